"""The worked example of docs/extending: its gradient, and a run with all of its parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hybrid_train.ops.logits import HeadPart, weighted_sum

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "extending"
TOKENS, HIDDEN, VOCAB = 11, 6, 13


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_the_focal_loss_has_the_gradient_of_its_formula(
    gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    from my_package.focal_loss import FocalTerm

    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(rows, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
        for rows in (TOKENS, VOCAB)
    )
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, dtype=torch.float64, generator=generator)

    log_p = torch.log_softmax(hidden @ weight.t(), dim=-1)[torch.arange(TOKENS), labels]
    expected = (-((1 - log_p.exp()) ** gamma) * log_p * weights).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))

    total, _ = weighted_sum(hidden, HeadPart(weight, VOCAB), FocalTerm(labels, gamma), weights)
    found = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable or uninitialized")
def test_the_example_trains_with_all_of_its_parts_and_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shown = run("train", "experiment=own_parts", f"run_dir={run_dir}", "objective.gamma=3")
    assert "frozen: embedding.word_embeddings.weight" in shown
    run("resume", f"run_dir={run_dir}", "train.tokens=3k")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    first, second = lines[:2]
    average = 0.5 * first["loss"] + 0.5 * second["loss"]
    assert second["own/loss_average"] == pytest.approx(average)
    assert "gamma: 3.0" in (run_dir / "config.yaml").read_text()
    before, after = (embedding(run_dir, step) for step in (10, 12))
    assert torch.equal(before, after)


def test_a_part_is_refused_with_a_sentence() -> None:
    wrong = run("check", "experiment=own_parts", "objective.gamma=0.5", code=2)
    assert "objective.gamma = 0.5: must be 0 or at least 1" in wrong
    wrong = run("check", "experiment=own_parts", "hooks.0.decay=2", code=2)
    assert "hooks.0.decay = 2.0" in wrong


def embedding(run_dir: Path, step: int) -> torch.Tensor:
    """Read the embedding from a checkpoint."""
    whole = run_dir / f"{step}.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / f"step_{step:08}", whole)
    found: torch.Tensor = torch.load(whole)["embedding.word_embeddings.weight"]
    return found


def run(*words: str, code: int = 0) -> str:
    """Run a command as the page says, in the folder of the example; return what it prints."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLE}"}
    done = subprocess.run(
        [sys.executable, "-m", "hybrid_train", *words],
        cwd=EXAMPLE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
