"""A Hugging Face folder: its tensors under the released names, and its import as a run folder."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.block_moves import Cast, Move, move_all, require_shapes
from hybrid_train.checkpoint.tensor_files import CheckpointWriter, OpenFiles
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import has_vocabulary
from hybrid_train.hf import config_json, origin
from hybrid_train.hf.family import LENGTH, Family
from hybrid_train.hf.files import new_folder
from hybrid_train.hf.names import Stored
from hybrid_train.hf.safetensors import Entry, read_header
from hybrid_train.hf.tensors import ours_from_theirs
from hybrid_train.schema.data import Data
from hybrid_train.schema.model import Model
from hybrid_train.schema.optimizer import Schedule
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import Train, TrainJob
from hybrid_train.schema.units import counted

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_STACKED = re.compile(r"(.*\.experts)\.(up_proj|down_proj)")
_log = logging.getLogger(__name__)


class Folder:
    """The tensors of a Hugging Face folder, under the names of the released layout of its family.

    Attributes:
        path: the folder.
        family: that of its config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.family = config_json.family_of(config_json.read_config(path))
        self._entries = dict(_released(_entries(path), self.family))
        self._files = OpenFiles()

    @property
    def names(self) -> set[str]:
        """Names of all tensors; stacked experts have one name each."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format of a tensor."""
        return self._entries[name].dtype

    def where(self, name: str) -> str:
        """Name file and tensor, for errors."""
        return str(self._entries[name])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor."""
        return self._entries[name].read(self._files, start, stop)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def main_dtype(self) -> torch.dtype:
        """Return the number format of most elements."""
        count: Counter[torch.dtype] = Counter()
        for entry in self._entries.values():
            count[entry.dtype] += math.prod(entry.shape)
        return count.most_common(1)[0][0]


def _entries(folder: Path) -> dict[str, Entry]:
    """Read the headers of all files of a folder.

    Raises:
        UserError: if files or tensors are missing, doubled or damaged.
    """
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, _weight_map(index))
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise UserError(f"{folder} has {len(files)} .safetensors files, but no {INDEX}")
    if not files:
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        also = f" ({pickled[0].name} is a pickle, and pickles are not read)" if pickled else ""
        raise UserError(f"{folder} has no {SINGLE}{also}")
    return read_header(files[0])


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_no_doubles)
        names = found["weight_map"]
        if not isinstance(names, dict) or not names:
            raise TypeError("weight_map is no table of tensors")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: {error}") from error
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file == "..":
            raise UserError(f"{index}: {name} lies in {file!r}, which is no file of this folder")
    return names


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{double} stands in it twice")
    return found


def _indexed(folder: Path, weight_map: dict[str, str]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    named_for = {file: name for name, file in reversed(weight_map.items())}
    for file in sorted(named_for):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing; {INDEX} names it for {named_for[file]}")
    for file in sorted(named_for):
        path = folder / file
        for name, entry in read_header(path).items():
            if name in entries:
                raise UserError(f"{name} stands in {entries[name].file.name} and in {path}")
            if weight_map.get(name) != file:
                raise UserError(f"{path}: {name} is not where {INDEX} says: {weight_map.get(name)}")
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise UserError(f"{folder / file}: {name} is missing; {INDEX} says that it is there")
    return entries


def _released(entries: dict[str, Entry], family: Family) -> Iterator[tuple[str, Entry]]:
    """Give every tensor its released name, experts one by one; leave out what is no weight."""
    seen: dict[str, Entry] = {}
    for name, entry in entries.items():
        known = family.released(name)
        if known is None:
            _log.info("left out, since it follows from the config: %s", entry)
            continue
        for released, one in _one_by_one(known, entry):
            if released in seen:
                raise UserError(f"{entry} is {seen[released]} a second time")
            seen[released] = one
            yield released, one


def _one_by_one(name: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
    match = _STACKED.fullmatch(name)
    if match is None:
        yield name, entry
        return
    if len(entry.shape) != 3:  # noqa: PLR2004  expert, out, in
        raise UserError(f"{entry} has shape {entry.shape}; stacked experts have three axes")
    size = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    for expert in range(entry.shape[0]):
        one = replace(entry, shape=entry.shape[1:], start=entry.start + expert * size)
        yield f"{match[1]}.{expert}.{match[2]}.weight", one


def import_folder(source: Path, output: Path, dtype: torch.dtype | None) -> str:
    """Write a Hugging Face folder as a run folder with one checkpoint, at step 0.

    Args:
        source: the folder.
        output: the run folder; must not be there yet.
        dtype: number format of the weights; None: as they are.

    Returns:
        What was done, in words.

    Raises:
        UserError: if the folder is damaged or no model of the family; nothing is left behind.
    """
    config = config_json.read_config(source)
    family = config_json.family_of(config)
    model = family.to_model(config, source / config_json.FILE)
    assert model.vocab_size is not None
    with Folder(source) as folder:
        tensors = list(family.table(model, model.vocab_size))
        _require_model(folder, model, tensors)
        cast = Cast(dtype)
        with new_folder(output) as partial:
            weights = layout.path_of(partial, 0)
            weights.mkdir(parents=True)
            _write_tensors(weights, tensors, folder, cast)
            layout.write_position(weights, {"step": 0, "tokens": 0})
            origin.keep(source, partial)
            length = int(config.get(LENGTH) or family.length)
            main = dtype or folder.main_dtype()
            frozen.freeze(imported_job(model, output, length, main), partial)
    if not has_vocabulary(source):
        _log.warning("%s has no tokenizer: text cannot be generated from %s", source, output)
    if config.get("auto_map"):
        _log.info("%s names code of its own (auto_map); it was neither run nor copied", source)
    loss = cast.in_words(len(tensors))
    if loss:
        _log.warning("%s", loss)
    theirs = counted(len(folder.names), "tensor")
    return f"{output}: {theirs} of {source} in {len(tensors)} of ours"


def _require_model(folder: Folder, model: Model, tensors: list[Stored]) -> None:
    """Refuse a folder that does not hold exactly the tensors of the model."""
    shapes = {part.name: part.shape for stored in tensors for part in stored.parts}
    present, head = folder.names, folder.family.spelling.head
    if model.tie_embeddings and head in present:
        _require_tied(folder)
        present.discard(head)
    require_shapes(folder, shapes, present)


def _require_tied(folder: Folder) -> None:
    embedding, head = folder.family.spelling.embedding, folder.family.spelling.head
    shape = folder.shape(embedding) if embedding in folder.names else None
    same = shape == folder.shape(head) and all(
        torch.equal(folder.read(head, row, row + 1), folder.read(embedding, row, row + 1))
        for row in range(shape[0])
    )
    if not same:
        raise UserError(
            f"{folder.where(head)} differs from {embedding}, but config.json says that they are "
            "one (tie_word_embeddings)"
        )


def _write_tensors(weights: Path, tensors: list[Stored], folder: Folder, cast: Cast) -> None:
    writer = CheckpointWriter(weights)
    try:
        move_all(_moves(tensors, folder, cast, writer), folder, cast)
        writer.finish()
    finally:
        writer.close()


def _moves(
    tensors: list[Stored], folder: Folder, cast: Cast, writer: CheckpointWriter
) -> Iterator[Move]:
    for stored in tensors:
        key, shape, at = stored.key, stored.shape, 0
        for start, block in ours_from_theirs(stored, folder):
            dtype = cast.of(block.dtype, keeps_float32=stored.keeps_float32)
            yield Move(block, dtype, writer.place(key, shape, start, block.shape, dtype))
            at = start + block.shape[0]
        if at < shape[0]:
            padding = torch.zeros((shape[0] - at, *shape[1:]), dtype=dtype)
            writer.place(key, shape, at, tuple(padding.shape), dtype).write(padding)


def imported_job(model: Model, run_dir: Path, length: int, dtype: torch.dtype) -> TrainJob:
    """Describe an imported model as a run that is not to train."""
    half = dtype == torch.bfloat16
    return TrainJob(
        run_dir=str(run_dir),
        train=Train(tokens="0", sequence_length=length, global_batch=1),
        model=model,
        precision=Precision(format=GemmFormat.bf16 if half else GemmFormat.fp32),
        data=Data(tokenizer=str(run_dir / layout.TOKENIZER)),
        schedule=Schedule(peak_lr=0.0),
    )
