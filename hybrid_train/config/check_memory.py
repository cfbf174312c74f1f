"""Rules of the settings that trade time or digits for memory.

Where a comment names a file, it is one of Megatron-Core 0.19.2.
"""

from collections.abc import Iterator

from hybrid_train.anatomy.layers import distinct
from hybrid_train.schema.optimizer import GradientFormat, MasterFormat, MomentFormat
from hybrid_train.schema.parallel import Recompute, RecomputeMethod, RecomputeModule
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.precision import NumberFormat
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob

_FRACTION_BITS = {MomentFormat.bfloat16: 7, MomentFormat.float16: 10, MomentFormat.float8: 3}


def _recomputed_modules_exist(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    if plan.recompute is not Recompute.selective or plan.recompute_modules is None:
        return
    asked = plan.recompute_modules
    held = {one for layer in distinct(job.model) for one in layer.kind.recomputed(layer.sizes)}
    there = [module for module in asked if module in held]
    if there and there == asked:
        return
    path, shown = "parallel.recompute_modules", _shown(asked)
    missing = [module for module in asked if module not in there]
    rule = f"the model has no {_shown(missing)}" if missing else "must name a module"
    yield Problem(path, shown, rule, _shown(there) if there else "null")


def _shown(modules: list[RecomputeModule]) -> str:
    return f"[{','.join(module.value for module in modules)}]"


def _recomputed_layers_fit_mtp(job: TrainJob, _: int) -> Iterator[Problem]:
    # transformer/multi_token_prediction.py 1419
    plan = job.parallel
    uniform = plan.recompute is Recompute.full and plan.recompute_method is RecomputeMethod.uniform
    if uniform and plan.recompute_layers > 1 and parse(job.model.pattern).mtp_depths:
        rule = "must be 1: an MTP depth is computed again as a whole"
        yield Problem("parallel.recompute_layers", plan.recompute_layers, rule, 1)


def _lowered_state_is_split(job: TrainJob, _: int) -> Iterator[Problem]:
    # optimizer/optimizer_config.py 435
    if job.parallel.distributed_optimizer and not job.parallel.fsdp:
        return
    rule = "needs parallel.distributed_optimizer=true: Megatron lowers no other state"
    if job.parallel.fsdp:
        rule = "needs parallel.fsdp=false: state of distributed tensors is kept in float32 alone"
    for name, value in job.optimizer.lowered.items():
        yield Problem(f"optimizer.{name}", value, rule, "float32")


def _main_gradients_are_the_reduced_ones(job: TrainJob, _: int) -> Iterator[Problem]:
    # Lowered state is updated from the buffer of the reduction (distrib_optimizer.py 2758);
    # otherwise a float32 copy of it is made, whatever its format.
    precision, given = job.precision, job.optimizer.main_gradients
    path, half = "optimizer.main_gradients", precision.base is NumberFormat.bf16
    halved = half and not precision.reduce_gradients_in_fp32
    if given is GradientFormat.bfloat16 and not half:
        yield Problem(path, given.value, "needs precision.format=bf16", "float32")
    elif given is GradientFormat.bfloat16 and not halved:
        rule = "needs precision.reduce_gradients_in_fp32=false: it is what was reduced"
        yield Problem(path, given.value, rule, "float32")
    elif given is GradientFormat.float32 and halved and job.optimizer.lowered:
        names = ", ".join(f"optimizer.{name}" for name in job.optimizer.lowered)
        rule = f"is not made of reduced bfloat16 gradients beside {names}"
        yield Problem(path, given.value, rule, "bfloat16")


def _masters_have_weights_to_differ_from(job: TrainJob, _: int) -> Iterator[Problem]:
    masters = job.optimizer.master_weights
    if masters is not MasterFormat.float32 and job.precision.base is NumberFormat.fp32:
        rule = "needs precision.format=bf16: float32 weights are their own masters"
        yield Problem("optimizer.master_weights", masters.value, rule, "float32")


def _moments_can_fall(job: TrainJob, _: int) -> Iterator[Problem]:
    """Refuse a format that is too coarse for the decay rate of a moment.

    Without gradients a moment is multiplied by beta. Where that takes less than half of the
    distance to the next number, rounding takes it back, and the moment never falls.
    """
    adamw = job.optimizer
    moments = (("first_moment", "beta1"), ("second_moment", "beta2"))
    for name, rate in moments:
        given, beta = getattr(adamw, name), getattr(adamw, rate)
        if _falls(given, beta):
            continue
        rule = f"is too coarse for optimizer.{rate}={beta}, and the moment would never fall; "
        rule += f"needs 1 - {rate} > 2^-{_FRACTION_BITS[given] + 1}"
        nearest = "float16" if _falls(MomentFormat.float16, beta) else "float32"
        yield Problem(f"optimizer.{name}", given.value, rule, nearest)


def _falls(given: MomentFormat, beta: float) -> bool:
    bits = _FRACTION_BITS.get(given)
    return bits is None or 1 - beta > 2.0 ** -(bits + 1)


MEMORY_RULES = (
    _recomputed_modules_exist,
    _recomputed_layers_fit_mtp,
    _lowered_state_is_split,
    _main_gradients_are_the_reduced_ones,
    _masters_have_weights_to_differ_from,
    _moments_can_fall,
)
