"""Every experiment composes and passes the checks on the processes that it states, without torch.

The comments of a recipe have a form of their own, so that they can be read by a program:
`# processes: N` and, until there are phases of data, `# phases:` with a YAML list below it.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrid_train.config.compose import compose, conf_dir
from hybrid_train.config.schema.schedule import Wsd
from hybrid_train.config.schema.train import TrainJob
from hybrid_train.config.units import tokens
from hybrid_train.model import counts

FILES = {file.stem: file for file in sorted((conf_dir() / "experiment").glob("*.yaml"))}
OWN_DATA = ("quickstart", "tiny_cpu")  # experiments that bring their data
RECIPES = [name for name in FILES if name not in OWN_DATA]
MODELS = {file.stem for file in (conf_dir() / "model").glob("*.yaml")}
GPU_BYTES = 80e9
PROCESSES = re.compile(r"^# processes: (\d+)", re.MULTILINE)
PHASES = re.compile(r"^# phases:\n((?:#   +.*\n)+)", re.MULTILINE)


def processes(name: str) -> int:
    """The number of processes that an experiment states."""
    stated = PROCESSES.search(FILES[name].read_text())
    assert stated, "state it: # processes: N"
    return int(stated[1])


def phases(name: str) -> list[dict[str, Any]]:
    """The phases that an experiment states."""
    stated = PHASES.search(FILES[name].read_text())
    assert stated, "state them: # phases:"
    listed = yaml.safe_load(re.sub(r"^#", "", stated[1], flags=re.MULTILINE))
    assert isinstance(listed, list)
    return listed


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Overrides that name token files and a tokenizer, as a user would."""
    for name in ("tokens.bin", "tokens.idx", "tokenizer.json"):
        (tmp_path / name).touch()
    return [f"data.train=[{tmp_path}/tokens]", f"data.tokenizer={tmp_path}"]


def composed(name: str, data: list[str], monkeypatch: pytest.MonkeyPatch) -> TrainJob:
    monkeypatch.setenv("WORLD_SIZE", str(processes(name)))
    return compose("train", [f"experiment={name}", *data])


@pytest.mark.parametrize("name", OWN_DATA)
def test_an_experiment_with_data_of_its_own_runs_as_it_is(name: str) -> None:
    assert compose("train", [f"experiment={name}"]).run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_the_checks_on_its_processes(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = composed(name, data, monkeypatch)
    assert job.run_dir == f"runs/{name}"


def test_every_named_model_has_a_recipe_of_the_same_name() -> None:
    assert MODELS - {"tiny"} == set(FILES) - {"tiny_cpu"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_into_its_gpus(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # bfloat16 weight, float32 gradient; master weight and two moments over the data-parallel ranks.
    # At most 40% of the memory, so that activations have the rest.
    job = composed(name, data, monkeypatch)
    plan, moe = job.parallel, job.model.moe
    assert job.model.vocab_size is not None
    total = counts.parameters(job.model, job.model.vocab_size).total
    routed = _expert_layers(job) * moe.experts * 2 * (moe.latent_size or job.model.hidden_size)
    routed *= moe.intermediate_size
    expert_tensor = plan.expert_tensor or plan.tensor
    split = {
        plan.tensor * plan.pipeline: total - routed,
        expert_tensor * plan.expert * plan.pipeline: routed,
    }
    needed = 0.0
    for ways, weights in split.items():
        replicas = processes(name) / ways
        needed += weights / ways * (2 + 4 + 12 / replicas)
    assert needed < 0.4 * GPU_BYTES


def _expert_layers(job: TrainJob) -> int:
    """Expert layers that hold weights: a repeated MTP block once."""
    main, *depths = job.model.pattern.split("/")
    return main.count("E") + (depths[0].count("E") if depths else 0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_phases_of_a_recipe_fill_its_tokens(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = composed(name, data, monkeypatch)
    known = {"name", "tokens", "data", "sequence_length", "mixed_with", "global_batch", "lr"}
    known |= {"tensor", "context", "expert", "pipeline"}
    base = 0
    for phase in phases(name):
        assert {"name", "tokens"} <= phase.keys() <= known
        if "sequence_length" not in phase:  # those with one of their own follow the run
            base += tokens(phase["tokens"])
    assert base == tokens(job.train.tokens)


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_blend_sums_to_a_hundred_percent(name: str) -> None:
    for phase in phases(name):
        parts = phase.get("data", {"all": 100}).values()
        # Published with one digit: each part may be off by 0.05.
        assert sum(parts) == pytest.approx(100, abs=0.05 * len(parts))


@pytest.mark.parametrize(
    ("name", "decay", "peak", "final"),
    [
        ("nemotron_h_8b", 3.6e12, 8e-4, 8e-6),
        ("nemotron_h_56b", 3.6e12, 8e-4, 8e-6),
        ("nemotron_nano_v2_12b", 3.6e12, 4.5e-4, 4.5e-6),
        ("nemotron3_nano", 5e12, 1e-3, 1e-5),
        ("nemotron3_super", 5e12, 4.5e-4, 4.5e-6),
        ("nemotron3_ultra", 5e12, 2.5e-4, 2.5e-6),
    ],
)
def test_the_rate_stays_and_decays_as_published(
    name: str, decay: float, peak: float, final: float, data: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    schedule = composed(name, data, monkeypatch).schedule
    assert isinstance(schedule, Wsd)
    assert tokens(schedule.decay_tokens) == decay
    assert schedule.peak_lr == peak
    assert schedule.peak_lr * schedule.final_lr_ratio == pytest.approx(final)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("ladder")])
def test_a_rung_follows_the_rules_of_the_ladder(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = composed(name, data, monkeypatch)
    assert job.model.vocab_size is not None
    count = counts.parameters(job.model, job.model.vocab_size)
    size = tokens(name.removeprefix("ladder_").replace("m", "M").replace("b", "B"))
    assert count.total == pytest.approx(size, rel=0.05)  # the name
    assert tokens(job.train.tokens) / count.active == pytest.approx(20, rel=0.1)
    rate = 3e-3 * (128 / job.model.hidden_size) ** 0.5
    assert job.schedule.peak_lr == pytest.approx(rate, rel=0.05)  # written with two digits
