"""Limits stand in the types of fields: what is beyond them is named, with the nearest value."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from hybrid_train.config.compose import compose
from hybrid_train.config.registry import SCHEMAS
from hybrid_train.schema.cluster import Cluster
from hybrid_train.schema.job_roots import GenerateJob
from hybrid_train.schema.limits import (
    MOST_TOKENS,
    FileName,
    Name,
    Place,
    Range,
    Seed,
    TokenCount,
    TokenCountOrNone,
)
from hybrid_train.schema.problems import ConfigError, Problem, collect
from hybrid_train.schema.runtime import Runtime
from hybrid_train.schema.train import Phase

TINY = "experiment=tiny_cpu"
Half = Annotated[float, Range(0, 0.5)]


@dataclass(kw_only=True)
class Inner:
    part: Half = 0.25


@dataclass(kw_only=True)
class Outer:
    one: Half = 0.25
    maybe: Half | None = None
    some: list[Half] = field(default_factory=list)
    named: dict[str, Half] = field(default_factory=dict)
    inner: list[Inner] = field(default_factory=list)
    seed: Seed = 1
    count: TokenCount = "1"
    warmup: TokenCountOrNone = "0"
    place: Place = "0"
    folder: FileName = "a"
    name: Name = "a"

    def problems(self) -> Iterator[Problem]:
        if self.one > 0.4:
            yield Problem("one", self.one, "is what a rule of the section says", 0.4)


def found(**values: Any) -> list[tuple[str, object]]:
    return [(problem.path, problem.nearest) for problem in collect(Outer(**values))]


@pytest.mark.parametrize("low_or_high", [0, 0.5])
def test_both_ends_of_a_range_belong_to_it(low_or_high: float) -> None:
    assert found(maybe=low_or_high, some=[low_or_high], seed=2**64 - 1) == []
    assert found(seed=2**64) == [("seed", 2**64 - 1)]


@pytest.mark.parametrize(
    ("value", "nearest"), [(math.inf, 0.5), (-math.inf, 0), (-1e-9, 0), (0.6, 0.5)]
)
def test_what_is_beyond_an_end_is_sent_to_that_end(value: float, nearest: float) -> None:
    places = {"maybe": "maybe", "some": "some.1", "named": "named.a", "inner": "inner.0.part"}
    values = {
        "maybe": value,
        "some": [0, value],
        "named": {"a": value},
        "inner": [Inner(part=value)],
    }
    assert found(**values) == [(path, nearest) for path in places.values()]


def test_nan_is_in_no_range_and_near_to_the_usual_value() -> None:
    assert found(one=math.nan) == [("one", 0.25)]
    assert found(maybe=math.nan, named={"a": math.nan}) == [("maybe", 0), ("named.a", 0)]


def test_a_value_beyond_its_limit_is_reported_once() -> None:
    assert found(one=0.45) == [("one", 0.4)]
    assert found(one=7.0) == [("one", 0.5)]


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("0", "1"), ("1e30", str(MOST_TOKENS)), ("1e400", "1"), ("9" * 400, "1"), ("nan", "1")],
)
def test_a_number_of_tokens_is_finite_and_at_least_one(text: str, nearest: str) -> None:
    assert found(count=text) == [("count", nearest)]
    assert found(count="1000T", warmup="0") == []


@pytest.mark.parametrize("text", ["101%", "9" * 400 + "%", "1e400", "inf%", "-1%", "2000T", ""])
def test_a_place_in_a_run_is_finite_and_within_it(text: str) -> None:
    assert [path for path, _ in found(place=text)] == ["place"]
    assert found(place="100%") == []


@pytest.mark.parametrize("text", ["", " ", "a\0b", "a" * 201, "b/" + "a" * 300, "ü" * 150])
def test_a_path_is_a_name_that_a_file_system_takes(text: str) -> None:
    (path, nearest), *more = found(folder=text)
    assert (path, more) == ("folder", [])
    assert found(folder=nearest) == []


def test_a_path_may_be_long_where_its_names_are_not() -> None:
    assert found(folder="a/" * 400) == []
    assert found(folder="a/" * 4000) == [("folder", "a")]
    assert found(name="a" * 200) == []
    assert found(name="a" * 300) == [("name", "a" * 200)]


def plain_numbers(hint: Any) -> bool:
    """Tell whether a type has a number in it that no limit stands beside."""
    if get_origin(hint) is Annotated:
        return False
    return hint in (int, float) or any(plain_numbers(inner) for inner in get_args(hint))


def sections(schema: Any) -> Iterator[Any]:
    """Yield a schema and all that are inside it."""
    yield schema
    for hint in get_type_hints(schema).values():
        for inner in (hint, *get_args(hint)):
            if hasattr(inner, "__dataclass_fields__"):
                yield from sections(inner)


def test_every_number_of_every_schema_has_limits() -> None:
    without = [
        f"{section.__name__}.{one.name}"
        for section in {inner for schema in SCHEMAS.values() for inner in sections(schema)}
        for one in fields(section)
        if plain_numbers(get_type_hints(section, include_extras=True)[one.name])
    ]
    assert without == []


def refused(*lines: str, job: str = "train") -> dict[str, Problem]:
    with pytest.raises(ConfigError) as error:
        compose(job, lines)
    return {problem.path: problem for problem in error.value.problems}


def test_values_of_a_yaml_file_are_checked_like_those_of_the_command_line(tmp_path: Any) -> None:
    (tmp_path / "experiment").mkdir()
    text = (
        "# @package _global_\ndefaults: [tiny_cpu]\n"
        "schedule: {peak_lr: .nan}\noptimizer: {eps: 0, beta2: .inf}\n"
        "objective: {mtp_loss_scale: -.inf}\nmodel: {init_std: 1e400}\n"
        "train: {phases: [{name: '', constant_lr: .nan}, {name: b, start: .inf}]}\n"
    )
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    found = refused(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert {path: problem.nearest for path, problem in found.items()} == {
        "schedule.peak_lr": 0,
        "optimizer.eps": 1e-30,
        "optimizer.beta2": 0.999999,
        "objective.mtp_loss_scale": 0,
        "model.init_std": 10,
        "train.phases.0.name": None,
        "train.phases.0.constant_lr": 0,
        "train.phases.1.start": "50%",
    }


@pytest.mark.parametrize(
    ("line", "path", "nearest"),
    [
        ("train.seed=1e400", "train.seed", 2**64 - 1),
        ("train.seed=-inf", "train.seed", 0),
        ("train.seed=nan", "train.seed", 1234),
        ("train.seed=", "train.seed", 1234),
        ("train.seed=-2.5", "train.seed", 0),
        ("runtime.threads=1e9", "runtime.threads", 1024),
        ("runtime.threads=1000000000", "runtime.threads", 1024),
        ("schedule.peak_lr=fast", "schedule.peak_lr", 1e-3),
        ("train.global_batch=[1]", "train.global_batch", 4),
        ("model.vocab_size=", "model.vocab_size", "null"),
        ("profile.ranks=3", "profile.ranks", "[3]"),
        ("profile.ranks=[0,-1]", "profile.ranks.1", 0),
        ("train.tokens=0", "train.tokens", "1"),
        ("run_dir=" + "a" * 300, "run_dir", "a" * 200),
        ("train.phases=[{name: a, constant_lr: nan}]", "train.phases.0.constant_lr", 0),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_nearest_value_keeps_the_limits(line: str, path: str, nearest: object) -> None:
    assert refused(TINY, line)[path].nearest == nearest


def of(problems: Iterator[Problem]) -> list[tuple[str, object]]:
    return [(problem.path, problem.nearest) for problem in problems]


def test_what_is_off_at_0_has_a_smallest_value_beside_it() -> None:
    cold = GenerateJob(checkpoint="a", temperature=1e-40)
    assert of(collect(cold)) == [("temperature", 0)]
    assert of(collect(Runtime(hang_timeout_s=0.5))) == [("hang_timeout_s", 5)]
    assert of(collect(GenerateJob(checkpoint="a", temperature=1e-4))) == []
    assert of(collect(Runtime(hang_timeout_s=0))) == []


def test_a_time_that_no_machine_counts_is_refused() -> None:
    for text in ("9" * 5000, f"{'9' * 5000}-00", f"{'9' * 5000}:00", "nan", "inf", ""):
        assert [path for path, _ in of(collect(Cluster(time_limit=text)))] == ["time_limit"]


@pytest.mark.parametrize("job", ["data_tokenize", "data_count", "data_merge"])
def test_an_input_is_a_name_that_a_file_system_takes(job: str) -> None:
    lines = {"data_tokenize": ["output=a", "tokenizer=b"], "data_merge": ["output=a"]}
    name = "b/" + "a" * 300
    found = refused(f"input={name},setup.py", *lines.get(job, []), job=job)
    assert found["input"].value == name


def test_rules_across_sections_are_tried_with_the_parts_of_lists_mended() -> None:
    lines = ("data=streams", "data.blend.copy=inf", "train.phases=[{name: a, blend: {sums: -1}}]")
    assert refused(TINY, *lines).keys() == {"data.blend.copy", "train.phases.0.blend.sums"}


def test_a_phase_takes_the_limits_of_what_it_changes() -> None:
    bad = Phase(name="a", tensor=0, sequence_length=2**40, blend={"x": math.nan})
    assert [problem.path for problem in collect(bad)] == ["blend.x", "sequence_length", "tensor"]
