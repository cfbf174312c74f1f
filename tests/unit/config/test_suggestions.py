"""What is offered for a broken configuration: taken all at once, it passes; a line a cause."""

import copy
import random
from collections.abc import Iterator
from functools import cache

import pytest
from omegaconf import OmegaConf

from hybrid_train.config import checks
from hybrid_train.config.compose import compose
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob
from tests.sampled import sampled

ROOTS = {
    "tiny": ("check", "experiment=tiny_cpu", "processes=1"),
    "tiny started": ("train", "experiment=tiny_cpu"),
    "tiny submitted": ("submit", "experiment=tiny_cpu", "cluster=slurm_cpu", "dry_run=true"),
    "tiny in phases": (
        "check",
        "experiment=tiny_cpu",
        "processes=4",
        "train.global_batch=16",
        "train.phases=[{name: a}, {name: b, start: 50%, sequence_length: 128, context: 2}]",
    ),
    "ladder": ("check", "experiment=ladder_60m", "processes=1", "runtime.device=cuda"),
    "56b": ("check", "experiment=nemotron_h_56b", "processes=1536", "runtime.device=cuda"),
    "super": ("check", "experiment=nemotron3_super", "processes=1024", "runtime.device=cuda"),
    "ultra": ("check", "experiment=nemotron3_ultra", "processes=1536", "runtime.device=cuda"),
    "ultra submitted": (
        "submit",
        "experiment=nemotron3_ultra",
        "cluster=slurm_b200",
        "cluster.nodes=192",
        "dry_run=true",
    ),
}


@cache
def composed(name: str) -> TrainJob:
    job, *lines = ROOTS[name]
    found = compose(job, lines)
    assert isinstance(found, TrainJob)
    return found


def changed(job: TrainJob, path: str, value: object) -> TrainJob:
    """Return a copy with one setting as a user would have typed it."""
    copied = copy.deepcopy(job)
    section: object = copied
    *sections, name = path.split(".")
    for part in sections:
        section = section[int(part)] if isinstance(section, list) else getattr(section, part)
    if isinstance(value, str) and not isinstance(getattr(section, name), str):
        config = OmegaConf.structured(section)
        config[name] = OmegaConf.from_dotlist([f"value={value}"])["value"]
        value = getattr(OmegaConf.to_object(config), name)
    setattr(section, name, value)
    return copied


def taken(job: TrainJob, started: int, problems: list[Problem]) -> tuple[TrainJob, int]:
    """Return the job and the number of its processes with all that is offered in place."""
    for problem in problems:
        for path, value in ((problem.path, problem.nearest), *problem.along):
            if path == "parallel" and value is not None:
                started = int(str(value).split()[2])
            elif value is not None:
                job = changed(job, path, value)
    return job, started


DEGREES = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context")
NUMBERS = [
    *((f"parallel.{name}", (0, 1, 2, 3, 4, 5, 8, 12, 16, 64, 100)) for name in DEGREES),
    ("train.sequence_length", (0, 1, 30, 31, 48, 63, 64, 100, 4096, 8190, 10_000)),
    ("train.global_batch", (0, 1, 2, 3, 5, 7, 12, 50, 100, 1000, 3071, 3073)),
    ("train.microbatch", (0, 1, 2, 3, 4, 5, 7)),
    ("train.batch_ramp.start_batch", (0, 1, 2, 3, 64, 100, 5000)),
    ("train.batch_ramp.increment", (0, 1, 2, 3, 5, 64, 100)),
    ("model.vocab_multiple", (0, 1, 2, 3, 27, 100, 128)),
    ("model.hidden_size", (0, 1, 48, 50, 63, 4100, 8190)),
    ("model.attention.heads", (0, 1, 3, 6, 40)),
    ("model.attention.kv_heads", (0, 1, 3, 5, 16)),
    ("model.attention.head_dim", (0, 1, 5, 100)),
    ("model.mamba.heads", (0, 1, 6, 100, 127)),
    ("model.mamba.groups", (0, 1, 3, 5, 16)),
    ("model.mlp.intermediate_size", (0, 1, 100, 127, 5000)),
    ("model.moe.experts", (0, 1, 3, 100, 127)),
    ("model.moe.top_k", (0, 1, 2, 1000)),
    ("model.moe.intermediate_size", (0, 1, 100, 127)),
    ("optimizer.beta2", (0.999, 0.9999)),
]
TEXTS = [
    ("train.batch_ramp.tokens", ("0", "1k", "3k", "1T", "30T")),
    ("schedule.warmup_tokens", ("0", "1k", "3k", "30T")),
    ("model.pattern", ("M", "ME*", "MEX*", "m*e", "M|E*", "M|M|M", "ME*-/*E/*E", "M*/E")),
    ("parallel.sequence", ("true", "false")),
    ("parallel.fsdp", ("true",)),
    ("parallel.distributed_optimizer", ("false",)),
    ("parallel.overlap_param_gather", ("true",)),
    ("parallel.recompute", ("full", "selective")),
    ("parallel.recompute_modules", ("[mlp]", "[mlp,mamba]", "[]", "[moe_act]")),
    ("optimizer.first_moment", ("bfloat16", "float8")),
    ("optimizer.second_moment", ("float16", "float8")),
    ("optimizer.main_gradients", ("bfloat16",)),
    ("precision.format", ("fp32", "mxfp8", "fp8_delayed", "mxfp4")),
    ("precision.backend", ("native", "emulated")),
    ("precision.fp8_param_gather", ("true",)),
    ("runtime.device", ("cpu", "cuda")),
    ("runtime.kernels", ("plain", "fused")),
]
PHASES = ("tensor", "pipeline", "context", "expert", "microbatch", "global_batch")


