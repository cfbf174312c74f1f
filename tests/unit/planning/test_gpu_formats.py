"""Which GPU has which format: the documented table, asked without a GPU."""

import ast
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid_train.planning.gpu_formats import Gpu, is_native, native_formats, nearest_native
from hybrid_train.schema.precision import GemmFormat

F = GemmFormat
V100 = Gpu("V100", (7, 0), (12, 8))
A100 = Gpu("A100", (8, 0), (13, 0))
L40 = Gpu("L40", (8, 9), (12, 8))
L40_OLD = Gpu("L40 of old", (8, 9), (12, 0))
H100_OLD = Gpu("H100 of old", (9, 0), (12, 8))
H100 = Gpu("H100", (9, 0), (13, 0))
B200 = Gpu("B200", (10, 0), (13, 0))
B300 = Gpu("B300", (10, 3), (13, 0))
RTX = Gpu("RTX PRO 6000", (12, 0), (13, 0))
PLAIN, TENSOR = {F.fp32, F.bf16}, {F.fp8_tensorwise, F.fp8_delayed}

TABLE = [
    (V100, {F.fp32}),
    (A100, PLAIN),
    (L40_OLD, PLAIN),
    (L40, PLAIN | TENSOR),
    (H100_OLD, PLAIN | TENSOR),
    (H100, PLAIN | TENSOR | {F.fp8_blockwise}),
    (B200, PLAIN | TENSOR | {F.fp8_blockwise, F.mxfp8, F.nvfp4}),
    (B300, PLAIN | TENSOR | {F.fp8_blockwise, F.mxfp8, F.nvfp4}),
    (RTX, PLAIN | TENSOR | {F.fp8_blockwise, F.nvfp4}),
]
THEIRS = {  # functions of Transformer Engine, and the formats that they stand for
    "_compute_fp8_support": TENSOR,
    "_compute_fp8_block_scaling_support": {F.fp8_blockwise},
    "_compute_mxfp8_support": {F.mxfp8},
    "_compute_nvfp4_support": {F.nvfp4},
}


@pytest.mark.parametrize(("gpu", "formats"), TABLE, ids=lambda one: getattr(one, "name", ""))
def test_a_gpu_has_the_formats_of_its_generation(gpu: Gpu, formats: set[GemmFormat]) -> None:
    assert set(native_formats(gpu)) == formats


NEAREST = [
    (F.nvfp4, B200, F.nvfp4),
    (F.nvfp4, H100, F.fp8_blockwise),
    (F.nvfp4, H100_OLD, F.fp8_tensorwise),
    (F.nvfp4, A100, F.bf16),
    (F.mxfp8, RTX, F.fp8_blockwise),
    (F.mxfp4, B200, F.nvfp4),
    (F.fp8_blockwise, L40, F.fp8_tensorwise),
    (F.fp8_delayed, A100, F.bf16),
    (F.bf16, V100, F.fp32),
]


@pytest.mark.parametrize(("format", "gpu", "nearest"), NEAREST)
def test_the_nearest_format_is_one_that_the_gpu_has(
    format: GemmFormat, gpu: Gpu, nearest: GemmFormat
) -> None:
    assert nearest_native(format, gpu) is nearest


def test_a_gpu_is_shown_with_what_decides() -> None:
    assert str(B300) == "B300 (compute capability 10.3, CUDA 13.0)"


def quantization_py() -> Path:
    """Return the file of Transformer Engine that decides; skip where there is no package."""
    named = os.environ.get("HYBRID_TRAIN_TE_SOURCES")
    spec = importlib.util.find_spec("transformer_engine") if named is None else None
    if named is None and (spec is None or spec.origin is None):
        pytest.skip(
            "transformer_engine is not installed, and HYBRID_TRAIN_TE_SOURCES names no folder"
        )
    package = Path(named) / "transformer_engine" if named else Path(str(spec.origin)).parent
    return package / "pytorch" / "quantization.py"


@pytest.mark.parametrize("name", THEIRS)
def test_the_table_is_that_of_transformer_engine(name: str) -> None:
    tree = ast.parse(quantization_py().read_text())
    (function,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
    )
    function.returns = None
    code = compile(ast.Module([function], []), name, "exec")
    for gpu in (V100, A100, L40_OLD, L40, H100_OLD, H100, B200, B300, RTX):
        names = {
            "get_device_compute_capability": lambda gpu=gpu: gpu.capability,
            "torch": SimpleNamespace(
                version=SimpleNamespace(cuda=".".join(map(str, gpu.cuda))),
            ),
            # cuBLASLt is that of the CUDA: 12.0.x is 120 0xx, and so on
            "tex": SimpleNamespace(
                get_cublasLt_version=lambda gpu=gpu: gpu.cuda[0] * 10_000 + gpu.cuda[1] * 100 + 99
            ),
        }
        exec(code, names)
        theirs, _ = names[name]()
        assert {is_native(format, gpu) for format in THEIRS[name]} == {theirs}, gpu
