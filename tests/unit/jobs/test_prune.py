"""A child as files: it computes what its masked parent does, and so does its export."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.counts import parameters
from hybrid_train.anatomy.selection import Selection
from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.lineage import WEIGHTS, parent_of, read
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.compression.choosing import Chosen
from hybrid_train.compression.ranking import Header, Ranking, read_for
from hybrid_train.compression.ranking import write as write_ranking
from hybrid_train.hf.read import Folder, import_folder
from hybrid_train.hf.verify import load_theirs
from hybrid_train.hf.write import Checkpoint, Weights, export_checkpoint, open_checkpoint
from hybrid_train.jobs.convert import differences
from hybrid_train.jobs.prune import Pruned, prune
from hybrid_train.schema.model import AttentionSizes, MambaSizes, Model
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from tests.hf_folders import VOCAB, folder_of, tokens_of
from tests.pruned import SIZES, child_of, selection_of
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS
RUNTIME = Runtime(device=Device.cpu, kernels=Kernels.plain, threads=1)
ROWS = 128
TOLERANCE = 1e-5  # of the largest value; float32 sums of another order
SHAPES = ("dense H", "Super, latent experts, MTP")
DRAWS = 6


def child_with_one_number_of_heads(parent: Model, random: np.random.Generator) -> Model:
    """A child of which only the widths of MLPs and experts differ from layer to layer."""
    child = child_of(parent, SIZES, random, dropped=(3,))
    for rule in child.layers:
        rule.attention, rule.mamba = AttentionSizes(), MambaSizes()
        rule.moe.experts = None
    return child


class Run:
    """A parent as a run folder, and a child of it in another."""

    def __init__(self, folder: Path, shape: str, seed: int = 0) -> None:
        self.folder, random = folder, np.random.default_rng([len(shape), seed])
        import_folder(folder_of(shape, folder / "hf"), folder / "parent", None)
        self.parent = open_checkpoint(folder / "parent")
        model = self.parent.model
        child = child_with_one_number_of_heads(model, random)
        selection = selection_of(model, child, random, dropped=(3,))
        counts = parameters(child, ROWS).total, parameters(model, ROWS).total
        self.chosen = Chosen(child, selection, *counts)

    def prune(self) -> Pruned:
        came_from = parent_of(WEIGHTS, "runs/parent", self.parent.found)
        return prune(self.parent, came_from, self.chosen, self.folder / "child", {"cut": {}})


def built(groups: Any, checkpoint: Checkpoint, masked_by: Selection | None = None) -> Any:
    """The model of a checkpoint, with its weights."""
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.compression.mask import Mask
    from hybrid_train.model.build import build_model

    checkpoint.job.runtime = RUNTIME
    model = build_model(checkpoint.job, groups, VOCAB, on_gpu=False).chunks[0].eval()
    read_weights(checkpoint.found.path, [model], groups)
    if masked_by is not None:
        Mask(masked_by).apply([model])
    return model


@torch.no_grad()
def said(model: Any, tokens: Tensor) -> list[Tensor]:
    """Logits of the next token and hidden states of each MTP depth; a mask leaves zeros there."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    outputs = model(tokens, position_ids=positions)
    return [outputs.logits()[..., :VOCAB], *outputs.mtp_hidden]


def require_close(found: Tensor, expected: Tensor) -> None:
    apart = (found - expected).abs().max()
    assert apart <= TOLERANCE * expected.abs().max(), apart


def require_close_states(found: Tensor, expected: Tensor) -> None:
    """Compare states of an MTP depth by their norm: rounding is larger at single tokens.

    Attention over random weights is sharp at some of them, where a difference of 1e-6 in what it
    reads is one of 1.6e-5 behind it, with any eps of the norms.
    """
    apart = (found - expected).norm()
    assert apart <= TOLERANCE * expected.norm(), apart


@torch.no_grad()
def by_cache(model: Any, tokens: Tensor, prompt: int) -> Tensor:
    """Logits of transformers that reads a prompt, then token by token."""
    read = model(tokens[:, :prompt], use_cache=True)
    logits = [read.logits]
    for place in range(prompt, tokens.shape[1]):
        past = read.past_key_values
        read = model(tokens[:, place : place + 1], past_key_values=past, use_cache=True)
        logits.append(read.logits)
    return torch.cat(logits, dim=1)


