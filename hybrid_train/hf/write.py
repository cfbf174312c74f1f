"""The export of a checkpoint as a Hugging Face folder that transformers loads as it is."""

import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_train.anatomy.layers import stored_tensors
from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.block_moves import Cast, Move, Rows, move_all, require_shapes
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import has_vocabulary, open_tokenizer
from hybrid_train.hf import config_json
from hybrid_train.hf.family import Family
from hybrid_train.hf.files import new_folder, write_json
from hybrid_train.hf.origin import FOLDER, Origin
from hybrid_train.hf.padding import filled_up
from hybrid_train.hf.read import INDEX
from hybrid_train.hf.safetensors import Writer
from hybrid_train.hf.tensors import Padded, Theirs, theirs_from_ours, turn_round
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.planning.phases import lay_out
from hybrid_train.schema.model import Model
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted

_MASTER = "optimizer.master."  # before the name of a weight: what a run in bf16 updates
_log = logging.getLogger(__name__)


class Weights:
    """The weights of a checkpoint; on request those in float32 that the optimizer keeps."""

    def __init__(self, stored: StoredTensors, *, best: bool) -> None:
        self._stored, self._best = stored, best

    @property
    def names(self) -> set[str]:
        """Names of all weights."""
        return self._stored.weights

    def _name(self, name: str) -> str:
        master = _MASTER + name
        return master if self._best and master in self._stored.names else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format of a weight."""
        return self._stored.dtype(self._name(name))

    def where(self, name: str) -> str:
        """Name file and tensor, for errors."""
        return self._stored.where(self._name(name))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a weight."""
        return self._stored.read(self._name(name), start, stop)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and the run it is of."""

    found: layout.Found
    job: TrainJob
    vocab_size: int

    @property
    def model(self) -> Model:
        """The model, without cuts into stages."""
        return self.job.model

    @functools.cached_property
    def began(self) -> dict[str, Any] | None:
        """The config.json of the folder that the run began with, if it began with one."""
        folder = self.found.run_dir / FOLDER
        return config_json.read_config(folder) if (folder / config_json.FILE).is_file() else None

    @functools.cached_property
    def family(self) -> Family:
        """The family that the model is exported as.

        Raises:
            UserError: if no family can say it.
        """
        return config_json.family_for(self.model, self.began)

    @functools.cached_property
    def told(self) -> Model:
        """The model as a config.json of its family says it.

        Raises:
            UserError: if no family can say it.
        """
        return self.family.told(self.model)

    def padded(self, weights: Rows) -> Padded:
        """Return weights as wide as the model that is told."""
        return Padded(weights, self.told, self.vocab_size)

    def theirs(self) -> dict[str, Theirs]:
        """Return what the tensors of the other side are made of."""
        made = turn_round(self.family.table(self.told, self.vocab_size))
        if self.model.tie_embeddings and self.family.stores_tied_head:
            one, head = made[self.family.spelling.embedding], self.family.spelling.head
            made[head] = Theirs(head, one.shape, one.keeps_float32, one.pieces)
        return made

    def require_model(self, weights: Weights) -> None:
        """Refuse a checkpoint whose weights are not those of its config."""
        rows = padded_vocab_size(self.vocab_size, self.model.vocab_multiple)
        shapes = {one.key: one.shape for one in stored_tensors(self.model, rows)}
        require_shapes(weights, shapes, weights.names)


def open_checkpoint(path: Path) -> Checkpoint:
    """Find a checkpoint and read the config of its run.

    Raises:
        UserError: if there is none.
    """
    found = layout.locate(path)
    job = frozen.load(found.run_dir)
    job.model.pattern = job.model.pattern.replace("|", "")
    size = job.model.vocab_size or open_tokenizer(found.run_dir / layout.TOKENIZER).vocab_size
    job.model.vocab_size = size
    if job.edits:
        kinds = ", ".join(one.kind for one in job.edits)
        _log.warning("the edits of the run (%s) are not in its weights, nor in the export", kinds)
    return Checkpoint(found, job, size)


def export_checkpoint(path: Path, output: Path, dtype: torch.dtype | None, shard_bytes: int) -> str:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        path: a run folder or one checkpoint of it.
        output: the new folder; must not be there yet.
        dtype: number format of the weights; None: as they are; expert biases stay float32.
        shard_bytes: a new file begins before it would grow beyond so many bytes.

    Returns:
        What was done, in words.

    Raises:
        UserError: if the checkpoint is damaged; nothing is left behind.
    """
    checkpoint = open_checkpoint(path)
    with StoredTensors(checkpoint.found.path) as stored:
        weights = Weights(stored, best=dtype == torch.float32)
        checkpoint.require_model(weights)
        theirs, cast, side = checkpoint.theirs(), Cast(dtype), checkpoint.padded(weights)
        formats = {
            name: cast.of(_dtype_of(one, weights), keeps_float32=one.keeps_float32)
            for name, one in theirs.items()
        }
        origin = Origin.of(checkpoint.found.run_dir)
        config = _config(checkpoint, origin, _main(theirs, formats))
        with new_folder(output) as partial:
            shards = _write_shards(partial, theirs, formats, (side, cast), shard_bytes)
            write_json(partial / config_json.FILE, config)
            origin.write_generation_config(partial, config)
            origin.copy_tokenizer(partial)
            has_tokenizer = has_vocabulary(partial)
    filled = {} if checkpoint.told.layers else filled_up(checkpoint.model)
    for name, widths in filled.items():
        _log.info(
            "%s is %d in the narrowest layer and %d in the widest: config.json has one width, and "
            "zeros fill up the others, which compute the same", name, *widths,
        )  # fmt: skip
    if not has_tokenizer:
        _log.warning("%s has no tokenizer: none was exported", checkpoint.found.run_dir)
    loss = cast.in_words(len(theirs))
    if loss:
        _log.warning("%s", loss)
    tensors, files = counted(len(theirs), "tensor"), counted(shards, "file")
    return f"{output}: {tensors} of {checkpoint.found.path} in {files}"


