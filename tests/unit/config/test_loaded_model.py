"""The model of a run that starts from the weights of another."""

import copy
import shutil
from pathlib import Path

import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.config.compose import compose, draft
from hybrid_train.config.frozen import freeze, run_of
from hybrid_train.jobs.run_folder import require_same_model
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.train import TrainJob

TINY = "experiment=tiny_cpu"
PATTERN = "MM|*-"


@pytest.fixture
def saved(tmp_path: Path) -> TrainJob:
    """The config of a run whose model no experiment has, in RUN of a folder."""
    job = compose("train", [TINY, "model=tiny", "model.pattern=MM*-", "parallel.pipeline=1"])
    job.model.hidden_size, job.model.vocab_size, job.model.norm_eps = 48, 601, 1e-6
    job.model.pattern = PATTERN  # it was trained in two stages
    freeze(job, tmp_path / "run")
    layout.path_of(tmp_path / "run", 7).mkdir(parents=True)
    return job


@pytest.fixture
def load(saved: TrainJob, tmp_path: Path) -> list[str]:
    """The words that start a run from those weights."""
    return [TINY, f"checkpoint.load={tmp_path / 'run'}", "checkpoint.load_only=weights"]


def uncut(job: TrainJob) -> Model:
    model = copy.deepcopy(job.model)
    model.pattern = model.pattern.replace("|", "")
    return model


def problems(*lines: str) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as error:
        compose("train", lines)
    found = {problem.path: problem for problem in error.value.problems}
    assert len(found) == len(error.value.problems)
    return found


@pytest.mark.parametrize(
    ("experiment", "place"),
    [
        (TINY, "run"),
        ("experiment=ladder_3m", "run/checkpoints/step_00000007"),
        ("data=streams", "run"),
    ],
)
def test_the_model_is_that_of_the_run_whatever_the_experiment_says(
    saved: TrainJob, load: list[str], tmp_path: Path, place: str, experiment: str
) -> None:
    lines = [experiment, f"checkpoint.load={tmp_path / place}", *load[2:]]
    assert draft("train", lines).config.model == uncut(saved)


@pytest.mark.parametrize("place", ["run", "run/", "run/checkpoints/step_00000007"])
def test_the_model_comes_from_behind_a_url_too(
    saved: TrainJob, load: list[str], tmp_path: Path, place: str
) -> None:
    lines = [TINY, f"checkpoint.load=file://{tmp_path}/{place}", *load[2:]]
    assert draft("train", lines).config.model == uncut(saved)


@pytest.mark.parametrize(
    ("url", "run"),
    [
        ("s3://b/a/checkpoints/step_00000007", "s3://b/a"),
        ("s3://b/a/checkpoints/step_00000007/", "s3://b/a"),
        ("s3://b/a/", "s3://b/a"),
        ("s3://checkpoints/a", "s3://checkpoints/a"),  # a bucket of that name
        ("s3://b/checkpoints/step", "s3://b/checkpoints/step"),
    ],
)
def test_the_run_is_told_from_its_checkpoint(url: str, run: str) -> None:
    assert run_of(url) == run


def test_a_url_without_a_run_is_refused_and_so_is_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other/config.yaml does not exist; checkpoint.load must"):
        compose("train", [TINY, f"checkpoint.load=file://{tmp_path}/other"])
    found = problems(TINY, "checkpoint.load=s3://")
    assert "must be the URL of a folder" in str(found["checkpoint.load"])


def test_a_whole_checkpoint_brings_its_model_too(saved: TrainJob, load: list[str]) -> None:
    assert compose("train", load[:2]).model == uncut(saved)


@pytest.mark.parametrize("first", [True, False])
def test_what_the_command_line_says_of_the_model_stays(
    saved: TrainJob, load: list[str], first: bool
) -> None:
    own = ["model.pattern=MM*-/*-", "model.norm_eps=1e-3"]
    model = compose("train", [*own, *load] if first else [*load, *own]).model
    expected = uncut(saved)
    expected.pattern, expected.norm_eps = "MM*-/*-", 1e-3
    assert model == expected


def test_a_model_that_is_chosen_by_name_stays(load: list[str]) -> None:
    assert compose("train", [*load, "model=ladder_3m"]).model.hidden_size != 48


def test_a_setting_that_does_not_fit_is_reported_once(load: list[str]) -> None:
    assert list(problems(*load, "model.hiden_size=3")) == ["model.hiden_size"]


def test_a_vocabulary_that_the_weights_lack_is_one_of_the_data(load: list[str]) -> None:
    problem = problems(*load, "data.vocab_size=700")["data.vocab_size"]
    assert (problem.value, problem.nearest) == (700, 601)


def test_a_folder_that_is_no_run_is_the_one_problem(load: list[str], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run")
    found = problems("data=streams", "train.tokens=1k", *load[1:])
    assert str(found["checkpoint.load"]).endswith("there is no such folder")
    assert not any(path.startswith("model") for path in found)
    (tmp_path / "run").mkdir()
    found = problems("data=streams", "train.tokens=1k", *load[1:])
    assert "is no run folder, nor a checkpoint of one" in str(found["checkpoint.load"])


def test_the_tokenizer_of_the_run_is_offered_where_the_data_needs_one(
    load: list[str], tmp_path: Path
) -> None:
    tokens, tokenizer = tmp_path / "tokens", tmp_path / "run" / layout.TOKENIZER
    for suffix in (".bin", ".idx"):
        tokens.with_suffix(suffix).touch()
    files = ["data=files", f"data.train=[{tokens}]"]
    assert problems(*load, *files)["data.tokenizer"].nearest is None
    tokenizer.mkdir()
    assert problems(*load, *files)["data.tokenizer"].nearest == str(tokenizer)


def found_in(run_dir: Path) -> layout.Found:
    return layout.Found(layout.path_of(run_dir, 7), 7)


def test_a_contradiction_is_refused_by_name(
    saved: TrainJob, load: list[str], tmp_path: Path
) -> None:
    job = compose("train", [*load, "model.hidden_size=96", "model.mamba.state_size=32"])
    with pytest.raises(UserError) as error:
        require_same_model(job, found_in(tmp_path / "run"))
    lines = str(error.value).splitlines()[1:]
    state = saved.model.mamba.state_size
    assert lines == [
        "  model.hidden_size: 48 there, 96 here",
        f"  model.mamba.state_size: {state} there, 32 here",
    ]


@pytest.mark.parametrize(
    ("pattern", "unused"),
    [("MM*-", "moe.top_k=1"), ("E*", "mamba.groups=1"), ("M-", "attention.head_dim=4")],
)
def test_sizes_of_layers_that_a_model_lacks_are_no_difference(
    saved: TrainJob, load: list[str], tmp_path: Path, pattern: str, unused: str
) -> None:
    saved.model.pattern = pattern
    freeze(saved, tmp_path / "run")
    require_same_model(compose("train", [*load, f"model.{unused}"]), found_in(tmp_path / "run"))


def test_weights_alone_may_go_on_with_other_rotary_positions(
    saved: TrainJob, load: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As long phases of Transformers do: no weight says how fast its heads were turned."""
    saved.model.attention.rope.theta = 10_000
    freeze(saved, tmp_path / "run")
    slower = "model.attention.rope.theta=160000"
    require_same_model(compose("train", [*load, slower]), found_in(tmp_path / "run"))
    assert "rope.theta: 10000.0 there, 160000.0 here" in caplog.text
    whole = compose("train", [*load[:-1], slower])
    with pytest.raises(UserError, match=r"rope.theta: 10000.0 there, 160000.0 here"):
        require_same_model(whole, found_in(tmp_path / "run"))
