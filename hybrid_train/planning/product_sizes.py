"""How large the matrices of linear layers are on one process, and the setting that each size is of.

Dimensions: T tokens, I input width, O output width; a linear layer multiplies [T, I] by [O, I].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hybrid_train.anatomy.product_formats import MTP, MTP_PROJECTION
from hybrid_train.planning import degrees
from hybrid_train.schema.model import Model
from hybrid_train.schema.train import TrainJob


@dataclass(frozen=True)
class Size:
    """One dimension of the products of a linear layer.

    Attributes:
        value: on one process.
        setting: the whole number of the configuration that it grows with.
        words: what it is.
    """

    value: int
    setting: str
    words: str


def weight_sizes(job: TrainJob, module: str) -> tuple[Size, Size]:
    """Return I and O of a linear layer on one process, after the tensor-parallel split.

    Args:
        job: the job; the splits must be even.
        module: the kind of linear layer, as in `product_formats.KINDS`.
    """
    one = module if module == MTP_PROJECTION else module.removeprefix(f"{MTP}.")
    inner, outer = _WEIGHTS[one](job.model)
    inner_ways, outer_ways = _ways(job, one)
    return _split(inner, inner_ways), _split(outer, outer_ways)


def token_sizes(job: TrainJob, module: str) -> Iterator[Size]:
    """Yield T of the products of a linear layer on one process; none for experts.

    Core pads the tokens of each expert to what the format needs (transformer/moe/experts.py 304).
    Parts of a sequence that tensor ranks hold are gathered before they are multiplied, but not for
    the latent projections, whose weights every rank holds (moe_layer.py 266).
    """
    if ".experts." in module:
        return
    parallel, train = job.parallel, job.train
    value = train.sequence_length * train.microbatch // parallel.context
    words = f"sequence_length x microbatch / context ({parallel.context})"
    if ".latent." in module and degrees.splits_sequence(parallel):
        value //= parallel.tensor
        words += f" / tensor ({parallel.tensor})"
    yield Size(value, "train.sequence_length", words)


def packed_rows(model: Model) -> Size:
    """Return O of Mamba's in_proj before any split: the rows z, x, B, C and dt."""
    sizes = model.mamba
    value = 2 * sizes.heads * sizes.head_dim + 2 * sizes.groups * sizes.state_size + sizes.heads
    return Size(value, "model.mamba.heads", "the rows of mamba.in_proj")


def _split(size: Size, ways: int) -> Size:
    words = size.words if ways == 1 else f"{size.words} / {ways}"
    return Size(size.value // ways, size.setting, words)


def _ways(job: TrainJob, module: str) -> tuple[int, int]:
    """Return how many ways I and O are split."""
    if ".latent." in module:
        return 1, 1
    experts = ".experts." in module
    ways = degrees.expert_tensor(job.parallel) if experts else job.parallel.tensor
    split_input = module.rpartition(".")[2] in ("out_proj", "proj", "fc2")
    return (ways, 1) if split_input else (1, ways)


def _hidden(model: Model) -> Size:
    return Size(model.hidden_size, "model.hidden_size", "hidden_size")


def _routed(model: Model) -> Size:
    return _hidden(model) if model.moe.latent_size is None else _latent(model)


def _latent(model: Model) -> Size:
    assert model.moe.latent_size is not None, "only asked for where there is one"
    return Size(model.moe.latent_size, "model.moe.latent_size", "moe.latent_size")


def _mamba_inner(model: Model) -> Size:
    sizes = model.mamba
    return Size(sizes.heads * sizes.head_dim, "model.mamba.heads", "mamba.heads x head_dim")


def _query_rows(model: Model) -> Size:
    sizes = model.attention
    value = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    return Size(value, "model.attention.head_dim", "the rows of queries, keys and values")


def _heads(model: Model) -> Size:
    sizes = model.attention
    return Size(sizes.heads * sizes.head_dim, "model.attention.head_dim", "heads x head_dim")


def _mlp(model: Model) -> Size:
    return Size(model.mlp.intermediate_size, "model.mlp.intermediate_size", "intermediate_size")


def _expert(model: Model) -> Size:
    value = model.moe.intermediate_size
    return Size(value, "model.moe.intermediate_size", "moe.intermediate_size")


def _shared(model: Model) -> Size:
    value = model.moe.shared_intermediate_size
    assert value is not None, "only asked for where there is one"
    return Size(value, "model.moe.shared_intermediate_size", "moe.shared_intermediate_size")


def _both_hidden(model: Model) -> Size:
    return Size(2 * model.hidden_size, "model.hidden_size", "2 x hidden_size")


_WEIGHTS: dict[str, Callable[[Model], tuple[Size, Size]]] = {
    "mamba.in_proj": lambda model: (_hidden(model), packed_rows(model)),
    "mamba.out_proj": lambda model: (_mamba_inner(model), _hidden(model)),
    "attention.qkv": lambda model: (_hidden(model), _query_rows(model)),
    "attention.proj": lambda model: (_heads(model), _hidden(model)),
    "mlp.fc1": lambda model: (_hidden(model), _mlp(model)),
    "mlp.fc2": lambda model: (_mlp(model), _hidden(model)),
    "moe.experts.fc1": lambda model: (_routed(model), _expert(model)),
    "moe.experts.fc2": lambda model: (_expert(model), _routed(model)),
    "moe.shared.fc1": lambda model: (_hidden(model), _shared(model)),
    "moe.shared.fc2": lambda model: (_shared(model), _hidden(model)),
    "moe.latent.down": lambda model: (_hidden(model), _latent(model)),
    "moe.latent.up": lambda model: (_latent(model), _hidden(model)),
    "mtp.eh_proj": lambda model: (_both_hidden(model), _hidden(model)),
}
