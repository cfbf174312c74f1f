"""Tiny frozen models whose activations are scored, and the rows that they read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hybrid_train.data.batch import Row
from hybrid_train.data.packing import fill_row
from hybrid_train.schema.importance import ImportanceJob
from tests.packed import PADDING, documents
from tests.tiny import LENGTH, VOCAB, some_rows

if TYPE_CHECKING:
    from hybrid_train.training.network import Network


def frozen_network(job: Any, groups: Any) -> "Network":
    """The model of a job on its layout, as it is when it is loaded; its weights are the first."""
    from hybrid_train.jobs.networks import _routing
    from hybrid_train.model.build import build_model
    from hybrid_train.training.network import Network

    built = build_model(job, groups, VOCAB, on_gpu=False)
    made = Network(
        list(built.chunks), groups, torch.device("cpu"), _routing(job.model), built.balance_losses
    )
    made.freeze()
    return made


def whole_rows(number: int) -> list[Row]:
    """Rows of one document each."""
    return [
        Row(row[:-1], row[1:], np.ones(LENGTH, np.float32), np.arange(LENGTH))
        for row in some_rows(number).numpy()
    ]


def packed_rows(number: int) -> list[Row]:
    """Rows of several documents, with padding behind them."""
    found = []
    for seed in range(number):
        fields: dict[str, Any] = fill_row(documents(5, 2, 6 + seed % 3, seed=seed), LENGTH, PADDING)
        found.append(Row(**fields))
    return found


def settings(**given: Any) -> ImportanceJob:
    """The job with some of its settings."""
    return ImportanceJob(checkpoint="", output="", **given)


def passes_of(network: "Network", rows: Sequence[Row], microbatch: int = 1) -> Any:
    """Passes of a network over rows."""
    from hybrid_train.compression.passes import Passes

    return Passes(network, rows.__getitem__, microbatch)


def scores_of(
    network: "Network", model: Any, rows: Sequence[Row], job: ImportanceJob, microbatch: int = 1
) -> dict[str, Tensor]:
    """The scores of activations of rows, as a ranking names them."""
    from hybrid_train.compression.activations import Activations

    passes, heard = passes_of(network, rows, microbatch), Activations(network, model, job)
    with heard.listening():
        for batches in passes.groups(len(rows)):
            passes.run(batches, lambda out, _: (out.hidden,), with_mtp=True, seeing=heard.see)
            heard.close()
    return heard.collect()
