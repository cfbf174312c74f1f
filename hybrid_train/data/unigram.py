"""The loss of a model that knows nothing but how often each token occurs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.indexed import beyond_vocabulary, place_beyond, spread, verify

_AT_MOST_TOKENS = 100_000_000  # of each file; counts of a longer one come from evenly spaced parts


def unigram_cross_entropy(
    train_prefixes: Sequence[str], validation_prefixes: Sequence[str], vocab_size: int
) -> float:
    """Cross-entropy of the train unigram distribution on the validation part, nats per token.

        p(v)   = (n_train(v) + 1) / (n_train + vocab_size)         add-one smoothing
        result = - sum_v n_validation(v) * log p(v) / n_validation

    Raises:
        UserError: if a prefix cannot be read or holds tokens beyond the vocabulary.
    """
    train = count_tokens(train_prefixes, vocab_size) + 1
    validation = count_tokens(validation_prefixes, vocab_size)
    log_p = np.log(train / train.sum())
    return float(-(validation * log_p).sum() / validation.sum())


def count_tokens(prefixes: Sequence[str], vocab_size: int) -> NDArray[np.int64]:
    """Count how often each token occurs: [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for prefix in prefixes:
        for part in spread(verify(prefix, vocab_size), _AT_MOST_TOKENS):
            if (place := place_beyond(part, vocab_size)) is not None:
                raise beyond_vocabulary(f"{prefix}.bin", f"token {part[place]}", vocab_size)
            counts += np.bincount(part, minlength=vocab_size)
    return counts
