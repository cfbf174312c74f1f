"""The root of a study: variants of one run, each with several seeds, against a baseline."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.schema.limits import FileName, Name, Seed, Workers
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import Problem

_FOLDER_NAME = re.compile(r"\w[\w.-]{0,99}")
_OUTPUTS = ("study.md", "study.json", "plots")  # beside the folders of the variants
_OWN_KEYS = ("run_dir", "train.seed", "runtime.threads")  # what the study itself sets


@dataclass(kw_only=True)
class Variant:
    """What one variant changes, and what somebody found for it."""

    overrides: list[str] = field(default_factory=list)  # after those of the base; empty: as base
    published: str = ""  # figure of a paper with its source, shown beside ours

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from _own_keys("overrides", self.overrides)


@dataclass(kw_only=True)
class StudyJob:
    """Variants of a training run; same seed means same data and same initial weights."""

    title: str = MISSING
    run_dir: FileName = MISSING  # each run gets the run folder run_dir/VARIANT/seed_N
    base: list[str] = field(default_factory=list)  # of every run, as of `hybrid-train train`
    overrides: list[str] = field(default_factory=list)  # your own, of every run, after all others
    seeds: list[Seed] = MISSING
    baseline: Name = MISSING  # name of the variant that the others are compared with
    variants: dict[Name, Variant] = field(default_factory=dict)
    only: list[Name] = field(default_factory=list)  # variants beside the baseline; empty: all
    parallel: Workers | None = None  # runs at once; None: one for each core, one alone on a GPU
    keep_checkpoints: bool = False  # of finished runs; what is compared are their metrics

    def chosen(self) -> dict[str, Variant]:
        """Return the variants that take part, in their order, the baseline first."""
        wanted = {self.baseline, *(self.only or self.variants)}
        rest = {name: one for name, one in self.variants.items() if name in wanted}
        return {self.baseline: rest.pop(self.baseline), **rest}

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from _own_keys("base", self.base)
        yield from _own_keys("overrides", self.overrides)
        yield from self._names()
        yield from self._unknown("baseline", [self.baseline])
        yield from self._unknown("only", self.only)
        for name in sorted({name for name in self.only if self.only.count(name) > 1}):
            yield Problem("only", name, "stands there twice")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            yield Problem("seeds", self.seeds, "must be one or more seeds, none of them twice")

    def _names(self) -> Iterator[Problem]:
        """Each variant has a folder: no two may be the same, where case does not count either."""
        taken = {name.lower(): name for name in _OUTPUTS}
        for name in self.variants:
            path = f"variants.{name}"
            if not _FOLDER_NAME.fullmatch(name):
                rule = "must be usable as a folder: up to 100 letters, digits, _, - and ."
                yield Problem(path, name, rule)
            elif taken.setdefault(name.lower(), name) != name or name in _OUTPUTS:
                yield Problem(path, name, f"{taken[name.lower()]} has this name already")

    def _unknown(self, path: str, names: list[str]) -> Iterator[Problem]:
        for name in names:
            if not self.variants:
                yield Problem(
                    path, name, "there are no variants: variants: {NAME: {overrides: []}}"
                )
                return
            if name not in self.variants:
                rule = f"must be one of the variants: {', '.join(self.variants)}"
                yield Problem(path, name, rule, nearest(name, self.variants))


def _own_keys(path: str, lines: list[str]) -> Iterator[Problem]:
    """Refuse settings that the study gives each run itself."""
    for line in lines:
        if line.partition("=")[0].lstrip("+~") in _OWN_KEYS:
            yield Problem(path, line, "the study sets this of each run; leave it out")
