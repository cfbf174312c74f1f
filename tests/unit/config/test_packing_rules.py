"""Packed rows are refused where documents would see each other."""

import pytest

from hybrid_train.config.rules_of_data import packed_rows_run
from hybrid_train.schema.data import Data, Packing
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from hybrid_train.schema.train import TrainJob


def job(context: int, kernels: Kernels, device: Device) -> TrainJob:
    return TrainJob(
        data=Data(packing=Packing.best_fit),
        parallel=Parallel(context=context),
        runtime=Runtime(kernels=kernels, device=device),
    )


@pytest.mark.parametrize(
    ("kernels", "device"), [(Kernels.fused, Device.auto), (Kernels.auto, Device.cuda)]
)
def test_transformer_engine_cannot_split_packed_rows(kernels: Kernels, device: Device) -> None:
    (problem,) = packed_rows_run(job(2, kernels, device), 2)
    assert (problem.path, problem.nearest) == ("runtime.kernels", "plain")
    assert "parallel.context=2" in problem.rule


@pytest.mark.parametrize(
    ("context", "kernels", "device"),
    [
        (1, Kernels.fused, Device.cuda),
        (2, Kernels.plain, Device.cuda),
        (2, Kernels.auto, Device.cpu),
        (4, Kernels.auto, Device.auto),
    ],
)
def test_what_keeps_documents_apart_is_allowed(
    context: int, kernels: Kernels, device: Device
) -> None:
    assert list(packed_rows_run(job(context, kernels, device), context)) == []


def test_rows_that_are_not_packed_can_be_split_by_any_kernel() -> None:
    unpacked = job(2, Kernels.fused, Device.cuda)
    unpacked.data.packing = Packing.none
    assert list(packed_rows_run(unpacked, 2)) == []
