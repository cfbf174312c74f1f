"""Reads a report as a browser would, without one."""

import html.parser
import json
from collections import Counter
from typing import Any

EMPTY = {"meta", "br", "img", "input"}  # tags that need no end


class Page(html.parser.HTMLParser):
    """Tags, texts and addresses of a page; ends must match beginnings.

    Attributes:
        data: what the figures are made of.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.data: dict[str, Any] = {}
        self.titles: dict[int, str] = {}  # of the figures
        self._open: list[str] = []
        self._scripts: list[str] = []
        self.feed(text)
        assert self._open == []
        self.data = json.loads(self._scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        own = dict(attrs)
        self.addresses += [v or "" for name, v in attrs if name in {"src", "href", "xlink:href"}]
        if own.get("class") == "plot":
            self.titles[int(own["data-figure"] or 0)] = own["aria-label"] or ""
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self._scripts if self._open[-1:] == ["script"] else self.texts).append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def figures(page: Page) -> dict[str, dict[str, Any]]:
    """The figures of a page by their titles."""
    return {title: page.data["figures"][number] for number, title in page.titles.items()}
