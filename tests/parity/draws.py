"""Random legal layouts, patterns and sizes: what the rules of the config admit must agree."""

import random

from hybrid_train.config.checks import check
from hybrid_train.schema.model import Attention, Mamba, Mlp, Model, Moe, Mtp
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.pattern import Pattern
from tests.parity.case import Case, needed_processes, parity_job

MOST_PROCESSES = 8


def draw(seed: int) -> Case:
    """Return the legal case of a seed, on two processes or more."""
    rng = random.Random(seed)
    while True:
        case = _any_case(rng)
        # The parity model needs no files of data.
        broken = [p for p in check(case.job, case.processes) if not p.path.startswith("data")]
        if 1 < case.processes <= MOST_PROCESSES and not broken:
            return case


def describe(case: Case) -> str:
    """Say what a case is made of, in one line."""
    job, default = case.job, Parallel()
    plan = {k: v for k, v in vars(job.parallel).items() if v != getattr(default, k)}
    split = ", ".join(f"{name}={value}" for name, value in plan.items()) or "data parallel"
    tied = ", tied" if job.model.tie_embeddings else ""
    return f"{case.processes} processes, {split}, {job.model.pattern}{tied}"


def _any_case(rng: random.Random) -> Case:
    job = parity_job()
    job.parallel = _any_plan(rng)
    job.model = _any_model(rng, job.parallel.pipeline * job.parallel.virtual_pipeline)
    job.train.seed = rng.randrange(2**31)
    job.train.microbatch = rng.choice([1, 2])
    job.train.sequence_length = rng.choice([16, 32, 48])
    return Case(job, needed_processes(job.parallel, data=rng.choice([1, 1, 2])))


def _any_plan(rng: random.Random) -> Parallel:
    whole_optimizer = rng.random() < 0.2
    overlap = rng.random() < 0.3
    return Parallel(
        tensor=rng.choice([1, 1, 2, 4]),
        pipeline=rng.choice([1, 1, 2, 4]),
        virtual_pipeline=rng.choice([1, 1, 2]),
        expert=rng.choice([1, 2, 4]),
        expert_tensor=rng.choice([None, 1, 2]),
        context=rng.choice([1, 1, 2, 4]),
        sequence=rng.choice([None, None, False]),
        distributed_optimizer=not whole_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and not whole_optimizer and rng.random() < 0.5,
    )


def _any_model(rng: random.Random, stages: int) -> Model:
    letters = rng.choices("MM*-EE", k=rng.randint(max(stages, 2), max(stages, 2) + 5))
    ends = sorted(rng.sample(range(1, len(letters)), stages - 1))
    cuts = zip([0, *ends], [*ends, len(letters)], strict=True)
    main = tuple("".join(letters[start:end]) for start, end in cuts)
    depths = rng.choice([0, 1, 2])
    mtp = "".join(rng.choices("M*-E", k=rng.randint(1, 2))) if depths else ""
    heads = rng.choice([4, 8])
    return Model(
        pattern=str(Pattern(main, mtp, depths)),
        hidden_size=rng.choice([16, 32, 48]),
        vocab_multiple=16,
        tie_embeddings=rng.random() < 0.3,
        attention=Attention(heads=heads, kv_heads=rng.choice([1, 2, 4]), head_dim=8),
        mamba=Mamba(
            heads=rng.choice([4, 8]), head_dim=8, state_size=rng.choice([4, 8]),
            groups=rng.choice([1, 2, 4]), chunk_size=8,
        ),
        mlp=Mlp(intermediate_size=rng.choice([32, 64])),
        moe=Moe(
            experts=rng.choice([4, 8]), top_k=rng.choice([1, 2, 3]), intermediate_size=32,
            shared_intermediate_size=rng.choice([None, 32]), latent_size=rng.choice([None, 16]),
            scaling_factor=rng.choice([1.0, 2.5]), bias_update_rate=rng.choice([0.0, 1e-3]),
        ),
        mtp=Mtp(repeated_block=rng.random() < 0.7),
    )  # fmt: skip
