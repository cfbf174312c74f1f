"""A new model has the same weights under every layout, and processes fail together.

What layouts compute is compared in `tests/parity`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.runtime import cpu, ranks
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.problems import UserError
from tests.distributed.launch import run_distributed
from tests.tiny import MEGATRON_WARNINGS, VOCAB, alone, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
LAYOUTS = {
    "tensor": Parallel(tensor=2),
    "pipeline": Parallel(pipeline=2),
    "expert": Parallel(expert=2),
    "context": Parallel(context=2),
    "tensor, experts by number": Parallel(tensor=2, expert=2, expert_tensor=1),
}


def _fail_on_the_main_process() -> None:
    def work() -> None:
        raise ValueError("the disk is on fire")

    expected = ValueError if ranks.is_main() else UserError
    with pytest.raises(expected, match="the disk is on fire"):
        ranks.run_on_main_first(work)
    done = []
    ranks.run_on_main_first(lambda: done.append(1))
    assert done == ([1] if ranks.is_main() else [])


def _write_new_models(folder: Path) -> None:
    cpu.install()
    from hybrid_train.checkpoint import store
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.training.hooks.checkpointing import content_of

    _fail_on_the_main_process()
    for name, parallel in LAYOUTS.items():
        groups = build_groups(parallel, timeout_s=60)
        content = content_of(tiny_engine(tiny_job(parallel=parallel), groups))
        store.save(folder / name, content, {"step": 0, "tokens": 0}, keep=1)
        destroy_groups()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of a new model under every layout, and the groups of one process."""
    folder = tmp_path_factory.mktemp("layouts")
    run_distributed(_write_new_models, 2, folder)
    with alone() as groups:
        yield folder, groups


def weights(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_weights_are_the_same_numbers_under_every_layout(written: Any, layout: str) -> None:
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.model.build import build_model

    folder, groups = written
    job = tiny_job()
    expected = weights(build_model(job, groups, VOCAB, on_gpu=False).chunks[0])
    job.train.seed = 99  # other weights than any that were saved
    chunks = build_model(job, groups, VOCAB, on_gpu=False).chunks
    read_weights(folder / layout / "checkpoints" / "step_00000000", chunks, groups)
    for name, value in weights(chunks[0]).items():
        assert torch.equal(value, expected[name]), name
