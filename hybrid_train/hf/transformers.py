"""Gateway to transformers: the logits of its NemotronH class for a folder."""

import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError

_NO_LIMIT = 1e-30  # its logarithm exists
_log = logging.getLogger(__name__)


def load(folder: Path, model: Model) -> NemotronHForCausalLM:
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


@torch.no_grad()
def logits(loaded: NemotronHForCausalLM, tokens: Tensor) -> Tensor:
    """Return the logits of tokens [B, S]: [B, S, V] in float32."""
    return loaded(tokens.to(loaded.device), use_cache=False).logits.float()
