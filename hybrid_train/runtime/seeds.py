"""Random numbers of a process, and their state for checkpoints."""

import random

import numpy as np
import torch


def random_state() -> dict[str, torch.Tensor]:
    """Return the state of every generator of this process as tensors."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.tensor(keys.astype(np.int64)),
        "numbers": torch.tensor([version, position, has_gauss], dtype=torch.int64),
        "gauss": torch.tensor([gauss or 0.0, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
    }


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put every generator back to where `random_state` found it."""
    version, position, has_gauss = (int(number) for number in state["numbers"])
    gauss, cached = (float(number) for number in state["gauss"])
    random.setstate((version, tuple(state["python"].tolist()), gauss or None))
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
