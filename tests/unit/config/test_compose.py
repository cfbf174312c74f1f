import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from hybrid_train.config import registry
from hybrid_train.config.compose import compose, draft, group_names
from hybrid_train.config.frozen import freeze, load, read_frozen, to_yaml
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.optimizer import AdamW, Cosine, Wsd
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.runtime import Device
from tests.sampled import sampled

EXPERIMENTS = sorted(file.stem for file in (conf_dir() / "experiment").glob("*.yaml"))
SAMPLED = ("quickstart", "nemotron3_super")  # of all others tests/conf composes what they say
QUICKSTART = "experiment=quickstart"


def problems(*lines: str, job: str = "train") -> dict[str, Problem]:
    """Compose what cannot run; return the problems by path."""
    with pytest.raises(ConfigError) as error:
        compose(job, lines)
    return {problem.path: problem for problem in error.value.problems}


@pytest.mark.parametrize(
    "name",
    sampled(EXPERIMENTS, *SAMPLED),
)
@pytest.mark.parametrize("line", ["schedule=cosine", "data=files", "model=tiny"])
def test_an_experiment_leaves_the_choice_of_other_parts_open(name: str, line: str) -> None:
    assert draft("train", [f"experiment={name}", line]).problems == []


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_a_frozen_config_is_read_back_equal(schedule: str, tmp_path: Path) -> None:
    job = compose("train", [QUICKSTART, f"schedule={schedule}", "train.tokens=200k"])
    freeze(job, tmp_path / "run")
    assert load(tmp_path / "run") == job
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "format.json"}


def test_a_choice_of_a_group_gives_its_own_class() -> None:
    job = compose("train", [QUICKSTART, "schedule=cosine", "schedule.final_lr_ratio=0.5"])
    assert type(job.schedule) is Cosine
    assert job.schedule.final_lr_ratio == 0.5
    assert type(job.data) is Quickstart


def test_phases_of_the_schedule_follow_the_length_of_training() -> None:
    schedule = compose("train", [QUICKSTART, "schedule=wsd", "train.tokens=2M"]).schedule
    assert isinstance(schedule, Wsd)
    assert (schedule.warmup_tokens, schedule.decay_tokens) == ("40000", "400000")


def test_lengths_stay_as_they_are_written() -> None:
    assert compose("train", [QUICKSTART, "train.tokens=1e6"]).train.tokens == "1e6"
    assert compose("train", [QUICKSTART, "train.tokens=300000"]).train.tokens == "300000"


def test_plus_signs_only_name_settings_that_exist() -> None:
    assert compose("train", [QUICKSTART, "++train.seed=7"]).train.seed == 7
    assert problems(QUICKSTART, "+trian.seed=7")["trian.seed"].nearest == "train.seed=7"


def test_every_problem_is_reported_at_once() -> None:
    found = problems(
        QUICKSTART,
        "model=quikstart",
        "trian.tokens=1",
        "parallel.tensor=two",
        "optimizer.beta1=3",
        "run_dir=a,b",
        "lonely",
    )
    assert found["model"].nearest == "quickstart"
    assert found["trian.tokens"].nearest == "train.tokens=1"
    assert found["parallel.tensor"].rule == "must be a whole number"
    assert found["optimizer.beta1"].nearest == 0.999999
    assert found["run_dir"].nearest == """'run_dir="a,b"'"""
    assert found["lonely"].rule == "write settings as KEY=VALUE"
    assert len(found) == 6


@pytest.mark.parametrize(
    ("line", "path", "rule"),
    [
        ("schedule.decay_shape=linaer", "schedule.decay_shape", "must be one of linear, cosine"),
        ("parallel.sequence=yess", "parallel.sequence", "must be true or false"),
        ("schedule.peak_lr=fast", "schedule.peak_lr", "must be a number"),
        ("train.seed=1.5", "train.seed", "must be a whole number"),
        ("train.seed=null", "train.seed", "must be a whole number"),
        ("model.moe=3", "model.moe", "is a section"),
        ("~train.seed", "train.seed", "cannot be removed"),
        ("train.seed=1,2", "train.seed", "several values need --multirun"),
        ("schedule.kind=cosine", "schedule.kind", "is set by the choice of schedule"),
        ("optimizer.beta3=1", "optimizer.beta3", "there is no such setting"),
        ("train.tokens=soon", "train.tokens", "must be a number of tokens"),
        ("train.sequence_length=0", "train.sequence_length", "must be at least 1"),
        ("parallel.tensor=0", "parallel.tensor", "must be at least 1"),
        ("run_dir=${nowhere}", "run_dir", "nowhere"),
    ],
)
def test_a_wrong_override_is_refused_with_its_path_and_rule(
    line: str, path: str, rule: str
) -> None:
    assert rule in problems(QUICKSTART, "schedule=wsd", line)[path].rule


def test_a_setting_of_another_choice_is_named_as_such() -> None:
    found = problems(QUICKSTART, "schedule=cosine", "schedule.decay_tokens=1k")
    rule = "schedule=cosine has no such setting; schedule=wsd has"
    assert found["schedule.decay_tokens"].rule == rule


def test_without_an_experiment_all_missing_values_are_listed() -> None:
    with pytest.raises(ConfigError, match="hybrid-train experiments") as error:
        compose("train", ["parallel.expert=0"])
    found = {problem.path: problem.rule for problem in error.value.problems}
    (unset,) = (path for path, rule in found.items() if rule == "are not set")
    assert {"train.tokens", "model.pattern", "schedule.peak_lr"} < set(unset.split(", "))
    assert found["parallel.expert"] == "must be at least 1"


