"""A checked job -> the model chunks of this process, with the same first values on every layout.

Each tensor of the whole model is drawn from a generator seeded by its name, and a process keeps
the part that it holds. Formulas: the initialisation of the released training code and
configurations (normal with 0.9 / sqrt(hidden), residual outputs divided by sqrt(layers), Mamba-2 as
in Dao and Gu, arXiv:2405.21060, reference code).
"""

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from hybrid_train.anatomy.gemm_formats import formats_of, kept_in_words, quantizes
from hybrid_train.anatomy.kinds import Draw
from hybrid_train.anatomy.layers import layers, main_layers, stored
from hybrid_train.config.supported import LIBRARIES
from hybrid_train.megatron import gpu_switches, native_recipes, patches, plain
from hybrid_train.megatron.checkpoints import ShardedTensor, plain_weights, sharded_tensors
from hybrid_train.megatron.data_parallel import ProcessGroups
from hybrid_train.megatron.hybrid import Hybrid
from hybrid_train.megatron.router import BalanceLosses, share_record
from hybrid_train.megatron.spec import (
    Parts,
    fused_parts,
    hybrid_spec,
    plain_parts,
    with_plain_linears,
)
from hybrid_train.megatron.transformer_config import (
    TransformerConfig,
    init_std,
    mamba_layer_class,
    transformer_config,
)
from hybrid_train.planning import stages
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.precision import te
from hybrid_train.runtime import optional, ranks
from hybrid_train.schema.model import Model
from hybrid_train.schema.precision import Backend, GemmFormat
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.runtime import Kernels
from hybrid_train.schema.train import TrainJob

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # step sizes that softplus(dt_bias) starts from
A_MIN, A_MAX = 1.0, 16.0  # decay rates that exp(A_log) starts from
_DECIDES_NUMBERS = ("torch", "transformer-engine", "mamba-ssm", "causal-conv1d")  # where in use
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltModel:
    """The chunks of this process, their Megatron config, and what their parts are made of."""

    chunks: list[Hybrid]
    config: TransformerConfig
    kernels: dict[str, str]  # part of the model -> whose kernels it runs on, in words
    backend: Backend | None  # who can compute quantized GEMMs, without a new build
    balance_losses: BalanceLosses  # of its expert layers


def build_model(
    job: TrainJob, groups: ProcessGroups, vocab_size: int, *, on_gpu: bool
) -> BuiltModel:
    """Build and initialise this process's part of the model.

    Raises:
        UserError: if the wanted kernels are not there, or another megatron-core is.
    """
    require_versions()
    quantized = quantizes(job.model, job.precision)
    emulated = quantized and (not on_gpu or job.precision.backend is Backend.emulated)
    parts, kernels = _choose_kernels(job, on_gpu=on_gpu, emulated=emulated)
    backend = _choose_backend(job, parts, quantized=quantized, on_gpu=on_gpu)
    if quantized:
        kernels["quantized GEMMs"] = _gemms_in_words(job, backend, on_gpu=on_gpu)
    if kept := kept_in_words(job.model, job.precision):
        kernels["FP8 parameters"] = kept
    native = backend is Backend.native
    fused = parts.experts is not plain.Experts
    config = transformer_config(job, on_gpu=on_gpu, fused=fused, native=native)
    if left_out := list(gpu_switches.left_out(job, on_gpu=on_gpu, fused=fused)):
        kernels["left out here"] = "; ".join(left_out)
    if config.tp_comm_overlap:
        _overlap_tensor_ranks(job)
    if native:
        patches.for_recipes(native_recipes.recipe_maker(job.precision))
    spec = hybrid_spec(
        parts,
        mamba_chunk_size=job.model.mamba.chunk_size,
        mamba_layer=mamba_layer_class(job.parallel),
        layers=layers(job.model),
        qk_norm=job.model.attention.qk_norm,
    )
    rows = padded_vocab_size(vocab_size, job.model.vocab_multiple)
    pattern = stages.cut(job, rows)
    make = functools.partial(
        Hybrid,
        config=config,
        hybrid_stack_spec=spec,
        vocab_size=rows,
        num_tokens=vocab_size,
        max_sequence_length=job.train.sequence_length,
        hybrid_layer_pattern=str(pattern),
        share_embeddings_and_output_weights=job.model.tie_embeddings,
        pg_collection=groups,
        rope=job.model.attention.rope,
    )
    chunks = []
    for chunk in range(job.parallel.virtual_pipeline):
        if native:  # read while a chunk is built, and never after
            config.quant_recipe = native_recipes.recipe_of_chunk(
                job.model, job.precision, pattern, chunk * groups.pp.size() + groups.pp.rank()
            )
        chunks.append(_build_chunk(make, groups, chunk, job.parallel.virtual_pipeline))
    initialize(chunks, job.model, std=init_std(job.model), seed=job.train.seed)
    return BuiltModel(chunks, config, kernels, backend, share_record(chunks))


