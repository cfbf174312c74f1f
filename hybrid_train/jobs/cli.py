"""The command line: finds the command, composes its config, runs it, and says what went wrong.

Exit codes: 0 done, 1 a fault of the program (with its traceback) or, of `doctor`, something broken,
2 something the user can fix (one message on stderr), 130 interrupted. A command that ends with 2
before its job starts has written nothing. Job modules are imported when they run: help and errors
need no torch, and a command that does says what it starts before that is imported.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hybrid_train import __version__
from hybrid_train.config import launcher, own_conf
from hybrid_train.config.commands import COMMANDS, command, root_of
from hybrid_train.config.secrets import masked
from hybrid_train.runtime.logs import accept_any_letter
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import ConfigError, UserError, explained_by_the_system

_WITH_DRY_RUN = ("submit", "distill_targets")
_WITH_JSON = [name for name, one in COMMANDS.items() if one.prints_json]
FLAGS = {
    "--help": "explains a command: hybrid-train train --help; --help=all shows every setting",
    "--cfg job": "prints the composed config and stops; hydra or all: with Hydra's own part",
    "--resolve": "puts values in place of ${...}, with --cfg",
    "--info": "says where the config comes from: all, defaults, defaults-tree, searchpath, ...",
    "--multirun": "runs every combination of values: train.seed=1,2 optimizer.beta2=0.9,0.95",
    "--config-dir PATH": "adds a folder with YAML files of your own, as PATH/experiment/mine.yaml; "
    "conf/ of the working folder is one without being named",
    "--json": f"is short for json=true, of {', '.join(_WITH_JSON)}: they print one JSON object",
    "--dry-run": "is short for dry_run=true, of submit, which prints the batch script and stops, "
    "and of distill_targets, which says size and time",
    "--version": "prints the version",
}
HELP_ALL = "--help=all"
FIRST_SPEAKS_S = 5.0
NOT_WRITABLE = 0o002  # by others than the user and the group
_LONGEST = 300  # characters of a command that is shown; a prompt may be a whole text
# Options of Hydra's own programs that have another form here.
_INSTEAD = {
    ("--config-name", "-cn"): "the command names its config; a file of your own is experiment=NAME",
    ("--config-path", "-cp"): "use --config-dir PATH for a folder of your own",
    ("--run", "-r"): "a command runs without it",
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
        error.on_all_ranks = True  # every process of a job finds the same fault
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
    """Say what the user can fix, once; return the exit code."""
    rank = os.environ.get(launcher.RANK, "").strip()  # it may be what is wrong
    is_other = rank.isdecimal() and int(rank) > 0
    if launcher.by_torchrun():
        is_first = os.environ.get(launcher.LOCAL_RANK, "0") == "0"
        if is_first if error.on_all_ranks else not error.repeated:
            _tell_torchrun(str(error))  # each node has a torchrun of its own
        if is_other and (error.on_all_ranks or error.repeated):
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
    _say(f"hybrid-train: {text}")


def _say(line: str) -> None:
    sys.stderr.write(masked(f"{line}\n"))
    sys.stderr.flush()


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
    options.help = options.help or options.help_all
    if options.version:
        return _version
    if not options.words:
        return _help_of_all("") if options.help or not arguments else _no_command()
    name, words = _command_name(options.words)
    _require_useful(name, options)
    words, folders = own_conf.taken_out(words)
    own_conf.name([*own_conf.checked(options.folders), *folders])
    words += ["json=true"] if options.json else []
    words += ["dry_run=true"] if options.dry_run else []
    if name in _families():
        if options.help:
            return _help_of_all(f"{name} ")
        raise UserError(
            f"{name} what? There are {', '.join(_family(name))}; see hybrid-train {name} --help"
        )
    return _started(name, words, options)


class _Parser(argparse.ArgumentParser):
    """Options between the overrides; what is wrong becomes a UserError."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        near = nearest(unknown.partition("=")[0], [name.split()[0] for name in FLAGS])
        hint = f"; did you mean {near}?" if unknown != message and near else ""
        raise UserError(f"{message}{hint}; see hybrid-train --help")


class _Refused(argparse.Action):
    """An option of Hydra that has another form here."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise UserError(f"there is no option {self.option_strings[0]}; {self.help}")


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    # An option by itself: as a value of --help it would take the word behind it.
    parser.add_argument(HELP_ALL, action="store_true", dest="help_all")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=_INFO)
    parser.add_argument(own_conf.OPTION, "-cd", action="append", default=[], dest="folders")
    for names, instead in _INSTEAD.items():
        parser.add_argument(*names, nargs="?", action=_Refused, help=instead)
    return parser


def _command_name(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command line into the name of a command, or of a family without more, and the rest.

    Raises:
        UserError: if there is no such command.
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
        raise _no_such_command(second, _family(first), f"{first} ")
    if "=" in first:
        raise UserError(
            f"{first} is a setting, and the command comes first: hybrid-train train {first}"
        )
    raise _no_such_command(first, list(COMMANDS), "")


def _no_such_command(name: str, known: Sequence[str], family: str) -> UserError:
    near = nearest(name, known) or _last_words(known).get(name)
    near = "--help" if name == "help" else near
    hint = f"did you mean {family}{near}?" if near else f"there are {', '.join(known)}."
    return UserError(
        f"there is no command {family + name!r}; {hint} See hybrid-train {family}--help"
    )


def _last_words(known: Sequence[str]) -> dict[str, str]:
    """Return the commands of two words by the second alone: tokenize -> data tokenize."""
    return {name.partition(" ")[2]: name for name in known if " " in name}


def _require_useful(name: str, options: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserError: naming what does.
    """
    if options.help:
        return
    if options.dry_run and name not in _WITH_DRY_RUN:
        raise UserError(f"{name} has no option --dry-run; {' and '.join(_WITH_DRY_RUN)} have")
    asked = [flag for flag in ("cfg", "info", "multirun", "json") if getattr(options, flag)]
    if options.resolve and not options.cfg:
        raise UserError("--resolve belongs to --cfg: --cfg job --resolve prints values in place")
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} do not go together")
    if asked and name in COMMANDS and not COMMANDS[name].schema:
        raise UserError(f"{name} has no option --{asked[0]}; hybrid-train {name} is all there is")
    if options.json and name not in _WITH_JSON:
        raise UserError(f"{name} has no option --json; {', '.join(_WITH_JSON)} have")


