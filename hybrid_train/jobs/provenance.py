"""What an attempt at a run comes from: command, code, machines, libraries; and what a run does."""

import json
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import hybrid_train
from hybrid_train.checkpoint import lineage
from hybrid_train.checkpoint.layout import Found
from hybrid_train.checkpoint.lineage import Made
from hybrid_train.config.commands import command
from hybrid_train.config.secrets import masked, masked_words
from hybrid_train.config.supported import LIBRARIES
from hybrid_train.distillation.teacher_record import ChosenTeacher
from hybrid_train.jobs.code_snapshot import checkout_state, code_of, repository
from hybrid_train.runtime import hardware, ranks
from hybrid_train.schema.train import TrainJob

_OURS = (("hybrid-train",), ("hybrid_train", "__main__.py"))  # ends of the program's path


def made_by(job: str) -> Made:
    """Say by what this process makes a folder."""
    root = Path(hybrid_train.__file__).parents[1]
    code = {"version": hybrid_train.__version__, **code_of(root)}
    return Made(job, command_line(sys.argv), code, libraries())


def write_lineage(
    job: TrainJob, loaded: Found | None, teachers: Sequence[ChosenTeacher], *, goes_on: bool
) -> None:
    """Say in a run folder what the run comes out of, and its config whenever it goes on.

    Args:
        job: the run, whose config is in its folder.
        loaded: the checkpoint that it starts from, if there is one.
        teachers: that it learns from.
        goes_on: whether that checkpoint is its own.
    """
    run_dir = Path(job.run_dir)
    if goes_on:
        lineage.renew(run_dir)
        return
    parents = [
        lineage.Parent(lineage.TEACHER, one.source, one.run_dir, one.step, one.checksum)
        for one in teachers
    ]
    if loaded is not None:
        source = masked(job.checkpoint.load or "")
        parents.insert(0, lineage.parent_of(lineage.WEIGHTS, source, loaded))
    lineage.write(run_dir, made_by("train"), parents)


def gathered() -> dict[str, Any]:
    """Describe this attempt as plain data; every process calls it, and the main one learns it.

    Returns:
        The command without credentials; version and commit of the package and whether its files
        differ from it; the same of the repository of the working folder, if it is another; the
        machines, equal ones once with their number; versions of Python and the libraries, null for
        one that is not installed. On other processes nothing.
    """
    machines = _machines()
    if not ranks.is_main():
        return {}
    root = Path(hybrid_train.__file__).parents[1]
    found: dict[str, Any] = {
        "command": command_line(sys.argv),
        "code": {"version": hybrid_train.__version__, **code_of(root)},
        "machines": machines,
        "libraries": libraries(),
    }
    here = repository(Path.cwd())
    if here is not None and here != root.resolve():
        found["working_folder"] = checkout_state(here, "--untracked-files=no")
    return found


def command_line(words: list[str]) -> str:
    """Write the command of a process as one types it, without credentials."""
    program, *rest = words or [""]
    masked = masked_words(rest)
    is_ours = any(Path(program).parts[-len(end) :] == end for end in _OURS)
    return command(*masked) if is_ours else shlex.join([program, *masked])


def libraries() -> dict[str, str | None]:
    """Return the versions of Python, CUDA and the libraries that decide what a run computes."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in (*LIBRARIES, "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machines() -> list[dict[str, Any]]:
    """List the machines of all processes, equal ones once with their number."""
    import torch.distributed as dist

    here = json.dumps(hardware.node()) if ranks.local_rank() == 0 else None
    said: list[str | None] = [None] * ranks.world_size()
    dist.all_gather_object(said, here)
    kinds = Counter(one for one in said if one is not None)
    return [{"count": count, **json.loads(kind)} for kind, count in kinds.items()]
