"""Under which layout a checkpoint was saved: for the log, nothing depends on it."""

import json
from pathlib import Path

import torch.distributed as dist

from hybrid_train.checkpoint.content import Content
from hybrid_train.megatron.optimizers import is_distributed

FILE = "plan.json"
Plan = dict[str, int]


def plan_of(content: Content) -> Plan:
    """Return the degree of every parallel axis of this run."""
    held = content.networks[0]
    groups = held.groups
    split = is_distributed(held.optimizer)
    return {
        "processes": dist.get_world_size(),
        "tensor": groups.tp.size(),
        "pipeline": groups.pp.size(),
        "virtual_pipeline": len(held.chunks),
        "context": groups.cp.size(),
        "expert": groups.ep.size(),
        "expert_tensor": groups.expt_tp.size(),
        "data": groups.dp.size(),
        "distributed_optimizer": int(split),
    }


def write_plan(folder: Path, plan: Plan) -> None:
    """Write the plan into a checkpoint."""
    (folder / FILE).write_text(json.dumps(plan) + "\n", encoding="utf-8")


def read_plan(folder: Path) -> Plan:
    """Return the plan of a checkpoint; empty if it has none."""
    try:
        return dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def in_words(plan: Plan) -> str:
    """Name the axes that are split: "tensor=2 data=4"; "1 process" if none is."""
    split = [f"{axis}={degree}" for axis, degree in plan.items() if _is_worth_a_word(axis, plan)]
    return " ".join(split) or f"{plan['processes']} process"


def _is_worth_a_word(axis: str, plan: Plan) -> bool:
    if axis == "processes":
        return False
    if axis == "expert_tensor":
        return plan[axis] != plan["tensor"]
    if axis == "distributed_optimizer":
        return not plan[axis]
    return plan[axis] > 1
