"""The folders of NVIDIA's trainers: which one a folder is of, and what its files say.

    Megatron-LM      latest_checkpointed_iteration.txt  iter_0000500/{.metadata, metadata.json, ...}
    Megatron-Bridge  the same, and in it run_config.yaml, train_state.pt, tokenizer/
    NeMo 2           weights/{.metadata, metadata.json, ...}  context/{model.yaml, io.json, ...}

The tensors are in Megatron-Core's format torch_dist each time, under the same names; NeMo 2 puts
`module.` before them. Settings are in the common state, in run_config.yaml, in model.yaml.

Sources: Megatron-LM d98e8a6, training/checkpointing.py; Megatron-Bridge 067f987,
training/utils/checkpoint_utils.py and training/state.py; NeMo 8cfedd7, lightning/ckpt_utils.py,
lightning/io/mixin.py and lightning/megatron_parallel.py.
"""

import enum
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from hybrid_train.checkpoint import safe_metadata
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.data.any_tokenizer import has_vocabulary
from hybrid_train.nvidia import saved_state
from hybrid_train.nvidia.arguments import Settings
from hybrid_train.schema.problems import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # in place of an iteration: weights of a converter, at step 0
RUN_CONFIG, TRAIN_STATE, LATEST = "run_config.yaml", "train_state.pt", "latest_train_state.pt"
WEIGHTS, CONTEXT, MODEL_FILE = "weights", "context", "model.yaml"
IO_FILE = "io.json"  # in the context: see nemo_context.py
PREFIX_OF_NEMO = "module."
TOKENIZERS = ("tokenizer", "nemo_tokenizer", "hf_tokenizer")  # folders that hold one, or may
_LONGEST = 18  # digits of an iteration
_ITERATION = re.compile(r"iter_(\d{7,})")
_OLD_FORMAT = "mp_rank_*"  # of Megatron-LM before torch_dist: pickles


class Trainer(enum.Enum):
    """A trainer whose checkpoints are read."""

    megatron_lm = "Megatron-LM"
    bridge = "Megatron-Bridge"
    nemo = "NeMo 2"


