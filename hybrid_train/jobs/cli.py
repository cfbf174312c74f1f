"""The command line: finds the job, composes its config, runs it, and says what went wrong.

Exit codes: 0 done, 1 a fault of the program (with its traceback) or, of `doctor`, something broken,
2 something the user can mend (one message on stderr), 130 interrupted. A command that ends with 2
before the job starts has written nothing. Job modules are imported when they run: help and errors
need no torch.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hybrid_train.config import launcher, own_conf
from hybrid_train.config.commands import COMMANDS, Command, root_of
from hybrid_train.config.secrets import masked
from hybrid_train.runtime.streams import accept_any_letter
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError, explained_by_the_system

_WITH_JSON = [name for name, command in COMMANDS.items() if command.prints_json]
FLAGS = {
    "--help": "this text, or that of a job: hybrid-train train --help",
    "--cfg job": "print the composed config and stop; hydra or all: with Hydra's own part",
    "--resolve": "with --cfg: put values in place of ${...}",
    "--info": "say where the config comes from: all, defaults, defaults-tree, searchpath, ...",
    "--multirun": "run every combination of values: train.seed=1,2 optimizer.beta2=0.9,0.95",
    "--config-dir PATH": "a folder with YAML files of your own, such as PATH/experiment/mine.yaml; "
    "conf/ of the working folder is one without being named",
    "--json": "short for json=true, of jobs that print one JSON object if asked: "
    f"{', '.join(_WITH_JSON)}",
    "--version": "print the version",
}
FIRST_SPEAKS_S = 5.0
NOT_WRITABLE = 0o002  # by others than the user and the group
# Options of Hydra's own programs that have another form here.
_INSTEAD = {
    ("--config-name", "-cn"): "the job names its config; a file of your own is experiment=NAME",
    ("--config-path", "-cp"): "use --config-dir PATH for a folder of your own",
    ("--run", "-r"): "a job runs without it",
    ("--package", "-p"): "write the key as a whole: --cfg job prints all of them",
    ("--hydra-help",): "see hybrid-train --help",
    ("--shell-completion", "-sc"): "there is no completion",
    ("--experimental-rerun",): "hybrid-train resume run_dir=PATH goes on with a run",
}
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Whatever the user's own mask is, nobody else may write into what this process makes.
    os.umask(os.umask(NOT_WRITABLE) | NOT_WRITABLE)
    accept_any_letter()
    given = list(sys.argv[1:] if arguments is None else arguments)
    with own_conf.as_it_was():
        return _main(given)


def _main(given: Sequence[str]) -> int:
    try:
        with explained_by_the_system():
            start = _command(given)
    except UserError as error:
        error.everywhere = True  # every process of a job finds the same fault
        return _refuse(error)
    try:
        with explained_by_the_system():
            return start() or 0
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read has had enough, as `head` has. Python would complain once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _refuse(error: UserError) -> int:
    """Say what the user can mend, once; return the exit code."""
    rank = os.environ.get(launcher.RANK, "").strip()  # it may be what is wrong
    is_other = rank.isdecimal() and int(rank) > 0
    if launcher.by_torchrun():
        is_first = os.environ.get(launcher.LOCAL_RANK, "0") == "0"
        if is_first if error.everywhere else not error.repeated:
            _tell_torchrun(str(error))  # each node has a torchrun of its own
        if is_other and (error.everywhere or error.repeated):
            # The first process says it. The others wait, since torchrun ends all of them, the
            # first included, as soon as one is gone.
            time.sleep(FIRST_SPEAKS_S)
            return 2
    _complain(f"rank {rank}: {error}" if is_other else str(error))
    return 2


def _tell_torchrun(text: str) -> None:
    """Leave the message where torchrun looks for it: it ends its own report with it (torch 2.11).

    Otherwise a message is buried under the traceback of torchrun.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {
            "message": masked(f"hybrid-train: {text}"),
            "extraInfo": {"timestamp": str(int(time.time()))},
        }
        with contextlib.suppress(OSError):  # it is on stderr as well
            Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")


def _complain(text: str) -> None:
    sys.stderr.write(masked(f"hybrid-train: {text}\n"))
    sys.stderr.flush()


class _Parser(argparse.ArgumentParser):
    """Options between the overrides; what is wrong becomes a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see hybrid-train --help")


class _Refused(argparse.Action):
    """An option of Hydra that has another form here."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise UserError(f"there is no option {self.option_strings[0]}; {self.help}")


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=_INFO)
    parser.add_argument(own_conf.OPTION, "-cd", action="append", default=[], dest="folders")
    for names, instead in _INSTEAD.items():
        parser.add_argument(*names, nargs="?", action=_Refused, help=instead)
    return parser


