"""Transformer Engine's quantizers in Python, loaded without its compiled parts.

They come with the package; HYBRID_TRAIN_TE_SOURCES names a folder that holds `transformer_engine`
where it is unpacked and not installed.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

VERSION = "2.20"
_RECIPES = "transformer_engine.pytorch.custom_recipes"
_NAMES = ("reference_nvfp4", "reference_current_scaling")


def load() -> types.SimpleNamespace:
    """Return the modules of both references; skip the calling test where there is no package."""
    folder = _folder()
    if folder is None:
        pytest.skip(
            "transformer_engine is not installed, and HYBRID_TRAIN_TE_SOURCES names no folder"
        )
    before = dict(sys.modules)
    try:
        _stand_in("transformer_engine")
        _stand_in("transformer_engine.pytorch")
        base = _stand_in("transformer_engine.pytorch.quantized_tensor")
        base.Quantizer, base.QuantizedTensorStorage = _Quantizer, _Storage
        recipes = _stand_in(_RECIPES)
        recipes.gemm = _stand_in(f"{_RECIPES}.gemm")
        recipes.gemm.MMParams = recipes.gemm.GEMMType = types.SimpleNamespace(FPROP=None)
        recipes.reference_utils = _from_file(folder, "reference_utils")
        return types.SimpleNamespace(**{name: _from_file(folder, name) for name in _NAMES})
    finally:  # others must not meet the stand-ins
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]
        sys.modules.update({k: v for k, v in before.items() if k.startswith("transformer_engine")})


class _Storage:
    """What a quantized tensor of theirs is derived from."""


class _Quantizer:
    """What a quantizer of theirs is derived from."""

    def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise_usage, self.columnwise_usage = rowwise, columnwise


def _folder() -> Path | None:
    named = os.environ.get("HYBRID_TRAIN_TE_SOURCES")
    if named is not None:
        package = Path(named) / "transformer_engine"
    else:
        spec = importlib.util.find_spec("transformer_engine")
        if spec is None or spec.origin is None:
            return None
        package = Path(spec.origin).parent
    return package / "pytorch" / "custom_recipes"


def _stand_in(name: str) -> Any:
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name]


def _from_file(folder: Path, name: str) -> types.ModuleType:
    full = f"{_RECIPES}.{name}"
    spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module
