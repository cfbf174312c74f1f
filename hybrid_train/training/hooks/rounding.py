"""Hooks that compare what linear layers multiply with what was asked, and measure rounding."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hybrid_train.anatomy import gemm_formats
from hybrid_train.anatomy.gemm_formats import (
    Formats,
    Linear,
    formats_of,
    quantizes,
)
from hybrid_train.model.quantized import observe_gemms
from hybrid_train.precision.audit import (
    Audit,
    Counted,
    Seen,
    Statistics,
)
from hybrid_train.precision.operands import OperandStatistics
from hybrid_train.precision.recipes import Operand, operands_as_asked
from hybrid_train.runtime import ranks
from hybrid_train.schema.precision import Gemm, Precision
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.tracking.jsonl import drop_after
from hybrid_train.training.engine import StepReport
from hybrid_train.training.loop import Hook, Run

AUDIT_FILE = "precision.json"
STATISTICS_FILE = "precision_statistics.jsonl"
_SHOWN = 12  # differences in an error
_log = logging.getLogger(__name__)


class AuditPrecision(Hook):
    """Listens to the first step of this process, and of each phase with other formats.

    The whole table stands in `precision.json` in the run folder, under the step.
    """

    def __init__(self, run_dir: Path, job_at: Callable[[int], TrainJob]) -> None:
        """Take the settings.

        Args:
            run_dir: the run folder.
            job_at: the run as it is after so many tokens.
        """
        self._run_dir = run_dir
        self._job_at = job_at
        self._audited: Precision | None = None
        self._audit = Audit()
        self._observed: Callable[[], None] | None = None

    def step_start(self, run: Run) -> None:
        job = self._job_at(run.state.tokens)
        if job.precision == self._audited:
            return
        self._audited = job.precision
        self._job = job
        quantized = run.engine.network.quantized
        self._audit = Audit() if quantized is None else quantized.records.audit
        self._audit.start()
        self._observed = observe_gemms(run.engine.network.chunks, self._audit)

    def step_end(self, run: Run, report: StepReport) -> None:
        if self._observed is None:
            return
        self._observed()
        self._observed = None
        formats = formats_of(self._job.model, self._job.precision)
        if not self._job.objective.trains_mtp:
            formats = {linear: one for linear, one in formats.items() if not linear.depth}
        if (left := run.engine.network.left) is not None:
            there = {(one.parent.depth, one.parent.number) for one in left.layers}
            formats = {
                linear: one
                for linear, one in formats.items()
                if linear.layer == 0 or (linear.depth, linear.layer) in there
            }
        rows = list(audit_rows(formats, self._job.precision, _of_all_ranks(self._audit.stop())))
        wrong = [row for row in rows if not row["as_asked"]]
        if ranks.is_main():
            self._write(run.state.step, rows)
            self._say(formats, len(wrong))
        if wrong:
            self._complain(wrong)

    def _write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        path = self._run_dir / AUDIT_FILE
        steps = json.loads(path.read_text()) if path.is_file() else {}
        steps[str(step)] = rows
        half = path.with_suffix(".tmp")
        half.write_text(json.dumps(steps, indent=1))
        half.replace(path)

    def _say(self, formats: Mapping[Linear, Formats], wrong: int) -> None:
        precision = self._job.precision
        if not quantizes(self._job.model, precision):
            return
        found = "as asked" if not wrong else f"{wrong} GEMMs NOT as asked"
        _log.info("GEMMs of this step, %s (%s):", found, self._run_dir / AUDIT_FILE)
        for line in gemm_formats.table_lines(formats, precision.exceptions):
            _log.info("  %s", line)

    def _complain(self, wrong: Sequence[Mapping[str, Any]]) -> None:
        lines = [
            f"  {row['layer_name']} {row['gemm']}: {row['asked']} was asked, "
            f"{' and '.join(row['operands']) or 'nothing'} multiplied"
            for row in wrong[:_SHOWN]
        ]
        more = len(wrong) - _SHOWN
        lines += [f"  and {more} more"] if more > 0 else []
        text = "\n".join(["GEMMs that did not run in the format that was asked:", *lines])
        if not self._job.precision.strict:
            _log.warning("%s", text)
            return
        error = UserError(f"{text}\nprecision.strict=false trains on")
        error.on_all_ranks = True
        raise error


def audit_rows(
    formats: Mapping[Linear, Formats], precision: Precision, seen: Seen
) -> Iterator[dict[str, Any]]:
    """Yield a row for every GEMM: what was asked, why, and what its operands were."""
    for linear, chosen in formats.items():
        for gemm in Gemm:
            format = chosen.formats[gemm]
            number = chosen.rules[gemm]
            operands = sorted(seen.get((linear, gemm), set()))
            yield {
                "layer_name": str(linear),
                "depth": linear.depth,
                "layer": linear.layer,
                "module": linear.module,
                "gemm": gemm.value,
                "asked": format.value,
                "why": "" if number is None else f"{number}: {precision.exceptions[number]}",
                "operands": [" x ".join(pair) for pair in operands],
                "as_asked": operands == [operands_as_asked(format, gemm, precision)],
            }


def _of_all_ranks(seen: Seen) -> Seen:
    """Bring together what the ranks noted; each holds a part of the layers."""
    merged: Seen = {}
    for part in _gathered(seen):
        for key, pairs in part.items():
            merged.setdefault(key, set()).update(pairs)
    return merged


def _gathered(part: Any) -> list[Any]:
    parts: list[Any] = [None] * ranks.world_size()
    dist.all_gather_object(parts, part)
    return parts


class MeasureRounding(Hook):
    """Counts underflow, saturation and error of every quantized operand in one step of many.

    A line a step, module, GEMM and operand goes to `precision_statistics.jsonl`; the report of
    the step has them over all modules, by operand.
    """

    def __init__(self, run_dir: Path, interval: int, resume_step: int) -> None:
        """Take the settings.

        Args:
            run_dir: the run folder.
            interval: steps from one measurement to the next.
            resume_step: step of the checkpoint that the run goes on from; lines after it go.
        """
        self._path = run_dir / STATISTICS_FILE
        self._interval = interval
        self._resume_step = resume_step
        self._statistics: Statistics | None = None  # that listen to the present step

    def fit_start(self, run: Run) -> None:
        if run.engine.network.quantized is None:
            _log.info("precision.statistics_interval: what hardware rounds is not measured")
        if ranks.is_main():
            drop_after(self._path, self._resume_step)

    def step_start(self, run: Run) -> None:
        quantized = run.engine.network.quantized
        self._statistics = None
        if quantized is not None and (run.state.step + 1) % self._interval == 0:
            self._statistics = quantized.records.statistics
            self._statistics.start()

    def step_end(self, run: Run, report: StepReport) -> None:
        if self._statistics is None:
            return
        counted = _merged_counts(_gathered(self._statistics.stop()))
        if not counted:
            return
        for operand in Operand:
            whole = OperandStatistics()
            for (_, _, one), found in counted.items():
                if one is operand:
                    whole.add(found)
            report.metrics.update(
                {f"{name}/{operand.value}": rate for name, rate in whole.rates().items()}
            )
        if ranks.is_main():
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(
                    f"{json.dumps(line)}\n" for line in _statistics_lines(run.state.step, counted)
                )


def _merged_counts(parts: Sequence[Counted]) -> Counted:
    merged: Counted = {}
    for part in parts:
        for key, found in part.items():
            merged.setdefault(key, OperandStatistics()).add(found)
    return merged


def _statistics_lines(step: int, counted: Counted) -> Iterator[dict[str, Any]]:
    for (linear, gemm, operand), found in sorted(
        counted.items(), key=lambda item: (item[0][0], item[0][1].value, item[0][2].value)
    ):
        yield {
            "step": step,
            "depth": linear.depth,
            "layer": linear.layer,
            "module": linear.module,
            "gemm": gemm.value,
            "operand": operand.value,
            **found.rates(),
        }