def settings_of(job: TrainJob) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Yield what may be put where in a job."""
    yield from NUMBERS
    yield from TEXTS
    for number in range(len(job.train.phases)):
        path = f"train.phases.{number}"
        yield from ((f"{path}.{name}", (0, 1, 2, 3, 4, 7, 16)) for name in PHASES)
        yield f"{path}.sequence_length", (0, 1, 63, 100, 1000, 1_000_000)
    if hasattr(job, "processes"):
        yield "processes", (0, 1, 2, 3, 7, 100, 384, 512, 768, 1000, 2000)
    if getattr(job, "cluster", None) is not None:
        yield "cluster.nodes", (0, 1, 2, 3, 48, 64, 100)
        yield "cluster.min_nodes", (0, 1, 5, 500)


def drawn(name: str, seed: str, number: int) -> tuple[TrainJob, int, list[str]]:
    """Return a root with a number of random values, its processes, and what the values are."""
    rng = random.Random(seed)
    job, told = composed(name), []
    settings = list(settings_of(job))
    for path, values in rng.sample(settings, number):
        value = rng.choice(values)
        job = changed(job, path, value)
        told.append(f"{path}={value}")
    return job, rng.choice((1, 2, 3, 6)) if number > 1 else 1, told


@pytest.mark.parametrize(
    ("number", "draws"),
    sampled([(1, 3), (2, 1), (1, 28), (2, 8)], (1, 3), (2, 1)),
)
@pytest.mark.parametrize("name", ROOTS)
def test_all_that_is_offered_makes_a_job_pass_in_one_line_for_one_wrong_value(
    name: str, number: int, draws: int
) -> None:
    for seed in range(draws):
        job, started, told = drawn(name, f"{name}/{number}/{seed}", number)
        found = list(checks.check(job, started))
        unfixed = {one.path for one in found if one.nearest is None and not one.along}
        left = checks.check(*taken(job, started, found)) if found else ()
        assert not [str(one) for one in left if one.path not in unfixed], told
        # A ramp that is set needs two settings more.
        if number == 1 and not unfixed and "batch_ramp.tokens" not in told[0]:
            assert len(found) <= 1, (told, found)


def problems(name: str, *given: tuple[str, object], started: int = 1) -> list[Problem]:
    """Return what is wrong with a root with values of these settings."""
    job = composed(name)
    for path, value in given:
        job = changed(job, path, value)
    return list(checks.check(job, started))


@pytest.mark.parametrize("processes", [384, 512, 768, 1000])
def test_processes_fit_the_layouts_of_all_phases_at_once(processes: int) -> None:
    (one,) = problems("ultra", ("processes", processes))
    # Multiples of 384 for two phases, of 512 for the third.
    assert (one.path, one.nearest) == ("processes", 1536)


@pytest.mark.parametrize("nodes", [48, 64, 100])
def test_nodes_fit_the_layouts_of_all_phases_at_once(nodes: int) -> None:
    (one,) = problems("ultra submitted", ("cluster.nodes", nodes))
    assert (one.path, one.nearest) == ("cluster.nodes", 192)


def test_processes_that_are_to_be_started_suit_the_batch_too() -> None:
    # Tensor 2 takes 2, 4, 6 processes; a batch of 12 in microbatches of 4 only 1 or 3 data ranks.
    given = (("parallel.tensor", 2), ("train.global_batch", 12), ("train.microbatch", 4))
    (one,) = problems("tiny started", *given, started=5)
    assert one.path == "parallel"
    assert "--nproc-per-node 6 " in str(one.nearest)


def test_settings_that_only_hold_together_are_offered_together() -> None:
    (one,) = problems("tiny", ("processes", 8), ("parallel.tensor", 8))
    assert str(one).endswith("; nearest: 2 with train.microbatch=1")


def test_a_size_is_offered_where_it_alone_would_suit_all_phases() -> None:
    (one,) = problems("super", ("model.moe.experts", 500))
    assert one.path == "parallel.expert"  # of phase 1; a later one has another
    assert str(one).endswith("; nearest: model.moe.experts=512")


def test_a_limit_of_a_section_and_a_rule_across_sections_make_one_line() -> None:
    (one,) = problems("tiny", ("processes", 2), ("train.global_batch", 0))
    assert (one.path, one.nearest) == ("train.global_batch", 4)


def test_what_has_no_legal_value_is_offered_none_and_the_rest_is_mended_beside_it() -> None:
    given = (("train.phases.1.start", "100%"), ("train.phases.1.sequence_length", 63))
    found = {one.path: one.nearest for one in problems("tiny in phases", *given)}
    assert found == {"train.phases.1.start": None, "train.phases.1.sequence_length": 64}


def test_a_list_is_offered_as_a_list() -> None:
    (one,) = problems("tiny", ("evaluate.task.recall.pairs", [4, 4, 16]))
    assert str(one).endswith("; nearest: [4, 16]")


@pytest.mark.parametrize(
    ("pattern", "path", "value"),
    [
        ("M*-", "model.moe.top_k", 1000),
        ("M*-", "model.moe.experts", 0),
        ("E*-/*", "model.mamba.heads", -1),
        ("ME", "model.attention.kv_heads", 0),
        ("ME*", "model.mlp.intermediate_size", 0),
    ],
)
def test_settings_of_layers_that_the_model_lacks_are_not_looked_at(
    pattern: str, path: str, value: int
) -> None:
    assert problems("tiny", ("model.pattern", pattern), (path, value)) == []
    assert problems("tiny", ("model.pattern", "ME*-"), (path, value)) != []
