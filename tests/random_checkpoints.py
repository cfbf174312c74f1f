"""Checkpoints of random values, and rankings of them, out of which a child is cut."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hybrid_train.anatomy.layers import stored_tensors
from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.tensor_files import CheckpointWriter
from hybrid_train.compression.ranking import write
from hybrid_train.schema.model import Model
from tests import rankings
from tests.rankings import HEADER


def random_tensors(model: Model, rows: int, seed: int) -> dict[str, Tensor]:
    """Random values for every tensor that a checkpoint of a model holds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        one.key: torch.randn(one.shape, generator=generator) for one in stored_tensors(model, rows)
    }


def write_checkpoint(run_dir: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors as the only checkpoint of a run, each in one piece."""
    folder = layout.path_of(run_dir, 0)
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        writer.place(name, shape, 0, shape, tensor.dtype).write(tensor)
    writer.finish()
    layout.write_position(folder, {"step": 0, "tokens": 0})
    return folder


def random_ranking(model: Model, checkpoint: Path, folder: Path, seed: int = 0) -> None:
    """Write a ranking of a checkpoint whose scores are drawn at random."""
    found = layout.locate(checkpoint)
    header = replace(
        HEADER, run=str(found.run_dir), step=found.step, checksum=layout.digest_of(found.path)
    )
    folder.mkdir()
    write(replace(rankings.random_ranking(model, seed), header=header), folder)
