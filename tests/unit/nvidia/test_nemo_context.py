"""The context of an export for NeMo 2, as the library that NeMo reads it with finds it.

NeMo itself is not here: classes of the same names and arguments stand for its own.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hybrid_train.nvidia.nemo_context import io_json

serialization = pytest.importorskip("fiddle.experimental.serialization")


@dataclass
class TrainerContext:
    model: Any
    trainer: Any
    extra: Any = None


@dataclass
class MambaModel:
    config: Any = None
    optim: Any = None
    tokenizer: Any = None
    model_transform: Any = None


@dataclass
class SSMConfig:
    hidden_size: int = 1
    hybrid_override_pattern: str | None = None
    activation_func: Any = None
    params_dtype: Any = None
    bf16: bool = True
    layernorm_epsilon: float = 0.0
    window_size: Any = 3


MODEL = {
    "_target_": "nemo.collections.llm.gpt.model.ssm.MambaModel",
    "config": {
        "_target_": "nemo.collections.llm.gpt.model.ssm.SSMConfig",
        "hidden_size": 64,
        "hybrid_override_pattern": "M*M-",
        "activation_func": {"_target_": "torch.nn.functional.relu", "_call_": False},
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "bf16": False,
        "layernorm_epsilon": 1e-5,
        "window_size": None,
    },
}


@pytest.fixture(autouse=True)
def _nemo(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {
        "nemo.lightning.io.pl": TrainerContext,
        "nemo.collections.llm.gpt.model.ssm": (MambaModel, SSMConfig),
    }
    for name, classes in places.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, module, sys.modules.get(module) or ModuleType(module))
        for one in classes if isinstance(classes, tuple) else (classes,):
            monkeypatch.setattr(sys.modules[name], one.__name__, one, raising=False)


def test_fiddle_builds_the_model_with_all_its_settings() -> None:
    import fiddle

    found = fiddle.build(serialization.load_json(json.dumps(io_json(MODEL))))
    assert type(found) is TrainerContext
    assert found.trainer is None
    assert type(found.model) is MambaModel
    assert found.model.config == SSMConfig(
        hidden_size=64, hybrid_override_pattern="M*M-",
        activation_func=torch.nn.functional.relu, params_dtype=torch.bfloat16,
        bf16=False, layernorm_epsilon=1e-5, window_size=None,
    )  # fmt: skip


def test_the_model_alone_is_found_by_its_path_as_nemo_looks_for_it() -> None:
    import fiddle

    content = io_json(MODEL)
    # `load` of nemo/lightning/io/mixin.py: the object with this path becomes the root.
    (key,) = [
        key for key, one in content["objects"].items() if "<root>.model" in one.get("paths", ())
    ]
    content["root"]["key"] = key
    found = fiddle.build(serialization.load_json(json.dumps(content)))
    assert type(found) is MambaModel
    assert found.config.hidden_size == 64


def test_the_tokenizer_is_named_by_its_place_in_the_context(tmp_path: Path) -> None:
    from hybrid_train.nvidia.export_checkpoint import _nemo_tokenizer

    folder = tmp_path / "nemo_tokenizer"
    folder.mkdir()
    assert _nemo_tokenizer(folder) == {}
    (folder / "tokenizer.model").write_bytes(b"")
    assert _nemo_tokenizer(folder)["model_path"] == "nemo_tokenizer/tokenizer.model"
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert _nemo_tokenizer(folder)["pretrained_model_name"] == "nemo_tokenizer"
