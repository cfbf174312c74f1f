"""Values with letters that Hydra takes for its own: taken where they mean one thing."""

import shlex

import pytest

from hybrid_train.config.compose import compose
from hybrid_train.config.overrides import parse
from hybrid_train.jobs import multirun
from hybrid_train.schema.problems import ConfigError, Problem

QUICKSTART = "experiment=quickstart"


def problem(*lines: str) -> Problem:
    with pytest.raises(ConfigError) as refused:
        compose("train", [QUICKSTART, *lines])
    (found,) = refused.value.problems
    return found


@pytest.mark.parametrize(
    "text",
    [
        "out/läuft",
        "lr=3e-4",
        "my run (2)",
        "o'brien/a",
        "a#b",
        "[a]",
        "{x}",
        "C:\\run;1",
        "a&b",
        "1,5",
    ],
    ids=lambda text: text[:20],
)
def test_text_is_taken_as_it_stands_or_in_the_form_that_the_message_names(text: str) -> None:
    line = f"run_dir={text}"
    if "," in text:
        found = problem(line)
        assert "--multirun" in found.rule
        (line,) = shlex.split(str(found.nearest))
    assert compose("train", [QUICKSTART, line]).run_dir == text


def test_a_path_at_home_is_the_same_from_every_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere/me")
    lines = ["run_dir=~/runs/x", "data=files", "data.train=[~/a, b~/c]"]
    with pytest.raises(ConfigError) as refused:
        compose("train", [QUICKSTART, *lines])
    values = [str(one.value) for one in refused.value.problems]
    assert "/somewhere/me/a" in values
    assert "b~/c" in values
    assert compose("train", [QUICKSTART, lines[0]]).run_dir == "/somewhere/me/runs/x"


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("[läuft,b=1]", ["läuft", "b=1"]),
        ("[ a#1 , b ]", ["a#1", "b"]),
        ('["a,b","c"]', ["a,b", "c"]),
        ("[{name: später, start: 80%}]", [{"name": "später", "start": "80%"}]),
        ("[[ä,1],[2]]", [["ä", 1], [2]]),
    ],
)
def test_texts_of_a_list_are_taken_one_by_one(value: str, read: list[object]) -> None:
    override = parse(f"data.train={value}")
    assert not isinstance(override, Problem)
    assert override.value() == read


@pytest.mark.parametrize("value", ['"a', "'a' b=", "[a(b,c)=]", '["a,=b]'])
def test_what_may_mean_two_things_is_refused_with_a_form_that_works(value: str) -> None:
    found = parse(f"run_dir={value}")
    assert isinstance(found, Problem)
    (line,) = shlex.split(str(found.nearest))
    override = parse(line)
    assert not isinstance(override, Problem)
    assert override.value() == value


def test_a_sweep_takes_such_letters_too() -> None:
    lines = [QUICKSTART, "train.seed=1,2", "run_dir=läuft=1"]
    words = [one.words for one in multirun.runs("train", lines)]
    assert [one[-1] for one in words] == [f'run_dir="läuft=1/seed={n}"' for n in (1, 2)]
    assert multirun.combinations(["a.b=ä,c=1"]) == [['a.b="ä"'], ['a.b="c=1"']]


@pytest.mark.parametrize(
    ("line", "path", "rule"),
    [
        ("train.seed=1e400", "train.seed", "must be a whole number"),
        ("model.rope=1", "model.rope", "there is no such setting"),
        ("modle=[1,2", "modle", "there is no such setting"),
        ("a..b=1", "a..b", "there is no such setting"),
        ("läuft=1", "läuft", "there is no such setting"),
        ("~nothing", "nothing", "there is no such setting"),
        ("optimizer.no_decay=[norms", "optimizer.no_decay", "must be a list"),
        ("optimizer.no_decay=norms", "optimizer.no_decay", "must be a list"),
        ("train.phases=" + "[" * 20_000, "train.phases", "too many brackets"),
        ("train.phases.0.name=x", "train.phases.0.name", "there is no such setting"),
        ("=x", "=x", "write settings as KEY=VALUE"),
        (".a=1", ".a=1", "write settings as KEY=VALUE"),
        ("++", "++", "write settings as KEY=VALUE"),
        ("", '""', "write settings as KEY=VALUE"),
        ("model=null", "model", "must be one of"),
        ("model=", "model", "must be one of"),
        ("model@x=tiny", "model@x", "has one place"),
        ("experiment=quickstart,tiny_cpu", "experiment", "several choices need --multirun"),
        ("train.seed=1,2", "train.seed", "several values need --multirun"),
    ],
    ids=lambda text: text[:40],
)
def test_one_mistake_is_one_line(line: str, path: str, rule: str) -> None:
    found = problem(line)
    assert len(str(found)) < 1000
    assert found.path == path
    assert rule in found.rule


def test_a_misspelt_group_is_the_only_problem() -> None:
    with pytest.raises(ConfigError) as refused:
        compose("train", ["experimnt=quickstart"])
    (found,) = refused.value.problems
    assert found.nearest == "experiment=quickstart"


def test_an_unknown_key_offers_a_setting_for_a_value_and_a_section_for_a_section() -> None:
    assert problem("model.mo=1").nearest is None
    assert problem("model.mo={top_k: 1}").nearest == "'model.moe={top_k: 1}'"
    assert problem("model.hiden_size=1").nearest == "model.hidden_size=1"


@pytest.mark.parametrize(
    ("entry", "rule", "near"),
    [
        ("{gemm: [wgrad], format: bf16}", "no setting gemm; it has format", "gemms: [wgrad]"),
        ("{gemms: [wgard], format: bf16}", "wgard must be one of fprop, dgrad", "[wgrad]"),
        ("{format: bf61}", "bf61 must be one of fp32, bf16", "{format: bf16}"),
        ("{gemms: wgrad, format: bf16}", "must be a list, such as [a]", None),
        ("{products: [wgrad], format: bf16}", "no setting products; it has format", None),
    ],
)
def test_a_wrong_entry_of_a_list_is_told_in_words(entry: str, rule: str, near: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        compose("train", ["experiment=tiny_cpu", f"precision.exceptions=[{entry}]"])
    (problem,) = error.value.problems
    assert rule in problem.rule
    assert (near is None) == (problem.nearest is None)
    assert near is None or near in str(problem.nearest)


@pytest.mark.parametrize("line", ["experiment=quikstart", "precision=fp9", "precisoin=nvfp4"])
def test_a_wrong_choice_of_a_check_is_told_in_words(line: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose("check", ["experiment=tiny_cpu", line])
    assert line.partition("=")[0] in str(error.value)


def test_settings_of_a_section_that_is_left_out_make_the_section() -> None:
    assert compose("check", ["experiment=tiny_cpu"]).cluster is None
    words = ["cluster.gpus_per_node=0", "cluster.processes_per_node=1", "cluster.nodes=2"]
    cluster = compose("check", ["experiment=tiny_cpu", *words]).cluster
    assert cluster is not None
    assert (cluster.gpus_per_node, cluster.processes_per_node, cluster.nodes) == (0, 1, 2)
    assert cluster.time_limit == "1-00:00:00"  # all else is the default
