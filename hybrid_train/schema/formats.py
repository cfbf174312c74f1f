"""The formats of all that is written here and read again: their versions, and which are read.

What has such a format says its version, beside the version of the package that wrote it. What says
none was written before there were numbers, and counts as version 1. `docs/versions.md` has this
table for users; `tests/formats/` keeps a small example of each version that is read.

A version goes up when older code would misread what is written, or newer code has to tell it from
what was written before; not when something is added that older code may ignore.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_train import __version__
from hybrid_train.schema.problems import UserError

KEY = "format"  # of the stamp in a JSON file
FILE_NAME = "format.json"  # of the stamp of a folder


@dataclass(frozen=True)
class Format:
    """A kind of file or folder.

    Attributes:
        name: in messages and stamps.
        changes: what each version is, or brought; the first is version 1.
        too_old: what to do with one that is not read any more.
        oldest_read: the oldest version that is read.
    """

    name: str
    changes: tuple[str, ...]
    too_old: str
    oldest_read: int = 1

    @property
    def version(self) -> int:
        """The version that is written."""
        return len(self.changes)

    def stamp(self) -> dict[str, Any]:
        """Return what says the version, to be written as JSON."""
        return {"name": self.name, "version": self.version, "written_by": __version__}

    def require_readable(self, stamp: object, place: Path | str) -> int:
        """Return the version that a stamp says; refuse one that this code does not read.

        Args:
            stamp: as it was read from JSON; None: there is none.
            place: where it stands, for messages.

        Raises:
            UserError: if it is newer or too old, of something else, or no stamp.
        """
        if stamp is None:
            return self._readable(1, "a version before there were numbers", place)
        known = stamp if isinstance(stamp, Mapping) else {}
        name, version = known.get("name"), known.get("version")
        if not isinstance(name, str) or type(version) is not int or version < 1:
            raise UserError(f"{place} is damaged: {stamp!r} says no version of a {self.name}")
        if name != self.name:
            raise UserError(f"{place} belongs to a {name}; a {self.name} is wanted there")
        return self._readable(version, str(known.get("written_by", "unknown")), place)

    def _readable(self, version: int, writer: str, place: Path | str) -> int:
        said = f"{place} was written by hybrid_train {writer} ({self.name}, format {version})"
        if version > self.version:
            raise UserError(
                f"{said}; this is hybrid_train {__version__}, which reads up to format "
                f"{self.version}: upgrade hybrid_train to use it"
            )
        if version < self.oldest_read:
            raise UserError(
                f"{said}; this is hybrid_train {__version__}, which reads format "
                f"{self.oldest_read} to {self.version}: {self.too_old}"
            )
        return version


RUN_FOLDER = Format(
    "run folder",
    (
        "config.yaml, metrics.jsonl, history.jsonl, data.json, tokenizer/; no number",
        "format.json; checkpoints of format 2; each attempt in history.jsonl says command, code, "
        "machines and libraries",
    ),
    "go on with the version that wrote it, or begin another run_dir=...",
)
CHECKPOINT = Format(
    "checkpoint",
    (
        "Megatron's distributed format (core 0.19) with position.json, plan.json and, since "
        "25 November 2026, checksums.json; no number",
        "the number stands in position.json",
    ),
    "export the weights with the version that wrote it: hybrid-train convert",
)
TOKEN_FILES = Format(
    "pair of token files",
    ("Megatron's .bin and .idx; the manifest PREFIX.json, which may be missing, has the number",),
    "write the files anew: hybrid-train data tokenize",
)
TOKENIZATION = Format(
    "unfinished tokenization",
    ("PREFIX.partial/ with state.json; no number", "state.json has the number"),
    "remove the folder, and the command begins anew",
)
TOKENIZER = Format(
    "tokenizer folder",
    (
        "Hugging Face's files; tokenizer_config.json has the number where the tokenizer was made "
        "here, and none where it comes from elsewhere",
    ),
    "train the tokenizer anew: hybrid-train data train_tokenizer",
)
QUICKSTART = Format(
    "quickstart corpus",
    ("token files, a tokenizer and manifest.json; format.json has the number",),
    "remove the folder, and the next run builds it anew",
)
INDEX = Format(
    "index of the data",
    (
        "arrays in data.cache; the number, another for every change of an order or of an array, "
        "is part of each name, so that another version is never found",
    ),
    "nothing: it is built anew",
)
STAGE = Format(
    "stage of a study",
    ("a mark NAME.done.json beside the folder of the stage, which has the number",),
    "remove the mark, and the stage runs again",
)
RATES = Format(
    "learning rates of a study",
    ("rates.json in the folder of the study; no number", "rates.json has the number"),
    "remove the file, and the rates are chosen again",
)
EVALUATION = Format(
    "result of an evaluation",
    ("a JSON file of each checkpoint and task, which has the number",),
    "remove the file, and the task is run again",
)
STORED_TARGETS = Format(
    "folder of stored targets",
    (
        "targets.json, head.safetensors, and files of rows in a folder for each phase and "
        "validation; format.json has the number",
    ),
    "write the targets anew: hybrid-train distill_targets",
)
RANKING = Format(
    "ranking",
    ("ranking.json and scores.safetensors; format.json has the number",),
    "make the ranking anew: hybrid-train importance",
)
LINEAGE = Format(
    "lineage",
    ("lineage.json in a folder of weights, which has the number",),
    "remove the file; where the weights come from is not known then",
)

FORMATS = (
    RUN_FOLDER, CHECKPOINT, TOKEN_FILES, TOKENIZATION, TOKENIZER, QUICKSTART, INDEX, STAGE, RATES,
    EVALUATION, STORED_TARGETS, RANKING, LINEAGE,
)  # fmt: skip


def write_stamp(folder: Path, format: Format) -> None:
    """Say in a folder which format it has; a reader never sees half of it."""
    half = folder / f"{FILE_NAME}.tmp"
    half.write_text(json.dumps(format.stamp(), indent=2) + "\n", encoding="utf-8")
    half.replace(folder / FILE_NAME)


def require_readable_folder(folder: Path, format: Format) -> int:
    """Return the version of a folder; refuse one that this code does not read.

    Raises:
        UserError: if it is newer or too old, or its stamp is damaged.
    """
    path = folder / FILE_NAME
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        stamp = None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: {error}; delete it if hybrid_train {__version__} wrote the folder"
        ) from error
    return format.require_readable(stamp, folder)
