"""Tiny engines and what a checkpoint of them holds, for the tests of this folder."""

from typing import Any

from torch import Tensor

from hybrid_train.schema.optimizer import AdamW
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from tests.tiny import EVERY_KIND, microbatches, some_rows, tiny_engine, tiny_job


def engine_of(
    groups: Any,
    seed: int,
    *,
    split: bool = True,
    steps: int = 0,
    pattern: str = EVERY_KIND,
    format: GemmFormat = GemmFormat.fp32,
    adamw: AdamW | None = None,
) -> Any:
    """An engine that has taken some steps; `split` deals the optimizer out to the processes."""
    job = tiny_job(
        pattern,
        parallel=Parallel(distributed_optimizer=split),
        precision=Precision(format=format),
        optimizer=adamw or AdamW(),
    )
    job.train.seed = seed
    engine = tiny_engine(job, groups)
    take(engine, steps)
    return engine


def take(engine: Any, steps: int) -> list[float]:
    """Take steps on the same rows as ever; return their losses."""
    batches = microbatches(some_rows(), 2)
    return [engine.step(batches, tokens_seen=0).loss for _ in range(steps)]


def content_of(engine: Any, groups: Any) -> Any:
    from hybrid_train.training.hooks import checkpointing

    return checkpointing.content_of(engine)


def weights_of(engine: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers, expert biases among them."""
    state = engine.network.chunks[0].module.state_dict()
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def moments_of(engine: Any) -> list[tuple[str, Tensor]]:
    """Master weights, moments and step counts, parameter by parameter."""
    found = []
    for part in engine.network.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                found += [("weight", parameter.detach().clone())]
                found += [(name, state[name].clone()) for name in sorted(state)]
    return found


def named(engine: Any, groups: Any) -> dict[tuple[Any, ...], Tensor]:
    """Weights and optimizer state by the names and offsets that a checkpoint gives them."""
    from hybrid_train.checkpoint.optimizer_state import state_parts
    from hybrid_train.checkpoint.shards import shards_of

    found = shards_of(engine.network.chunks, groups)
    tensors = [shard.weight for shard in found]
    tensors += [part.tensor for part in state_parts(engine.network.optimizer, found)]
    # A weight of an expert has one axis less than its moments: that of the experts.
    return {
        (tensor.key, tensor.global_offset): tensor.data.detach().squeeze(0).clone()
        for tensor in tensors
    }