def own_experiment(folder: Path, text: str) -> list[str]:
    """Write an experiment into a folder of the user's own; return the overrides that find it."""
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    return [f"hydra.searchpath=[file://{folder}]", "experiment=mine"]


def test_experiments_of_ones_own_may_lie_elsewhere(tmp_path: Path) -> None:
    lines = own_experiment(tmp_path, "defaults: [quickstart]\ntrain: {seed: 7}\n")
    job = compose("train", lines)
    assert (job.train.seed, job.model.hidden_size) == (7, 128)


@pytest.mark.parametrize(
    ("text", "path", "rule"),
    [
        ("\ntrian: {tokens: 1}\n", "trian", "mine.yaml, line 3: there is no such setting"),
        ("train:\n  tokns: 1\n", "train.tokns", "mine.yaml, line 3: there is no such setting"),
        ("train: {phases: [{nme: 1}]}\n", "nme", "mine.yaml: there is no such setting"),
        ("defaults: [tiny_cpu]\ntrain: null\n", "train", "mine.yaml, line 3: field 'train'"),
        ("train: {seed: x}\n", "train.seed", "mine.yaml, line 2: Value 'x' of type 'str' could"),
        ("train: {tokens: '${run_dir}'}\nrun_dir: ${train.tokens}", "train.tokens", "line 2"),
    ],
)
def test_a_setting_that_does_not_fit_is_told_with_its_file_and_line(
    tmp_path: Path, text: str, path: str, rule: str
) -> None:
    assert rule in problems(*own_experiment(tmp_path, text))[path].rule


def test_prompts_are_taken_as_they_stand(tmp_path: Path) -> None:
    texts = ["def f(x: int):\n", "a, {b} = 'c'", "-x"]
    lines = [f"checkpoint={tmp_path}", *(f"prompt={text}" for text in texts), "top_k=5"]
    job = compose("generate", lines)
    assert job.prompt == texts
    assert job.top_k == 5


@pytest.mark.parametrize("key", ["prompt", "messages", "stop"])
def test_a_dollar_in_a_prompt_names_no_setting(tmp_path: Path, key: str) -> None:
    texts = ["${x}", "$HOME", "${oc.env:HOME}", r"\${top_k} \\${", "$${", "a${b", "???", "a\\"]
    given = [] if key == "prompt" else ["prompt=a"]
    lines = [f"checkpoint={tmp_path}", *given, *(f"{key}={text}" for text in texts)]
    assert getattr(compose("generate", lines), key) == texts


def test_generation_names_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    found = problems(f"checkpoint={tmp_path}/quikstart", job="generate")
    assert found["checkpoint"].nearest == f"{tmp_path}/quickstart"
    assert "prompt" in found


def test_a_folder_without_a_config_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        load(tmp_path)


def test_a_frozen_config_that_does_not_fit_says_where(tmp_path: Path) -> None:
    text = to_yaml(compose("train", [QUICKSTART]))
    (tmp_path / "config.yaml").write_text(text.replace("peak_lr", "peek_lr"))
    with pytest.raises(ConfigError, match=r"schedule\.peek_lr"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text(text.replace("kind: cosine", "kind: zigzag"))
    with pytest.raises(ConfigError, match="must be one of constant, cosine, wsd"):
        load(tmp_path)


@pytest.mark.parametrize(
    "data", ["run_dir: läuft".encode("latin-1"), b"\xff\xfer\x00", b"\xef\xbb\xbf"]
)
def test_a_frozen_config_that_is_no_text_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(data)
    for read in (load, read_frozen):
        with pytest.raises(UserError, match=r"config\.yaml, line 1: "):
            read(tmp_path)


def test_a_conf_folder_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_TRAIN_CONF", str(tmp_path))
    with pytest.raises(UserError, match="HYBRID_TRAIN_CONF") as error:
        conf_dir()
    assert str(tmp_path) in str(error.value)


def test_every_yaml_file_says_in_a_line_what_it_is() -> None:
    for file in conf_dir().rglob("*.yaml"):
        comments = [
            line
            for line in file.read_text().splitlines()[:2]
            if line.startswith("# ") and "@package" not in line
        ]
        assert comments, file
        assert len(comments[0]) <= 100, file


@pytest.mark.slow
def test_every_choice_of_every_group_composes() -> None:
    # Experiments choose for themselves: tests/conf.
    groups = [group for group in group_names("train") if group not in ("data", "experiment")]
    choices = {g: sorted(f.stem for f in (conf_dir() / g).glob("*.yaml")) for g in groups}
    for turn in range(max(map(len, choices.values()))):
        lines = [f"{group}={names[turn % len(names)]}" for group, names in choices.items()]
        assert draft("train", [QUICKSTART, *lines]).problems == []


def test_every_schema_names_its_own_kind() -> None:
    for (group, kind), schema in registry.SCHEMAS.items():
        if kind != "base" and group != "job":
            assert schema.__dataclass_fields__["kind"].default == kind


def test_composing_needs_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from hybrid_train.config.compose import compose\n"
        "import hybrid_train.jobs.cli\n"
        "compose('train', ['experiment=quickstart'])\n"
        "assert not {'torch', 'megatron', 'numpy'} & set(sys.modules)\n"
    )
    path = os.pathsep.join([str(conf_dir().parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_the_device_is_read_by_name() -> None:
    assert compose("train", [QUICKSTART, "runtime.device=cpu"]).runtime.device is Device.cpu


def test_what_is_done_to_a_config_reaches_no_later_one() -> None:
    registry.register("train")
    store = ConfigStore.instance()
    assert copy.deepcopy(store) is store  # Hydra asks for one twice a composition
    name = "schema/optimizer/adamw.yaml"
    store.load(name).node.beta1 = 0.125
    assert store.load(name).node.beta1 == AdamW().beta1
