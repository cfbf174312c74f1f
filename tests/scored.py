"""Tiny frozen models whose activations are scored, and the rows that they read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import layers
from hybrid_train.compression.ranking import HIDDEN, LAYERS, name_of
from hybrid_train.data.batch import Row
from hybrid_train.data.packing import fill_row
from hybrid_train.schema.importance import ImportanceJob
from tests.packed import PADDING, documents
from tests.tiny import LENGTH, VOCAB, some_rows

if TYPE_CHECKING:
    from hybrid_train.training.network import Network


def frozen_network(job: Any, groups: Any) -> "Network":
    """The model of a job on its layout, as it is when it is loaded; its weights are the first."""
    from hybrid_train.model.build import build_model
    from hybrid_train.training.network import Network, Routing

    built = build_model(job, groups, VOCAB, on_gpu=False)
    made = Network(
        list(built.chunks), groups, torch.device("cpu"), Routing((), 0), built.balance_losses
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


# The element of each axis that `plant` lets matter most, in every layer that has some.
PLANTED = {
    Axis.hidden: 5,
    Axis.ssm_heads: 2,
    Axis.ssm_head_dim: 3,
    Axis.kv_groups: 1,
    Axis.heads: 3,
    Axis.ffn: 7,
    Axis.experts: 2,
    Axis.expert_ffn: 4,  # of expert 0; of the others the ones that follow
    Axis.shared_ffn: 11,
    Axis.latent: 9,
}
PLANTED_LAYER = 5  # from 1
_ROWS_OF = {  # what makes an axis, by the ends of the names of weights
    "mlp.linear_fc1.weight": Axis.ffn,
    "shared_experts.linear_fc1.weight": Axis.shared_ffn,
    "fc1_latent_proj.weight": Axis.latent,
}
_LAST = (  # what a layer adds to the hidden states
    *("mixer.out_proj.weight", "linear_proj.weight", "mlp.linear_fc2.weight"),
    *("fc2_latent_proj.weight", "shared_experts.linear_fc2.weight"),
)


def plant(model: Any) -> None:
    """Let one element of each axis matter most, in a model of `tiny_job` on one process."""
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):  # every token chooses it
            bias[PLANTED[Axis.experts]] = 1
    for name, weight in model.named_parameters():
        rows = weight.data
        axis = next((axis for end, axis in _ROWS_OF.items() if name.endswith(end)), None)
        if rows.dim() == 1 and len(rows) == model.config.hidden_size and "mixer.norm" not in name:
            rows[PLANTED[Axis.hidden]] *= 3
        elif axis is not None:
            rows[PLANTED[axis]] *= 6
        elif ".experts.linear_fc1.weight" in name:
            rows[PLANTED[Axis.expert_ffn] + int(name[-1])] *= 20
        elif name.endswith(f".experts.linear_fc2.weight{PLANTED[Axis.experts]}"):
            rows *= 50
        elif name.startswith("decoder.layers.") and name.endswith(_LAST):
            rows *= 5 if int(name.split(".")[2]) == PLANTED_LAYER - 1 else 0.002
        else:
            _plant_heads(name, rows)


def _plant_heads(name: str, rows: Tensor) -> None:
    if name.endswith("in_proj.weight"):
        x = rows[64:128].view(4, 16, -1)
        x[PLANTED[Axis.ssm_heads]] *= 5
        x[:, PLANTED[Axis.ssm_head_dim]] *= 5
    elif name.endswith("linear_qkv.weight"):  # of each group two queries, a key, a value
        group = rows.view(2, 4, 8, -1)[PLANTED[Axis.kv_groups]]
        group[3] *= 10
        group[PLANTED[Axis.heads] % 2] *= 100  # looks at one token, and takes no mean of many


def planted(model: Any, scores: Mapping[str, Tensor]) -> Iterator[tuple[Any, int, Tensor]]:
    """Yield axes, the planted element, and the scores of all; layers as an axis of their own."""
    yield Axis.hidden, PLANTED[Axis.hidden], scores[HIDDEN]
    for name in scores:
        if name.startswith(LAYERS) and name != f"{LAYERS}loss":  # chance has no loss to lose
            yield "layers", PLANTED_LAYER - 1, scores[name]
    for layer in layers(model):
        for axis, element in PLANTED.items():
            values = scores.get(name_of(layer, axis))
            if axis is Axis.ssm_head_dim and layer.letter == "M":
                yield axis, element, scores[name_of(layer, Axis.ssm_heads)].square().sum(0)
            elif axis is Axis.expert_ffn and values is not None:
                yield from ((axis, element + n, one) for n, one in enumerate(values))
            elif axis is Axis.ssm_heads and values is not None:
                yield axis, element, values.square().sum(1)
            elif values is not None:
                yield axis, element, values
