"""What a folder of weights came out of: its parents, and theirs, in a file of its own.

    FOLDER/lineage.json   how it was made; its parents, by step and checksum; all their ancestors

A run folder has one from its start, and an exported folder another. Ancestors are told whole, so
that they are known where their folders are gone.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_train.checkpoint import layout
from hybrid_train.config.frozen import FROZEN_NAME
from hybrid_train.schema.formats import KEY, LINEAGE
from hybrid_train.schema.problems import UserError

FILE_NAME = "lineage.json"
WEIGHTS, TEACHER = "weights", "teacher"  # roles of a parent
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parent:
    """Weights that others came out of.

    Attributes:
        role: what they were for: `weights`, `teacher`.
        source: what the command called them.
        folder: the run folder that they are of, or the folder of another program.
        step: of the checkpoint; None: of a folder of another program.
        checksum: of its files.
    """

    role: str
    source: str
    folder: str
    step: int | None
    checksum: str

    @property
    def place(self) -> Path:
        """Where the files are, if they are still there."""
        folder = Path(self.folder)
        return folder if self.step is None else layout.path_of(folder, self.step)


@dataclass(frozen=True)
class Made:
    """By what a folder was made.

    Attributes:
        job: the command: `train`, `prune`, `convert`.
        command: as it was typed, without credentials.
        code: version and commit of the package.
        libraries: their versions.
    """

    job: str
    command: str
    code: Mapping[str, Any]
    libraries: Mapping[str, str | None]


@dataclass(frozen=True)
class Record:
    """How a folder came to be.

    Attributes:
        made: by what.
        config: SHA-256 of its config.yaml; empty: it has none.
        parents: what it came out of; none, if it began at random.
    """

    made: Made
    config: str
    parents: tuple[Parent, ...] = ()


@dataclass(frozen=True)
class Lineage:
    """The record of a folder, and those of its ancestors by the checksums of their weights."""

    record: Record
    ancestors: Mapping[str, Record]


def parent_of(role: str, source: str, found: layout.Found) -> Parent:
    """Return a checkpoint as a parent."""
    return Parent(role, source, str(found.run_dir), found.step, layout.digest_of(found.path))


def write(folder: Path, made: Made, parents: Sequence[Parent]) -> None:
    """Write the lineage of a folder, with what its parents' folders say; never half of it."""
    ancestors: dict[str, Record] = {}
    for parent in parents:
        try:
            known = read(Path(parent.folder))
        except UserError as error:  # no reason to end a training
            _log.warning("%s; %s is named without its ancestors", error, parent.folder)
            continue
        if known:
            ancestors |= {**known.ancestors, parent.checksum: known.record}
    _write(folder, Lineage(Record(made, _config_of(folder), tuple(parents)), ancestors))


def renew(run_dir: Path) -> None:
    """Say the config of a run that goes on, which may have changed; what it began with stays."""
    if known := read(run_dir):
        _write(run_dir, replace(known, record=replace(known.record, config=_config_of(run_dir))))


def _config_of(folder: Path) -> str:
    path = folder / FROZEN_NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _write(folder: Path, lineage: Lineage) -> None:
    content = {
        KEY: LINEAGE.stamp(),
        **asdict(lineage.record),
        "ancestors": {checksum: asdict(one) for checksum, one in lineage.ancestors.items()},
    }
    half = folder / f"{FILE_NAME}.tmp"
    half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    half.replace(folder / FILE_NAME)


def read(folder: Path) -> Lineage | None:
    """Read the lineage of a folder; None if it has none, as those from before there were any.

    Raises:
        UserError: if the file is damaged, or of a format that is not read.
    """
    path = folder / FILE_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        LINEAGE.require_readable(found.pop(KEY, None), path)
        ancestors = found.pop("ancestors")
        return Lineage(_record(found), {key: _record(one) for key, one in ancestors.items()})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); bring it back, or remove it") from error


def _record(found: dict[str, Any]) -> Record:
    parents = tuple(Parent(**one) for one in found["parents"])
    return Record(Made(**found["made"]), str(found["config"]), parents)
