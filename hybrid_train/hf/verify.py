"""Compares logits position by position: ours and those of transformers (its gateway).

Our logits are computed by Megatron, which is imported here, so the process must have been started
before (`runtime/start.py`); theirs by the class of transformers that the family names.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hybrid_train.hf import config_json
from hybrid_train.hf.rope_keys import FRACTIONS, renamed
from hybrid_train.megatron.hybrid import Hybrid
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError

_NO_LIMIT = 1e-30  # its logarithm exists
_log = logging.getLogger(__name__)


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
def their_logits(loaded: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the logits of tokens [B, S]: [B, S, V] in float32."""
    return loaded(tokens.to(loaded.device), use_cache=False).logits.float()


def load_theirs(folder: Path, model: Model) -> PreTrainedModel:
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
    said = config_json.read_config(folder)
    family = config_json.family_of(said)
    if not family.has_class:
        raise UserError(
            f"transformers has no class for {family.model_type}: verify with logits=false compares "
            "the tensors"
        )
    kind = getattr(transformers, family.architecture)
    if family.model_type == config_json.NEMOTRON_H.model_type:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        _mend(config, model)
    else:
        config = kind.config_class.from_dict(_known(said, model))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    loaded: PreTrainedModel = kind.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True,
        trust_remote_code=False, use_safetensors=True, weights_only=True,
    )  # fmt: skip
    return loaded.eval()


def _mend(config: PreTrainedConfig, model: Model) -> None:
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


def _known(said: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Return a config of a dense family by keys that transformers 5.23 knows.

    It does not know kv_channels and rope_percent, reads "su" too late, and NemotronConfig leaves
    null KV heads as they are.
    """
    attention = model.attention
    sizes = {"head_dim": attention.head_dim, "num_key_value_heads": attention.kv_heads}
    return {FRACTIONS[0]: attention.rope.fraction, **renamed(said), **sizes}
