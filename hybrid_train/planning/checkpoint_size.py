"""What a checkpoint of a run holds: bytes of the tensors and number of files, before it is written.

Weights lie in it as they are; beside each, both moments in float32, whatever the optimizer keeps
them in, and a float32 master where the weight is not float32 (`checkpoint/optimizer_state.py`).
Each tensor is stored once, whatever the layout. Not counted: random states and step counts, some
kilobytes a process, and torch's names around each tensor.
"""

from hybrid_train.anatomy.axes import sizes_of
from hybrid_train.anatomy.kinds import EMBEDDING, FINAL_NORM, HEAD, MTP_BLOCK, Parameter
from hybrid_train.anatomy.layers import layers, mtp_blocks
from hybrid_train.schema.model import Model
from hybrid_train.schema.precision import NumberFormat
from hybrid_train.schema.train import TrainJob

_FP32, _HALF, _MOMENTS = 4, 2, 8  # bytes of an element
FILES_OF_ALL = (".metadata", "metadata.json", "position.json", "checksums.json")


def stored_bytes(job: TrainJob, vocab_rows: int) -> int:
    """Return the bytes of weights and optimizer state of the whole model.

    Args:
        job: a checked job.
        vocab_rows: rows of the embedding as they are stored.
    """
    full, model = job.precision.base is NumberFormat.fp32, job.model
    sizes = sizes_of(model, vocab_rows)
    found = sum(
        one.elements(layer.sizes) * _bytes(one, full=full)
        for layer in layers(model)
        for one in layer.parameters
    )
    outer = [EMBEDDING, FINAL_NORM, *_head(model), *MTP_BLOCK * mtp_blocks(model)]
    return found + sum(one.elements(sizes) * _bytes(one, full=full) for one in outer)


def _head(model: Model) -> list[Parameter]:
    return [] if model.tie_embeddings else [HEAD]


def _bytes(one: Parameter, *, full: bool) -> int:
    """Return the bytes of an element of a tensor and of what the optimizer has of it."""
    weight = _FP32 if full or one.float32 else _HALF
    if one.buffer:
        return weight
    return weight + _MOMENTS + (0 if weight == _FP32 else _FP32)
