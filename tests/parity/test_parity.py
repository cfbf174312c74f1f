"""Every layout computes what one process computes, and a fault in one is noticed.

`python -m tests.parity` prints the same as tables; `python -m tests.parity draw 7` one random case.
"""

import pytest

from tests.parity.draws import describe, draw
from tests.parity.faults import FAULTS
from tests.parity.layouts import CASES, DENSE, LAYOUTS, PACKED, QUANTIZED, TAUGHT, UNEQUAL
from tests.parity.suite import Suite
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS

# One group: its tests share the references and the processes.
pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("parity")]

# Draws that once failed, and some more. 1: tied embeddings with MTP in a pipeline; 24: experts that
# did not wait for parameters on their way.
SEEDS = (1, 24, 0, 14, 25)
# Splits in four where there are splits in two, and pairs that stand in a triple: `make parity` has
# them.
LEFT_OUT = {
    "TP4", "EP4", "CP4", "DP4", "TP2 x PP2", "TP2 x CP2", "EP2 x CP2", "TP2 x EP2",
    "EP2 x DP2, FSDP", "TP2, ETP1, FSDP",
}  # fmt: skip
TESTED = [name for name in LAYOUTS if name not in LEFT_OUT]
# What `make test` has of those.
EACH_SPLIT = (
    "TP2", "VPP2 x PP2", "EP2", "ETP2", "CP2", "DP2, overlapped", "DP2, FSDP", "EP2, tokens to all",
    "EP2, shared experts meanwhile",
)  # fmt: skip
# Each kind of split, and those that meet in one; `make parity` runs all on packed rows, and more
# with quantized GEMMs.
EVERY_PACKED = tuple(
    f"packed, {name}" for name in ("EP2", "ETP2", "CP2", "EP2 x CP2, FSDP", "TP2 x CP2 x PP2")
)
QUANTIZED_SPLITS = (
    "fp8_tensorwise, EP2", "fp8_tensorwise, TP2 x CP2 x PP2", "mxfp8, ETP2", "nvfp4, PP2",
)  # fmt: skip

# Of Transformers: all splits of a Llama, of the others those that meet what they have beside it.
ALONE = ("PP2", "CP2", "DP2", "all recomputed")
DENSE_SPLITS = [
    name for name in DENSE
    if name.startswith(("llama", "packed", "fp8", "nvfp4")) or not name.endswith(ALONE)
]  # fmt: skip


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", sampled(TESTED, *EACH_SPLIT))
def test_a_layout_computes_what_one_process_computes(suite: Suite, name: str) -> None:
    assert suite.compare(LAYOUTS[name]).problems == []


@pytest.mark.parametrize("name", sampled(EVERY_PACKED, "packed, TP2 x CP2 x PP2"))
def test_a_layout_computes_packed_rows_as_one_process_does(suite: Suite, name: str) -> None:
    assert suite.compare(PACKED[name]).problems == []


@pytest.mark.parametrize("name", sampled(QUANTIZED_SPLITS, "mxfp8, ETP2"))
def test_a_layout_quantizes_as_one_process_does(suite: Suite, name: str) -> None:
    assert suite.compare(QUANTIZED[name]).problems == []


@pytest.mark.parametrize("name", sampled(TAUGHT, "taught, TP2", "taught, VPP2 x PP2"))
def test_a_student_learns_under_a_layout_as_in_one_process(suite: Suite, name: str) -> None:
    assert suite.compare(TAUGHT[name]).problems == []


@pytest.mark.parametrize(
    "name",
    # Each split of one kind alone stands in the second, or is slow.
    sampled(UNEQUAL, "unequal layers, EP2"),
)
def test_a_layout_splits_layers_of_unequal_sizes(suite: Suite, name: str) -> None:
    assert suite.compare(UNEQUAL[name]).problems == []


@pytest.mark.parametrize(
    "name",
    sampled(
        DENSE_SPLITS,
        "llama, TP2 x CP2 x PP2",
        "qwen, TP2, whole sequences",
        "nemotron, DP2, FSDP",
    ),
)
def test_a_layout_splits_a_transformer(suite: Suite, name: str) -> None:
    assert suite.compare(DENSE[name]).problems == []


@pytest.mark.parametrize("seed", sampled(SEEDS))
def test_a_random_legal_case_computes_what_one_process_computes(suite: Suite, seed: int) -> None:
    case = draw(seed)
    repeat = f"{describe(case)}; repeat it: python -m tests.parity draw {seed}"
    assert suite.compare(case).problems == [], repeat


@pytest.mark.parametrize(
    "name",
    sampled(
        FAULTS,
        "MTP denominator of one rank",
        "expert counted twice",
        "slot of the microbatch before",
    ),
)
def test_a_planted_fault_is_noticed_where_it_is(suite: Suite, name: str) -> None:
    fault = FAULTS[name]
    assert fault.noticed(suite.compare(CASES[fault.layout], name).problems)
