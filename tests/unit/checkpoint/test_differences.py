"""Layers of multi-token prediction come and go with a word; any other difference is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.schema.problems import UserError
from tests.tiny import EVERY_KIND, MEGATRON_WARNINGS
from tests.unit.checkpoint.content import content_of, engine_of, named, take

pytestmark = MEGATRON_WARNINGS
WITHOUT = EVERY_KIND.split("/")[0]
# The loss of the main layers is that of before, but logits with those of MTP beside them are summed
# in other blocks: rows of 32 features, and 64 logits; sqrt(32 + 64) / 2, about 5 ulps.
ROUNDING = 5 * torch.finfo(torch.float32).eps


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    # A job that ran in this process before keeps its messages from pytest.
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    return caplog


def saved_and_loaded(groups: Any, run_dir: Path, patterns: tuple[str, str]) -> tuple[Any, Any]:
    from hybrid_train.checkpoint import layout, store

    saved, loaded = (
        engine_of(groups, seed=seed, steps=steps, pattern=pattern)
        for seed, steps, pattern in zip((1, 2), (2, 0), patterns, strict=True)
    )
    folder = store.save(run_dir, content_of(saved, groups), {"step": 2}, keep=1)
    store.load(layout.locate(folder), content_of(loaded, groups))
    return saved, loaded


def test_dropped_mtp_takes_its_moments_along_and_leaves_the_rest(
    groups: Any, tmp_path: Path, said: Any
) -> None:
    saved, loaded = saved_and_loaded(groups, tmp_path, (EVERY_KIND, WITHOUT))
    before, after = named(saved, groups), named(loaded, groups)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    gone = {key[0] for key in before.keys() - after.keys()}
    assert gone
    assert all("mtp.layers." in key for key in gone)
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in gone)
    weights = {key for key in gone if not key.startswith("optimizer.")}
    words = f"not in the model, dropped with their moments: mtp.layers.0 ({len(weights)} tensors)"
    assert words in said.text  # both depths repeat one block
    assert take(loaded, 1) == pytest.approx(take(saved, 1), rel=ROUNDING)


def test_added_mtp_begins_with_its_own_first_weights_and_no_moments(
    groups: Any, tmp_path: Path, said: Any
) -> None:
    saved, loaded = saved_and_loaded(groups, tmp_path, (WITHOUT, EVERY_KIND))
    first = named(engine_of(groups, seed=2), groups)
    before, after = named(saved, groups), named(loaded, groups)
    for key, value in after.items():
        expected = before[key] if key in before else first[key]
        assert torch.equal(value, expected), key
    new = [key for key in after if key not in before]
    assert any(key[0].startswith("mtp.layers.0.") for key in new)
    assert not any(after[key].any() for key in new if key[0].startswith("optimizer.exp_avg"))
    assert "not in the checkpoint, newly initialised with moments 0: mtp.layers.0" in said.text
    assert take(loaded, 1) == pytest.approx(take(saved, 1), rel=ROUNDING)


def test_a_checkpoint_of_another_model_is_refused_with_names_of_both_sides(
    groups: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is of another model; only MTP may be added") as error:
        saved_and_loaded(groups, tmp_path, ("M-M", "MEM"))
    words = str(error.value)
    assert "not in the checkpoint: decoder.layers.1." in words
    assert "not in the model: decoder.layers.1.mlp." in words
    assert "more" in words
    assert error.value.on_all_ranks


def test_the_same_model_needs_no_word(groups: Any, tmp_path: Path, said: Any) -> None:
    saved_and_loaded(groups, tmp_path, (WITHOUT, WITHOUT))
    assert not [record for record in said.records if record.levelno >= logging.WARNING]
