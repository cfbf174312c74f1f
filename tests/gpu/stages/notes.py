"""What a stage writes down while it runs, line by line, so that a stage that is ended leaves it."""

import json
from pathlib import Path
from typing import Any


class SkippedStage(Exception):
    """Raised by a stage that this machine cannot run; the text says why."""


class Notes:
    """Figures of one stage.

    Attributes:
        plain: whether plain twins run on the CPU, at tiny sizes.
    """

    def __init__(self, path: Path, plain: bool) -> None:
        self.plain = plain
        self._path = path
        self.beyond: list[str] = []

    def flavour(self, words: str) -> None:
        """Say whose kernels run; the last word counts."""
        self._write({"flavour": f"plain twin, CPU: {words}" if self.plain else words})

    def row(
        self, what: str, value: float, unit: str = "", *, limit: float | None = None,
        headline: bool = False, note: str = "",
    ) -> None:  # fmt: skip
        """Write a figure down.

        Args:
            what: it is of.
            value: of it; NaN is beyond every limit.
            unit: empty for a ratio.
            limit: it may be at most; None: none is known.
            headline: whether the line on the console has it.
            note: where a limit comes from, and what else is to be known.
        """
        ok = limit is None or value <= limit
        if not ok:
            self.beyond.append(f"{what}: {value:.4g} {unit}, at most {limit:.4g}")
        row = {
            "what": what, "value": value, "unit": unit, "limit": limit, "ok": ok,
            "headline": headline, "note": note,
        }  # fmt: skip
        self._write({"row": row})

    def skipped(self, what: str, why: str) -> None:
        """Write down that a part of the stage cannot run here."""
        self.words(what, "skipped", why)

    def words(self, what: str, words: str, note: str) -> None:
        """Write down what has no figure."""
        row = {
            "what": what, "value": None, "unit": words, "limit": None, "ok": True,
            "headline": False, "note": note,
        }  # fmt: skip
        self._write({"row": row})

    def end(self, outcome: str, reason: str = "") -> None:
        """Say what became of the stage."""
        self._write({"outcome": outcome, "reason": reason})

    def _write(self, note: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(note) + "\n")
