"""What a forward pass leaves to its reader: hidden states, and the head that makes logits of them.

Dimensions: S sequence, B batch, V vocabulary with its padding, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from hybrid_train.megatron.plain import ColumnParallelLinear
from hybrid_train.ops.logits import HeadPart, Term, weighted_sum


class OutputLayer(ColumnParallelLinear):
    """Core's output layer, which can also compute a loss of its logits.

    The loss is computed within `forward`, since what gathers a weight for the time of its use does
    so around the module that has it.
    """

    num_tokens: int  # of the vocabulary without its padding

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        term: Term | None = None,
        weights: Tensor | None = None,
    ) -> Any:
        """Return logits [S, B, V / tp] and no bias; with a term its sum and values."""
        if term is None:
            return super().forward(input_, weight, runtime_gather_output)
        assert weights is not None, "a term needs weights"
        return weighted_sum(input_, self._part(weight), term, weights)

    def _part(self, tied_weight: Any) -> HeadPart:
        weight = self.weight if tied_weight is None else tied_weight
        group = self.tp_group if self.tp_group.size() > 1 else None
        buffer = getattr(weight, "main_grad", None) if self.gradient_accumulation_fusion else None
        if group is None and getattr(weight, "zero_out_wgrad", False):
            # The embedding adds to this weight, too: their gradients meet in an ordinary one.
            buffer = None
        if buffer is not None and torch.is_grad_enabled():
            weight.grad_added_to_main_grad = True
        return HeadPart(weight, self.num_tokens, group, self.sequence_parallel, buffer)


@dataclass(frozen=True)
class Head:
    """The output layer with the weight that it has or, where embeddings are tied, is given."""

    layer: OutputLayer
    tied_weight: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [S / tp or S, B, H] to logits over the padded vocabulary, [B, S, V]."""
        logits, _ = self.layer(hidden, weight=self.tied_weight)
        return gather_from_tensor_model_parallel_region(
            logits.transpose(0, 1), group=self.layer.tp_group
        )

    def weighted_sum(self, hidden: Tensor, term: Term, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sum up a term of the logits, which are never there all at once; see `ops.logits`.

        Args:
            hidden: as the layout holds it, [S / tp or S, B, H].
            term: of the S x B tokens, sequence before batch.
            weights: of each token, [B, S].

        Returns:
            The sum, with gradients; the values [B, S], without.
        """
        by_row = weights.transpose(0, 1)
        total, values = self.layer(hidden, self.tied_weight, term=term, weights=by_row)
        return total, values.view(by_row.shape).transpose(0, 1)


@dataclass(frozen=True)
class Outputs:
    """What the last pipeline stage makes of a microbatch.

    Attributes:
        hidden: after the final norm, as the layout holds it, [S / tp or S, B, H].
        mtp_hidden: of each MTP depth in the same shape; empty where they were not run.
        head: maps each of them to logits.
    """

    hidden: Tensor
    mtp_hidden: tuple[Tensor, ...]
    head: Head

    def logits(self) -> Tensor:
        """Return the logits of the next token over the padded vocabulary, [B, S, V]."""
        return self.head.logits(self.hidden)
