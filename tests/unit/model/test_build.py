"""From a job to a model: its size, its vocabulary, and what is said of its kernels."""

from typing import Any

import pytest
import torch

from hybrid_train.anatomy import counts
from hybrid_train.runtime import optional
from hybrid_train.schema.model import Mtp
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.runtime import Kernels, Runtime
from tests.tiny import EVERY_KIND, MEGATRON_WARNINGS, VOCAB, tiny_job, tiny_model

pytestmark = MEGATRON_WARNINGS


def build(job: Any, groups: Any, *, on_gpu: bool = False) -> Any:
    from hybrid_train.model.build import build_model

    return build_model(job, groups, VOCAB, on_gpu=on_gpu)


def with_kernels(kernels: Kernels) -> Any:
    return tiny_job("-", runtime=Runtime(kernels=kernels))


def size_of(model: torch.nn.Module) -> int:
    """Parameters, and the expert biases, which are buffers that published counts include."""
    biases = [b.numel() for name, b in model.named_buffers() if name.endswith("expert_bias")]
    return sum(p.numel() for p in model.parameters()) + sum(biases)


@pytest.mark.parametrize("pattern", ["M", "*", "-", "E", "MEM*M-", "M/*E", EVERY_KIND])
def test_built_size_is_the_counted_one(groups: Any, pattern: str) -> None:
    job = tiny_job(pattern)
    assert size_of(tiny_model(job, groups)) == counts.parameters(job.model, 64).total


@pytest.mark.parametrize("change", ["tied", "no latent", "no shared expert", "own blocks"])
def test_built_size_is_the_counted_one_with_other_choices(groups: Any, change: str) -> None:
    job = tiny_job()
    if change == "tied":
        job.model.tie_embeddings = True
    elif change == "no latent":
        job.model.moe.latent_size = None
    elif change == "no shared expert":
        job.model.moe.shared_intermediate_size = None
    else:
        job.model.mtp = Mtp(repeated_block=False)
    assert size_of(tiny_model(job, groups)) == counts.parameters(job.model, 64).total


@pytest.mark.parametrize(
    ("size", "multiple", "padded"), [(61, 16, 64), (64, 16, 64), (65, 16, 80), (1, 128, 128)]
)
def test_vocabulary_is_padded_to_the_next_multiple(
    groups: Any, size: int, multiple: int, padded: int
) -> None:
    from hybrid_train.planning.degrees import padded_vocab_size

    assert padded_vocab_size(size, multiple) == padded


def test_plain_kernels_are_said_with_the_reason_part_by_part(groups: Any) -> None:
    asked = build(with_kernels(Kernels.plain), groups).kernels
    chosen = build(with_kernels(Kernels.auto), groups).kernels
    assert len(asked) == 4
    assert asked.keys() == chosen.keys()
    assert asked["Mamba scan and convolution"] == "plain PyTorch (asked for)"
    assert chosen["Mamba scan and convolution"] == "plain PyTorch (no GPU)"
    assert chosen["attention"] == "PyTorch scaled dot product (no GPU)"


def test_missing_libraries_are_named_beside_a_gpu(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional, "available", lambda library: False)
    kernels = build(with_kernels(Kernels.auto), groups, on_gpu=True).kernels
    mamba = kernels["Mamba scan and convolution"]
    assert mamba == "plain PyTorch (mamba_ssm and causal_conv1d not installed)"
    assert "transformer_engine not installed" in kernels["linear layers, norms, experts"]


def test_fused_kernels_without_their_library_are_refused(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional, "available", lambda library: False)
    with pytest.raises(UserError, match=r"kernels=fused needs transformer_engine.*install it"):
        build(with_kernels(Kernels.fused), groups)


def test_fused_kernels_without_a_gpu_are_refused(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional, "require", lambda *_: None)
    with pytest.raises(UserError, match=r"needs a GPU; use runtime.kernels=plain or auto"):
        build(with_kernels(Kernels.fused), groups)


def test_another_megatron_core_is_refused(groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_train.model import build as build_file

    monkeypatch.setattr(build_file, "version", lambda _: "0.18.0")
    with pytest.raises(UserError, match=r"megatron-core 0.18.0 is installed, but 0.19.2"):
        build(tiny_job("-"), groups)


def test_another_torch_is_warned_of_and_trains(
    groups: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hybrid_train.model import build as build_file

    installed = build_file.version
    monkeypatch.setattr(
        build_file, "version", lambda name: "2.99.0" if name == "torch" else installed(name)
    )
    build(tiny_job("-"), groups)
    assert "torch 2.99.0: newer than 2.11.0, the newest that was tried" in caplog.text
