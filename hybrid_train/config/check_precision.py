"""Rules about number formats: exceptions that name what there is, and formats that go together."""

from collections.abc import Iterator

from hybrid_train.anatomy.product_formats import (
    GATHERED_IN_FP8,
    KINDS,
    formats_of,
    is_named,
    kept_in_fp8,
    linears,
    matches,
)
from hybrid_train.schema.layer_ranges import is_range
from hybrid_train.schema.names import nearest
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.precision import NumberFormat, ProductFormat
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob


def exceptions_match_something(job: TrainJob, _: int) -> Iterator[Problem]:
    """Every rule speaks of layers that there are, and decides some that no earlier one does."""
    rules, model = job.precision.exceptions, job.model
    if not rules or not all(is_range(rule.layers) for rule in rules):
        return  # reported where they stand
    found, count = linears(model), len(parse(model.pattern).main)
    decided = formats_of(model, job.precision).values()
    for number, rule in enumerate(rules):
        path = f"precision.exceptions.{number}"
        unknown = [name for name in rule.modules if not _known(name)]
        for name in unknown:
            near = nearest(name, _names())
            yield Problem(f"{path}.modules", name, "names no kind of linear layer", near)
        if unknown:
            continue
        if not any(matches(rule, linear, count) for linear in found):
            yield Problem(path, str(rule), "matches no linear layer of the model")
        elif not any(number in one.rules.values() for one in decided):
            yield Problem(path, str(rule), "decides nothing: earlier exceptions cover all of it")


def _known(name: str) -> bool:
    return any(is_named(module, name) for module in KINDS)


def _names() -> list[str]:
    """Return what a rule may say: modules, and what they are parts of."""
    return sorted({*KINDS, *(kind.rpartition(".")[0] for kind in KINDS)})


def formats_go_together(job: TrainJob, _: int) -> Iterator[Problem]:
    """What is not quantized has one format in the whole model."""
    base = job.precision.base
    other = {NumberFormat.fp32: ProductFormat.bf16, NumberFormat.bf16: ProductFormat.fp32}[base]
    for number, rule in enumerate(job.precision.exceptions):
        if rule.format is other:
            path = f"precision.exceptions.{number}.format"
            rule_text = f"whatever is not quantized has the format of the model, {base.value}"
            yield Problem(path, other.value, rule_text, base.value)


def weights_can_be_kept_in_fp8(job: TrainJob, _: int) -> Iterator[Problem]:
    """Megatron's distributed optimizer gathers FP8 weights, of formats that have them as such."""
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
            bool(kept_in_fp8(job.model, precision))
        ),
        # core has masters of its own beside FusedAdam then (optimizer_config.py 404)
        "needs optimizer state in float32; lowered is "
        f"{', '.join(job.optimizer.lowered)}": not job.optimizer.lowered,
    }
    for rule, holds in rules.items():
        if not holds:
            yield Problem("precision.fp8_param_gather", True, rule, "false")


PRECISION_RULES = (exceptions_match_something, formats_go_together, weights_can_be_kept_in_fp8)