def _dtype_of(one: Theirs, weights: Weights) -> torch.dtype:
    return weights.dtype(next(iter(one.pieces.values())).key)


def _main(theirs: dict[str, Theirs], formats: dict[str, torch.dtype]) -> str:
    """Return the name of the number format of most elements."""
    count: dict[torch.dtype, int] = {}
    for name, one in theirs.items():
        count[formats[name]] = count.get(formats[name], 0) + math.prod(one.shape)
    return str(max(count, key=count.__getitem__)).removeprefix("torch.")


def _config(checkpoint: Checkpoint, origin: Origin, dtype: str) -> dict[str, Any]:
    """Return the config.json: that of the folder it began with, where there was one, else new."""
    length, family, said = trained_length(checkpoint), checkpoint.family, checkpoint.began
    make = functools.partial(
        family.to_config,
        checkpoint.told,
        vocab_size=checkpoint.vocab_size,
        length=length,
        dtype=dtype,
    )
    if origin.folder is None or said is None:
        return make(token_ids=origin.token_ids())
    path, config = origin.folder / config_json.FILE, said
    if family.model_type != said["model_type"]:
        _log.warning(
            "the model began as %s, which cannot say it any more; it is exported as %s",
            said["model_type"], family.model_type,
        )  # fmt: skip
        config = make(token_ids={key: said.get(key) for key in config_json.TOKEN_IDS})
    elif changes := config_json.changes(family.to_model(said, path), checkpoint.told):
        _log.info("%s is written anew, since these changed: %s", path.name, ", ".join(changes))
        config = config_json.renewed(said, make(token_ids={}), checkpoint.told)
    config = family.as_trained(config, length=length, dtype=dtype)
    return config if origin.is_same_tokenizer else origin.with_own_ids(config, path)


def trained_length(checkpoint: Checkpoint) -> int:
    """Return the longest sequences of the phases that have begun."""
    seen = int(checkpoint.found.position().get("tokens", 0))
    train = checkpoint.job.train
    if not seen or not train.phases:
        return train.sequence_length
    begun = (one for one in lay_out(checkpoint.job) if one.start < seen)
    return max(one.job.train.sequence_length for one in begun)


def _write_shards(
    output: Path, theirs: dict[str, Theirs], formats: dict[str, torch.dtype],
    reading: tuple[Rows, Cast], shard_bytes: int,
) -> int:  # fmt: skip
    """Write all tensors, then the index; return the number of files."""
    sizes = {n: math.prod(one.shape) * formats[n].itemsize for n, one in theirs.items()}
    shards = list(_cut(sizes, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(output / file, [theirs[name] for name in names], formats, reading)
        weight_map.update(dict.fromkeys(names, file))
    total = {"total_size": sum(sizes.values())}
    write_json(output / INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
    return len(shards)


def _write_shard(
    path: Path, theirs: list[Theirs], formats: dict[str, torch.dtype],
    reading: tuple[Rows, Cast],
) -> None:  # fmt: skip
    side, cast = reading
    writer = Writer(path, {one.name: (formats[one.name], one.shape) for one in theirs})
    whole = False
    try:
        move_all(_moves(theirs, formats, side, writer), side, cast)
        whole = True
    finally:
        writer.close(whole=whole)


def _moves(
    theirs: list[Theirs], formats: dict[str, torch.dtype], side: Rows, writer: Writer
) -> Iterator[Move]:
    for one in theirs:
        dtype = formats[one.name]
        for block in theirs_from_ours(one, side):
            yield Move(block, dtype, writer.place(math.prod(block.shape) * dtype.itemsize))


def _cut(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Cut the tensors, in their order, into files of at most so many bytes."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > most:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names
