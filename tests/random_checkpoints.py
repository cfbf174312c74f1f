"""Checkpoints of random values, and rankings of them, out of which a child is cut."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis, Sizes
from hybrid_train.anatomy.layers import layers, main_layers, stored_tensors
from hybrid_train.anatomy.selection import CHOSEN
from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.tensor_files import CheckpointWriter
from hybrid_train.compression.ranking import HIDDEN, Header, Ranking, Scores, name_of, write
from hybrid_train.schema.model import Model


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
    draw = np.random.default_rng(seed).random
    main = len(main_layers(model))
    scores: dict[str, Scores] = {HIDDEN: draw(model.hidden_size, dtype=np.float32)}
    for name, shape in (("layers.cosine", (main,)), ("blocks.cosine", (main, main))):
        scores[name] = draw(shape, dtype=np.float32)
    for layer in layers(model):
        for axis in CHOSEN[layer.letter]:
            if shape := _shape(axis, layer.sizes):
                scores[name_of(layer, axis)] = draw(shape, dtype=np.float32)
    found = layout.locate(checkpoint)
    header = Header(
        str(found.run_dir), found.step, layout.digest_of(found.path), rows=1, sequence_length=8,
        over_tokens="mean", over_rows="l2",
    )  # fmt: skip
    folder.mkdir()
    write(Ranking(header, scores), folder)


def _shape(axis: Axis, sizes: Sizes) -> tuple[int, ...]:
    """The shape of the scores of an axis; none where they follow from those of another."""
    if axis is Axis.ssm_heads:
        return sizes.ssm_heads, sizes.ssm_head_dim
    if axis is Axis.expert_ffn:
        return sizes.experts, sizes.expert_ffn
    number = 0 if axis is Axis.ssm_head_dim else sizes.along(axis)
    return (number,) if number else ()
