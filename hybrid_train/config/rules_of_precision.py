"""Rules about number formats: what exceptions may name, and what the libraries do not compute.

`PRECISION_RULES` hold on any machine. `NATIVE_RULES` hold where a GPU is meant to compute quantized
GEMMs itself; a CPU emulates them, as `precision.backend=emulated` does anywhere, and takes what
these rules refuse. With `runtime.device=auto` the start of a run knows; what they would say is a
note before (`hardware_notes`). Which formats a GPU has is asked when it is there
(`precision/te.py`).

Where a comment names a file, it is one of Megatron-Core 0.19.2 or, with TE in front, of
Transformer Engine 2.20.2.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.gemm_formats import (
    GATHERED_IN_FP8,
    KINDS,
    MTP,
    UNQUANTIZED,
    Formats,
    Linear,
    formats_of,
    fp8_primary_weights,
    is_named,
    linears,
    matches,
    quantized_kinds,
)
from hybrid_train.anatomy.kinds import MTP_PROJECTION, MambaKind
from hybrid_train.anatomy.layers import distinct
from hybrid_train.planning.gemm_sizes import Size, packed_rows, token_sizes, weight_sizes
from hybrid_train.planning.phases import views_of
from hybrid_train.schema.job_roots import CheckJob, SubmitJob
from hybrid_train.schema.layer_ranges import is_range
from hybrid_train.schema.names import nearest
from hybrid_train.schema.parallel import Recompute, RecomputeModule
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.precision import Backend, GemmFormat, NumberFormat
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Device, Kernels
from hybrid_train.schema.train import TrainJob

# What each dimension of a GEMM must be a multiple of, as each is summed over in one of the three
# GEMMs: 16 for FP8 with float32 scales (TE quantization.py 982, utils.py 704), 32 for MXFP8
# (TE csrc/quantizer.cpp 1515), and for NVFP4 16 as a block (1982), but 32 along a sum: 16 bytes of
# 4 bits (core fp4_utils.py, get_fp4_align_size).
MULTIPLES = {
    GemmFormat.fp8_tensorwise: 16,
    GemmFormat.fp8_delayed: 16,
    GemmFormat.fp8_blockwise: 16,
    GemmFormat.mxfp8: 32,
    GemmFormat.nvfp4: 32,
}
_FP8_ROWS = 16
EMULATE = "precision.backend=emulated runs it"
_KEPT_BY_DELAYED = (RecomputeModule.moe_act, RecomputeModule.layernorm)


def exceptions_match_something(job: TrainJob, _: int) -> Iterator[Problem]:
    """Every rule speaks of layers that there are, and decides some that no earlier one does."""
    rules, model = job.precision.exceptions, job.model
    if not rules or not all(is_range(rule.layers) for rule in rules):
        return  # reported where they stand
    found, count = linears(model), len(parse(model.pattern).main)
    decided = formats_of(model, job.precision).values()
    for number, rule in enumerate(rules):
        path = f"precision.exceptions.{number}"
        unknown = [name for name in rule.modules if not _is_known(name)]
        for name in unknown:
            near = nearest(name, _known_names())
            yield Problem(f"{path}.modules", name, "names no kind of linear layer", near)
        if unknown:
            continue
        if not any(matches(rule, linear, count) for linear in found):
            yield Problem(path, str(rule), "matches no linear layer of the model")
        elif not any(number in one.rules.values() for one in decided):
            yield Problem(path, str(rule), "decides nothing: earlier exceptions cover all of it")


def _is_known(name: str) -> bool:
    return any(is_named(module, name) for module in KINDS)


def _known_names() -> list[str]:
    """Return what a rule may say: modules, and what they are parts of."""
    return sorted({*KINDS, *(kind.rpartition(".")[0] for kind in KINDS)})


def formats_go_together(job: TrainJob, _: int) -> Iterator[Problem]:
    """What is not quantized has one format in the whole model."""
    base = job.precision.base
    other = {NumberFormat.fp32: GemmFormat.bf16, NumberFormat.bf16: GemmFormat.fp32}[base]
    for number, rule in enumerate(job.precision.exceptions):
        if rule.format is other:
            path = f"precision.exceptions.{number}.format"
            rule_text = f"whatever is not quantized has the format of the model, {base.value}"
            yield Problem(path, other.value, rule_text, base.value)


def fp8_primary_weights_are_possible(job: TrainJob, _: int) -> Iterator[Problem]:
    """Megatron's distributed optimizer gathers FP8 primary weights, of formats that have them."""
    precision = job.precision
    if not precision.fp8_param_gather or not all(is_range(r.layers) for r in precision.exceptions):
        return
    names = " or ".join(one.value for one in GATHERED_IN_FP8)
    rules = {
        "needs parallel.distributed_optimizer=true: masters are the optimizer's": (
            job.parallel.distributed_optimizer
        ),
        "needs parallel.fsdp=false": not job.parallel.fsdp,
        "needs precision.unquantized=bf16: weights are bfloat16 or FP8": (
            precision.base is NumberFormat.bf16
        ),
        f"needs main layers in {names}; weights of others are gathered in bfloat16": (
            bool(fp8_primary_weights(job.model, precision))
        ),
        # core has masters of its own beside FusedAdam then (optimizer_config.py 404)
        "needs optimizer state in float32; in reduced precision is "
        f"{', '.join(job.optimizer.reduced_state)}": not job.optimizer.reduced_state,
    }
    for rule, holds in rules.items():
        if not holds:
            yield Problem("precision.fp8_param_gather", True, rule, "false")