def _command(arguments: Sequence[str]) -> Callable[[], int | None]:
    """Check a command line and return what it starts.

    Raises:
        UserError: if it cannot run.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working folder is gone; cd to one that is there") from error
    options = _parser().parse_intermixed_args(arguments)
    if options.version:
        return _version
    if not options.words:
        return _help_text(None, ()) if options.help or not arguments else _no_job()
    name, words = _job_name(options.words)
    _require_useful(name, options)
    words, folders = own_conf.taken_out(words)
    own_conf.name([*own_conf.checked(options.folders), *folders])
    words += ["json=true"] if options.json else []
    if name in _families():
        if options.help:
            return _help_text(name, ())
        raise UserError(
            f"{name} what? There are {', '.join(_family(name))}; see hybrid-train {name} --help"
        )
    return _job_command(name, words, options)


def _job_name(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command line into the name of a job, or of a family without more, and the rest.

    Raises:
        UserError: if there is no such job.
    """
    first, *rest = words
    if first in COMMANDS:
        return first, rest
    if first in _families():
        if not rest:
            return first, rest
        second, *rest = rest
        if f"{first} {second}" in COMMANDS:
            return f"{first} {second}", rest
        raise _no_such_job(second, _family(first), f"{first} ")
    raise _no_such_job(first, list(COMMANDS), "")


def _no_such_job(name: str, known: Sequence[str], family: str) -> UserError:
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}."
    return UserError(f"there is no job {family + name!r}; {hint} See hybrid-train {family}--help")


def _require_useful(name: str, options: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserError: naming what does.
    """
    if options.help:
        return
    asked = [flag for flag in ("cfg", "info", "multirun", "json") if getattr(options, flag)]
    if options.resolve and not options.cfg:
        raise UserError("--resolve belongs to --cfg: --cfg job --resolve prints values in place")
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} do not go together")
    if asked and name in COMMANDS and not COMMANDS[name].schema:
        raise UserError(f"{name} has no option --{asked[0]}; hybrid-train {name} is all there is")
    if options.json and name not in _WITH_JSON:
        raise UserError(f"{name} has no option --json; {' and '.join(_WITH_JSON)} have")


def _families() -> set[str]:
    """Return the first words of jobs that have two."""
    return {name.partition(" ")[0] for name in COMMANDS if " " in name}


def _family(first: str) -> list[str]:
    """Return the second words of a family."""
    return [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]


def _no_job() -> NoReturn:
    raise UserError(f"which job? There are {', '.join(COMMANDS)}; see hybrid-train --help")


def _job_command(
    name: str, words: Sequence[str], options: argparse.Namespace
) -> Callable[[], int | None]:
    """Return what a job's command line starts."""
    job = COMMANDS[name]
    if options.help:
        return _help_text(name, words)
    launcher.require_sound()
    if not job.schema:
        return lambda: importlib.import_module(job.module).run(list(words))
    from hybrid_train.config import compose, describe  # Hydra takes a moment to import

    root = root_of(name)
    if options.cfg:
        return _printer(describe.config_text(root, words, options.cfg, resolve=options.resolve))
    if options.info:
        return lambda: describe.print_info(root, words, options.info)
    if options.multirun:
        from hybrid_train.jobs import sweep

        return sweep.plan(name, words)
    config = compose.compose(root, words)
    return lambda: _run(job, config)


def _run(command: Command, config: Any) -> int | None:
    code: int | None = importlib.import_module(command.module).run(config)
    return code


def _printer(text: str) -> Callable[[], None]:
    def write() -> None:
        sys.stdout.write(text)

    return write


def _help_text(name: str | None, words: Sequence[str]) -> Callable[[], None]:
    """Return what prints the help of all jobs, of a family, or of one."""
    from hybrid_train.jobs import help as help_page

    if name is None or name not in COMMANDS or not COMMANDS[name].schema:
        within = f"{name} " if name and name not in COMMANDS else ""
        jobs = {known: job.summary for known, job in COMMANDS.items() if known.startswith(within)}
        return lambda: help_page.show_jobs(jobs, FLAGS)
    return lambda: help_page.show_job(name, root_of(name), COMMANDS[name].summary, words)


def _version() -> None:
    try:
        number = importlib.metadata.version("hybrid_train")
    except importlib.metadata.PackageNotFoundError:
        number = "(source tree, not installed)"
    sys.stdout.write(f"hybrid-train {number}\n")