def require_one_model(groups: Any, run: Run) -> None:
    """Compare child, masked parent, export by transformers, and its import."""
    folder, tokens = run.folder, tokens_of(33)
    run.prune()
    child = open_checkpoint(folder / "child")
    logits, *depths = said(built(groups, child), tokens)
    expected, *states = said(built(groups, run.parent, run.chosen.selection), tokens)
    require_close(logits, expected)
    hidden = torch.from_numpy(run.chosen.selection.hidden)
    for ours, theirs in zip(depths, states, strict=True):
        require_close_states(ours, theirs[..., hidden])
    export_checkpoint(folder / "child", folder / "out", None, 2**40)
    exported = load_theirs(folder / "out", child.told)
    with torch.no_grad():
        require_close(exported(tokens, use_cache=False).logits, logits)
    require_close(by_cache(exported, tokens, prompt=5), logits)
    import_folder(folder / "out", folder / "again", None)  # transformers ignores MTP
    again = said(built(groups, open_checkpoint(folder / "again")), tokens)
    require_close(again[0], logits)
    for ours, theirs in zip(again[1:], depths, strict=True):
        require_close_states(ours, theirs)
    with StoredTensors(child.found.path) as stored, Folder(folder / "out") as theirs:
        found = differences(child, Weights(stored, best=False), theirs)
    assert found.is_same_model, found.lines()
    assert found.tensors


@pytest.mark.parametrize("shape", SHAPES)
def test_a_child_and_its_export_compute_what_the_masked_parent_does(
    groups: Any, shape: str, tmp_path: Path
) -> None:
    require_one_model(groups, Run(tmp_path, shape))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_so_do_children_of_other_sizes(groups: Any, shape: str, tmp_path: Path) -> None:
    for seed in range(1, 1 + DRAWS):
        require_one_model(groups, Run(tmp_path / str(seed), shape, seed))


def test_a_child_is_a_run_of_its_own_with_what_its_parent_had(tmp_path: Path) -> None:
    run = Run(tmp_path, SHAPES[1])
    pruned = run.prune()
    child = open_checkpoint(tmp_path / "child")
    assert child.model == dataclasses.replace(run.chosen.model, vocab_size=VOCAB)
    assert child.found.position() == {"step": 0, "tokens": 0}
    assert layout.damages(child.found.path) == []
    with StoredTensors(child.found.path) as stored:
        held = sum(np.prod(stored.shape(name)) for name in stored.names)
    assert held == run.chosen.parameters
    assert (tmp_path / "child" / "hf" / "config.json").is_file()
    found = read(tmp_path / "child")
    assert found is not None
    assert found.record.made.job == "prune"
    (parent,) = found.record.parents
    assert (parent.step, parent.checksum) == (0, layout.digest_of(run.parent.found.path))
    said = json.loads((tmp_path / "child" / "prune.json").read_text())
    assert said["bytes"] == pruned.bytes
    assert pruned.bytes["in"] == pruned.bytes["out"] + pruned.bytes["cut"]
    assert {one["name"] for one in said["tensors"]} == {one.name for one in pruned.accounts}
    assert said["layers_dropped"] == [3]


def test_nothing_is_left_where_a_tensor_cannot_be_read(tmp_path: Path) -> None:
    run = Run(tmp_path, SHAPES[0])
    (file,) = run.parent.found.path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError):
        run.prune()
    assert {one.name for one in tmp_path.iterdir()} == {"hf", "parent"}


def test_heads_that_differ_between_layers_are_not_exported_and_named(tmp_path: Path) -> None:
    run = Run(tmp_path, SHAPES[0])
    model, random = run.parent.model, np.random.default_rng(0)
    child = child_with_one_number_of_heads(model, random)
    next(rule for rule in child.layers if rule.layers == "1").mamba.heads = 4
    selection = selection_of(model, child, random, dropped=(3,))
    run.chosen = dataclasses.replace(run.chosen, model=child, selection=selection)
    run.prune()
    with pytest.raises(UserError, match=r"mamba\.heads is 2 in layer 5, and .* 4 in layer 1"):
        export_checkpoint(tmp_path / "child", tmp_path / "out", None, 2**40)
    assert not (tmp_path / "out").exists()


def test_a_ranking_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, SHAPES[0])
    found = run.parent.found
    header = Header(
        "runs/other", 7, "0" * 64, rows=1, sequence_length=8, over_tokens="mean", over_rows="l2"
    )
    (tmp_path / "ranking").mkdir()
    write_ranking(Ranking(header, {"hidden": np.ones(32, np.float32)}), tmp_path / "ranking")
    with pytest.raises(UserError, match=r"made of runs/other, step 7 .* hybrid-train importance"):
        read_for(tmp_path / "ranking", found)
    own = dataclasses.replace(header, checksum=layout.digest_of(found.path))
    (tmp_path / "own").mkdir()
    write_ranking(Ranking(own, {"hidden": np.ones(32, np.float32)}), tmp_path / "own")
    assert read_for(tmp_path / "own", found).header == own
