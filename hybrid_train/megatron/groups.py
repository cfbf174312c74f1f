"""Process groups: built from our section, the only reader of Megatron's parallel state."""

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection as ProcessGroups

from hybrid_train.megatron import replacements
from hybrid_train.schema.parallel import Parallel


def build_groups(parallel: Parallel, timeout_s: float) -> ProcessGroups:
    """Split the processes of the run into groups along each parallel axis.

    Megatron's tracker of random states begins here, too. The one for inference never switches
    streams: the family has no dropout, and weights are initialised by name (`model/init.py`).
    """
    replacements.for_process(on_gpu=torch.cuda.is_available())
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    return ProcessGroups.use_mpu_process_groups()


def destroy_groups() -> None:
    """Forget the groups, so that a later run in this process can build its own."""
    parallel_state.destroy_model_parallel()
