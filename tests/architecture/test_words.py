"""Messages and pages have no word twice, and no `(s)` in place of a plural (`units.counted`)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = sorted(
    path
    for folder in ("hybrid_train", "data_tools", "launch")
    for path in (ROOT / folder).rglob("*.py")
)
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "launch").rglob("*.md")),
    *sorted((ROOT / "conf").rglob("*.yaml")),
    *sorted((ROOT / "tests").rglob("*.md")),
]
FAULTS = {
    "a word twice": re.compile(r"(?<![\w.{-])([A-Za-z]{2,})[ \n]+\1(?![\w.=-])"),
    "a plural in brackets": re.compile(r"\w\((?:s|es|ies)\)"),
    "one of several": re.compile(
        r"(?<![\d.,x+-] )(?<![\d.,])\b1 (?:steps|problems|processes|layers|tokens)\b"
    ),
}


def texts(path: Path) -> Iterator[str]:
    """Yield the string literals of a file; what is filled into one is a blank."""
    inside = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            yield "".join(map(str, parts))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            yield node.value


def prose(page: str) -> str:
    """Return a page without its blocks of code, and without code within a line."""
    return re.sub(r"`[^`]*`", "`", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE))


def faults_of(text: str) -> list[str]:
    return [f"{name}: {match[0]!r}" for name, one in FAULTS.items() for match in one.finditer(text)]


def test_no_message_has_a_word_twice_or_a_plural_in_brackets() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in CODE
        for text in texts(path)
        for fault in faults_of(text)
    ]
    assert found == []


def test_no_page_has_a_word_twice_or_a_plural_in_brackets() -> None:
    found = {str(page): faults_of(prose(page.read_text())) for page in PAGES}
    assert {page: faults for page, faults in found.items() if faults} == {}


@pytest.mark.parametrize("text", ["of the the run", "2 problem(s)", "1 steps"])
def test_each_fault_is_noticed(text: str) -> None:
    assert len(faults_of(text)) == 1