def require_versions() -> None:
    """Hold the installed libraries against `config.supported`; say what was never tried.

    Raises:
        UserError: if one is another than we know, and no run starts with it.
    """
    for name, known in LIBRARIES.items():
        try:
            fault = known.fault(found := version(name), rebuilt=name == "torch")
        except PackageNotFoundError:  # of an optional one; what needs it says so itself
            continue
        if fault and known.others_refused:
            raise UserError(
                f"{name} {found} is installed, but {known.tested} is needed; "
                f"install it: pip install {name}=={known.tested}"
            )
        if fault and name in _DECIDES_NUMBERS and ranks.is_main():
            _say_untried(name, found, fault)


@functools.cache  # said once, though each phase on another layout builds anew
def _say_untried(name: str, found: str, fault: str) -> None:
    _log.warning("%s %s: %s", name, found, fault)


def _choose_kernels(job: TrainJob, *, on_gpu: bool, emulated: bool) -> tuple[Parts, dict[str, str]]:
    """Take the libraries where they can run; say of each part what was taken, and why."""
    wanted, norm = job.runtime.kernels, job.model.norm
    fused = _usable(("transformer_engine",), wanted, on_gpu=on_gpu)
    mamba = _usable(("mamba_ssm", "causal_conv1d"), wanted, on_gpu=on_gpu)
    if fused is not None:
        patches.for_plain_layers()
    if mamba is not None:
        patches.for_plain_mamba()
    layers = f"plain PyTorch ({fused})" if fused else "Transformer Engine"
    parts = {
        "linear layers, norms, experts": layers,
        "attention": f"PyTorch scaled dot product ({fused})" if fused else "Transformer Engine",
        "Mamba scan and convolution": f"plain PyTorch ({mamba})" if mamba else "mamba-ssm",
        "cross-entropy": "plain PyTorch (ours on every device)",
    }
    if fused is not None:
        return plain_parts(norm), parts
    if emulated:
        patches.for_plain_latent_linears()
        parts["linear layers, norms, experts"] = "plain PyTorch (emulated GEMMs), norms fused"
        return with_plain_linears(fused_parts(), norm), parts
    return fused_parts(), parts


def _usable(libraries: tuple[str, ...], wanted: Kernels, *, on_gpu: bool) -> str | None:
    """Return None if all libraries can be used, else the reason why they are not."""
    if wanted is Kernels.fused:
        for library in libraries:
            optional.require(library, "runtime.kernels=fused")
        if not on_gpu:
            raise UserError("runtime.kernels=fused needs a GPU; use runtime.kernels=plain or auto")
        return None
    if wanted is Kernels.plain:
        return "asked for"
    if not on_gpu:
        return "no GPU"
    missing = [library for library in libraries if not optional.available(library)]
    return f"{' and '.join(missing)} not installed" if missing else None


def _choose_backend(
    job: TrainJob, parts: Parts, *, quantized: bool, on_gpu: bool
) -> Backend | None:
    """Choose who computes quantized GEMMs; None where layers can do neither.

    Raises:
        UserError: if the wanted one cannot.
    """
    wanted, has_plain_linears = job.precision.backend, parts.experts is plain.Experts
    if not on_gpu and wanted is Backend.native:
        raise UserError("precision.backend=native needs a GPU; use auto or emulated")
    if not quantized:
        return Backend.emulated if has_plain_linears else None
    if not on_gpu or wanted is Backend.emulated:
        return Backend.emulated
    if has_plain_linears:
        raise UserError(
            f"precision.format={job.precision.format.value} on a GPU needs Transformer Engine "
            f"({optional.LIBRARIES['transformer_engine'].install}) and runtime.kernels=auto or "
            "fused; or precision.backend=emulated"
        )
    te.require_formats(job)
    return Backend.native


def _gemms_in_words(job: TrainJob, backend: Backend | None, *, on_gpu: bool) -> str:
    if backend is Backend.native:
        return "Transformer Engine, in the formats of the hardware"
    why = "asked for" if on_gpu else "no GPU"
    words = f"emulated ({why}): quantized operands, sums in float32"
    formats = formats_of(job.model, job.precision).values()
    if any(GemmFormat.fp8_delayed in one.formats.values() for one in formats):
        words += "; what fp8_delayed remembers begins here, also in a run that goes on"
    return words


