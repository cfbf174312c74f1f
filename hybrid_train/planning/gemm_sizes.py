"""How large the matrices of linear layers are on one process, and the setting that each size is of.

Dimensions: T tokens, I input width, O output width; a linear layer multiplies [T, I] by [O, I].
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.anatomy.axes import Dim, Sizes
from hybrid_train.anatomy.gemm_formats import MTP
from hybrid_train.anatomy.kinds import MTP_PROJECTION, MambaKind, weight_of
from hybrid_train.planning import degrees
from hybrid_train.schema.train import TrainJob


@dataclass(frozen=True)
class Size:
    """One dimension of the GEMMs of a linear layer.

    Attributes:
        value: on one process.
        setting: the whole number of the configuration that it grows with.
        words: what it is.
    """

    value: int
    setting: str
    words: str


def weight_sizes(job: TrainJob, module: str, sizes: Sizes) -> tuple[Size, Size]:
    """Return I and O of a linear layer on one process, after the tensor-parallel split.

    Args:
        job: the job; the splits must be even.
        module: the kind of linear layer, as in `gemm_formats.KINDS`.
        sizes: of the layer that it is in.
    """
    one = module if module == MTP_PROJECTION else module.removeprefix(f"{MTP}.")
    weight = weight_of(one, sizes)
    ways = degrees.expert_tensor(job.parallel) if weight.of_experts else job.parallel.tensor
    rows, columns = (
        _split(weight.dims[number], sizes, ways if weight.split == number else 1)
        for number in (0, 1)
    )
    return columns, rows


def token_sizes(job: TrainJob, module: str) -> Iterator[Size]:
    """Yield T of the GEMMs of a linear layer on one process; none for experts.

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


def packed_rows(sizes: Sizes) -> Size:
    """Return O of Mamba's in_proj before any split: the rows z, x, B, C and dt."""
    return _split(MambaKind.packed, sizes, 1)


def _split(whole: Dim, sizes: Sizes, ways: int) -> Size:
    words = str(whole) if ways == 1 else f"{whole} / {ways}"
    axis = whole.grows_with
    assert axis is not None, "a linear layer has no fixed width"
    return Size(whole.size(sizes) // ways, axis.setting, words)
