"""What a study found: a table on the console, study.md, study.json and plots/gap.png.

A variant is compared with the baseline, or with another one that it names. A study with stages says
of each, too, how many tokens it took with and without them, and when the baseline is as low; one
with a longer baseline, how many tokens are saved.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid_train import __version__
from hybrid_train.config import frozen
from hybrid_train.config.commands import command, typed
from hybrid_train.jobs import study_evaluation
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.jobs.provenance import command_line, libraries
from hybrid_train.jobs.study_plan import PlannedRun, StudyPlan, are_paired
from hybrid_train.jobs.study_stages import PlannedStage
from hybrid_train.runtime import hardware
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.study import StudyJob, Variant
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted, show_tokens, tokens
from hybrid_train.tracking.gaps import (
    TAIL,
    WINDOW,
    WINDOWS,
    Comparison,
    Curve,
    Spread,
    compare,
    curve,
    spread,
    tokens_needed,
)
from hybrid_train.tracking.metrics import show, show_duration
from hybrid_train.tracking.plots import Figures, plot_figures, plot_gaps

MARKDOWN, JSON, PLOT = "study.md", "study.json", "plots/gap.png"
PLOT_OF_FIGURES = "plots/figures.png"
_SEEDS_OF_A_CLAIM = 3
_STAGE_HEADS = ("stage", "command", "tokens", "time")
_VERSIONS = ("python", "torch", "megatron-core")
_FIGURES = "What `evaluate` says of the finished runs: mean over seeds, and their deviation."


@dataclass(frozen=True)
class _Found:
    """A variant and what its finished runs came to.

    Attributes:
        saved: share of the tokens that the baseline needs for the validation loss of the variant;
            None where no longer baseline ran, or its model or data are not those of the baseline.
    """

    variant: Variant
    against: str  # the variant that it is compared with
    runs: dict[int, PlannedRun]  # finished ones, by seed
    curves: dict[int, Curve]  # of those
    comparison: Comparison
    paired: bool  # with those of `against`, so that the same seed means the same batches
    saved: Spread | None
    figures: Figures  # of what its runs were asked

    @property
    def seen(self) -> float:
        """Tokens of a run alone, without its stages."""
        return next(iter(self.curves.values())).seen

    @property
    def before(self) -> Spread:
        """Validation losses before the first step."""
        return spread([one.before for one in self.curves.values()])

    @property
    def seen_with_stages(self) -> float:
        run = next(iter(self.runs.values()))
        return self.seen + sum(_tokens_of(one) or 0 for one in run.stages().values())

    def tokens_of(self, other: "_Found") -> float:
        """Return when another is as low as this at its end, mean over seeds; NaN if never."""
        reached = [
            other.curves[seed].tokens_to_reach(one.mean(WINDOWS[TAIL]))
            for seed, one in self.curves.items()
            if seed in other.curves
        ]
        return sum(reached) / len(reached) if reached else math.nan


def report(study: StudyJob, plan: StudyPlan) -> None:
    """Compare the finished runs with the baseline, print the table and write the files.

    Raises:
        UserError: if no run of the baseline is finished.
    """
    found = _found(study, plan.runs)
    folder = Path(study.run_dir)
    missing = [run.name for run in plan.runs if not run.is_finished()]
    facts = _facts(study, found, missing)
    baseline = found[study.baseline].curves
    plots = {name: compare(one.curves, baseline) for name, one in found.items()}
    plot_gaps(plots, study.baseline, folder / PLOT, study.title)
    (folder / PLOT_OF_FIGURES).unlink(missing_ok=True)
    plot_figures(_figures(study, found), folder / PLOT_OF_FIGURES, study.title)
    (folder / JSON).write_text(json.dumps(_as_data(study, found, facts, plan), indent=2) + "\n")
    (folder / MARKDOWN).write_text(_markdown(study, found, facts, plan))
    page = console()
    page.print(f"\n{study.title}\n", soft_wrap=True)
    show_numbers(page, list(_rows(study, found)), _heads(study, found))
    page.print(f"\n{_legend(study, found)}", soft_wrap=True)
    if figures := study_evaluation.rows(_figures(study, found)):
        page.print(f"\n{_FIGURES}\n", soft_wrap=True)
        show_numbers(page, figures, ["figure", "of", *found], words=2)
    for kind, one in plan.rates.items():
        page.print(f"\n{one.sentence(kind)}", soft_wrap=True)
    if plan.stages:
        page.print("\n" + "\n".join(_sentences(study, found)), soft_wrap=True)
    if missing:
        page.print(f"\nMissing, since they failed: {', '.join(missing)}", soft_wrap=True)
    published = [(name, one.variant.published) for name, one in found.items()]
    page.print("\nPublished, for other models and far longer runs:")
    for name, text in published:
        if text:
            page.print(f"  {name}: {text}", soft_wrap=True)
    page.print("\nWhere things lie:")
    written = {"table": MARKDOWN, "figures": JSON, "plot": PLOT, "plot of figures": PLOT_OF_FIGURES}
    for name, place in written.items():
        if (folder / place).is_file():
            page.print(f"  {name:<17}{folder / place}", soft_wrap=True)


def _found(study: StudyJob, runs: Sequence[PlannedRun]) -> dict[str, _Found]:
    """Read the metrics of the finished runs; variants without any are left out."""
    finished: dict[str, dict[int, PlannedRun]] = {}
    for run in runs:
        if run.is_finished():
            finished.setdefault(run.variant, {})[run.seed] = run
    if study.baseline not in finished:
        raise UserError(
            f"no run of the baseline {study.baseline} has ended well, so there is nothing to "
            f"compare with; its logs are in {Path(study.run_dir) / study.baseline}"
        )
    curves = {
        name: {seed: curve(run.metrics()) for seed, run in by_seed.items()}
        for name, by_seed in finished.items()
    }
    # As they ran: by then a model has the vocabulary of its tokenizer.
    first = {
        name: frozen.load(next(iter(by_seed.values())).folder) for name, by_seed in finished.items()
    }
    lengths = [curves[name] for name in (study.baseline, *study.longer) if name in curves]
    found = {}
    for name, variant in study.chosen().items():
        if name not in finished:
            continue
        against = study.compared_with(name)
        against = against if against in finished else study.baseline
        like_baseline = are_paired(first[name], first[study.baseline])
        found[name] = _Found(
            variant,
            against,
            finished[name],
            curves[name],
            compare(curves[name], curves[against]),
            are_paired(first[name], first[against]),
            _saved(curves[name], lengths) if like_baseline and len(lengths) > 1 else None,
            study_evaluation.over_seeds(
                [run.evaluation for run in finished[name].values() if run.evaluation]
            ),
        )
    return found


def _figures(study: StudyJob, found: Mapping[str, _Found]) -> dict[str, Figures]:
    """Return what is shown of what runs were asked, by variant."""
    return {
        name: study_evaluation.of_metrics(one.figures, study.figures) for name, one in found.items()
    }


def _saved(curves: Mapping[int, Curve], lengths: Sequence[Mapping[int, Curve]]) -> Spread:
    """Describe over seeds the share of tokens that a run saves; 0 and the largest are bounds."""
    return spread(
        [
            1 - one.seen / tokens_needed(one.validation, [runs[seed] for runs in lengths])
            for seed, one in curves.items()
            if all(seed in runs for runs in lengths)
        ]
    )


def _tokens_of(stage: PlannedStage) -> float | None:
    """Return the tokens that a stage trains on; None if it trains nothing."""
    job = stage.job
    return (
        tokens(job.train.tokens) if stage.command == "train" and isinstance(job, TrainJob) else None
    )


def _sentences(study: StudyJob, found: Mapping[str, _Found]) -> Iterator[str]:
    """Yield a sentence for each variant but the baseline."""
    for name, one in found.items():
        if name == study.baseline:
            continue
        tail = one.comparison.windows[TAIL]
        deviation = (
            f"deviation {_percent(tail.deviation, '{:.2f}')} %" if tail.number > 1 else "no spread"
        )
        few = ", fewer than the three that a claim needs" if tail.number < _SEEDS_OF_A_CLAIM else ""
        word = {True: "within", False: "beyond", None: ""}[one.comparison.within_seeds]
        judged = f", {word} what seeds alone do" if word else ""
        text = (
            f"{name}: a loss {_percent(tail.mean)} % from that of {one.against} ({deviation} over "
            f"{counted(tail.number, 'seed')}{few}{judged}) after {_count(one.seen)} tokens, "
            f"{_count(one.seen_with_stages)} with its stages"
        )
        yield f"{text}{_when(study, one, found[one.against])}."


def _when(study: StudyJob, one: _Found, other: _Found) -> str:
    """Say when the baseline, or what a variant is compared with, is as low."""
    if one.saved is not None:
        return f"; saved are {_share(one.saved)} % of the tokens that {study.baseline} needs"
    if study.longer:
        return ""
    needed = one.tokens_of(other)
    if math.isnan(needed):
        return f"; {one.against} is never as low in {_count(other.seen)} tokens"
    saved = _percent(1 - one.seen / needed, "{:.0f}")
    return f"; {one.against} is as low after {_count(needed)}: {saved} % saved"


def _share(saved: Spread | None) -> str:
    """Show a share over seeds: the mean, the lowest and the highest."""
    if saved is None or not saved.number:
        return "-"
    low, high = _percent(saved.lowest, "{:.0f}"), _percent(saved.highest, "{:.0f}")
    return f"{_percent(saved.mean, '{:.0f}')} ({low} to {high})"


def _count(number: float) -> str:
    return show_tokens(round(number))


def _heads(study: StudyJob, found: Mapping[str, _Found]) -> list[str]:
    return [
        "gap, %", "against", "seeds", *WINDOWS, "deviation", "lowest", "highest", "validation",
        "its seeds", *(["saved, %"] if study.longer else []),
        *(["before", "after"] if _has_starts(found) else []),
    ]  # fmt: skip


def _has_starts(found: Mapping[str, _Found]) -> bool:
    return any(math.isfinite(one.before.mean) for one in found.values())


def _rows(study: StudyJob, found: Mapping[str, _Found]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each variant but the baseline."""
    for name, one in found.items():
        if name == study.baseline:
            continue
        tail = one.comparison.windows[TAIL]
        yield (
            name,
            one.against,
            str(tail.number),
            *(_percent(gap.mean) for gap in one.comparison.windows.values()),
            _percent(tail.deviation, "{:.2f}"),
            _percent(tail.lowest),
            _percent(tail.highest),
            _percent(one.comparison.validation_gap.mean),
            {True: "within", False: "beyond", None: "not known"}[one.comparison.within_seeds],
            *([_share(one.saved)] if study.longer else []),
            *(_starts_and_ends(one) if _has_starts(found) else []),
        )


