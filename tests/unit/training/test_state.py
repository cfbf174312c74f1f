"""A run whose batches do not follow from config and data goes on where its checkpoint says."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.data.batch import Batch
from hybrid_train.data.loader import BatchSource, Loader
from hybrid_train.schema.checkpoint import Checkpoint
from hybrid_train.schema.problems import UserError
from hybrid_train.training.loop import Hook, HookList, TrainState
from tests.tiny import BATCH, LENGTH, MEGATRON_WARNINGS, batch_of, some_rows
from tests.unit.checkpoint.content import engine_of

pytestmark = MEGATRON_WARNINGS
STEPS = 4


class MadeUp:
    """Batches from a seed and a counter, and from what was made before, as those of a game are."""

    global_batch = BATCH

    def __init__(self, seed: int) -> None:
        self.seed, self.made, self.last = seed, 0, [0.0]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.made += 1
        rows = some_rows(2, seed=1000 * self.seed + self.made + int(self.last[0]))
        self.last = [float(rows.sum() % 7)]
        return batch_of(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "last": list(self.last), "kind": "made up"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.made, self.last = state["made"], list(state["last"])


class Losses(Hook):
    """Notes the losses, and ends the run with an error behind a step."""

    def __init__(self, ends_behind: int = 99) -> None:
        self.found: list[tuple[float, float]] = []
        self._ends_behind = ends_behind

    def step_end(self, run: Any, report: Any) -> None:
        self.found.append((report.loss, report.grad_norm))
        if run.state.step == self._ends_behind:
            raise ZeroDivisionError("killed")


def run_of(groups: Any, folder: Path, losses: Losses, found: Any = None) -> Any:
    from hybrid_train.checkpoint import store
    from hybrid_train.training.hooks.checkpointing import SaveCheckpoints, content_of
    from hybrid_train.training.loop import Run

    engine = engine_of(groups, seed=1)
    source: BatchSource = MadeUp(seed=5)
    run = Run(engine, source, token_budget=STEPS * BATCH * LENGTH)
    if found is not None:
        run.state = TrainState(**store.load(found, content_of(engine)))
        run.batches.load_state_dict(run.state.batches)
        engine.steps_done = run.state.step
    saving = SaveCheckpoints(Checkpoint(interval=2, async_save=False), folder, -1)
    run.hooks = HookList([saving, losses])
    return run


def test_a_run_with_a_source_of_its_own_is_killed_and_goes_on_to_the_bit(
    groups: Any, tmp_path: Path
) -> None:
    from hybrid_train.checkpoint import layout
    from hybrid_train.training.loop import fit

    straight, killed, resumed = Losses(), Losses(ends_behind=3), Losses()
    whole = run_of(groups, tmp_path / "whole", straight)
    fit(whole)
    with pytest.raises(ZeroDivisionError):
        fit(run_of(groups, tmp_path / "killed", killed))
    found = layout.latest(tmp_path / "killed")
    assert found is not None
    assert found.step == 2
    assert found.position()["batches"] == {"made": 4, "last": [killed_at(4)], "kind": "made up"}
    second = run_of(groups, tmp_path / "killed", resumed, found)
    fit(second)
    assert killed.found == straight.found[:3]
    assert resumed.found == straight.found[2:]
    pairs = zip(
        *(dict(run.engine.network.chunks[0].named_parameters()).items() for run in (whole, second)),
        strict=True,
    )
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)


def killed_at(made: int) -> float:
    """What the source keeps after so many batches."""
    source = MadeUp(seed=5)
    for _ in range(made):
        next(source)
    return source.last[0]


def test_a_source_without_a_state_takes_no_place_in_a_checkpoint() -> None:
    assert TrainState(step=3, tokens=9).position() == {"step": 3, "tokens": 9, "source_tokens": {}}
    state = TrainState(step=3, tokens=9, batches={"made": 1})
    assert TrainState(**state.position()) == state


def test_token_files_refuse_the_state_of_another_source() -> None:
    def read(_: int) -> Any:
        raise AssertionError

    loader = Loader(read, microbatch=1, global_batch=lambda _: 1)
    assert loader.state_dict() == {}
    loader.load_state_dict({})
    with pytest.raises(UserError, match=r"another source of batches \(kind, made\)"):
        loader.load_state_dict({"made": 3, "kind": "made up"})
