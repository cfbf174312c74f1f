"""What is measured under the layouts of two processes is what one process measures."""

from typing import Any

import pytest

from hybrid_train.runtime import cpu
from hybrid_train.schema.evaluation import Asking, HeldOut
from hybrid_train.schema.evaluation import Decoding as DecodingSettings
from hybrid_train.schema.parallel import Parallel
from tests.asked import sources, subject, tokenizer
from tests.distributed.launch import run_distributed
from tests.tiny import MEGATRON_WARNINGS, alone
from tests.unit.evaluation.test_runner import Mixed

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.slow]
LAYOUTS = {
    "tensor": Parallel(tensor=2),
    "pipeline": Parallel(pipeline=2),
    "data": Parallel(),
    "expert": Parallel(expert=2),
}
ROUNDING = 1e-5  # relative: float32 sums of another order, through six layers


def _measured(layouts: dict[str, Parallel]) -> dict[str, list[Any]]:
    """Items of held-out text, of choices, and of answers that are greedy or drawn."""
    cpu.install()
    from hybrid_train.evaluation import heldout
    from hybrid_train.evaluation.runner import Questions
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    found = {}
    for name, parallel in layouts.items():
        groups = build_groups(parallel, timeout_s=60)
        asked = subject(groups, parallel=parallel)
        text = heldout.HeldOut(sources(), tokenizer(), HeldOut(), length=16, seed=0)
        drawn = Asking(samples=3, temperature=1.0, batch=2)
        measures = [text, Questions(Mixed(), {}, Asking(batch=2)), Questions(Mixed(), {}, drawn)]
        found[name] = [item for one in measures for item in one.run(asked)]
        destroy_groups()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[Any]]]:
    return run_distributed(_measured, 2, LAYOUTS)


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    with alone():
        from hybrid_train.megatron.data_parallel import destroy_groups

        destroy_groups()
        return _measured({"one": Parallel()})["one"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_results_of_one_process(
    layout: str, ranks: list[dict[str, list[Any]]], expected: list[Any]
) -> None:
    one, other = (rank[layout] for rank in ranks)
    assert one == other
    assert [item.name for item in one] == [item.name for item in expected]
    apart = [0.0]
    for item, wanted in zip(one, expected, strict=True):
        assert list(item.values) == list(wanted.values)
        for metric, pair in item.values.items():
            assert pair == pytest.approx(wanted.values[metric], rel=ROUNDING), item.name
            if metric == "loss":
                apart.append(abs(pair[0] - wanted.values[metric][0]) / pair[1])
        assert item.said.get("answers") == wanted.said.get("answers")
        assert item.said.get("choice") == wanted.said.get("choice")
    print(f"{layout}: losses of documents differ by at most {max(apart):.2g} nats a token")


def _decoded(layouts: dict[str, Parallel]) -> dict[str, list[Any]]:
    """Items of decoding with and without drafts."""
    cpu.install()
    from hybrid_train.evaluation.decoding import Decoding
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    found = {}
    for name, parallel in layouts.items():
        groups = build_groups(parallel, timeout_s=60)
        asked = subject(groups, parallel=parallel)
        settings = DecodingSettings(lengths=[5, 12], drafts=[0, 1], new_tokens=6, prompts=3)
        found[name] = Decoding(sources(), settings, seed=0).run(asked)
        destroy_groups()
    return found


def test_cache_and_accepted_drafts_are_those_of_one_process_and_all_ranks_say_one_time() -> None:
    one, other = run_distributed(_decoded, 2, LAYOUTS)
    assert one == other
    with alone():
        from hybrid_train.megatron.data_parallel import destroy_groups

        destroy_groups()
        expected = _decoded({"one": Parallel()})["one"]
    for layout, items in one.items():
        assert [item.name for item in items] == [item.name for item in expected]
        for item, wanted in zip(items, expected, strict=True):
            for metric in ("cache_bytes", "acceptance_length"):
                assert item.values.get(metric) == wanted.values.get(metric), (layout, item.name)
            for metric in ("tokens_per_s", "prompt_tokens_per_s"):
                (tokens, seconds), (same, alone_s) = item.values[metric], wanted.values[metric]
                assert tokens == same
                # A step of two processes takes longer, but none is over at once.
                assert seconds > alone_s / 20