@dataclass(frozen=True)
class Found:
    """A checkpoint of one of them.

    Attributes:
        trainer: which.
        weights: the folder of its tensors.
        settings: of the model, as `nvidia.arguments` reads them.
        place: where they stand.
        common: what is stored beside the tensors.
        step: optimizer steps done.
        samples: sequences seen by then.
        tokenizer: the folder of the tokenizer, if it has one.
    """

    trainer: Trainer
    weights: Path
    settings: Settings
    place: Path
    common: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    samples: int = 0
    tokenizer: Path | None = None

    @property
    def prefix(self) -> str:
        """What stands before the names of its tensors."""
        return PREFIX_OF_NEMO if self.trainer is Trainer.nemo else ""

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence; 0 if it is not said."""
        return saved_state.whole_number(self.settings, "seq_length", self.place)


def trainer_of(folder: Path) -> Trainer | None:
    """Tell whose checkpoint a folder holds; None if it is of none of them."""
    if (folder / WEIGHTS).is_dir() and (folder / CONTEXT).is_dir():
        return Trainer.nemo
    iteration = _iteration_of(folder)
    if iteration is None:
        return None
    return Trainer.bridge if (iteration / RUN_CONFIG).is_file() else Trainer.megatron_lm


def _iteration_of(folder: Path) -> Path | None:
    """Return the folder of one iteration: the one that is named, or the newest in it."""
    if (folder / safe_metadata.INDEX).is_file() or (folder / RUN_CONFIG).is_file():
        return folder
    tracker = folder / TRACKER
    if tracker.is_file():
        said = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not (said == RELEASE or (said.isdecimal() and len(said) < _LONGEST)):
            raise UserError(f"{tracker} says {said[:40]!r}, which is no iteration")
        return folder / (said if said == RELEASE else f"iter_{int(said):07d}")
    found = [one for one in folder.glob("iter_*") if _ITERATION.fullmatch(one.name)]
    return max(found, key=lambda one: int(one.name.removeprefix("iter_")), default=None)


def look(folder: Path) -> Found:
    """Read all but the tensors of a checkpoint.

    Raises:
        UserError: if it is damaged, of another format, or asks for code.
    """
    trainer = trainer_of(folder)
    if trainer is Trainer.nemo:
        return _of_nemo(folder)
    iteration = _iteration_of(folder)
    assert iteration is not None, "somebody has asked `trainer_of`"
    _require_format(iteration)
    if trainer is Trainer.bridge:
        return _of_bridge(iteration)
    return _of_megatron_lm(iteration)


def _require_format(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; {folder.parent / TRACKER} names it")
    if (folder / safe_metadata.INDEX).is_file():
        return
    if any(folder.glob(_OLD_FORMAT)):
        raise UserError(
            f"{folder} is in Megatron-LM's format `torch`, a pickle for each rank, which is not "
            "read; let Megatron-LM write it as torch_dist: --ckpt-convert-format torch_dist"
        )
    raise UserError(f"{folder} has no {safe_metadata.INDEX}: only the format torch_dist is read")


def _common(weights: Path) -> tuple[dict[str, Any], Path]:
    """Read what is stored beside the tensors, from where this version of Megatron-Core keeps it."""
    old = weights / safe_metadata.OLD_COMMON
    if old.is_file():
        return saved_state.read(old.read_bytes(), old), old
    with StoredTensors(weights, foreign=True) as stored:
        content = stored.saved(safe_metadata.COMMON)
    place = weights / safe_metadata.COMMON
    return ({} if content is None else saved_state.read(content, place)), place


def _of_megatron_lm(folder: Path) -> Found:
    common, place = _common(folder)
    arguments = common.get("args")
    if not isinstance(arguments, dict):
        raise UserError(f"{place} holds no args: the checkpoint does not say which model it is of")
    return Found(
        Trainer.megatron_lm, folder, arguments, place, common,
        step=saved_state.whole_number(common, "iteration", place),
        samples=saved_state.whole_number(arguments, "consumed_train_samples", place),
        tokenizer=_tokenizer_in(folder, folder.parent),
    )  # fmt: skip


def _of_bridge(folder: Path) -> Found:
    config = folder / RUN_CONFIG
    state_file = folder / TRAIN_STATE
    state = saved_state.read(state_file.read_bytes(), state_file) if state_file.is_file() else {}
    common, place = _common(folder)
    return Found(
        Trainer.bridge, folder, _section(config, "model"), config, common,
        step=saved_state.whole_number(state or common, "step" if state else "iteration", place),
        samples=saved_state.whole_number(state, "consumed_train_samples", state_file),
        tokenizer=_tokenizer_in(folder, folder.parent),
    )  # fmt: skip


def _of_nemo(folder: Path) -> Found:
    weights, model = folder / WEIGHTS, folder / CONTEXT / MODEL_FILE
    _require_format(weights)
    common, place = _common(weights)
    data: dict[str, Any] = next((one for one in common.values() if _has_samples(one)), {})
    return Found(
        Trainer.nemo, weights, _section(model, "config"), model, common,
        step=saved_state.whole_number(common, "global_step", place),
        samples=saved_state.whole_number(data, "consumed_samples", place),
        tokenizer=_tokenizer_in(folder / CONTEXT),
    )  # fmt: skip


def _has_samples(value: object) -> bool:
    """Tell whether it is the state of a data module, which has the name of its class for a key."""
    return isinstance(value, dict) and "consumed_samples" in value


def _section(path: Path, name: str) -> dict[str, Any]:
    """Read a section of a YAML file; a config inside of one (`transformer`) counts as part of it.

    Raises:
        UserError: if it is not there, damaged, or holds more than plain data.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{path} is no YAML of plain data: {first}") from error
    section = content.get(name) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{path} has no section {name}: it does not say which model it is of")
    inner = section.get("transformer")
    return (inner if isinstance(inner, dict) else {}) | section


def _tokenizer_in(*folders: Path) -> Path | None:
    places = [folder / name for folder in folders for name in ("", *TOKENIZERS)]
    return next((place for place in places if has_vocabulary(place)), None)
