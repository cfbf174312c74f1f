"""Every experiment composes and passes the checks on the processes that it states, without torch.

A comment of a recipe has a form of its own, to be read by a program: `# processes: N`.
"""

import re
from pathlib import Path

import pytest

from hybrid_train.anatomy import counts
from hybrid_train.config.compose import compose, conf_dir
from hybrid_train.planning.phases import PhaseSpan, lay_out
from hybrid_train.schema.objective import Distill
from hybrid_train.schema.optimizer import Schedule, Wsd
from hybrid_train.schema.problems import ConfigError
from hybrid_train.schema.train import Phase, TrainJob
from hybrid_train.schema.units import tokens

FILES = {file.stem: file for file in sorted((conf_dir() / "experiment").glob("*.yaml"))}
OWN_DATA = (
    "quickstart",
    "tiny_cpu",
    "parent_hybrid",
    "parent_sums",
    "parent_dense",
    "student_hybrid",
    "child_hybrid",
)  # experiments that bring their data
RECIPES = [name for name in FILES if name not in OWN_DATA]
MODELS = {file.stem for file in (conf_dir() / "model").glob("*.yaml")}
GPU_BYTES = 80e9
TAUGHT = [name for name in FILES if "_distilled" in name]  # they need a teacher
CORRECTED = [name for name in FILES if name.endswith("_corrected")]  # teachers that train on
BLENDED = ("nemotron3_nano", "nemotron3_super", "nemotron3_ultra")  # with published weights
LENGTHS = {"ladder": 2048} | dict.fromkeys(("nemotron4", "minitron", "qwen", "phi4"), 4096)
PROCESSES = re.compile(r"^# processes: (\d+)", re.MULTILINE)
LONG = {  # published tokens and sequence length of the last phases
    "nemotron_nano_v2_12b": {"long": (18.9e9, 524288)},
    "nemotron_nano_v2_9b": {"long": (2.5e9, 524288)},
    "nemotron_nano_v2_9b_distilled_base": {"long": (2.5e9, 524288)},
    "nemotron_nano_v2_9b_distilled": {"48k": (25e9, 49152), "256k": (1e9, 262144)},
    "nemotron_nano_v2_9b_distilled_long": {"": (0.4e9, 262144)},
    "nemotron3_nano_4b": {"long": (150e9, 49152)},
    "nemotron3_nano": {"long": (121e9, 524288)},
    "nemotron3_super": {"long": (34e9, 1048576), "mixed": (17e9, 1048576)},
    "nemotron3_ultra": {"long": (33e9, 1048576)},
}
SHORT = {  # published tokens of the phases before
    "nemotron_h_8b": {"diverse": 9e12, "better": 3e12, "best": 2.62e12, "final": 380e9},
    "nemotron_h_56b": {"diverse": 12e12, "better": 4e12, "best": 3.62e12, "final": 380e9},
    "nemotron_nano_v2_12b": {"1": 12e12, "2": 6e12, "3": 2e12},
    "nemotron_nano_v2_9b": {"narrowed": 360e9},
    "nemotron_nano_v2_9b_distilled_base": {"narrowed": 360e9},
    "nemotron_nano_v2_9b_distilled_depth": {"shortened": 60e9},
    "nemotron_nano_v2_9b_distilled": {"narrowed": 50e9},
    "nemotron_nano_v2_9b_distilled_long": {},
    "nemotron3_nano_4b": {"short": 63e9},
    "nemotron3_nano": {"1": 23.5e12, "2": 1.5e12},
    "nemotron3_super": {"1": 20e12, "2": 5e12},
    "nemotron3_ultra": {"1": 15e12, "2": 5e12},
}