def _starts_and_ends(one: _Found) -> Iterator[str]:
    """Yield the validation losses before the first step and at the end."""
    for loss in (one.before, one.comparison.validation_loss):
        yield show("validation_loss", loss.mean) if math.isfinite(loss.mean) else "-"


def _percent(share: float, form: str = "{:+.2f}") -> str:
    return form.format(100 * share) if math.isfinite(share) else "-"


def _legend(study: StudyJob, found: Mapping[str, _Found]) -> str:
    """Say what the figures are, and those of what the variants are compared with."""
    others = dict.fromkeys([study.baseline, *(one.against for one in found.values())])
    alone = ", ".join(name for name, one in found.items() if not one.paired)
    unpaired = (
        f"\n\nNot paired: {alone}. Their batches or their models are not those of what they are "
        f"compared with, so that their gaps hold what chance does to a run."
    )
    saved = (
        f"\nSaved: of the tokens that {study.baseline} needs for the same validation loss, read "
        f"between {', '.join([study.baseline, *study.longer])}; mean\n(lowest to highest) over "
        "seeds, of variants with its model and its batches. The least and the most that these can "
        "show are bounds."
    )
    starts = (
        "\nBefore, after: validation losses before the first step and at the end, nats per token, "
        "mean over seeds."
    )
    return (
        "Gap: (loss - loss of the other) / loss of the other, the one under `against`, of runs "
        "with the same seed, mean over\nseeds. A loss at a point is the mean over the "
        f"{WINDOW:.0%} of training before it. Deviation (of the sample), lowest,\nhighest: of the "
        f"gap of the {TAIL} over seeds. Validation: gap at the end. Its seeds: whether the gap of "
        f"the\n{TAIL} is within the relative deviation of the losses of the other over its own "
        f"seeds.{saved if study.longer else ''}"
        f"{starts if _has_starts(found) else ''}\n\n"
        + "\n".join(_losses_of(name, found[name].comparison) for name in others)
        + (unpaired if alone else "")
    )


