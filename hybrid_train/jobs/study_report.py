"""What a study found: a table on the console, study.md, study.json and plots/gap.png.

A study with stages says of each variant, too, how many tokens it took with and without them, and
when the baseline is as low.
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
)
from hybrid_train.tracking.metrics import show, show_duration
from hybrid_train.tracking.plots import plot_gaps

MARKDOWN, JSON, PLOT = "study.md", "study.json", "plots/gap.png"
_SEEDS_OF_A_CLAIM = 3
_STAGE_HEADS = ("stage", "command", "tokens", "time")
_VERSIONS = ("python", "torch", "megatron-core")


@dataclass(frozen=True)
class _Found:
    """A variant and what its finished runs came to."""

    variant: Variant
    runs: dict[int, PlannedRun]  # finished ones, by seed
    curves: dict[int, Curve]  # of those
    comparison: Comparison
    paired: bool  # with those of the baseline, so that the same seed means the same batches

    @property
    def seen(self) -> float:
        """Tokens of a run alone, without its stages."""
        return next(iter(self.curves.values())).seen

    @property
    def seen_with_stages(self) -> float:
        run = next(iter(self.runs.values()))
        return self.seen + sum(_tokens_of(one) or 0 for one in run.stages().values())

    def tokens_of_baseline(self, baseline: "_Found") -> float:
        """Return when the baseline is as low as this at its end, mean over seeds; NaN if never."""
        reached = [
            baseline.curves[seed].tokens_to_reach(one.mean(WINDOWS[TAIL]))
            for seed, one in self.curves.items()
            if seed in baseline.curves
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
    plots = {name: one.comparison for name, one in found.items()}
    plot_gaps(plots, study.baseline, folder / PLOT, study.title)
    (folder / JSON).write_text(json.dumps(_as_data(study, found, facts, plan), indent=2) + "\n")
    (folder / MARKDOWN).write_text(_markdown(study, found, facts, plan))
    page = console()
    page.print(f"\n{study.title}\n", soft_wrap=True)
    show_numbers(page, list(_rows(study, found)), _heads(study))
    page.print(f"\n{_legend(study, found)}", soft_wrap=True)
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
    for name, place in {"table": MARKDOWN, "figures": JSON, "plot": PLOT}.items():
        page.print(f"  {name:<9}{folder / place}", soft_wrap=True)


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
    return {
        name: _Found(
            variant,
            finished[name],
            curves[name],
            compare(curves[name], curves[study.baseline]),
            are_paired(first[name], first[study.baseline]),
        )
        for name, variant in study.chosen().items()
        if name in finished
    }


def _tokens_of(stage: PlannedStage) -> float | None:
    """Return the tokens that a stage trains on; None if it trains nothing."""
    job = stage.job
    return (
        tokens(job.train.tokens) if stage.command == "train" and isinstance(job, TrainJob) else None
    )


def _sentences(study: StudyJob, found: Mapping[str, _Found]) -> Iterator[str]:
    """Yield a sentence for each variant but the baseline."""
    baseline = found[study.baseline]
    for name, one in found.items():
        if name == study.baseline:
            continue
        tail = one.comparison.windows[TAIL]
        spread = (
            f"deviation {_percent(tail.deviation, '{:.2f}')} %" if tail.number > 1 else "no spread"
        )
        few = ", fewer than the three that a claim needs" if tail.number < _SEEDS_OF_A_CLAIM else ""
        word = {True: "within", False: "beyond", None: ""}[one.comparison.within_seeds]
        judged = f", {word} what seeds alone do" if word else ""
        text = (
            f"{name}: a loss {_percent(tail.mean)} % from that of {study.baseline} ({spread} over "
            f"{counted(tail.number, 'seed')}{few}{judged}) after {_count(one.seen)} tokens, "
            f"{_count(one.seen_with_stages)} with its stages; "
        )
        needed = one.tokens_of_baseline(baseline)
        if math.isnan(needed):
            yield f"{text}{study.baseline} is never as low in {_count(baseline.seen)} tokens."
        else:
            saved = _percent(1 - one.seen / needed, "{:.0f}")
            yield f"{text}{study.baseline} is as low after {_count(needed)}: {saved} % saved."


def _count(number: float) -> str:
    return show_tokens(round(number))


def _heads(study: StudyJob) -> list[str]:
    return [
        "gap, %", "seeds", *WINDOWS, "deviation", "lowest", "highest", "validation",
        f"seeds of {study.baseline}",
    ]  # fmt: skip


def _rows(study: StudyJob, found: Mapping[str, _Found]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each variant but the baseline."""
    for name, one in found.items():
        if name == study.baseline:
            continue
        tail = one.comparison.windows[TAIL]
        yield (
            name,
            str(tail.number),
            *(_percent(gap.mean) for gap in one.comparison.windows.values()),
            _percent(tail.deviation, "{:.2f}"),
            _percent(tail.lowest),
            _percent(tail.highest),
            _percent(one.comparison.validation_gap.mean),
            {True: "within", False: "beyond", None: "not known"}[one.comparison.within_seeds],
        )


def _percent(share: float, form: str = "{:+.2f}") -> str:
    return form.format(100 * share) if math.isfinite(share) else "-"


def _legend(study: StudyJob, found: Mapping[str, _Found]) -> str:
    """Say what the figures are, and those of the baseline itself."""
    base = found[study.baseline].comparison
    windows = "; ".join(f"{name} {show('loss', loss.mean)}" for name, loss in base.losses.items())
    tail, validation = base.losses[TAIL], base.validation_loss
    alone = ", ".join(name for name, one in found.items() if not one.paired)
    unpaired = (
        f"\n\nNot paired: {alone}. Their batches or their models are not those of "
        f"{study.baseline}, so that their gaps hold what chance does to a run."
    )
    return (
        f"Gap: (loss - loss of {study.baseline}) / loss of {study.baseline}, of runs with the same "
        f"seed, mean over seeds. A loss at a\npoint is the mean over the {WINDOW:.0%} of training "
        f"before it. Deviation (of the sample), lowest, highest: of the gap of\nthe {TAIL} over "
        f"seeds. Validation: gap at the end. Seeds of {study.baseline}: whether the gap of the "
        f"{TAIL} is within the\nrelative deviation of the losses of {study.baseline} over its own "
        f"seeds, {_percent(tail.relative, '{:.2f}')} %.\n\n"
        f"{study.baseline}: loss {windows}; validation {show('validation_loss', validation.mean)} "
        f"(lowest {show('validation_loss', validation.lowest)}, highest "
        f"{show('validation_loss', validation.highest)}).{unpaired if alone else ''}"
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
            "runs": {str(seed): str(run.folder) for seed, run in one.runs.items()},
            "gaps": {key: _spread(gap) for key, gap in one.comparison.windows.items()},
            "losses": {key: _spread(loss) for key, loss in one.comparison.losses.items()},
            "validation_loss": _spread(one.comparison.validation_loss),
            "validation_gap": _spread(one.comparison.validation_gap),
            "paired": one.paired,
            "within_seeds_of_baseline": one.comparison.within_seeds,
            "tokens": one.seen,
            "tokens_with_stages": one.seen_with_stages,
            "tokens_of_baseline_to_reach": _finite(one.tokens_of_baseline(baseline)),
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
    parts += _table([*_heads(study), "published"], _published_rows(study, found))
    parts += ["", _legend(study, found), "", f"![gaps]({PLOT})", ""]
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