def _overlap_tensor_ranks(job: TrainJob) -> None:
    train, given = job.train, formats_of(job.model, job.precision).values()
    te.overlap_tensor_ranks(
        train.microbatch * train.sequence_length // job.parallel.context,
        job.model.hidden_size,
        job.parallel.tensor,
        formats={format for one in given for format in one.formats.values()},
    )


def _build_chunk(
    make: Callable[..., Hybrid], groups: ProcessGroups, chunk: int, num_chunks: int
) -> Hybrid:
    """Build the chunk of this process with a number; the first and the last stage hold the ends."""
    stage, last_stage = groups.pp.rank(), groups.pp.size() - 1
    return make(
        pre_process=stage == 0 and chunk == 0,
        post_process=stage == last_stage and chunk == num_chunks - 1,
        vp_stage=chunk if num_chunks > 1 else None,
    ).to(torch.cuda.current_device())


def initialize(chunks: Sequence[torch.nn.Module], model: Model, *, std: float, seed: int) -> None:
    """Overwrite every parameter of the model chunks of this process; without memory, none.

    Args:
        chunks: of the model.
        model: what they are built from.
        std: standard deviation of most weights.
        seed: of all draws, with the name of a tensor.
    """
    if all(one.is_meta for chunk in chunks for one in chunk.parameters()):
        return
    draws = {key: one.draw for key, one in stored(model)}
    num_layers = len(main_layers(model))
    for chunk in chunks:
        with plain_weights(chunk) as in_fp8:
            storages = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
            for shard in sharded_tensors(chunk):
                if shard.data.untyped_storage().data_ptr() in storages:
                    rule = _draw_of(shard.key, draws)
                    _fill_shard(shard, rule, std=std, num_layers=num_layers, seed=seed)
        for weight, drawn in in_fp8:  # by Transformer Engine, as it was built
            _quantize_drawn(weight, drawn)


@torch.no_grad()
def _quantize_drawn(weight: Any, drawn: Tensor) -> None:
    """Quantize what was drawn; masters begin with it as drawn (core, distrib_optimizer.py 431)."""
    weight.copy_(drawn)
    weight.get_high_precision_init_val().copy_(drawn)


def _draw_of(key: str, draws: Mapping[str, Draw]) -> Draw:
    """Return how a tensor is drawn; a part of a packed one as the whole."""
    return draws[key] if key in draws else draws[key.rpartition(".")[0]]


@torch.no_grad()
def _fill_shard(
    shard: ShardedTensor, rule: Draw, *, std: float, num_layers: int, seed: int
) -> None:
    # Leading axes that only number experts or stages belong to the name, not to the tensor.
    numbered = shard.prepend_axis_num
    name = f"{seed}/{shard.key}/{shard.global_offset[:numbered]}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator(device=shard.data.device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    whole = torch.empty(shard.global_shape[numbered:], device=shard.data.device)
    fill_by_rule(rule, whole, std=std, num_layers=num_layers, generator=generator)
    for axis, (start, size) in enumerate(
        zip(shard.global_offset[numbered:], shard.data.shape, strict=True)
    ):
        whole = whole.narrow(axis, start, size)
    shard.data.copy_(whole)


def fill_by_rule(
    rule: Draw, whole: Tensor, *, std: float, num_layers: int, generator: torch.Generator
) -> None:
    """Fill one whole tensor in place by a rule."""
    if rule is Draw.taps:  # fan-in: the taps of one channel
        bound = 1 / math.sqrt(whole.shape[-1])
        whole.uniform_(-bound, bound, generator=generator)
    elif rule is Draw.tap_biases:
        whole.uniform_(-0.5, 0.5, generator=generator)
    elif rule is Draw.decay_rates:
        whole.uniform_(A_MIN, A_MAX, generator=generator).log_()
    elif rule is Draw.step_sizes:
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        dt = whole.uniform_(low, high, generator=generator).exp_().clamp_(min=DT_FLOOR)
        whole.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
    elif rule in (Draw.ones, Draw.zeros):
        whole.fill_(float(rule is Draw.ones))
    else:
        assert rule in (Draw.normal, Draw.residual), f"no parameter begins as {rule}"
        scale = std / math.sqrt(num_layers) if rule is Draw.residual else std
        whole.normal_(0.0, scale, generator=generator)
