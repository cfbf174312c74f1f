"""What is offered for a broken configuration: taken all at once, it passes; a line a cause."""

import copy
import random
from collections.abc import Iterator
from functools import cache

from omegaconf import OmegaConf

from hybrid_train.config.compose import compose
from hybrid_train.config.problems import Problem
from hybrid_train.config.schema.train import TrainJob

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
        "cluster=slurm_h100",
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
            if path == "parallel":
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
        yield "processes", (0, 1, 2, 3, 7, 100, 384, 512, 768, 1000, 2000)
    if hasattr(job, "cluster"):
        yield "cluster.nodes", (0, 1, 2, 3, 48, 64, 100)
        yield "cluster.min_nodes", (0, 1, 5, 500)


def drawn(seed: int, number: int) -> tuple[str, TrainJob, int, list[str]]:
    """Return a published or tiny job with a number of random values, and what they are."""
    rng = random.Random(seed)
    name = rng.choice(list(ROOTS))
    job, told = composed(name), []
    for _ in range(number):
        path, values = rng.choice(list(settings_of(job)))
        value = rng.choice(values)
        job = changed(job, path, value)
        told.append(f"{path}={value}")
    started = rng.choice((1, 1, 2, 3, 6)) if name == "tiny started" else 1
    return name, job, started, told