PRECISION_RULES = (
    exceptions_match_something,
    formats_go_together,
    fp8_primary_weights_are_possible,
)


def is_native(job: TrainJob) -> bool:
    """Tell whether a GPU is meant to compute quantized GEMMs itself."""
    backend, device = job.precision.backend, job.runtime.device
    cluster = job.cluster if isinstance(job, SubmitJob | CheckJob) else None
    on_gpus = cluster is not None and cluster.gpus_per_node > 0
    meant = device is Device.cuda or (on_gpus and device is Device.auto)
    return backend is Backend.native or (backend is Backend.auto and meant)


def on_a_gpu(job: TrainJob) -> TrainJob:
    """Return the job as it is where `runtime.device=auto` finds a GPU."""
    return replace(job, runtime=replace(job.runtime, device=Device.cuda))


def hardware_notes(job: TrainJob) -> list[Problem]:
    """Return what a GPU would refuse of a job whose quantized GEMMs are emulated.

    One that may find a GPU is told all of it, another the sizes alone: they are easily overlooked.
    """
    if is_native(job):
        return []
    rules: tuple[Callable[[TrainJob, int], Iterator[Problem]], ...] = NATIVE_RULES
    if job.precision.backend is Backend.emulated or job.runtime.device is Device.cpu:
        rules = (sizes_fit_the_formats,)
    meant = on_a_gpu(job)
    meant.precision = replace(job.precision, backend=Backend.native)
    found = {
        problem.path: problem
        for one in list(views_of(meant))
        for rule in rules
        for problem in rule(one, 1)
    }
    return list(found.values())


def quantized_linears(job: TrainJob) -> dict[Linear, Formats]:
    """Return the linear layers with a quantized GEMM; none where a rule cannot be read."""
    if not all(is_range(rule.layers) for rule in job.precision.exceptions):
        return {}
    found = formats_of(job.model, job.precision)
    return {linear: one for linear, one in found.items() if one.quantized}


def _quantized_kinds(job: TrainJob) -> Mapping[str, frozenset[GemmFormat]]:
    """Return the kinds of `quantized_linears`, each with its formats."""
    if not all(is_range(rule.layers) for rule in job.precision.exceptions):
        return {}
    return quantized_kinds(job.model, job.precision)


def native_needs_a_gpu(job: TrainJob, _: int) -> Iterator[Problem]:
    """A CPU has no such GEMMs, and the plain layers leave none to Transformer Engine."""
    if job.precision.backend is Backend.native and job.runtime.device is Device.cpu:
        rule = "needs a GPU; runtime.device is cpu"
        yield Problem("precision.backend", "native", rule, "emulated")
    elif job.runtime.kernels is Kernels.plain and is_native(job) and _quantized_kinds(job):
        rule = f"leaves no quantized GEMMs to Transformer Engine; {EMULATE}"
        yield Problem("runtime.kernels", "plain", rule, "auto")


