"""Where documents that share a row cannot be kept apart, and why.

Where a comment names a file, it is one of Megatron-Core 0.19.2.
"""

from collections.abc import Iterator

from hybrid_train.schema.data import Packing
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Device, Kernels
from hybrid_train.schema.train import TrainJob


def packed_rows_run(job: TrainJob, _: int) -> Iterator[Problem]:
    """Refuse a layout that mixes up documents.

    With `runtime.kernels=auto` on whatever device there is, the model refuses at its first step
    (`megatron/packed_rows.py`).
    """
    if job.data.packing is Packing.none:
        return
    kernels, device = job.runtime.kernels, job.runtime.device
    fused = kernels is Kernels.fused or (kernels is Kernels.auto and device is Device.cuda)
    if fused and job.parallel.context > 1:
        # Its attention takes 2 * context pieces of each document, all of equal length
        # (extensions/transformer_engine.py 2012, qkv_format thd); our ranks hold pieces of rows.
        rule = (
            "must be plain: Transformer Engine cannot keep documents of a row apart with "
            f"parallel.context={job.parallel.context}"
        )
        yield Problem("runtime.kernels", kernels.value, rule, "plain")
