"""Says whether a job is to be queued again after its processes are gone.

    requeue.py RUN_DIR --limit 3 --job 1234 --began 1764075600 --code 0

Exit codes: 0 the run is finished; 75 queue the job again; 1 do not: so many attempts of this job in
a row ended at the same checkpoint. The verdict goes into history.jsonl of the run folder. It is
asked by the batch script (train.sbatch), and imports nothing but the standard library and two
files of the package that do the same.
"""

import argparse
import sys
from pathlib import Path

from hybrid_train.checkpoint import layout
from hybrid_train.tracking import history

FINISHED, GIVE_UP, QUEUE_AGAIN = 0, 1, 75  # 75: EX_TEMPFAIL of sysexits.h
QUEUED, GAVE_UP = "queued again", "not queued again"


def verdict(run_dir: Path, limit: int, job: str, began: float, code: int) -> tuple[int, str]:
    """Return the exit code and a sentence, and note both in the history of the run.

    Args:
        run_dir: the run folder.
        limit: attempts in a row that may end at one checkpoint.
        job: id of the job.
        began: when this start of it began, seconds since 1970.
        code: exit code of its processes.
    """
    events = history.read(run_dir)
    attempts = [one for one in history.attempts(events) if (one.end or one.start) >= began]
    # A run that was complete before ends with 0 and begins no attempt.
    if code == 0 and (not attempts or attempts[-1].outcome == history.FINISHED):
        return FINISHED, "the run is finished"
    newest = layout.latest(run_dir)
    step = newest.step if newest else 0
    # Counted here and not by the attempts in the history: one that dies before it can write there
    # - no container, no GPU, no package - must not be queued for ever.
    same = 1
    for event in reversed([one for one in events if one["event"] == QUEUED]):
        if (event["job"], event["step"]) != (job, step):
            break
        same += 1
    cause = _cause(attempts)
    if same >= limit:
        why = f"{same} attempts in a row ended at step {step}; the last: {cause}"
        history.note(run_dir, GAVE_UP, job=job, step=step, cause=why)
        return GIVE_UP, f"{why}; fix that, then submit the job again"
    history.note(run_dir, QUEUED, job=job, step=step, cause=cause)
    return QUEUE_AGAIN, f"goes on from step {step}; the attempt before: {cause}"


def _cause(attempts: list[history.Attempt]) -> str:
    """Return how the last attempt ended, in words."""
    if not attempts:
        return "no process of the run came as far as its history"
    return attempts[-1].cause or "it left no word how it ended"


def main() -> int:
    """Read the command line, judge, say it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--began", type=float, required=True, help="seconds since 1970")
    parser.add_argument("--code", type=int, required=True, help="of the processes of the run")
    options = parser.parse_args()
    code, text = verdict(options.run_dir, options.limit, options.job, options.began, options.code)
    sys.stdout.write(f"requeue: {text}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
