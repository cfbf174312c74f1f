"""How pages of text are laid out, and the help pages: of all commands, and of one.

The page of a command fits on two screens; `--help=all` shows every choice and every setting.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from hybrid_train.config import describe
from hybrid_train.config.commands import Command
from hybrid_train.config.most_used import MOST_USED

SCREEN_LINES, SCREEN_COLUMNS = 30, 100  # a help page takes two such screens at the most
_SHOWN_CHOICES = 8  # of a group
_EXAMPLES = {
    "a first run": "hybrid-train train experiment=quickstart",
    "what there is": "hybrid-train recipes",
    "other values": "hybrid-train train experiment=quickstart train.tokens=2M run_dir=runs/longer",
    "two processes": "torchrun --nproc-per-node 2 -m hybrid_train train experiment=quickstart "
    "parallel.tensor=2",
    "text": 'hybrid-train generate checkpoint=runs/quickstart prompt="def main("',
}
_PIPED_WIDTH = 120  # columns where there is no terminal to ask
_UNLIMITED_WIDTH = 10_000  # columns; what a table would take if it could


def console() -> Console:
    """Return a console for pages of text, readable in a pipe too."""
    plain = Console(highlight=False, markup=False)
    return (
        plain if plain.is_terminal else Console(highlight=False, markup=False, width=_PIPED_WIDTH)
    )


def table(rows: Iterable[Sequence[str]], heads: Sequence[str] | None = None) -> Table:
    """Lay out rows in columns without lines; the last column wraps."""
    layout = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=heads is not None)
    listed = list(rows)
    width = len(listed[0]) if listed else 0
    for column in range(width):
        layout.add_column(heads[column] if heads else "", overflow="fold", no_wrap=column == 0)
    for row in listed:
        layout.add_row(*row)
    return layout


def show_numbers(
    page: Console, rows: Sequence[Sequence[str]], heads: Sequence[str], words: int = 1
) -> None:
    """Print a table whose columns are numbers, but for the first; no number is ever broken.

    Args:
        page: where to.
        rows: as many cells each as there are heads.
        heads: of the columns.
        words: how many columns hold words.
    """
    layout = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, head in enumerate(heads):
        layout.add_column(head, justify="left" if column < words else "right", no_wrap=True)
    for row in rows:
        layout.add_row(*row)
    unlimited = page.options.update(width=_UNLIMITED_WIDTH)
    page.width = max(page.width, page.measure(layout, options=unlimited).maximum)
    page.print(layout)


def show_left_out(page: Console, left_out: Mapping[str, str]) -> None:
    """Say what is not in a table, and why."""
    for name, why in left_out.items():
        page.print(f"\n{name} is left out: {why}", soft_wrap=True)


def show_commands(commands: Mapping[str, Command], flags: Mapping[str, str]) -> None:
    """Print what `hybrid-train` can do."""
    page = console()
    page.print("Usage: hybrid-train COMMAND [GROUP=CHOICE ...] [KEY=VALUE ...] [OPTIONS]\n")
    page.print("Commands")
    page.print(table((f"  {name}", command.summary) for name, command in commands.items()))
    page.print("\nOptions")
    page.print(table((f"  {flag}", meaning) for flag, meaning in flags.items()))
    page.print("\nExamples")
    page.print(table((f"  {aim}", command) for aim, command in _EXAMPLES.items()), soft_wrap=True)
    page.print("\n`hybrid-train COMMAND --help` explains a command and its settings.")


def show_without_settings(name: str, command: Command) -> None:
    """Print the page of a command that takes no settings."""
    page = console()
    page.print(f"`hybrid-train {name}` {command.summary}. It takes no settings.")


def show_command(name: str, command: Command, root: str, lines: Sequence[str]) -> None:
    """Print the groups of a command with what is chosen, and the settings that are used most.

    Args:
        name: as it is typed.
        command: what it is.
        root: name of its root in conf/.
        lines: overrides.
    """
    keys = {one.name: one for one in describe.settings(root, lines)}  # first: they may be wrong
    groups = list(_group_rows(root, lines))
    used = MOST_USED.get(root) or {key: one.comment for key, one in keys.items()}
    common = [(f"  {key}", keys[key].default, words) for key, words in used.items() if key in keys]
    page = console()
    _show_usage(page, name, command, bool(groups))
    given = " with these choices" if lines else ""
    page.print(f"\nKEY=VALUE sets one value. The most used keys, and their values{given}:")
    page.print(table(common))
    if any(value == describe.UNSET for _, value, _ in common):
        chosen = " or comes with an experiment" if _has_experiments(groups) else ""
        page.print(f"`{describe.UNSET}` stands where a value has to be given{chosen}.")
    if groups:
        page.print("\nGROUP=CHOICE sets many values at once. Now chosen, and what else there is:")
        page.print(table(groups))
    page.print()
    what = f"every choice and all {len(keys)} keys" if groups else f"all {len(keys)} keys in detail"
    page.print(f"`hybrid-train {name} --help=all` shows {what}.", soft_wrap=True)
    page.print("`hybrid-train --help` explains the options.", soft_wrap=True)


def _group_rows(root: str, lines: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each group that offers a choice: its name, what is chosen, the others."""
    chosen, choices = describe.chosen(root, lines), describe.choices(root)
    for group, options in sorted(choices.items(), key=lambda one: one[0] != "experiment"):
        own = chosen[group]
        others = [name for name in options if name != own]
        shown = ", ".join(others[:_SHOWN_CHOICES])
        more = len(others) - _SHOWN_CHOICES
        if others:
            yield f"  {group}", own or "(none)", f"{shown} and {more} more" if more > 0 else shown


def _has_experiments(groups: Sequence[Sequence[str]]) -> bool:
    return any(row[0].strip() == "experiment" for row in groups)


def show_all(name: str, command: Command, root: str, lines: Sequence[str]) -> None:
    """Print every choice of every group of a command, and every key with its value.

    Args:
        name: as it is typed.
        command: what it is.
        root: name of its root in conf/.
        lines: overrides.
    """
    keys = list(describe.settings(root, lines))  # first: nothing is printed if an override is wrong
    rows = [
        (f"  {group}={choice}" if choice else f"  {group}", description)
        for group, options in describe.choices(root).items()
        for choice, description in options.items()
    ]
    page = console()
    _show_usage(page, name, command, bool(rows))
    if rows:
        page.print("\nGROUP=CHOICE sets many values at once:")
        page.print(table(rows))
    page.print("\nKEY=VALUE sets one value. All keys" + (" with these choices:" if lines else ":"))
    page.print(table((f"  {key.name}", key.default, key.comment) for key in keys))


def _show_usage(page: Console, name: str, command: Command, has_groups: bool) -> None:
    page.print(f"`hybrid-train {name}` {command.summary}.\n", soft_wrap=True)
    groups = "[GROUP=CHOICE ...] " if has_groups else ""
    page.print(f"Usage: hybrid-train {name} {groups}[KEY=VALUE ...] [OPTIONS]", soft_wrap=True)
