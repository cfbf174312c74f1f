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


def write_stray(prefix: Path, stray: int, vocab_size: int) -> str:
    """Write a stray id into documents of 100 tokens but where the check at the start looks."""
    total = 200_000
    ids = np.random.default_rng(0).integers(1, vocab_size, total)
    looked_at = np.zeros(total, dtype=bool)
    for place in range(64):
        start = (total - 1024) * place // 63
        looked_at[start : start + 1024] = True
    ids[40::100] = np.where(looked_at[40::100], 1, stray)
    ids[99::100] = END
    assert 0 < np.count_nonzero(ids[40::100] == stray) < total // 100
    dtype_of = 100_000 if stray < 0 else vocab_size  # four bytes, which have a sign
    write_documents(prefix, ids.reshape(-1, 100).tolist(), vocab_size=dtype_of)
    return str(prefix)
