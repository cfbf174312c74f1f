"""The help pages: all jobs; one job with its groups and settings."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from hybrid_train.config import describe

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


def show_jobs(jobs: Mapping[str, str], flags: Mapping[str, str]) -> None:
    """Print what `hybrid-train` can do."""
    page = console()
    page.print("Usage: hybrid-train JOB [GROUP=CHOICE ...] [KEY=VALUE ...] [OPTIONS]\n\nJobs")
    page.print(table((f"  {name}", summary) for name, summary in jobs.items()))
    page.print("\nOptions")
    page.print(table((f"  {flag}", meaning) for flag, meaning in flags.items()))
    page.print("\nExamples")
    page.print(table((f"  {aim}", command) for aim, command in _EXAMPLES.items()), soft_wrap=True)
    page.print("\nhybrid-train JOB --help lists the groups and keys of a job.")


def show_job(name: str, root: str, summary: str, lines: Sequence[str]) -> None:
    """Print the groups of a job with their choices, and its keys with their defaults.

    Args:
        name: as it is typed.
        root: name of its root in conf/.
        summary: what it does.
        lines: overrides.
    """
    keys = list(describe.settings(root, lines))  # first: nothing is printed if an override is wrong
    page = console()
    page.print(f"hybrid-train {name}: {summary}\n")
    rows = [
        (f"  {group}={choice}" if choice else f"  {group}", description)
        for group, options in describe.choices(root).items()
        for choice, description in options.items()
    ]
    groups = "[GROUP=CHOICE ...] " if rows else ""
    page.print(f"Usage: hybrid-train {name} {groups}[KEY=VALUE ...] [OPTIONS]\n")
    if rows:
        page.print("Groups: each choice sets several keys (GROUP=CHOICE)")
        page.print(table(rows))
        page.print()
    page.print("Keys (KEY=VALUE) and their values" + (" with these overrides" if lines else ""))
    page.print(table((f"  {key.name}", key.default, key.comment) for key in keys))
