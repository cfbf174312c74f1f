"""Products that do not run as asked stop the run, or are named where that is wanted."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.anatomy.gemm_formats import formats_of
from hybrid_train.precision.emulated import emulation_of
from hybrid_train.schema.precision import Gemm, GemmFormat, Precision
from hybrid_train.schema.problems import UserError
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS


def audited(groups: Any, run_dir: Path, *, strict: bool, fault: bool) -> None:
    """One audited step; with a fault, the first in_proj multiplies in another format than asked."""
    from hybrid_train.megatron.plain import linear_modules
    from hybrid_train.model.edits import quantize
    from hybrid_train.model.quantized import unwrapped
    from hybrid_train.training.hooks.rounding import AuditPrecision
    from hybrid_train.training.loop import Run

    precision = Precision(format=GemmFormat.nvfp4, strict=strict)
    job = tiny_job("M*", precision=precision)
    engine = tiny_engine(job, groups)
    if fault:
        linear, module = next(linear_modules(unwrapped(engine.network.chunks[0])))
        other = replace(precision, format=GemmFormat.mxfp8)
        formats = formats_of(job.model, other)[linear]
        quantize(module, [emulation_of(linear, formats, other, engine.network.quantized.records)])
    run = Run(engine, microbatches(some_rows(), 2), 1000)
    hook = AuditPrecision(run_dir, lambda _: job)
    hook.step_start(run)
    report = engine.step(run.batches, tokens_seen=0)
    hook.step_end(run, report)


def test_a_layer_in_another_format_stops_the_run(groups: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        audited(groups, tmp_path, strict=True, fault=True)
    text = str(error.value)
    assert "1 mamba.in_proj fprop: nvfp4 was asked" in text
    assert "e4m3, 1x32, e8m0 scales x e4m3, 1x32, e8m0 scales multiplied" in text
    assert text.count("nvfp4 was asked") == len(Gemm)
    assert "precision.strict=false" in text


def test_without_strict_it_is_named_and_the_run_goes_on(
    groups: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A run of an earlier test may have turned its logger to stderr.
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="hybrid_train"):
        audited(groups, tmp_path, strict=False, fault=True)
    assert "3 GEMMs NOT as asked" in caplog.text
    assert "1 mamba.in_proj wgrad: nvfp4 was asked" in caplog.text


def test_a_run_as_asked_passes_and_leaves_its_table(groups: Any, tmp_path: Path) -> None:
    audited(groups, tmp_path, strict=True, fault=False)
    text = (tmp_path / "precision.json").read_text()
    assert '"as_asked": true' in text
    assert '"as_asked": false' not in text
