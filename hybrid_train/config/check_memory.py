"""Rules of the settings that trade time or digits for memory.

Where a comment names a file, it is one of Megatron-Core 0.19.2.
"""

from collections.abc import Iterator

from hybrid_train.config.pattern import parse
from hybrid_train.config.problems import Problem
from hybrid_train.config.schema.parallel import Recompute, RecomputeMethod, RecomputeModule
from hybrid_train.config.schema.train import TrainJob

_LETTERS = {  # layer kind that has the module
    RecomputeModule.core_attn: "*",
    RecomputeModule.layernorm: "E",
    RecomputeModule.mamba: "M",
    RecomputeModule.mlp: "-",
    RecomputeModule.moe: "E",
    RecomputeModule.moe_act: "E",
    RecomputeModule.shared_experts: "E",
}


def _recomputed_modules_exist(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    if plan.recompute is not Recompute.selective or plan.recompute_modules is None:
        return
    asked = plan.recompute_modules
    there = [module for module in asked if _has(job, module)]
    if there and there == asked:
        return
    path, shown = "parallel.recompute_modules", _shown(asked)
    missing = [module for module in asked if module not in there]
    rule = f"the model has no {_shown(missing)}" if missing else "must name a module"
    yield Problem(path, shown, rule, _shown(there) if there else "null")


def _has(job: TrainJob, module: RecomputeModule) -> bool:
    if module is RecomputeModule.shared_experts and job.model.moe.shared_intermediate_size is None:
        return False
    return parse(job.model.pattern).count(_LETTERS[module]) > 0


def _shown(modules: list[RecomputeModule]) -> str:
    return f"[{','.join(module.value for module in modules)}]"


def _recomputed_layers_fit_mtp(job: TrainJob, _: int) -> Iterator[Problem]:
    # transformer/multi_token_prediction.py 1419
    plan = job.parallel
    uniform = plan.recompute is Recompute.full and plan.recompute_method is RecomputeMethod.uniform
    if uniform and plan.recompute_layers > 1 and parse(job.model.pattern).mtp_depths:
        rule = "must be 1: an MTP depth is computed again as a whole"
        yield Problem("parallel.recompute_layers", plan.recompute_layers, rule, 1)


MEMORY_RULES = (_recomputed_modules_exist, _recomputed_layers_fit_mtp)
