"""Tiny token files for the tests of the data package."""

from pathlib import Path

import numpy as np

from hybrid_train.data.token_files import write_documents

VOCAB = 50
END = 0


def write_corpus(prefix: Path, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Write documents of random tokens, the last of each being END; return them."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    documents = [[*rng.integers(1, VOCAB, n - 1).tolist(), END] for n in lengths]
    write_documents(prefix, documents, vocab_size=VOCAB)
    return documents
