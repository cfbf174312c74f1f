"""A batch of fixed random tokens, for programs that time a step."""

import torch

from hybrid_train.data.batch import Batch


def fixed_batch(vocab: int, sequences: int, length: int) -> Batch:
    """Return one microbatch in which every label counts."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab, (sequences, length + 1), generator=generator)
    positions = torch.arange(length).expand(sequences, -1)
    return Batch(rows[:, :-1], rows[:, 1:], torch.ones(sequences, length), positions)
