"""Teachers for the tests: runs of tiny models, written with their first weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrid_train.checkpoint import layout
from hybrid_train.config import frozen
from hybrid_train.schema.objective import Distill, NextToken
from tests.tiny import VOCAB, tiny_engine, tiny_job

PATTERN = "ME*-/*"


def student_job(teacher: Path | str | None = None, **settings: Any) -> Any:
    """The job of a student; its first weights are those of a teacher with the seed of a job."""
    if teacher is not None:
        settings["teacher"] = str(teacher)
    job = tiny_job(PATTERN, objective=Distill(moe_aux_loss_scale=0.0, **settings))
    job.model.vocab_size = VOCAB
    return job


def write_teacher(
    run_dir: Path,
    groups: Any,
    seed: int | None = None,
    change: Callable[[Any], None] | None = None,
    **model: Any,
) -> Path:
    """Write a run with a checkpoint of its first weights, or of what `change` makes of them."""
    from hybrid_train.checkpoint import store
    from hybrid_train.training.hooks.checkpointing import content_of

    job = student_job()
    job.objective, job.run_dir = NextToken(), str(run_dir)
    job.train.seed = job.train.seed if seed is None else seed
    for name, value in model.items():
        setattr(job.model, name, value)
    frozen.freeze(job, run_dir)
    engine = tiny_engine(job, groups)
    if change is not None:
        change(engine.network.chunks[0].module)
    content = content_of(engine)
    store.save(run_dir, content, {"step": 5, "tokens": 320}, keep=1)
    return run_dir


def teacher_folder(run_dir: Path, step: int = 5, weights: str = "a") -> Path:
    """A run folder as far as the record looks at it."""
    job = student_job()
    frozen.freeze(job, run_dir)
    (run_dir / "data.json").write_text(json.dumps({"tokenizer": "of all", "sources": {}}))
    folder = layout.path_of(run_dir, step)
    folder.mkdir(parents=True)
    (folder / "weights").write_text(weights)
    layout.write_position(folder, {"step": step, "tokens": 0, "source_tokens": {}})
    layout.write_checksums(folder, {})
    return run_dir