def formats_have_hardware(job: TrainJob, _: int) -> Iterator[Problem]:
    """No GPU multiplies MXFP4 in Transformer Engine (TE common/recipe has no such recipe)."""
    if not is_native(job):
        return
    rule = f"has no hardware path; {EMULATE}"
    for path, format in written_formats(job):
        if format is GemmFormat.mxfp4:
            yield Problem(path, format.value, rule, GemmFormat.nvfp4.value)


def layers_have_one_recipe(job: TrainJob, _: int) -> Iterator[Problem]:
    """A module takes one recipe for its three GEMMs (core extensions/transformer_engine.py 312).

    Transformer Engine itself could leave both gradients unquantized (backward_override), but core's
    TEQuantizationRecipe (122) has no field for it.
    """
    if not is_native(job):
        return
    rules = job.precision.exceptions
    if not any(one.gemms for one in rules):
        return
    mixed = [one for one in quantized_linears(job).values() if len(set(one.formats.values())) > 1]
    deciding = {number for one in mixed for number in one.rules.values()}
    for number, exception in enumerate(rules):
        if number in deciding and exception.gemms:
            shown = ", ".join(gemm.value for gemm in exception.gemms)
            rule = f"Transformer Engine has one format for the three GEMMs, [] names all; {EMULATE}"
            yield Problem(f"precision.exceptions.{number}.gemms", shown, rule, "[]")


def quantized_beside_bf16(job: TrainJob, _: int) -> Iterator[Problem]:
    """NVFP4's transform reads bfloat16 alone (TE csrc/quantizer.cpp 2634); one rule for all."""
    precision = job.precision
    if not is_native(job) or precision.base is not NumberFormat.fp32 or not _quantized_kinds(job):
        return
    if precision.unquantized is NumberFormat.fp32 and precision.format not in UNQUANTIZED:
        rule = f"the hardware quantizes bfloat16; {EMULATE}"
        yield Problem("precision.unquantized", "fp32", rule, "null")
    else:
        rule = f"exceptions are quantized, and the hardware quantizes bfloat16; {EMULATE}"
        yield Problem("precision.format", precision.format.value, rule, "bf16")


def delayed_scaling_is_alone(job: TrainJob, _: int) -> Iterator[Problem]:
    """Scales of earlier steps need one region of autocast around a whole forward pass.

    Core opens it (models/hybrid/hybrid_block.py 327) and lets no module have it by itself
    (extensions/transformer_engine.py 191). Whenever one closes, the histories of all modules move
    on (TE quantization.py 782), so a second one in a pass would shift in zeros.
    """
    found = _quantized_kinds(job) if is_native(job) else {}
    formats = {format for kinds in found.values() for format in kinds}
    quantized = formats.difference(UNQUANTIZED)
    if GemmFormat.fp8_delayed not in quantized:
        return
    legal = GemmFormat.fp8_tensorwise.value
    for path, format in written_formats(job):
        if format is GemmFormat.fp8_delayed and len(quantized) > 1:
            others = ", ".join(sorted(one.value for one in quantized - {format}))
            yield Problem(path, format.value, f"stands beside {others}; {EMULATE}", legal)
    plan, path = job.parallel, "precision.format"
    passes = {
        "an MTP block": bool(parse(job.model.pattern).mtp_depths),
        f"parallel.virtual_pipeline={plan.virtual_pipeline}": plan.virtual_pipeline > 1,
    }
    for words, there in passes.items():
        if there and len(quantized) == 1:
            rule = f"would move its histories on too early with {words}; {EMULATE}"
            yield Problem(path, GemmFormat.fp8_delayed.value, rule, legal)
    if job.precision.power_of_two_scales:
        # TE quantization.py, _default_sf_compute
        rule = f"fp8_delayed has float32 scales in Transformer Engine; {EMULATE}"
        yield Problem("precision.power_of_two_scales", True, rule, "null")
    yield from _delayed_recompute(job)


