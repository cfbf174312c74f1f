"""Dense families against their classes in transformers: logits, gradients, caches, round trips."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.hf.read import Folder, import_folder
from hybrid_train.hf.rope_keys import renamed
from hybrid_train.hf.tensors import turn_round
from hybrid_train.hf.verify import load_theirs
from hybrid_train.hf.write import Checkpoint, Weights, export_checkpoint, open_checkpoint
from hybrid_train.jobs.convert import differences
from tests.dense_folders import FAMILIES, FAST_SEEDS, ORIGINAL, SEEDS, VOCAB, folder_of, model_of
from tests.hf_folders import tokens_of
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, RUNTIME

if TYPE_CHECKING:
    from hybrid_train.megatron.hybrid import Hybrid

pytestmark = MEGATRON_WARNINGS
FAST = [(family, seed) for family in FAMILIES for seed in FAST_SEEDS]
FOLDERS = sampled([(family, seed) for family in FAMILIES for seed in SEEDS], *FAST)
# What a seed decides that logits do not notice is said by fewer of them.
SOME = sampled([(family, seed) for family in FAMILIES for seed in SEEDS[:6]], *FAST)
LONGEST = 300
LENGTHS = (1, 17, *ORIGINAL, *(length + 1 for length in ORIGINAL), LONGEST)
SHARE = 1e-4  # of the standard deviation of the logits
NOISE = 1e-4  # a gradient below this share of the largest is compared with that share


def imported(family: str, seed: int, place: Path) -> Checkpoint:
    import_folder(folder_of(family, seed, place / "theirs"), place / "run", None)
    checkpoint = open_checkpoint(place / "run")
    checkpoint.job.runtime = RUNTIME
    return checkpoint


def built(checkpoint: Checkpoint, groups: Any) -> "Hybrid":
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.model.build import build_model

    model = build_model(checkpoint.job, groups, VOCAB, on_gpu=False).chunks[0]
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)  # of what is not read
    read_weights(checkpoint.found.path, [model], groups)
    return model


def assert_close(found: Tensor, expected: Tensor, what: object) -> None:
    largest = (found[..., :VOCAB] - expected).abs().max()
    assert largest <= SHARE * expected.std(), what


@pytest.mark.parametrize(("family", "seed"), SOME)
def test_a_round_trip_keeps_every_bit_and_the_meaning_of_every_key(
    family: str, seed: int, tmp_path: Path
) -> None:
    checkpoint = imported(family, seed, tmp_path)
    export_checkpoint(tmp_path / "run", tmp_path / "again", None, 10_000)
    with Folder(tmp_path / "theirs") as before, Folder(tmp_path / "again") as after:
        assert before.names == after.names
        for name in before.names:
            rows = before.shape(name)[0]
            assert before.dtype(name) == after.dtype(name)
            assert torch.equal(before.read(name, 0, rows), after.read(name, 0, rows)), name
        with StoredTensors(checkpoint.found.path) as stored:
            assert not differences(checkpoint, Weights(stored, best=False), after).lines()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model_of(family, seed)(tokens_of(LONGEST), use_cache=False).logits
        assert_close(again(tokens_of(LONGEST), use_cache=False).logits, expected, "loaded")
    said = json.loads((tmp_path / "theirs" / "config.json").read_text())
    kept = json.loads((tmp_path / "again" / "config.json").read_text())
    attention = checkpoint.model.attention
    sizes = {"head_dim": attention.head_dim, "num_key_value_heads": attention.kv_heads}
    assert kept == renamed(said) | sizes


@pytest.mark.parametrize(("family", "seed"), FOLDERS)
def test_logits_and_gradients_are_those_of_transformers(
    groups: Any, family: str, seed: int, tmp_path: Path
) -> None:
    theirs, checkpoint = model_of(family, seed), imported(family, seed, tmp_path)
    ours = built(checkpoint, groups).eval()
    loaded = load_theirs(tmp_path / "theirs", checkpoint.model)
    for length in LENGTHS:
        tokens = tokens_of(length)
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
            assert_close(ours(tokens).logits(), expected, f"length {length}")
            assert_close(loaded(tokens, use_cache=False).logits, expected, f"loaded, {length}")
    for length in (17, LONGEST):
        errors = gradient_errors(checkpoint, ours, theirs, tokens_of(length + 1))
        assert max(errors.values()) < SHARE, (length, errors)


def gradient_errors(
    checkpoint: Checkpoint, ours: "Hybrid", theirs: PreTrainedModel, rows: Tensor
) -> dict[str, float]:
    """Return the error of each gradient as a share of its root mean square, by their names."""
    labels = rows[:, 1:].flatten()
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)
    cross_entropy(ours(rows[:, :-1]).logits()[..., :VOCAB].flatten(0, 1), labels).backward()
    cross_entropy(theirs(rows[:, :-1], use_cache=False).logits.flatten(0, 1), labels).backward()
    mine = gradients_by_their_names(checkpoint, ours)
    expected = {name: one.grad for name, one in theirs.named_parameters()}
    assert mine.keys() == expected.keys()
    least = NOISE * max(one.square().mean().sqrt().item() for one in expected.values())
    return {
        name: (
            (mine[name] - one).square().mean().sqrt() / max(one.square().mean().sqrt(), least)
        ).item()
        for name, one in expected.items()
    }


def gradients_by_their_names(checkpoint: Checkpoint, ours: "Hybrid") -> dict[str, Tensor]:
    """Return the gradients as the table of names tells them, in whole tensors of theirs."""
    from tests.parity import shards

    held = [(one, one.data) for one in ours.parameters()]
    for one, _ in held:  # what knows where a weight belongs is asked about its gradient
        assert one.grad is not None
        one.data = one.grad
    stored = shards.assemble(shards.weights([SimpleNamespace(module=ours)]))
    for one, data in held:
        one.data = data
    made = {}
    for name, theirs in turn_round(checkpoint.family.table(checkpoint.told, VOCAB)).items():
        pieces = [piece for _, piece in sorted(theirs.pieces.items())]
        made[name] = torch.cat([stored[one.key][one.start : one.stop] for one in pieces])
    return made


@pytest.mark.parametrize(("family", "seed"), SOME)
def test_tokens_that_are_read_one_by_one_have_the_logits_that_transformers_gives_them(
    groups: Any, family: str, seed: int, tmp_path: Path
) -> None:
    from hybrid_train.generation.cached_model import CachedModel
    from hybrid_train.training.network import Network, Routing

    theirs, ours = model_of(family, seed), built(imported(family, seed, tmp_path), groups).eval()
    network = Network([ours], groups, torch.device("cpu"), Routing((), 0), None)
    for prompt, length in ((14, 20), (80, 86)):  # within and beyond every original length
        tokens, cached = tokens_of(length), CachedModel(network, 2)
        cached.clear(0, length)
        cached.clear(1, length)
        with torch.no_grad():
            past = theirs(tokens[:, :prompt], use_cache=True)
        found = read(cached, tokens[:, :prompt])
        assert_close(found, past.logits, f"a prompt of {prompt}")
        for at in range(prompt, length):
            with torch.no_grad():
                past = theirs(
                    tokens[:, at : at + 1], past_key_values=past.past_key_values, use_cache=True
                )
            assert_close(read(cached, tokens[:, at : at + 1]), past.logits, f"token {at}")


def read(cached: Any, window: Tensor) -> Tensor:
    hidden = cached.read(slice(0, 2), window.tolist(), [window.shape[1]] * 2)
    found: Tensor = cached.logits(hidden)
    return found
