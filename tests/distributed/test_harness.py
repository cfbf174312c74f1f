"""Tasks of lm-eval under every layout of two processes have the answers of one process."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.hf.read import import_folder
from hybrid_train.runtime import cpu
from hybrid_train.schema.evaluation import Harness
from hybrid_train.schema.parallel import Parallel
from tests import hf_folders
from tests.distributed.launch import run_distributed
from tests.harness_tasks import LONGEST, TASKS, write_tasks
from tests.hf_random import random_folder
from tests.tiny import MEGATRON_WARNINGS, RUNTIME, alone

pytestmark = [
    *MEGATRON_WARNINGS,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # datasets, of a file that it reads
]
LAYOUTS = {
    "tensor": Parallel(tensor=2),
    "pipeline": Parallel(pipeline=2),
    "expert": Parallel(expert=2),
    "data": Parallel(),
}
SAME = 1e-4  # nats, of a continuation or a whole text


def _results(layouts: dict[str, Parallel], run_dir: str, tasks: str) -> dict[str, Any]:
    """What lm-eval returns, by layout."""
    cpu.install()
    from hybrid_train.evaluation import harness
    from hybrid_train.jobs.networks import load_model
    from hybrid_train.megatron.data_parallel import destroy_groups

    settings = Harness(tasks=list(TASKS), include=tasks, max_length=LONGEST)
    found = {}
    for name, parallel in layouts.items():
        prepared = harness.prepare(settings, Path(run_dir))
        network = load_model(run_dir, RUNTIME, parallel=parallel).network
        found[name] = harness.run(prepared, network)
        destroy_groups()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those of one process, and of each of two by layout."""
    folder = tmp_path_factory.mktemp("harness")
    tasks = write_tasks(folder / "tasks", documents=5)  # two ranks have unequal shares
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hf_folders._COMMON, "vocab_size", 300)
        source = hf_folders.folder_of("Nano 3, experts", folder / "source")
    for file in random_folder(1, folder / "other").glob("*token*"):
        (source / file.name).write_bytes(file.read_bytes())
    import_folder(source, folder / "run", None)
    given = (str(folder / "run"), str(tasks))
    with alone():
        from hybrid_train.megatron.data_parallel import destroy_groups

        destroy_groups()
        expected = _results({"one": Parallel()}, *given)["one"]
    return expected, run_distributed(_results, 2, LAYOUTS, *given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_results_of_one_process(layout: str, results: Any) -> None:
    expected, by_rank = results
    one, other = (rank[layout] for rank in by_rank)
    assert json.dumps(one) == json.dumps(other)
    apart = [0.0]
    for name, samples in expected["samples"].items():
        for found, wanted in zip(one["samples"][name], samples, strict=True):
            if name == "answers":
                assert found["resps"] == wanted["resps"]
                continue
            for (mine,), (its,) in zip(found["resps"], wanted["resps"], strict=True):
                pair = (mine[0], its[0]) if isinstance(mine, list) else (mine, its)
                apart.append(abs(pair[0] - pair[1]))
        for metric, value in expected["results"][name].items():
            if isinstance(value, float):
                assert one["results"][name][metric] == pytest.approx(value, rel=1e-5)
    print(f"{layout}: largest difference {max(apart):.2g} nats")
    assert len(apart) > 50
    assert max(apart) < SAME
