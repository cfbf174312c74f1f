"""What an attempt at a run comes from: command, code, machines and libraries, for its history."""

import json
import platform
import shlex
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import hybrid_train
from hybrid_train.config.commands import command
from hybrid_train.config.secrets import masked_words
from hybrid_train.config.supported import LIBRARIES
from hybrid_train.jobs.code_snapshot import checkout_state, code_of, repository
from hybrid_train.runtime import hardware, ranks

_OURS = (("hybrid-train",), ("hybrid_train", "__main__.py"))  # ends of the program's path


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
