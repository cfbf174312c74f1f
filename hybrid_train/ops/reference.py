"""What another model says of the tokens that a model is compared with it on.

By its hidden states and its part of its head, of which a chunk of logits is made at a time; or by
what was stored of its most likely tokens. How far apart the two are: `ops/divergence.py`.

Dimensions: T tokens, N tokens of a chunk, H hidden units of the other model, V/tp rows of a head on
one rank, K tokens that are told apart.
"""

from dataclasses import dataclass

from torch import Tensor
from torch import distributed as dist

from hybrid_train.ops.linear import gemm
from hybrid_train.ops.logits import HeadPart


@dataclass(frozen=True)
class Reference:
    """What another model makes of the same tokens.

    Attributes:
        hidden: in the order of the model's tokens, all of them on every tensor rank, [T, H].
        head: this rank's rows of its head; the same tokens as the rows of the model's.
    """

    hidden: Tensor
    head: HeadPart

    def logits(self, rows: slice) -> Tensor:
        """Return the logits of a chunk, [N, V/tp]."""
        return gemm(self.hidden[rows], self.head.weight)

    def require_alike(self, head: HeadPart) -> None:
        """Refuse a head whose rows on this rank are other tokens; see `aligned`.

        Raises:
            ValueError: if it has another vocabulary, or another padding of it over several ranks.
        """
        mine, other = ((one.vocab_size, one.first, one.width) for one in (head, self.head))
        if mine != other:
            raise ValueError(
                f"the heads do not have the same tokens here: {other[2]} from {other[1]} of "
                f"{other[0]} in the reference, {mine[2]} from {mine[1]} of {mine[0]} in the model"
            )


def aligned(head: HeadPart, model: HeadPart) -> HeadPart:
    """Return a frozen head with the rows on this rank that the model's has; every rank calls this.

    A vocabulary that is padded otherwise is split otherwise, too: then rows are copied.

    Args:
        head: of a reference.
        model: of the model, over the same ranks.

    Raises:
        ValueError: if the vocabularies differ.
    """
    if head.vocab_size != model.vocab_size:
        raise ValueError(
            f"the reference has a vocabulary of {head.vocab_size} tokens, the model one of "
            f"{model.vocab_size}"
        )
    if head.group is None or len(head.weight) == len(model.weight):
        return head
    whole = head.weight.new_zeros(
        dist.get_world_size(head.group) * len(head.weight), head.weight.shape[1]
    )
    dist.all_gather_into_tensor(whole, head.weight.detach().contiguous(), group=head.group)
    rows = head.weight.new_zeros(len(model.weight), head.weight.shape[1])
    own = whole[model.first : model.first + model.width]
    rows[: len(own)] = own
    return HeadPart(rows, head.vocab_size, head.group)


@dataclass(frozen=True)
class TopTokens:
    """The most likely tokens of another model; all others are one entry, with what is left.

    Attributes:
        tokens: in the whole vocabulary, those of a row all different, [T, K].
        logits: theirs, [T, K].
        log_sum: log of the sum of exp(logit) over the whole vocabulary, [T].
    """

    tokens: Tensor
    logits: Tensor
    log_sum: Tensor


Target = Reference | TopTokens
