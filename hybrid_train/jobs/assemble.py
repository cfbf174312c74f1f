"""Config sections -> objects: a job becomes networks, an objective, and an engine with both."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from hybrid_train.jobs.networks import build_network, teacher_loader
from hybrid_train.megatron.groups import ProcessGroups
from hybrid_train.model.build import BuiltModel, build_model
from hybrid_train.schema.extension import implementation_of
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.training.engine import Engine
from hybrid_train.training.network import Network
from hybrid_train.training.objective import Given, Objective


def build_engine(
    job: TrainJob, built: BuiltModel, groups: ProcessGroups, device: torch.device
) -> Engine:
    """Give a job what its steps need: networks and objective.

    Args:
        job: a checked job.
        built: the model of its own section; those that the objective adds are built here.
        groups: processes of its layout.
        device: of this process.

    Raises:
        UserError: if the objective cannot be imported, or is not one.
    """
    networks = {}
    for number, (name, model) in enumerate(job.objective.models(job.model).items()):
        own, made = job, built
        if model is not job.model:
            # Two networks of one shape must not begin alike, nor round alike.
            train = dataclasses.replace(job.train, seed=job.train.seed + number)
            own = dataclasses.replace(job, model=model, train=train)
            assert model.vocab_size is not None, f"{name} has no vocabulary"
            made = build_model(own, groups, model.vocab_size, on_gpu=device.type == "cuda")
        networks[name] = build_network(own, made, groups, device, name)
    return Engine(
        networks=networks,
        objective=build_objective(job, networks, groups),
        microbatch=job.train.microbatch,
        sequences_per_step=job.train.global_batch,
        sequence_length=job.train.sequence_length,
    )


def build_objective(
    job: TrainJob, networks: Mapping[str, Network], groups: ProcessGroups
) -> Objective:
    """Build what the settings of the objective name.

    Raises:
        UserError: if that cannot be imported, or its turns ask for what is not there.
    """
    implementation = implementation_of(job.objective)
    given = Given(networks, groups, job.model, Path(job.run_dir), teacher_loader(job, groups))
    objective: Objective = implementation(job.objective, given)
    turns = objective.turns
    if unknown := {turn.network for turn in turns} - networks.keys():
        raise _refused(
            f"objective {job.objective.kind}: it trains {', '.join(sorted(unknown))}, but its "
            f"networks are {', '.join(networks)}"
        )
    if len(turns) > 1 and (job.parallel.fsdp or job.precision.fp8_param_gather):
        raise _refused(
            f"objective {job.objective.kind}: a step of {len(turns)} turns takes back updates, "
            "which parallel.fsdp=true and precision.fp8_param_gather=true do not let it do; set "
            "both to false"
        )
    return objective


def _refused(text: str) -> UserError:
    error = UserError(text)
    error.everywhere = True  # every process builds the same objective
    return error