def _losses_of(name: str, found: Comparison) -> str:
    """Say the losses of a variant that others are compared with."""
    windows = "; ".join(f"{part} {show('loss', loss.mean)}" for part, loss in found.losses.items())
    mean, lowest, highest = (
        show("validation_loss", value)
        for value in (
            found.validation_loss.mean,
            found.validation_loss.lowest,
            found.validation_loss.highest,
        )
    )
    return (
        f"{name}: loss {windows}; validation {mean} (lowest {lowest}, highest {highest}); "
        f"deviation over seeds {_percent(found.losses[TAIL].relative, '{:.2f}')} %."
    )


def _facts(study: StudyJob, found: Mapping[str, _Found], missing: Sequence[str]) -> dict[str, Any]:
    """Collect under which conditions the figures came about."""
    seconds = {
        name: sum(run.seconds for run in one.curves.values()) / len(one.curves)
        for name, one in found.items()
    }
    versions = libraries()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command_line(sys.argv),
        "cores": len(os.sched_getaffinity(0)),
        "processor": hardware.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "hybrid_train": __version__,
        **{name: versions[name] for name in _VERSIONS},
        "base": [*study.base, *study.overrides],
        "seeds": list(study.seeds),
        "seconds_of_steps_per_run": seconds,
        "missing": list(missing),
    }


