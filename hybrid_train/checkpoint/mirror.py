"""The copy of a run behind a URL: its whole checkpoints, and what a resume needs beside them.

    URL/config.yaml  URL/tokenizer/  URL/checkpoints/step_00000500/{..., position.json}

It lies there as it does in the run folder. An object store has no rename, so the files of a
checkpoint come first and its position.json comes last; it is the first that goes, too. A folder
without one is not whole, and nobody takes it for a checkpoint. What comes back is compared with
the checksums that were written with it.
"""

import contextlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.layout import (
    CHECKSUMS,
    DAMAGED,
    FOLDER,
    PARTIAL,
    POSITION,
    Found,
)
from hybrid_train.config.fsspec import (
    FIRST_WAIT_S,
    TRIES,
    Hints,
    doubling,
    file_system,
    retried,
)
from hybrid_train.config.secrets import MASK, masked
from hybrid_train.schema.problems import UserError

OWNER = "owner.json"  # who copies to the URL
# Stores without folders. Elsewhere a folder is made before a file; on S3 that would make a bucket.
_FLAT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
_MISSING_TO_WRITE = "check that the bucket or folder is there"


class TakenOverError(UserError):
    """Another run copies to the URL now."""


class Mirror:
    """The checkpoints of a run behind a URL.

    Every method raises a `UserError` that says what cannot be done, and to which URL.

    Args:
        url: the folder of the run there.
        waits: called for each request: seconds before each further try; a few seconds if None.
        told: called with each fault that another try follows, and with None when one succeeds.
        setting: that names the URL, for messages.
    """

    def __init__(
        self,
        url: str,
        waits: Callable[[], Iterable[float]] | None = None,
        told: Callable[[Exception | None], None] | None = None,
        setting: str = "checkpoint.url",
    ) -> None:
        if MASK in url:
            raise UserError(
                f"{url}: a run folder holds no credentials, so they are missing here; give them "
                "in the variables that the driver reads (AWS_ACCESS_KEY_ID and the like)"
            )
        self.url = url.rstrip("/")
        self._waits, self._told = waits or (lambda: doubling(TRIES, FIRST_WAIT_S)), told
        self._read = Hints(f"check {setting}", f"or leave {setting} out")
        self._written = Hints(_MISSING_TO_WRITE, self._read.driver, "write", "written")
        self._files, self._root = file_system(self.url, self._read)
        protocol = self._files.protocol
        self._is_flat = bool(_FLAT & ({protocol} if isinstance(protocol, str) else set(protocol)))

    def probe(self) -> None:
        """Write and remove a small object: what forbids that should be known before a step."""
        name = f".probe-{uuid.uuid4().hex}"
        self._put_bytes(name, b"hybrid_train may write here\n")
        self._remove([name])

    def steps(self) -> list[int]:
        """List the steps of whole checkpoints, oldest first."""
        return sorted(step for step, names in self._folders().items() if POSITION in names)

    def files_of(self, step: int) -> set[str]:
        """List the files of a checkpoint, whole or not."""
        return self._folders().get(step, set())

    def copy(self, found: Found, beside: Sequence[Path], owner: str) -> int:
        """Copy a checkpoint, its position last, and return the bytes that went; 0 if it is there.

        Args:
            found: the checkpoint.
            beside: files and folders of the run folder that a resume needs.
            owner: of the claim of this run.

        Raises:
            TakenOverError: if another run has claimed the URL.
        """
        self._require_owner(owner)
        place, there = self._place(found.step), self._folders().get(found.step, set())
        if {POSITION, CHECKSUMS} <= there and self.is_equal(found):
            return 0
        if POSITION in there:
            self._remove([f"{place}/{POSITION}"])
        copied = self.copy_beside(found.run_dir, beside)
        files = sorted(one for one in found.path.iterdir() if one.name != POSITION)
        for path in files:
            copied += self._put(path, f"{place}/{path.name}")
        self._require_owner(owner)
        if missing := {path.name for path in files} - self.files_of(found.step):
            raise UserError(
                f"{masked(self.url)}: {', '.join(sorted(missing))} of step {found.step} went while "
                "the rest was copied"
            )
        return copied + self._put(found.path / POSITION, f"{place}/{POSITION}")

    def is_equal(self, found: Found) -> bool:
        """Tell whether a checkpoint with checksums has the same there."""
        place = f"{self._place(found.step)}/{CHECKSUMS}"
        return self._bytes(place) == (found.path / CHECKSUMS).read_bytes()

    def size_of(self, step: int) -> int:
        """Return the bytes of a checkpoint, as its checksums have them."""
        place = f"{self._place(step)}/{CHECKSUMS}"
        try:
            return sum(int(size) for size, _ in json.loads(self._bytes(place)).values())
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{masked(self.url)}/{place} is damaged: {error}") from error

    def copy_beside(self, run_dir: Path, beside: Sequence[Path]) -> int:
        """Copy files and folders of a run folder, those that are there; return the bytes."""
        return sum(self._put(path, str(path.relative_to(run_dir))) for path in _files_of(beside))

    def tidy(self, keep: int, owner: str) -> None:
        """Remove all but the newest `keep` whole checkpoints, and what was never whole.

        What came back damaged stays: see `set_aside`.
        """
        self._require_owner(owner)
        folders = self._folders()
        whole = sorted(step for step, names in folders.items() if POSITION in names)
        damaged = {step for step, names in folders.items() if POSITION + DAMAGED in names}
        for step in folders.keys() - {*whole[-keep:], *(damaged - set(whole))}:
            place, names = self._place(step), folders[step]
            if POSITION in names:
                self._remove([f"{place}/{POSITION}"])
            self._remove([f"{place}/{name}" for name in sorted(names - {POSITION})])
            if not self._is_flat:
                with contextlib.suppress(OSError):  # nobody takes an empty folder for anything
                    self._files.rmdir(self._at(place))

    def fetch(self, step: int, run_dir: Path) -> str:
        """Bring a checkpoint into a run folder; say what is damaged, and leave it out then.

        What a fetch that was cut off has brought as it was written stays.
        """
        final = layout.path_of(run_dir, step)
        partial = final.with_name(final.name + PARTIAL)
        partial.mkdir(parents=True, exist_ok=True)
        names = sorted(self.files_of(step), key=lambda name: (name != CHECKSUMS, name))
        for path in (one for one in partial.iterdir() if one.name not in names):
            path.unlink()
        for name in names:
            is_here = name != CHECKSUMS and (partial / name).is_file()
            if not (is_here and layout.is_as_written(partial, name)):
                self._get(f"{self._place(step)}/{name}", partial / name)
        if layout.damages(partial):  # on the way, or there? What is damaged there comes so again.
            for name in names:
                if not layout.is_as_written(partial, name):
                    self._get(f"{self._place(step)}/{name}", partial / name)
        damaged = [f"{name} is missing" for name in (POSITION, CHECKSUMS) if name not in names]
        damaged += layout.damages(partial)
        if damaged:
            shutil.rmtree(partial)
            return ", ".join(damaged)
        layout.sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        layout.sync(final.parent)
        return ""

    def set_aside(self, step: int) -> None:
        """Have nobody take a checkpoint that came back damaged for a whole one.

        Its files stay, and its position under another name: what damaged it may be the machine that
        fetched it.
        """
        position = f"{self._place(step)}/{POSITION}"
        self._put_bytes(position + DAMAGED, self._bytes(position))
        self._remove([position])

    def fetch_beside(self, run_dir: Path, only: Sequence[str] = ()) -> None:
        """Bring what lies beside the checkpoints, or some of its files and folders."""
        for name in self._names():
            top = name.partition("/")[0]
            wanted = top in only if only else not name.startswith((f"{FOLDER}/", OWNER, ".probe-"))
            if wanted:
                self._get(name, run_dir / name)

    def fetch_position(self, step: int, run_dir: Path) -> None:
        """Bring the position of a checkpoint alone: which step and tokens it has."""
        name = f"{self._place(step)}/{POSITION}"
        self._get(name, run_dir / name)

    def claim(self, run_dir: Path) -> tuple[str, str]:
        """Become the run that copies to the URL; return the owner, and who it was before.

        The one before is named only if it did not end in order, and was in another folder.
        """
        before = self._owner()
        me = {
            "id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(),
            "run_dir": str(run_dir.absolute()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        }  # fmt: skip
        self._put_bytes(OWNER, json.dumps(me).encode() + b"\n")
        same = before and all(before.get(key) == me[key] for key in ("host", "run_dir"))
        return str(me["id"]), "" if same or not before else _in_words(before)

    def release(self, owner: str) -> None:
        """Say that the run has ended and copies no more."""
        if self._owner().get("id") == owner:
            self._remove([OWNER])

    def _require_owner(self, owner: str) -> None:
        now = self._owner()
        if now.get("id") != owner:
            by = _in_words(now) if now else "whoever removed its owner.json"
            raise TakenOverError(f"{masked(self.url)} was taken over by {by}")

    def _owner(self) -> dict[str, Any]:
        if OWNER not in self._names(""):
            return {}
        try:
            return dict(json.loads(self._bytes(OWNER)))
        except (ValueError, TypeError):
            return {"host": "an unknown machine"}

    def _place(self, step: int) -> str:
        return f"{FOLDER}/{layout.path_of(Path(), step).name}"

    def _folders(self) -> dict[int, set[str]]:
        """Return the files of each checkpoint, whole or not."""
        found: dict[int, set[str]] = {}
        for name in self._names(FOLDER):
            folder, _, file = name.removeprefix(f"{FOLDER}/").partition("/")
            step = layout.step_of(folder)
            if step is not None and file and "/" not in file:
                found.setdefault(step, set()).add(file)
        return found

    def _names(self, below: str | None = None) -> list[str]:
        """List files relative to the URL: all, those in a folder, or with "" those at the top.

        Left out is what names no file below the URL: marks of folders, which end in a slash, and
        names that would lead out of the run folder.
        """
        where = f"{self._root}/{below}".rstrip("/") if below else self._root

        def look() -> list[str]:
            self._files.invalidate_cache()  # a listing that was kept hides what others wrote
            try:
                depth = {"maxdepth": 1} if below == "" else {}
                return list(self._files.find(where, **depth))
            except FileNotFoundError as error:
                if error.__cause__ is not None:  # the bucket is not there, or not the network
                    raise
                return []

        paths = self._do(where, look, self._read)
        root = self._root.rstrip("/") + "/"
        names = (path.removeprefix(root) for path in paths if path.startswith(root))
        return sorted(name for name in names if not {"", ".", ".."} & set(name.split("/")))

    def _put(self, path: Path, name: str) -> int:
        """Copy a file as it is now; what is written behind its end meanwhile is left out."""
        self._make_folder(name)
        self._do(name, lambda: self._files.put_file(str(path), self._at(name)), self._written)
        return path.stat().st_size

    def _put_bytes(self, name: str, content: bytes) -> None:
        self._make_folder(name)
        self._do(name, lambda: self._files.pipe_file(self._at(name), content), self._written)

    def _make_folder(self, name: str) -> None:
        if not self._is_flat:
            folder = self._at(name).rpartition("/")[0]
            self._do(name, lambda: self._files.makedirs(folder, exist_ok=True), self._written)

    def _bytes(self, name: str) -> bytes:
        return bytes(self._do(name, lambda: self._files.cat_file(self._at(name)), self._read))

    def _get(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._do(name, lambda: self._files.get_file(self._at(name), str(path)), self._read)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:

            def remove(name: str = name) -> None:
                with contextlib.suppress(FileNotFoundError):  # a try before has come through
                    self._files.rm_file(self._at(name))

            self._do(name, remove, self._written)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _do[T](self, what: str, action: Callable[[], T], hints: Hints) -> T:
        url = self.url if what.startswith(self._root) else f"{self.url}/{what}"
        result = retried(url, url, action, self._waits(), hints=hints, told=self._told)
        if self._told is not None:
            self._told(None)
        return result


def _files_of(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        yield from sorted(one for one in (place, *place.rglob("*")) if one.is_file())


def _in_words(owner: dict[str, Any]) -> str:
    process = f"process {owner['pid']} on " if "pid" in owner else ""
    since = f", since {owner['since']}" if "since" in owner else ""
    folder = f" in {owner['run_dir']}" if "run_dir" in owner else ""
    return f"{process}{owner.get('host')}{folder}{since}"
