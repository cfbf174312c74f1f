"""A run folder without a run: config, metrics and history as a trainer would leave them."""

import json
import math
from pathlib import Path

from hybrid_train.config.compose import compose
from hybrid_train.config.frozen import freeze
from hybrid_train.tracking import history

NASTY = "<script>alert('source')</script>"
STEP_S = 0.5
PROVENANCE = {
    "command": f"hybrid-train train experiment=tiny_cpu note={NASTY}",
    "code": {"version": "0.1.0", "commit": "0123456789abcdef", "dirty": True},
    "working_folder": {"commit": None, "dirty": None},
    "machines": [
        {
            "count": 2, "processor": "a processor", "cores": 96, "memory_bytes": 2 * 10**12,
            "gpus": [{"name": "a GPU", "count": 4, "memory_bytes": 80 * 10**9}],
        }
    ],
    "libraries": {"python": "3.12.1", "torch": "2.11.0", "mamba-ssm": None},
}  # fmt: skip


def make(
    folder: Path, *, steps: int, start: float, attempts: int = 3,
    sources: tuple[str, ...] = ("web", NASTY), layers: int = 4, outcome: str | None = "finished",
) -> Path:  # fmt: skip
    """Make a run; its attempts have equal parts of the steps and a minute between them.

    Args:
        folder: of the run.
        steps: of it, which are all of its tokens.
        start: when it began, seconds since 1970.
        attempts: how many it took.
        sources: names.
        layers: with experts.
        outcome: of the last attempt; None: it has no end.
    """
    job = compose("train", ["experiment=tiny_cpu", f"run_dir={folder}"])
    job.train.tokens = str(256 * steps)
    freeze(job, folder)
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(
            json.dumps(_line(step, steps, sources, layers)) + "\n" for step in range(1, steps + 1)
        )
    at, part = start, steps // attempts
    for number in range(1, attempts + 1):
        last = number == attempts
        first, end = (number - 1) * part, steps if last else number * part
        history.note(
            folder, "attempt", at=at, attempt=number, step=first, processes=8, nodes=2,
            host="n<1>", job=f"77{number}", restart=0, provenance=PROVENANCE,
        )  # fmt: skip
        at += STEP_S * (end - first) + 10
        how = outcome if last else "failed"
        if how is not None:
            cause = f"rank 3 was killed (<b>{NASTY}</b>)" if how == "failed" else "all is trained"
            history.note(
                folder, "end", at=at, attempt=number, step=end, outcome=how,
                kind="killed" if how == "failed" else how, cause=cause,
                ranks=[3] if how == "failed" else [],
            )  # fmt: skip
        at += 60
    history.note(folder, "skipped", at=start + 5, step=steps // 2, reason="spike", sources=[NASTY])
    return folder


def _line(step: int, steps: int, sources: tuple[str, ...], layers: int) -> dict[str, float | None]:
    loss = 3.0 + 5.0 * math.exp(-8 * step / steps) + 0.1 * math.sin(step)
    line: dict[str, float | None] = {
        "step": step, "tokens": 256 * step, "loss": None if step == steps // 2 else loss,
        "lr": 1e-3, "grad_norm": 40.0 if step == steps // 2 else 1.0, "tokens_per_s": 512.0,
        "step_time_s": STEP_S, "pause_s": 0.0, "mfu": 0.4, "mtp_loss_1": loss + 0.3,
    }  # fmt: skip
    line |= {f"loss/{name}": loss + 0.2 * number for number, name in enumerate(sources)}
    line |= {f"expert_load_{2 * n + 2}": 1.2 + 0.1 * math.cos(step) for n in range(layers)}
    if step % max(1, steps // 10) == 0:
        line |= {"validation_loss": loss + 0.05, "unigram_loss": 7.0}
        line |= {f"validation_loss/{name}": loss for name in sources}
    return line
