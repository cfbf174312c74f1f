import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.schema.pattern import KINDS, Pattern, parse, repair

layers = st.text(alphabet="".join(KINDS), min_size=1, max_size=12)
patterns = st.builds(
    lambda stages, mtp, depths: Pattern(tuple(stages), mtp if depths else "", depths),
    st.lists(layers, min_size=1, max_size=4),
    layers,
    st.integers(0, 3),
)
noise = st.text(alphabet="".join(KINDS) + "|/mexX ", max_size=12)


@given(patterns)
def test_a_written_pattern_is_read_back_equal(pattern: Pattern) -> None:
    assert parse(str(pattern)) == pattern


@given(patterns)
def test_counts_of_all_kinds_add_up_to_the_layers(pattern: Pattern) -> None:
    total = sum(map(len, pattern.stages)) + pattern.mtp_depths * len(pattern.mtp)
    assert sum(pattern.count(kind) for kind in KINDS) == total


@given(patterns, st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_cutting_makes_the_asked_stages_of_the_same_layers(
    pattern: Pattern, lengths: list[int]
) -> None:
    if min(lengths) < 1 or sum(lengths) != len(pattern.main):
        with pytest.raises(ValueError, match="cannot make stages"):
            pattern.cut(lengths)
        lengths = [1] * len(pattern.main)
    cut = pattern.cut(lengths)
    assert cut.layers == pattern.layers
    assert [len(stage) for stage in cut.stages] == lengths


@given(patterns)
def test_megatron_reads_the_same_parts(pattern: Pattern) -> None:
    allocation = pytest.importorskip("megatron.core.models.hybrid.hybrid_layer_allocation")
    read = allocation.parse_hybrid_pattern(str(pattern))
    assert read.main_pattern == "|".join(pattern.stages)
    assert (read.mtp_pattern or "") == pattern.mtp
    assert read.mtp_num_depths == pattern.mtp_depths


@given(noise)
def test_a_repaired_pattern_is_legal(text: str) -> None:
    mended = repair(text)
    if mended is not None:
        assert repair(mended) == mended
        parse(mended)


@given(patterns)
def test_a_legal_pattern_needs_no_repair(pattern: Pattern) -> None:
    assert repair(str(pattern)) == str(pattern)


@pytest.mark.parametrize(
    ("text", "place", "reason", "mended"),
    [
        ("MEXM", 3, "'X' is no kind of layer; legal are M (Mamba-2)", "MEM"),
        ("mem", 1, "'m' is no kind", "MEM"),
        ("", 1, "no main layers", None),
        ("/*E", 1, "no main layers", None),
        ("M||E", 3, "has no layers", "M|E"),
        ("|M", 1, "has no layers", "M"),
        ("ME|", 4, "has no layers", "ME"),
        ("ME/", 4, "no layers follow", "ME"),
        ("ME/*E/*", 7, "must have the layers '*E'", "ME/*E/*E"),
        ("M|E/*|E", 6, "cuts main layers only", "M|E/*E"),
    ],
)
def test_a_fault_is_pointed_at_and_mended(
    text: str, place: int, reason: str, mended: str | None
) -> None:
    with pytest.raises(ValueError, match="at character") as error:
        parse(text)
    first, shown, caret = str(error.value).split("\n")
    assert first == f"at character {place}"
    assert reason in caret
    assert shown.strip() == text
    assert caret.index("^") - (len(shown) - len(text)) == place - 1
    assert repair(text) == mended


def test_the_papers_example_has_the_parts_one_expects() -> None:
    pattern = parse("MEM*|M-M-/*E/*E")
    assert pattern.stages == ("MEM*", "M-M-")
    assert (pattern.mtp, pattern.mtp_depths) == ("*E", 2)
    assert {kind: pattern.count(kind) for kind in KINDS} == {"M": 4, "*": 3, "-": 2, "E": 3}