def processes(name: str) -> int:
    """The number of processes that an experiment states."""
    stated = PROCESSES.search(FILES[name].read_text())
    assert stated, "state it: # processes: N"
    return int(stated[1])


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Overrides that name token files and a tokenizer, as a user would."""
    for name in ("tokens.bin", "tokens.idx", "tokenizer.json"):
        (tmp_path / name).touch()
    return [f"data.train=[{tmp_path}/tokens]", f"data.tokenizer={tmp_path}"]


def composed(name: str, data: list[str], monkeypatch: pytest.MonkeyPatch) -> TrainJob:
    monkeypatch.setenv("WORLD_SIZE", str(processes(name)))
    return compose("train", [f"experiment={name}", *teacher(name), *data])


def teacher(name: str) -> list[str]:
    """The override that names a teacher, where an experiment has one; any folder will do."""
    return [f"objective.teacher={conf_dir()}"] if name in TAUGHT else []


def with_sources(name: str, data: list[str]) -> list[str]:
    """The same overrides with a source for every name in the blends of an experiment."""
    files, tokenizer = data
    prefix = files.removeprefix("data.train=")
    names = dict.fromkeys(blended for phase in drafted(name) for blended in phase.blend) or ["text"]
    sources = ", ".join(f"{one}: {{train: {prefix}}}" for one in names)
    return [f"data.sources={{{sources}}}", tokenizer]


def drafted(name: str) -> list[Phase]:
    """The phases of an experiment; a plan composes without data."""
    lines = [f"experiment={name}", *teacher(name), f"processes={processes(name)}"]
    return compose("check", lines).train.phases


@pytest.mark.parametrize("name", OWN_DATA)
def test_an_experiment_with_data_of_its_own_runs_as_it_is(name: str) -> None:
    assert compose("train", [f"experiment={name}"]).run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_the_checks_on_its_processes(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = composed(name, data, monkeypatch)
    assert job.run_dir == f"runs/{name}"
    assert not any(
        phase_span.job.data.blend for phase_span in lay_out(job)
    )  # one source, nothing to mix


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_mixes_the_sources_that_its_phases_name(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = composed(name, with_sources(name, data), monkeypatch)
    read = [phase_span.job.data.blend for phase_span in lay_out(job)]
    stated = [phase.blend for phase in job.train.phases]
    if name in BLENDED:
        assert read[:3] == stated[:3]
        assert all(read)
    elif any(stated):  # one blend for all phases
        assert read == [stated[0]] * len(read)
    else:  # by size
        assert not any(read)


def test_a_phase_without_a_blend_keeps_that_of_the_phase_before(
    data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "nemotron3_super"
    *_, long, mixed = lay_out(composed(name, with_sources(name, data), monkeypatch))
    assert mixed.job.data.blend == long.job.data.blend
    assert mixed.job.parallel == long.job.parallel


def test_a_source_that_a_blend_names_and_the_run_lacks_is_a_problem(data: list[str]) -> None:
    sources, tokenizer = with_sources("nemotron3_super", data)
    words = [sources.replace("code:", "cod:"), tokenizer, "processes=1024"]
    with pytest.raises(ConfigError, match=r"phases\.0\.blend\.code = 14.0: is no source"):
        compose("check", ["experiment=nemotron3_super", *words])


def test_every_named_model_has_a_recipe_of_the_same_name() -> None:
    assert MODELS - {"tiny"} == set(FILES) - {"tiny_cpu", *TAUGHT, *CORRECTED}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_into_its_gpus(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # bfloat16 weight, float32 gradient; master weight and two moments over the data-parallel ranks.
    # At most 40% of the memory, so that activations have the rest.
    for phase_span in lay_out(composed(name, data, monkeypatch)):
        assert _bytes_of_process(phase_span.job, processes(name)) < 0.4 * GPU_BYTES


def _bytes_of_process(job: TrainJob, number: int) -> float:
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
        replicas = number / ways
        needed += weights / ways * (2 + 4 + 12 / replicas)
    return needed


def _expert_layers(job: TrainJob) -> int:
    """Expert layers that hold weights: a repeated MTP block once."""
    main, *depths = job.model.pattern.split("/")
    return main.count("E") + (depths[0].count("E") if depths else 0)


def step_tokens(phase_span: PhaseSpan) -> int:
    train = phase_span.job.train
    return train.global_batch * train.sequence_length


@pytest.mark.parametrize("name", SHORT)
def test_phases_are_as_long_as_published(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {phase: count for phase, (count, _) in LONG.get(name, {}).items()}
    phase_spans = lay_out(composed(name, data, monkeypatch))
    found = {one.name: one.end - one.start for one in phase_spans}
    assert list(found) == [*SHORT[name], *long]
    # A phase begins and ends with a step, and a share of the run is written with six digits.
    slack = max(map(step_tokens, phase_spans)) + 1e-6 * 15e12 * (name == "nemotron_h_8b")
    for phase, wanted in (SHORT[name] | long).items():
        assert found[phase] == pytest.approx(wanted, abs=slack)


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_long_phases_change_the_length_of_a_sequence(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase_spans = lay_out(composed(name, data, monkeypatch))
    base = next((length for start, length in LENGTHS.items() if name.startswith(start)), 8192)
    lengths = {phase: length for phase, (_, length) in LONG.get(name, {}).items()}
    assert [one.job.train.sequence_length for one in phase_spans] == [
        lengths.get(one.name, base) for one in phase_spans
    ]


@pytest.mark.parametrize("name", ["nemotron_h_8b", "nemotron_h_56b"])
def test_a_scaled_run_keeps_its_phases(
    name: str, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = composed(name, [*data, "train.tokens=100B", "schedule.warmup_tokens=1B"], monkeypatch)
    total = sum(SHORT[name].values())
    for phase_span in lay_out(job):
        share = (phase_span.end - phase_span.start) / 100e9
        assert share == pytest.approx(SHORT[name][phase_span.name] / total, abs=2e-4)  # two steps


@pytest.mark.parametrize("name", BLENDED)
def test_a_published_blend_sums_to_a_hundred_percent(name: str) -> None:
    for phase in drafted(name):
        # Published with one digit: each part may be off by 0.05.
        if phase.blend:
            slack = 0.05 * len(phase.blend)
            assert sum(phase.blend.values()) == pytest.approx(100, abs=slack)


@pytest.mark.parametrize(
    ("name", "share", "others"),
    [
        ("nemotron3_nano", 0.79, {"long_document_qa": 20, "retrieval": 1}),
        ("nemotron3_super", 0.80, {"long_document_qa": 20}),
        ("nemotron3_ultra", 0.54, {"long_context": 46}),
    ],
)
def test_a_long_phase_mixes_the_second_phase_with_long_documents(
    name: str, share: float, others: dict[str, float]
) -> None:
    _, second, long, *_ = drafted(name)
    wanted = {source: share * weight for source, weight in second.blend.items()}
    assert long.blend == pytest.approx(wanted | others)


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
    phase_spans = lay_out(composed(name, data, monkeypatch))
    schedule = phase_spans[0].schedule
    assert isinstance(schedule, Wsd)
    assert tokens(schedule.decay_tokens) == decay
    assert schedule.peak_lr == peak
    assert schedule.peak_lr * schedule.final_lr_ratio == pytest.approx(final)
    # The schedule ends where the long phases begin, which go on at its last rate.
    short = sum(SHORT[name].values())
    assert phase_spans[0].rate_tokens == pytest.approx(
        short, abs=2 * max(map(step_tokens, phase_spans))
    )
    for phase_span in phase_spans[len(SHORT[name]) :]:
        assert type(phase_span.schedule) is Schedule
        assert phase_span.schedule.peak_lr == pytest.approx(final)


@pytest.mark.parametrize(
    ("name", "spent", "warmup_steps", "peak", "final"),
    [
        ("minitron_8b_distilled", (94e9, 1152), 32, 2e-4, 4.5e-7),
        ("minitron_4b_distilled", (94e9, 1152), 32, 2e-4, 4.5e-7),
        ("llama3_1_minitron_4b_width_distilled", (94e9, 1152), 40, 1e-4, 1e-5),
        ("llama3_1_minitron_4b_depth_distilled", (94e9, 1152), 40, 1e-4, 1e-5),
        ("mistral_nemo_minitron_8b_distilled", (380e9, 768), 60, 1e-4, 4.5e-7),
        ("llama3_1_8b_corrected", (100e9, 512), 120, 3e-4 / 5, 3e-6),
        ("mistral_nemo_12b_corrected", (100e9, 512), 120, 3e-4 / 5, 3e-6),
    ],
)
def test_a_pruned_transformer_heals_and_its_teacher_is_corrected_as_published(
    name: str, spent: tuple[float, int], warmup_steps: int, peak: float, final: float
) -> None:
    job = compose("check", [f"experiment={name}", *teacher(name), f"processes={processes(name)}"])
    assert (tokens(job.train.tokens), job.train.global_batch) == spent
    step = job.train.global_batch * job.train.sequence_length
    assert tokens(job.schedule.warmup_tokens) == warmup_steps * step
    assert job.schedule.peak_lr == pytest.approx(peak)
    assert job.schedule.peak_lr * job.schedule.final_lr_ratio == pytest.approx(final)
    assert isinstance(job.objective, Distill) is (name in TAUGHT)


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
