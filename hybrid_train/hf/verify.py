"""Differences between a checkpoint and a Hugging Face folder (gateway to transformers).

Our logits are computed by Megatron, which is imported here, so the process must have been started
before (`runtime/start.py`); theirs by the class NemotronH of transformers.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from hybrid_train.hf.read import Folder
from hybrid_train.hf.tensors import Theirs, require_finite, theirs_from_ours
from hybrid_train.hf.write import Checkpoint, Weights
from hybrid_train.megatron.hybrid import Hybrid
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_NO_LIMIT = 1e-30  # its logarithm exists
_log = logging.getLogger(__name__)


@dataclass
class Differences:
    """Every tensor that is not the same on both sides, in words; empty lists if all are."""

    tensors: int = 0  # compared
    only_ours: list[str] = field(default_factory=list)
    only_theirs: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)  # of equal values, or they stand below too
    values: list[str] = field(default_factory=list)

    @property
    def is_same_model(self) -> bool:
        """Whether all is equal but for number formats, up to the narrower of the two."""
        return not (self.only_ours or self.only_theirs or self.shapes or self.values)

    def lines(self) -> list[str]:
        """Say what differs, each kind with its number."""
        kinds = {
            "only in the checkpoint": self.only_ours,
            "only in the folder": self.only_theirs,
            "of another shape": self.shapes,
            "of another number format": self.formats,
            "of other values": self.values,
        }
        return [
            f"{counted(len(found), 'tensor')} {kind}: {_some(found)}"
            for kind, found in kinds.items()
            if found
        ]


def _some(found: list[str], most: int = 5) -> str:
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def differences(checkpoint: Checkpoint, weights: Weights, folder: Folder) -> Differences:
    """Compare every tensor of both sides, a part at a time."""
    theirs = checkpoint.theirs()
    found = Differences()
    present, stored = folder.names, weights.names
    found.only_theirs = sorted(present - theirs.keys())
    for name, one in theirs.items():
        lacking = [piece.key for piece in one.pieces.values() if piece.key not in stored]
        if name not in present:
            found.only_ours.append(name)
        elif lacking:
            found.only_theirs.append(f"{name} ({lacking[0]})")
        elif folder.shape(name) != one.shape:
            found.shapes.append(f"{name}: {one.shape} here, {folder.shape(name)} there")
        else:
            found.tensors += 1
            _compare(one, weights, folder, found)
    keys = {piece.key for one in theirs.values() for piece in one.pieces.values()}
    found.only_ours += sorted(stored - keys)
    return found


def _compare(one: Theirs, weights: Weights, folder: Folder, found: Differences) -> None:
    here = weights.dtype(next(iter(one.pieces.values())).key)
    there = folder.dtype(one.name)
    if here != there:
        found.formats.append(f"{one.name}: {_word(here)} here, {_word(there)} there")
    narrow = min((here, there), key=lambda dtype: dtype.itemsize)
    row, largest, first = 0, 0.0, None
    for part in theirs_from_ours(one, weights):
        ours = weights.read(part.name, part.start, part.stop)
        require_finite(weights, part.name, ours, part.start)
        ours = ours.view(part.shape)
        block = folder.read(one.name, row, row + len(ours))
        if not _equal(ours, block, narrow):
            change = (ours.double() - block.double()).abs()
            largest = max(largest, change.max().nan_to_num(torch.inf).item())
            if first is None:
                unequal = (ours.to(narrow) != block.to(narrow)).nonzero()[0].tolist()
                first = [row + unequal[0], *unequal[1:]]
        row += len(ours)
    if first is not None:
        found.values.append(f"{one.name}: by at most {largest:.3g}, first at {first}")


def _equal(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(ours.to(dtype), theirs.to(dtype))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class LogitDifference:
    """How far two sets of logits are apart, as a share of the logits' own spread."""

    scale: float  # standard deviation of their logits
    largest: float  # absolute
    mean: float  # absolute
    first: int | None  # position of the first that differs by more than the tolerance
    length: int

    @property
    def share(self) -> float:
        """The largest difference as a share of the scale."""
        return self.largest / self.scale if self.scale else self.largest

    def __str__(self) -> str:
        where = "none" if self.first is None else f"the first at position {self.first}"
        return (
            f"logits of {self.length} positions: largest difference {self.largest:.3g}, mean "
            f"{self.mean:.3g}, of logits with a standard deviation of {self.scale:.3g} (largest / "
            f"scale = {self.share:.1e}); beyond the tolerance: {where}"
        )


def compare_logits(ours: Tensor, theirs: Tensor, tolerance: float) -> LogitDifference:
    """Compare logits [B, S, V]; `tolerance` is a share of the standard deviation of theirs."""
    apart = (ours.double() - theirs.double()).abs()
    apart = apart.nan_to_num(torch.inf, torch.inf)
    scale = theirs.double().std().item()
    beyond = (apart > tolerance * scale).flatten(2).any(dim=2).any(dim=0).nonzero()
    return LogitDifference(
        scale=scale,
        largest=apart.max().item(),
        mean=apart.mean().item(),
        first=int(beyond[0].item()) if len(beyond) else None,
        length=ours.shape[1],
    )


@torch.no_grad()
def our_logits(model: Hybrid, tokens: Tensor, vocab_size: int) -> Tensor:
    """Return our logits of tokens [B, S] without the padding of the vocabulary: [B, S, V]."""
    outputs = model(tokens.to(torch.cuda.current_device()))
    return outputs.logits()[..., :vocab_size].float()


@torch.no_grad()
def their_logits(loaded: NemotronHForCausalLM, tokens: Tensor) -> Tensor:
    """Return the logits of tokens [B, S]: [B, S, V] in float32."""
    return loaded(tokens.to(loaded.device), use_cache=False).logits.float()


def load_theirs(folder: Path, model: Model) -> NemotronHForCausalLM:
    """Load a folder in float32, from its files alone and without any code of its own.

    Args:
        folder: with config.json and safetensors files; checked before (`hf/read.py`).
        model: what its config.json says, the former spellings of keys included.

    Raises:
        UserError: if it cannot run the model.
    """
    if "E" in parse(model.pattern).main and model.moe.experts == 1:
        raise UserError(
            "transformers 5.23 cannot run a single expert (n_routed_experts is 1; "
            "modeling_nemotron_h.py 777): verify with logits=false compares the tensors"
        )
    config = NemotronHConfig.from_pretrained(folder, local_files_only=True)
    _mend(config, model)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    loaded = NemotronHForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True,
        trust_remote_code=False, use_safetensors=True, weights_only=True,
    )  # fmt: skip
    return loaded.eval()


def _mend(config: NemotronHConfig, model: Model) -> None:
    """Set what transformers 5.23 takes from a config otherwise than the released models' code.

    It limits Mamba's steps from below by time_step_min, which is a value of the initialisation
    (modeling_nemotron_h.py 414), and does not know attention_head_dim and rms_norm_eps.
    """
    if config.time_step_min > _NO_LIMIT:
        _log.info(
            "transformers limits Mamba's steps from below by time_step_min=%g; the released models "
            "do not, so the comparison is made without",
            config.time_step_min,
        )
        config.time_step_min = _NO_LIMIT
    config.head_dim, config.layer_norm_epsilon = model.attention.head_dim, model.norm_eps
