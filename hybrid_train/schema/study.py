"""The root of a study: variants of one run, each with several seeds, against a baseline.

What variants start from is made by stages: jobs whose output later overrides name as `{NAME}`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from hybrid_train.schema.limits import FileName, Name, Processes, Rate, Seed, Share, Workers
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import Problem

SEED = "seed"  # {seed} in an override of a stage: it is made for each seed of the study
SHORT = "short"  # folder of the short form, within that of the study
# Hydra has no such value: a dictionary has colons.
_REFERENCE = re.compile(r"\{([\w.-]+)\}")
_FOLDER_NAME = re.compile(r"\w[\w.-]{0,99}")
RATES_FILE = "rates.json"  # which learning rates were chosen
_OUTPUTS = ("study.md", "study.json", RATES_FILE, "plots", SHORT)  # beside those of the variants
_OWN_KEYS = ("run_dir", "train.seed", "runtime.threads")  # what the study itself sets
_OWN_OF_EVALUATE = ("checkpoint", "output", "runtime.threads")  # and of `evaluate`


@dataclass(kw_only=True)
class Variant:
    """What one variant changes, and what somebody found for it."""

    overrides: list[str] = field(default_factory=list)  # after those of the base; empty: as base
    against: Name | None = None  # variant that it is compared with; null: the baseline
    published: str = ""  # figure of a paper with its source, shown beside ours
    evaluate: list[str] = field(default_factory=list)  # after those of the study
    processes: Processes = 1  # of each run, by torchrun on this machine: for a layout of several

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from _own_keys("overrides", self.overrides)
        yield from _own_keys("evaluate", self.evaluate, _OWN_OF_EVALUATE)


def references(lines: Sequence[str]) -> list[str]:
    """Return the names that lines refer to, `{seed}` among them, each once."""
    return list(dict.fromkeys(name for line in lines for name in _REFERENCE.findall(line)))


@dataclass(kw_only=True)
class Stage:
    """A job that runs before the variants. `{NAME}` in what comes later is the folder it wrote.

    It refers to stages above it, and with `{seed}` to a seed of the study, for each of which it is
    then made; otherwise it is made once. Equal stages run once, whatever study asks for them.
    """

    command: Name = "train"  # a word of the command line: convert, "data tokenize", ...
    overrides: list[str] = field(default_factory=list)  # all of its settings but where it writes
    processes: Processes = 1  # by torchrun on this machine, as of a variant


@dataclass(kw_only=True)
class ShortForm:
    """What short=true changes, to see within a minute that a study works."""

    overrides: list[str] = field(default_factory=list)  # of every training, after all others
    evaluate: list[str] = field(default_factory=list)  # after those of the study and of variants
    only: list[Name] = field(default_factory=list)  # variants beside the baseline; empty: as asked
    seeds: list[Seed] = field(default_factory=list)  # empty: the first of the study


@dataclass(kw_only=True)
class RateChoice:
    """Chooses schedule.peak_lr before the variants run, once for each kind of objective.

    Runs that begin with trained weights (checkpoint.load) are a kind of their own. The first
    variant of a kind trains with every candidate; the lowest loss at the end wins. With `each` all
    variants do, since their models want rates of their own. What the overrides of a variant, or
    your own, say of schedule.peak_lr stays.
    """

    candidates: list[Rate] = field(default_factory=list)  # empty: none is chosen
    each: bool = False  # each variant tries them, not the first one of a kind of objective
    share: Share = 0.25  # of the tokens of a run, for each of them
    seed: Seed = 0  # of these runs; no seed of the study, so that none is judged by what it chose

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        known = self.candidates
        if known and (len(known) == 1 or len(set(known)) < len(known)):
            yield Problem("candidates", known, "must be two or more rates, none of them twice")
        if not self.share:
            yield Problem("share", self.share, "must be more than 0", RateChoice().share)


@dataclass(kw_only=True)
class StudyJob:
    """Variants of a training run; same seed means same data and same initial weights."""

    title: str = MISSING
    run_dir: FileName = MISSING  # each run gets the run folder run_dir/VARIANT/seed_N
    stages_dir: FileName = "runs/stages"  # what stages wrote, by hash; shared by all studies
    stages: dict[Name, Stage] = field(default_factory=dict)  # jobs before the variants
    base: list[str] = field(default_factory=list)  # of every variant, as of `hybrid-train train`
    overrides: list[str] = field(default_factory=list)  # your own, of every training, after others
    # Settings of `evaluate`, which measures every finished run: [tasks=heldout]; empty: none does.
    evaluate: list[str] = field(default_factory=list)
    figures: list[Name] = field(default_factory=list)  # TASK.METRIC that tables show; empty: all
    rates: RateChoice = field(default_factory=RateChoice)
    seeds: list[Seed] = MISSING
    baseline: Name = MISSING  # name of the variant that the others are compared with
    # Variants that are the baseline with more tokens: tokens saved are read between its lengths.
    longer: list[Name] = field(default_factory=list)
    variants: dict[Name, Variant] = field(default_factory=dict)
    only: list[Name] = field(default_factory=list)  # variants beside the baseline; empty: all
    parts: dict[Name, list[Name]] = field(default_factory=dict)  # variants that part=NAME runs
    part: Name | None = None  # one of the parts; the study without it compares what all have run
    short: bool = False  # the short form, in run_dir/short
    short_form: ShortForm = field(default_factory=ShortForm)
    parallel: Workers | None = None  # runs at once; None: one for each core, one alone on a GPU
    keep_checkpoints: bool = False  # of finished runs; what is compared are their metrics

    def as_asked(self) -> "StudyJob":
        """Return the study with its part and its short form put into the other settings."""
        asked = replace(self, only=self.parts[self.part]) if self.part else self
        if not self.short:
            return asked
        form = self.short_form
        return replace(
            asked,
            run_dir=f"{self.run_dir}/{SHORT}",
            only=asked.only or form.only,
            seeds=form.seeds or self.seeds[:1],
            overrides=[*form.overrides, *self.overrides],
            variants={
                name: replace(one, evaluate=[*one.evaluate, *form.evaluate])
                for name, one in self.variants.items()
            },
        )

    def chosen(self) -> dict[str, Variant]:
        """Return the variants that take part, in their order, the baseline first.

        With a variant goes what it is compared with.
        """
        wanted = {self.baseline, *(self.only or self.variants)}
        while more := {self.compared_with(name) for name in wanted} - wanted:
            wanted |= more
        rest = {name: one for name, one in self.variants.items() if name in wanted}
        return {self.baseline: rest.pop(self.baseline), **rest}

    def compared_with(self, name: str) -> str:
        """Return the variant that this one is compared with."""
        return self.variants[name].against or self.baseline

    def asked_of(self, name: str) -> list[str]:
        """Return the settings of `evaluate` for the runs of a variant; none: they are not asked."""
        return [*self.evaluate, *self.variants[name].evaluate] if self.evaluate else []

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from _own_keys("evaluate", self.evaluate, _OWN_OF_EVALUATE)
        if self.figures and not self.evaluate:
            rule = "are those of `evaluate`, of which the study says nothing: evaluate=[tasks=...]"
            yield Problem("figures", self.figures, rule, [])
        yield from _own_keys("base", self.base)
        yield from _own_keys("overrides", self.overrides)
        yield from _own_keys("short_form.overrides", self.short_form.overrides)
        yield from self._names()
        yield from self._stages()
        yield from self._unknown("baseline", [self.baseline])
        yield from self._unknown("only", self.only)
        yield from self._unknown("longer", self.longer)
        yield from self._unknown("short_form.only", self.short_form.only)
        for name, variant in self.variants.items():
            yield from self._against(f"variants.{name}.against", name, variant.against)
        yield from self._parts()
        if self.short and not self.short_form.overrides:
            rule = "this study says nothing of it; short_form: {overrides: [train.tokens=4k]} does"
            yield Problem("short", "true", rule, "false")
        for path, seeds in {"seeds": self.seeds, "short_form.seeds": self.short_form.seeds}.items():
            if (path == "seeds" and not seeds) or len(set(seeds)) < len(seeds):
                yield Problem(path, seeds, "must be one or more seeds, none of them twice")
            if self.rates.candidates and self.rates.seed in seeds:
                rule = f"{path} has it; what chooses a rate needs a seed that is not reported"
                free = next(seed for seed in range(len(seeds) + 1) if seed not in seeds)
                yield Problem("rates.seed", self.rates.seed, rule, free)

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

    def _stages(self) -> Iterator[Problem]:
        """A stage has its own name and refers to those above it, so that none waits for itself."""
        above: list[str] = []
        for name, stage in self.stages.items():
            path = f"stages.{name}"
            if not _FOLDER_NAME.fullmatch(name):
                yield Problem(path, name, "must be letters, digits, _, - and .; at most 100")
            elif name == SEED or name in self.variants:
                what = "a variant" if name in self.variants else f"what {{{SEED}}} stands for"
                yield Problem(path, name, f"is the name of {what}; a stage needs another one")
            if not stage.overrides:
                yield Problem(f"{path}.overrides", "[]", "is empty; the base is of variants alone")
            yield from self._references(f"{path}.overrides", stage.overrides, above)
            above.append(name)
        of_variants = {
            "base": self.base, "overrides": self.overrides, "evaluate": self.evaluate,
        }  # fmt: skip
        for name, one in self.variants.items():
            of_variants[f"variants.{name}.overrides"] = one.overrides
            of_variants[f"variants.{name}.evaluate"] = one.evaluate
        for path, lines in of_variants.items():
            yield from self._references(path, lines, above)

    def _references(self, path: str, lines: list[str], above: list[str]) -> Iterator[Problem]:
        """Refuse names of no stage, or of one that does not come before."""
        for line in lines:
            for name in references([line]):
                if name in above or name == SEED:
                    continue
                if name in self.stages:
                    itself = path == f"stages.{name}.overrides"
                    rule = "a stage cannot read itself" if itself else f"{name} stands below it"
                    rule = (
                        f"{rule}; it may refer to the stages above it: {', '.join(above) or 'none'}"
                    )
                    yield Problem(path, line, rule)
                elif name in self.variants:
                    yield Problem(
                        path, line, f"{name} is a variant; only stages can be referred to"
                    )
                else:
                    rule = f"there is no stage {name}; there are {', '.join(above) or 'none'}"
                    yield Problem(path, line, rule, nearest(name, above))

    def _parts(self) -> Iterator[Problem]:
        """Check the names of parts and of the variants in them."""
        for name, variants in self.parts.items():
            path = f"parts.{name}"
            if not variants:
                yield Problem(path, "[]", "is empty; it names the variants that it runs")
            yield from self._unknown(path, variants)
        if self.part is None:
            return
        if self.part not in self.parts:
            rule = f"there is no such part; there are {', '.join(self.parts) or 'none'}"
            yield Problem("part", self.part, rule, nearest(self.part, self.parts))
        elif self.only:
            yield Problem("only", self.only, f"part={self.part} names the variants; choose one")

    def _against(self, path: str, name: str, other: str | None) -> Iterator[Problem]:
        """A variant is compared with another one; the baseline with none."""
        if other is None:
            return
        yield from self._unknown(path, [other])
        if name in (self.baseline, other):
            rule = "the baseline is compared with none" if name == self.baseline else "is itself"
            yield Problem(path, other, rule, None)

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
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Problem(path, name, "stands there twice")


def _own_keys(path: str, lines: list[str], own: Sequence[str] = _OWN_KEYS) -> Iterator[Problem]:
    """Refuse settings that the study gives each run itself."""
    for line in lines:
        if line.partition("=")[0].lstrip("+~") in own:
            yield Problem(path, line, "the study sets this of each run; leave it out")