def _families() -> set[str]:
    """Return the first words of commands that have two."""
    return {name.partition(" ")[0] for name in COMMANDS if " " in name}


def _family(first: str) -> list[str]:
    """Return the second words of a family."""
    return [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]


def _no_command() -> NoReturn:
    raise UserError(f"which command? There are {', '.join(COMMANDS)}; see hybrid-train --help")


def _started(
    name: str, words: Sequence[str], options: argparse.Namespace
) -> Callable[[], int | None]:
    """Return what the command line of a command starts."""
    command = COMMANDS[name]
    if options.help:
        return _help_of(name, words, in_full=options.help_all)
    launcher.require_sound()
    if not command.schema:
        return lambda: command.run(list(words))
    from hybrid_train.config import describe  # Hydra takes a moment to import

    root = root_of(name)
    if options.cfg:
        return _printer(describe.config_text(root, words, options.cfg, resolve=options.resolve))
    if options.info:
        return lambda: describe.print_info(root, words, options.info)
    return _ready(name, words, is_sweep=options.multirun)


def _ready(name: str, words: Sequence[str], *, is_sweep: bool) -> Callable[[], int | None]:
    """Compose and check a command's config, or several, and return what runs them."""
    if name == "submit":  # problems of the cluster and of all runs of an array are told at once
        _say(f"Checking: {_typed(name, words)}")
        from hybrid_train.jobs import submit

        return submit.plan(words, is_array=is_sweep)
    if is_sweep:
        from hybrid_train.jobs import sweep

        return sweep.plan(name, words)
    from hybrid_train.config import compose

    try:
        config = compose.compose(root_of(name), words)
    except ConfigError as error:
        if COMMANDS[name].prints_json and "json=true" in words:
            _tell_problems(error)
        raise
    return lambda: _run(name, words, config)


def _tell_problems(error: ConfigError) -> None:
    """Print what is wrong with a config as JSON, for whoever reads stdout."""
    from hybrid_train.jobs.check_json import problems_as_data

    sys.stdout.write(json.dumps(problems_as_data(error.problems), indent=1) + "\n")


def _run(name: str, words: Sequence[str], config: Any) -> int | None:
    """Run a command whose config is sound."""
    command = COMMANDS[name]
    if command.says_what_starts and launcher.rank() == 0:
        _say(first_line(name, words, config))
    return command.run(config)


def first_line(name: str, words: Sequence[str], config: Any) -> str:
    """Return what is said of a command before what it needs is imported.

    Args:
        name: of the command.
        words: its overrides.
        config: what they were composed to.
    """
    said = (
        _folder_in_words(Path(run_dir), name)
        if (run_dir := getattr(config, "run_dir", None))
        else ""
    )
    return f"Starting: {_typed(name, words)}{said}"


def _typed(name: str, words: Sequence[str]) -> str:
    """Return a command as it was typed, on one line and not too long."""
    typed = command(*name.split(), *words).replace("\n", " ")
    return typed if len(typed) <= _LONGEST else f"{typed[:_LONGEST]}..."


def _folder_in_words(run_dir: Path, name: str) -> str:
    """Say whether a run goes on or begins; if it does neither, the command itself will say it."""
    from hybrid_train.config.frozen import FROZEN_NAME  # takes a moment to import

    with contextlib.suppress(OSError):  # of a folder that nobody may read
        if (run_dir / FROZEN_NAME).is_file():
            return f"\nIts run folder is {run_dir}, which has a run."
        if name == "train" and (not run_dir.exists() or _is_empty(run_dir)):
            return f"\nIts run folder is {run_dir}, a new one."
    return ""


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _printer(text: str) -> Callable[[], None]:
    def write() -> None:
        sys.stdout.write(text)

    return write


def _help_of_all(within: str) -> Callable[[], None]:
    """Return what prints the help of all commands, or of those of a family."""
    from hybrid_train.jobs import help as help_page

    shown = {name: one for name, one in COMMANDS.items() if name.startswith(within)}
    return lambda: help_page.show_commands(shown, FLAGS)


def _help_of(name: str, words: Sequence[str], *, in_full: bool) -> Callable[[], None]:
    """Return what prints the help of a command."""
    from hybrid_train.jobs import help as help_page

    command = COMMANDS[name]
    if not command.schema:
        return lambda: help_page.show_without_settings(name, command)
    show = help_page.show_all if in_full else help_page.show_command
    return lambda: show(name, command, root_of(name), words)


def _version() -> None:
    sys.stdout.write(f"hybrid-train {__version__}\n")