def _delayed_recompute(job: TrainJob) -> Iterator[Problem]:
    # transformer/transformer_config.py 1821
    plan = job.parallel
    asked = plan.recompute_modules if plan.recompute is Recompute.selective else None
    kept = [one.value for one in asked or () if one not in _KEPT_BY_DELAYED]
    if asked and len(kept) < len(asked):
        shown = f"[{','.join(one.value for one in asked)}]"
        rule = f"fp8_delayed recomputes neither moe_act nor layernorm; {EMULATE}"
        legal = f"[{','.join(kept)}]" if kept else "null"
        yield Problem("parallel.recompute_modules", shown, rule, legal)


def sizes_fit_the_formats(job: TrainJob, _: int) -> Iterator[Problem]:
    """Every dimension of a quantized GEMM is a multiple of what its format needs."""
    if not is_native(job):
        return
    needed: dict[str, tuple[int, GemmFormat]] = {}  # of each kind: the largest, and whose
    for module, formats in _quantized_kinds(job).items():
        for format in sorted(formats, key=lambda one: one.value):
            multiple = MULTIPLES.get(format, 1)
            if multiple > needed.get(module, (1, format))[0]:
                needed[module] = (multiple, format)
    reported: set[str] = set()
    for module, (multiple, format) in needed.items():
        for size in (*_all_weight_sizes(job, module), *token_sizes(job, module)):
            if size.value % multiple and size.setting not in reported:
                reported.add(size.setting)
                rule = (
                    f"{size.words} = {size.value} must be a multiple of {multiple}: {module} in "
                    f"{format.value} on a GPU; precision.backend=emulated takes any"
                )
                yield Problem(size.setting, _value_at(job, size.setting), rule)
    chosen = {format for _, format in needed.values()}
    if Axis.ssm_heads.setting not in reported:
        yield from _packed_rows_fit(job, chosen)


def _packed_rows_fit(job: TrainJob, formats: set[GemmFormat]) -> Iterator[Problem]:
    # ssm/mamba_mixer.py 251: before they are split, and whether or not they are quantized
    fp8 = formats and GemmFormat.nvfp4 not in formats
    if not fp8:
        return
    for layer in distinct(job.model):
        rows = packed_rows(layer.sizes)
        if layer.letter != MambaKind.letter or not rows.value % _FP8_ROWS:
            continue
        rule = (
            f"{rows.words} = {rows.value} must be a multiple of {_FP8_ROWS} beside FP8 GEMMs "
            "on a GPU; precision.backend=emulated takes any"
        )
        setting = layer.setting(Axis.ssm_heads)
        yield Problem(setting, layer.sizes.ssm_heads, rule)


def _all_weight_sizes(job: TrainJob, module: str) -> Iterator[Size]:
    """Yield I and O of a kind of linear layer wherever they differ."""
    one = module if module == MTP_PROJECTION else module.removeprefix(f"{MTP}.")
    for layer in distinct(job.model):
        if any(tensor.linear == one for tensor in layer.parameters) or one == MTP_PROJECTION:
            for size in weight_sizes(job, module, layer.sizes):
                yield replace(
                    size, setting=layer.setting(Axis(size.setting.removeprefix("model.")))
                )


def _value_at(job: TrainJob, path: str) -> object:
    found: object = job
    for name in path.split("."):
        found = found[int(name)] if isinstance(found, list) else getattr(found, name)
    return found


def written_formats(job: TrainJob) -> Iterator[tuple[str, GemmFormat]]:
    """Yield every format that is written down, and where."""
    yield "precision.format", job.precision.format
    for number, rule in enumerate(job.precision.exceptions):
        yield f"precision.exceptions.{number}.format", rule.format


def fsdp_is_not_native(job: TrainJob, _: int) -> Iterator[Problem]:
    """Megatron-FSDP moves weights under the quantized copies that Transformer Engine keeps of them.

    A copy is renewed in the first microbatch of a step alone (transformer/module.py 105).
    """
    if job.parallel.fsdp and is_native(job) and _quantized_kinds(job):
        rule = f"is not joined with GEMMs that the hardware quantizes; {EMULATE}"
        yield Problem("parallel.fsdp", True, rule, "false")


NATIVE_RULES = (
    native_needs_a_gpu,
    formats_have_hardware,
    layers_have_one_recipe,
    quantized_beside_bf16,
    delayed_scaling_is_alone,
    sizes_fit_the_formats,
    fsdp_is_not_native,
)
