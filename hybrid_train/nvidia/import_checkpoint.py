"""The import of a checkpoint of NVIDIA's trainers as a run folder that trains on.

Tensors have the same names on both sides, since our models are made of Megatron-Core's classes.
The optimizer's have others, and come along where the checkpoint has them one for each weight:

    optimizer.state.{exp_avg,exp_avg_sq}.KEY  optimizer.state.{param,fp32_param}.KEY

as Megatron-Core writes them without its distributed optimizer, and with it in the format
"fully_reshardable" (distrib_optimizer.py 1690 and optimizer.py 1138, core 0.19.2). Its other
formats store what each rank has in its buffers, which nothing but the same layout can read.

Until August 2026 core puts state that lies behind the padding of a bucket at a wrong place in that
format (Megatron-LM#5077). So each weight is compared with its master first, and one that differs
leaves all state behind.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_train.anatomy.kinds import EMBEDDING
from hybrid_train.anatomy.layers import StoredTensor, stored_tensors
from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.block_moves import (
    Cast,
    Copied,
    blocks,
    move_all,
    moves,
    require_shapes,
)
from hybrid_train.checkpoint.tensor_files import CheckpointWriter, StoredTensors
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import copy_tokenizer, open_tokenizer
from hybrid_train.hf.files import new_folder
from hybrid_train.hf.read import imported_job
from hybrid_train.nvidia import arguments, saved_state
from hybrid_train.nvidia.checkpoint_folders import Found, look
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_STATE = "optimizer.state."
_OURS = "optimizer."  # names of checkpoint/optimizer_state.py, which would bring Megatron along
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTERS = ("param", "fp32_param")  # with the distributed optimizer, without
_BESIDE_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_")
_SEQUENCE_LENGTH = 4096  # of the run folder where theirs says none
_log = logging.getLogger(__name__)


class Theirs:
    """The tensors of one of their checkpoints, by our names."""

    def __init__(self, stored: StoredTensors, prefix: str) -> None:
        self._stored, self._prefix = stored, prefix
        inside = f".{prefix}"
        # The prefix is that of the model; state of the optimizer has it behind its own.
        self._names = {
            name.removeprefix(prefix).replace(inside, ".", 1) if prefix else name: name
            for name in stored.names
        }

    @property
    def weights(self) -> set[str]:
        """Names of all weights."""
        return {name for name in self._names if not name.startswith(_BESIDE_WEIGHTS)}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._stored.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return its number format."""
        return self._stored.dtype(self._names[name])

    def where(self, name: str) -> str:
        """Name file and tensor, for errors."""
        return self._stored.where(self._names[name])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of it."""
        return self._stored.read(self._names[name], start, stop)


def import_checkpoint(
    source: Path, output: Path, dtype: torch.dtype | None, tokenizer: Path | None
) -> str:
    """Write a checkpoint as a run folder with one checkpoint, at its step.

    Args:
        source: their folder.
        output: the run folder; must not be there yet.
        dtype: number format of the weights; None: as they are.
        tokenizer: the folder or file of the tokenizer; None: that of their folder, if it has one.

    Returns:
        What was done, in words.

    Raises:
        UserError: if it is damaged, asks for code, or is no model that is known here; nothing is
            left behind.
    """
    found = look(source)
    model = arguments.to_model(found.settings, found.place)
    with StoredTensors(found.weights, foreign=True) as stored:
        theirs = Theirs(stored, found.prefix)
        place = tokenizer or found.tokenizer
        _set_vocabulary(model, found, theirs, place)
        tensors = _tensors(model, found, theirs)
        cast = Cast(dtype)
        steps, lacking = _optimizer_steps(found, theirs, tensors)
        copied = list(_copied(tensors, theirs, dtype, with_state=steps is not None))
        main = _main(tensors, copied)
        with new_folder(output) as partial:
            weights = layout.path_of(partial, found.step)
            weights.mkdir(parents=True)
            _write(weights, copied, theirs, cast, _made(model, found, steps))
            length = found.sequence_length
            layout.write_position(weights, {"step": found.step, "tokens": found.samples * length})
            (partial / layout.TOKENIZER).mkdir()
            if place is not None:
                _keep_tokenizer(place, partial / layout.TOKENIZER)
            frozen.freeze(imported_job(model, output, length or _SEQUENCE_LENGTH, main), partial)
    _say(found, source, output, lacking, place)
    if loss := cast.in_words(len(copied)):
        _log.warning("%s", loss)
    return f"{output}: {counted(len(tensors), 'tensor')} of {found.trainer.value}, {found.weights}"


def _set_vocabulary(model: Model, found: Found, theirs: Theirs, tokenizer: Path | None) -> None:
    """Take the vocabulary of the settings, else that of the tokenizer, else all rows."""
    name = EMBEDDING.stored
    if name not in theirs:
        raise UserError(f"{found.weights} has no {name}; it is no checkpoint of a language model")
    rows = theirs.shape(name)[0]
    size = found.settings.get("vocab_size")
    if size is None and tokenizer is not None:
        size = open_tokenizer(tokenizer).vocab_size
    if size is not None and not (type(size) is int and 0 < size <= rows):
        raise UserError(f"the vocabulary has {size} tokens, but {theirs.where(name)} {rows} rows")
    arguments.vocabulary(model, rows, size)


def _tensors(model: Model, found: Found, theirs: Theirs) -> list[StoredTensor]:
    """List the tensors of the model that come from the checkpoint; refuse other ones.

    Raises:
        UserError: if any is missing, of another shape, or has no place in the model.
    """
    assert model.vocab_size is not None
    rows = theirs.shape(EMBEDDING.stored)[0]
    tensors = list(stored_tensors(model, rows))
    if not arguments.has_expert_bias(found.settings):
        tensors = [one for one in tensors if not one.parameter.buffer]
    require_shapes(theirs, {one.key: one.shape for one in tensors}, theirs.weights)
    return tensors


def _optimizer_steps(
    found: Found, theirs: Theirs, tensors: Sequence[StoredTensor]
) -> tuple[int | None, str]:
    """Return the steps of their optimizer; None, and why, if its state cannot come along."""
    learned = [one for one in tensors if not one.parameter.buffer]
    wanted = {f"{_STATE}{kind}.{one.key}": one.shape for kind in _MOMENTS for one in learned}
    if not any(name in theirs for name in wanted):
        kind = _sharding_type(found.common)
        return None, (
            f'its format is "{kind}", which only the same layout can read; let Megatron-LM write '
            "it with --dist-ckpt-optim-fully-reshardable to bring it along"
            if kind
            else "the checkpoint holds none, or none that is kept by weight"
        )
    odd = [
        name for name, shape in wanted.items() if name not in theirs or theirs.shape(name) != shape
    ]
    if odd:
        return None, f"{odd[0]} is missing, or has another shape than its weight"
    if misplaced := _misplaced(theirs, learned):
        return None, misplaced
    return saved_state.optimizer_steps(found.common) or found.step, ""


def _misplaced(theirs: Theirs, learned: Sequence[StoredTensor]) -> str:
    """Say which weight is not its master, cast to the format of weights; empty if all are.

    The first rows of each show it: state at a wrong place is so from there on.
    """
    for key, shape, _ in learned:
        master = _master_of(theirs, key)
        if master is None:
            continue
        row_bytes = math.prod(shape[1:]) * theirs.dtype(master).itemsize
        _, stop = next(blocks(0, shape[0], row_bytes))
        weight, exact = theirs.read(key, 0, stop), theirs.read(master, 0, stop)
        if not torch.equal(exact.to(weight.dtype), weight):
            return (
                f"{master} is not the master of its weight; Megatron-Core before #5077 (21 August "
                "2026) misplaces state in the format fully_reshardable where a bucket is padded"
            )
    return ""


def _master_of(theirs: Theirs, key: str) -> str | None:
    names = (f"{_STATE}{kind}.{key}" for kind in _MASTERS)
    return next((name for name in names if name in theirs), None)


def _sharding_type(common: Mapping[str, Any]) -> str:
    metadata = common.get("content_metadata")
    found = metadata.get("distrib_optim_sharding_type") if isinstance(metadata, dict) else None
    return "" if found in (None, "fully_reshardable") else str(found)


def _copied(
    tensors: Sequence[StoredTensor], theirs: Theirs, dtype: torch.dtype | None, *, with_state: bool
) -> Iterator[Copied]:
    """Say what is copied: weights, each from its master where it stays in float32, then state."""
    for key, _, parameter in tensors:
        master = _master_of(theirs, key) if with_state else None
        kept = torch.float32 if parameter.float32 else dtype or theirs.dtype(key)
        exact = kept == torch.float32 and master is not None
        yield Copied(master if exact and master else key, key, kept)
        if parameter.buffer or not with_state:
            continue
        for kind in _MOMENTS:
            yield Copied(f"{_STATE}{kind}.{key}", f"{_OURS}{kind}.{key}", torch.float32)
        if master is not None and not exact:
            yield Copied(master, f"{_OURS}master.{key}", torch.float32)


def _main(tensors: Sequence[StoredTensor], copied: Sequence[Copied]) -> torch.dtype:
    """Return the number format of the embedding, which is that of the model."""
    keys = {one.key for one in tensors}
    return next(one.dtype for one in copied if one.key in keys)


def _made(model: Model, found: Found, steps: int | None) -> dict[str, Tensor]:
    """Return the tensors that theirs lacks: biases of experts at zero, the optimizer's steps."""
    assert model.vocab_size is not None
    made = {} if steps is None else {f"{_OURS}step": torch.tensor([steps])}
    if not arguments.has_expert_bias(found.settings):
        buffers = [one for one in stored_tensors(model, 1) if one.parameter.buffer]
        made |= {one.key: torch.zeros(one.shape) for one in buffers}
    return made


def _write(
    folder: Path, copied: Iterable[Copied], theirs: Theirs, cast: Cast, made: dict[str, Tensor]
) -> None:
    writer = CheckpointWriter(folder)
    try:
        move_all(moves(copied, theirs, writer), theirs, cast)
        for key, tensor in made.items():
            shape = tuple(tensor.shape)
            writer.place(key, shape, 0, shape, tensor.dtype).write(tensor)
        writer.finish()
    finally:
        writer.close()


def _keep_tokenizer(source: Path, target: Path) -> None:
    if source.is_dir():
        copy_tokenizer(source, target)
    else:
        open_tokenizer(source).save(target)


def _say(found: Found, source: Path, output: Path, lacking: str, tokenizer: Path | None) -> None:
    if lacking:
        _log.warning("the optimizer's state stays behind: %s", lacking)
    if not found.samples or not found.sequence_length:
        _log.warning("%s does not say how many tokens it has seen: counted as 0", source)
    for line in arguments.unused(found.settings):
        _log.warning("%s: models here learn without dropout", line)
    if tokenizer is None:
        _log.warning(
            "%s has no tokenizer: text cannot be generated from %s; name one: tokenizer=FOLDER",
            source, output,
        )  # fmt: skip
