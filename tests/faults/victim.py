"""Runs `hybrid-train` and lets faults happen to it: FAULTS names a JSON file with their list.

A fault is {"id", "kind", "step", "rank"}. What is wrong with the data is wrong whenever the step is
taken; what happens to a process happens once, and a line in FAULTS.log says when. The time at which
each step was done goes to FAULTS.steps.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hybrid_train.jobs import cli, train

PLAN = Path(os.environ["FAULTS"])
RANK = int(os.environ.get("RANK", "0"))
OF_DATA = ("nan", "spike")
_full = False  # whether the disk of this process takes no more shards


def append(suffix: str, line: object) -> None:
    descriptor = os.open(PLAN.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{json.dumps(line)}\n".encode())
    os.close(descriptor)


def happened() -> set[int]:
    path = PLAN.with_suffix(".log")
    return (
        {json.loads(line)["id"] for line in path.read_text().splitlines()}
        if path.exists()
        else set()
    )


def damage_newest(run_dir: Path, how: int) -> None:
    """Flip a bit of a shard of the newest checkpoint, cut it short, or remove it."""
    newest = max((run_dir / "checkpoints").glob("step_????????"))
    shard = sorted(newest.glob("*.distcp"))[how % 2]
    if how % 3 == 0:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif how % 3 == 1:
        os.truncate(shard, shard.stat().st_size - 100)
    else:
        shard.unlink()


def stand_still() -> None:
    while True:
        time.sleep(1)


def fill_disk() -> None:
    global _full
    _full = True


def cut_data() -> None:
    for path in PLAN.parent.glob("*.bin"):  # whoever drives this brings them back
        os.truncate(path, 0)


def strike(fault: dict[str, Any]) -> None:
    """Let a fault happen to this process, before a step."""
    append(".log", {"id": fault["id"], "time": time.time()})
    if fault["kind"] == "corrupt":
        damage_newest(PLAN.parent / "run", fault["id"])
    if fault["kind"] in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault["kind"]])
    elif fault["kind"] in ACTS:
        ACTS[fault["kind"]]()


SIGNALS = {
    "kill": signal.SIGKILL,
    "corrupt": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "sigterm": signal.SIGTERM,
    "sigusr1": signal.SIGUSR1,
}
ACTS = {"hang": stand_still, "full": fill_disk, "vanish": cut_data}


def refuse_when_full() -> None:
    """Let shards of checkpoints find the disk full once."""
    from hybrid_train.checkpoint import writing

    true_write = writing.Writing._write

    def write(self: Any) -> None:
        global _full
        if _full:
            _full = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true_write(self)

    writing.Writing._write = write  # type: ignore[method-assign]


@contextlib.contextmanager
def process_with_faults(*args: Any) -> Iterator[torch.device]:
    """Be the context of the job, with steps that faults happen to."""
    with start(*args) as device:
        from hybrid_train.training.engine import Engine  # imports Megatron: not before

        faults, done = json.loads(PLAN.read_text()), happened()
        mine = [fault for fault in faults if fault["rank"] == RANK and fault["id"] not in done]
        wrong = {fault["step"]: fault["kind"] for fault in faults if fault["kind"] in OF_DATA}
        slow = [fault for fault in faults if fault["kind"] == "slow" and fault["rank"] == RANK]
        true_step, true_take, true_reduce = Engine.step, Engine._take, Engine._reduce

        def step(self: Engine, *args: Any, **kwargs: Any) -> Any:
            number = self.steps_done + 1
            for fault in [one for one in mine if one["step"] == number]:
                if fault["kind"] not in OF_DATA:
                    mine.remove(fault)
                    strike(fault)
            report = true_step(self, *args, **kwargs)
            if RANK == 0:
                append(".steps", [number, time.time()])
            return report

        def take(self: Engine, *args: Any) -> Any:
            number = self.steps_done + 1
            if any(one["step"] <= number < one["step"] + 20 for one in slow):
                time.sleep(0.05)
            return true_take(self, *args)

        def reduce(self: Engine, *args: Any) -> dict[str, float]:
            metrics = true_reduce(self, *args)
            kind = wrong.get(self.steps_done + 1)
            metrics["loss"] *= {"nan": float("nan"), "spike": 10.0}.get(kind or "", 1.0)
            return metrics

        Engine.step, Engine._take, Engine._reduce = step, take, reduce  # type: ignore[method-assign]
        refuse_when_full()
        yield device


start = train.process
train.process = process_with_faults  # type: ignore[assignment]
if __name__ == "__main__":
    sys.exit(cli.main())
