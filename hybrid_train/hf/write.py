"""The export of a checkpoint as a Hugging Face folder that transformers loads as it is."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.config import compose
from hybrid_train.config.schema.model import Model
from hybrid_train.config.schema.train import TrainJob
from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.hf import config as hf_config
from hybrid_train.hf.files import VOCABULARY_FILES, copy_tokenizer, new_folder, write_json
from hybrid_train.hf.moves import Move, carry_out
from hybrid_train.hf.names import EMBEDDING, HEAD, table
from hybrid_train.hf.read import INDEX, SOURCE
from hybrid_train.hf.safetensors import Writer
from hybrid_train.hf.tensors import Cast, Theirs, require_shapes, theirs_from_ours, turned

_MASTER = "optimizer.master."  # before the name of a weight: what a run in bf16 updates
_BESIDE_WEIGHTS = ("optimizer.", "random.")
_KEYS_OF_DTYPE = ("torch_dtype", "dtype")
_log = logging.getLogger(__name__)


class Weights:
    """The weights of a checkpoint; on request those in float32 that the optimizer keeps."""

    def __init__(self, stored: StoredTensors, *, best: bool) -> None:
        self._stored, self._best = stored, best

    @property
    def names(self) -> set[str]:
        """Names of all weights."""
        return {name for name in self._stored.names if not name.startswith(_BESIDE_WEIGHTS)}

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

    def theirs(self) -> dict[str, Theirs]:
        """Return what the tensors of the other side are made of."""
        made = turned(table(self.model, self.vocab_size))
        if self.model.tie_embeddings:  # transformers 5.23 ties nothing: it reads a head of its own
            one = made[EMBEDDING]
            made[HEAD] = Theirs(HEAD, one.shape, one.keeps_float32, one.pieces)
        return made

    def require_model(self, weights: Weights) -> None:
        """Refuse a checkpoint whose weights are not those of its config."""
        shapes = {stored.key: stored.shape for stored in table(self.model, self.vocab_size)}
        require_shapes(weights, shapes, weights.names)


def open_checkpoint(path: Path) -> Checkpoint:
    """Find a checkpoint and read the config of its run.

    Raises:
        UserError: if there is none.
    """
    found = layout.locate(path)
    job = compose.load(found.run_dir)
    job.model.pattern = job.model.pattern.replace("|", "")
    size = job.model.vocab_size or open_tokenizer(found.run_dir / layout.TOKENIZER).vocab_size
    job.model.vocab_size = size
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
        theirs, cast = checkpoint.theirs(), Cast(dtype)
        formats = {
            name: cast.of(_dtype_of(one, weights), keeps_float32=one.keeps_float32)
            for name, one in theirs.items()
        }
        config = _config(checkpoint, _main(theirs, formats), changed=dtype is not None)
        with new_folder(output) as partial:
            shards = _write_shards(partial, theirs, formats, (weights, cast), shard_bytes)
            write_json(partial / hf_config.FILE, config)
            _write_generation_config(checkpoint, partial, config)
            copied = copy_tokenizer(checkpoint.found.run_dir / layout.TOKENIZER, partial)
    if not VOCABULARY_FILES & set(copied):
        _log.warning("%s has no tokenizer: none was exported", checkpoint.found.run_dir)
    loss = cast.in_words(len(theirs))
    if loss:
        _log.warning("%s", loss)
    return f"{output}: {len(theirs)} tensors of {checkpoint.found.path} in {shards} files"


def _dtype_of(one: Theirs, weights: Weights) -> torch.dtype:
    return weights.dtype(next(iter(one.pieces.values())).key)


def _main(theirs: dict[str, Theirs], formats: dict[str, torch.dtype]) -> str:
    """Return the name of the number format of most elements."""
    count: dict[torch.dtype, int] = {}
    for name, one in theirs.items():
        count[formats[name]] = count.get(formats[name], 0) + math.prod(one.shape)
    return str(max(count, key=count.__getitem__)).removeprefix("torch.")


def _config(checkpoint: Checkpoint, dtype: str, *, changed: bool) -> dict[str, Any]:
    """Return the config.json: that of the import, where there was one, else a new one."""
    source = checkpoint.found.run_dir / SOURCE
    if (source / hf_config.FILE).is_file():
        config = hf_config.read_config(source)
        said = hf_config.to_model(config, source / hf_config.FILE)
        if _sizes(said) == _sizes(checkpoint.model):
            if changed:
                keys = [key for key in _KEYS_OF_DTYPE if key in config] or [_KEYS_OF_DTYPE[0]]
                config.update(dict.fromkeys(keys, dtype))
            return config
        _log.warning("%s is of another model, and left out of the export", source)
    return hf_config.to_config(
        checkpoint.model,
        vocab_size=checkpoint.vocab_size,
        length=checkpoint.job.train.sequence_length,
        dtype=dtype,
        end_of_document=_end_of_document(checkpoint),
    )


def _sizes(model: Model) -> list[tuple[str, tuple[int, ...]]]:
    assert model.vocab_size is not None
    return [(stored.key, stored.shape) for stored in table(model, model.vocab_size)]


def _end_of_document(checkpoint: Checkpoint) -> int | None:
    folder = checkpoint.found.run_dir / layout.TOKENIZER
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return None
    return open_tokenizer(folder).end_of_document


def _write_generation_config(checkpoint: Checkpoint, output: Path, config: dict[str, Any]) -> None:
    kept = checkpoint.found.run_dir / SOURCE / hf_config.GENERATION_FILE
    if kept.is_file():
        (output / hf_config.GENERATION_FILE).write_bytes(kept.read_bytes())
    else:
        made = hf_config.generation_config(config)
        write_json(output / hf_config.GENERATION_FILE, made)


def _write_shards(
    output: Path, theirs: dict[str, Theirs], formats: dict[str, torch.dtype],
    reading: tuple[Weights, Cast], shard_bytes: int,
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
    reading: tuple[Weights, Cast],
) -> None:  # fmt: skip
    weights, cast = reading
    writer = Writer(path, {one.name: (formats[one.name], one.shape) for one in theirs})
    whole = False
    try:
        carry_out(_moves(theirs, formats, weights, writer), weights, cast)
        whole = True
    finally:
        writer.close(whole=whole)


def _moves(
    theirs: list[Theirs], formats: dict[str, torch.dtype], weights: Weights, writer: Writer
) -> Iterator[Move]:
    for one in theirs:
        dtype = formats[one.name]
        for block in theirs_from_ours(one, weights):
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