def _as_data(
    study: StudyJob, found: Mapping[str, _Found], facts: Mapping[str, Any], plan: StudyPlan
) -> dict[str, Any]:
    """Return everything as plain data; what is not finite becomes null."""
    variants = {}
    baseline = found[study.baseline]
    for name, one in found.items():
        variants[name] = {
            "overrides": list(one.variant.overrides),
            "published": one.variant.published,
            "against": one.against,
            "runs": {str(seed): str(run.folder) for seed, run in one.runs.items()},
            "gaps": {key: _spread(gap) for key, gap in one.comparison.windows.items()},
            "losses": {key: _spread(loss) for key, loss in one.comparison.losses.items()},
            "validation_loss": _spread(one.comparison.validation_loss),
            "validation_gap": _spread(one.comparison.validation_gap),
            "start_validation_loss": _spread(one.before),
            "figures": study_evaluation.as_data(one.figures),
            "paired": one.paired,
            "within_seeds_of_the_other": one.comparison.within_seeds,
            "tokens": one.seen,
            "tokens_with_stages": one.seen_with_stages,
            "tokens_of_baseline_to_reach": _finite(one.tokens_of(baseline)),
            "tokens_saved": _spread(one.saved) if one.saved else None,
        }
    return {
        "title": study.title,
        "baseline": study.baseline,
        "window": WINDOW,
        **facts,
        "rates": {kind: dataclasses.asdict(one) for kind, one in plan.rates.items()},
        "stages": [_stage_as_data(stage) for stage in plan.stages],
        "variants": variants,
    }


def _stage_as_data(stage: PlannedStage) -> dict[str, Any]:
    record = stage.record()
    return {
        "name": stage.name,
        "command": stage.command,
        "overrides": list(stage.lines),
        "path": str(stage.path),
        "hash": stage.digest,
        "tokens": _tokens_of(stage),
        "seconds": record["seconds"] if record else None,
    }


def _spread(one: Spread) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in dataclasses.asdict(one).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _markdown(
    study: StudyJob, found: Mapping[str, _Found], facts: Mapping[str, Any], plan: StudyPlan
) -> str:
    """Write the table, what it means, and how to repeat it."""
    seconds = facts["seconds_of_steps_per_run"]
    parts = [f"# {study.title}", "", f"`{facts['command']}`, {facts['date']}.", ""]
    parts += _table([*_heads(study, found), "published"], _published_rows(study, found))
    parts += ["", _legend(study, found), "", f"![gaps]({PLOT})", ""]
    if figures := study_evaluation.rows(_figures(study, found)):
        asked = f"`{typed(*study.evaluate)}`"
        parts += ["## Figures", "", f"{_FIGURES} Asked was {asked}.", ""]
        parts += [*_table(["figure", "of", *found], figures), ""]
        if (Path(study.run_dir) / PLOT_OF_FIGURES).is_file():
            parts += [f"![figures]({PLOT_OF_FIGURES})", ""]
    if facts["missing"]:
        parts += [f"Missing, since they failed: {', '.join(facts['missing'])}.", ""]
    if plan.stages:
        parts += [f"- {sentence}" for sentence in _sentences(study, found)]
        parts += ["", "## Stages", "", *_table(_STAGE_HEADS, map(_stage_row, plan.stages)), ""]
    for kind, one in plan.rates.items():
        parts += [one.sentence(kind), ""]
    parts += ["## Settings", ""]
    parts += [f"Every run: `{command('train', *facts['base'])}`", ""]
    parts += [f"Seeds: {', '.join(map(str, facts['seeds']))}.", ""]
    settings = [
        (name, f"`{typed(*one.variant.overrides)}`" if one.variant.overrides else "as above",
         show_duration(seconds[name]))
        for name, one in found.items()
    ]  # fmt: skip
    parts += _table(["variant", "its own settings", "time of the steps of a run"], settings)
    device = f"; {facts['gpu']}" if facts["gpu"] else ""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("hybrid_train", *_VERSIONS))
    parts += ["", f"Machine: {facts['cores']} cores, {facts['processor']}{device}. {versions}.", ""]
    return "\n".join(parts)


def _stage_row(stage: PlannedStage) -> tuple[str, ...]:
    count, record = _tokens_of(stage), stage.record()
    return (
        stage.name,
        f"`{command(*stage.command.split(), *stage.lines)}`",
        "-" if count is None else _count(count),
        show_duration(record["seconds"]) if record else "not finished",
    )


def _published_rows(study: StudyJob, found: Mapping[str, _Found]) -> Iterator[tuple[str, ...]]:
    for row in _rows(study, found):
        yield (*row, found[row[0]].variant.published)


def _table(heads: Sequence[str], rows: Any) -> list[str]:
    """Write a table in Markdown; a bar within a cell would end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
