"""How a model reads a window of new tokens: the arithmetic of its layers, bound to the weights.

Core's layers are ready for what generation never has, as gradients, dropout, offload, and norms
that are not there: of a small model a token costs more in that than in its GEMMs. Here a layer is a
function of its weights. What is more than a GEMM or a norm, as a linear that is split over tensor
ranks, quantized, or Transformer Engine's, is asked as core asks it.

Dimensions: R rows, B rows of a pass, W tokens of its window, T = B * W tokens, those of a row one
after the other; H hidden, V vocabulary with its padding, k experts of a token.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.fp4_utils import get_fp4_context
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.nn import Module, functional

from hybrid_train.megatron import norms, plain
from hybrid_train.megatron.hybrid import Hybrid, is_skipped
from hybrid_train.megatron.mamba import MambaMixer
from hybrid_train.megatron.norms import norm_within
from hybrid_train.megatron.row_cache import AttentionPast, MambaPast, RowCache, Window
from hybrid_train.ops.experts import chosen_experts
from hybrid_train.ops.norm import rms_norm
from hybrid_train.ops.rope import turn
from hybrid_train.schema.problems import UserError

Map = Callable[[Tensor], Tensor]
Part = Callable[[Tensor, Window], Tensor]


class ChunkPass:
    """The chunk of a model that a pipeline stage holds, with the past of R rows."""

    def __init__(self, chunk: Hybrid, rows: int) -> None:
        """Bind the weights, which do not change meanwhile.

        Args:
            chunk: in eval mode.
            rows: R, all empty.
        """
        self.cache = RowCache(chunk.decoder, rows, chunk.rope)
        self._embed = _embedding(chunk) if chunk.pre_process else None
        self._stack = _stack(chunk.decoder, self.cache)

    def __call__(self, given: Tensor) -> Tensor:
        """Read the window that the cache has open.

        Args:
            given: on the first stage tokens, [B, W]; else what the stage before made of them.

        Returns:
            Hidden states, [B, W, H]; those of the last stage are behind the final norm.
        """
        batch, width = given.shape[:2]
        x = given.flatten(0, 1) if self._embed is None else self._embed(given)
        return self._stack(x).view(batch, width, -1)


class DraftPass:
    """The first MTP block of a model, with a past of its own of R rows."""

    def __init__(self, chunk: Hybrid, rows: int) -> None:
        """Bind the weights, see `ChunkPass`; the chunk is one of the last stage."""
        block: Any = chunk.mtp.layers[0]
        self.cache = RowCache(block, rows, chunk.rope)
        self._embed = _embedding(chunk)
        self._join = _join(block)
        self._stack = _stack(block.mtp_model_layer, self.cache)
        self._norm = _norm(block.final_layernorm)

    def __call__(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Read the window that the cache has open.

        Args:
            hidden: of the token before each, as the final norm or this block gave it, [B, W, H].
            tokens: the ones behind those, [B, W].

        Returns:
            Hidden states of which the head makes logits of the tokens thereafter, [B, W, H].
        """
        joined = self._join(self._embed(tokens), hidden.flatten(0, 1))
        return self._norm(self._stack(joined)).view(hidden.shape)


def bound_head(chunk: Hybrid) -> Map:
    """Return the map of hidden states [B, W, H] to logits [B, W, V]; on the last stage."""
    head = chunk.head()
    weight = plain.bare_weight(head.layer, head.tied_weight)
    if weight is not None:
        return partial(torch.matmul, other=weight.t())
    return lambda hidden: head.logits(hidden.transpose(0, 1))


def _stack(stack: Any, cache: RowCache) -> Map:
    """Return a stack as a map of [T, H], reading the window that its cache has open."""
    layers = [layer for layer in stack.layers if not is_skipped(layer)]
    parts = [(_part(layer, cache), _formats_of(layer)) for layer in layers]
    around = _formats_of(stack)
    end = _norm(stack.final_norm) if stack.post_process and stack.post_layer_norm else None

    def run(x: Tensor) -> Tensor:
        window = cache.window
        assert window is not None, "no pass has begun"
        with around():
            for part, formats in parts:
                with formats():
                    x = x + part(x, window)
        return x if end is None else end(x)

    return run


def _formats_of(module: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Return the context in which Transformer Engine multiplies as a stack or layer is to.

    Delayed scaling has one around the stack, any other format one for each layer, as in core's
    stack (hybrid_block.py 327).
    """
    config, number = module.config, getattr(module, "layer_number", None)
    if config.fp8 and (config.fp8_recipe == Fp8Recipe.delayed) == (number is None):
        return partial(get_fp8_context, config, *(() if number is None else (number - 1,)))
    if config.fp4 and number is not None:
        return partial(get_fp4_context, config, number - 1)
    return nullcontext


def _part(layer: Any, cache: RowCache) -> Part:
    """Return what a layer adds to [T, H].

    Raises:
        UserError: for a layer of a kind that is not known here.
    """
    part: Part
    if isinstance(layer, MambaLayer):
        part = _mixer(layer.mixer, cache.of(layer.mixer))
    elif isinstance(layer.self_attention, SelfAttention):
        part = _attention(layer.self_attention, cache.of(layer.self_attention))
    else:
        norm, inner = _norm(layer.pre_mlp_layernorm), _of_tokens(layer.mlp)

        def part(x: Tensor, _: Window) -> Tensor:
            return inner(norm(x))

    return part


def _mixer(mixer: MambaMixer, past: MambaPast) -> Part:
    into, out, norm = _linear(mixer.in_proj), _linear(mixer.out_proj), mixer.norm
    return lambda x, window: out(norm(past.read(into(x), window)))


def _attention(attention: SelfAttention, past: AttentionPast) -> Part:
    groups, width = past.keys.shape[1], past.keys.shape[3]
    into, out = _linear(attention.linear_qkv), _linear(attention.linear_proj)
    is_cut = plain.bare_weight(attention.linear_qkv) is not None
    has_norms = attention.q_layernorm is not None
    of_query, of_key = attention.q_layernorm, attention.k_layernorm

    def part(x: Tensor, window: Window) -> Tensor:
        if is_cut:
            by_group = into(x).view(len(x), groups, -1, width)
            query, key, value = by_group.split((by_group.shape[2] - 2, 1, 1), dim=2)
            if has_norms:
                query, key = of_query(query), of_key(key)
        else:
            query, key, value = attention.get_query_key_value_tensors(x[:, None], None)
        if window.turning is not None:
            query, key = turn(query, *window.turning), turn(key, *window.turning)
        return out(past.attend(query, key, value, window))

    return part


def _of_tokens(module: Module) -> Map:
    """Return the map of a part that treats each token by itself."""
    if isinstance(module, MoELayer):
        return _experts(module)
    if isinstance(module, MLP):
        return _mlp(module)
    raise UserError(
        f"generation does not know how a layer with {type(module).__name__} reads tokens behind "
        "others: say it in hybrid_train/megatron/window_pass.py (docs/adding.md)"
    )


def _mlp(mlp: MLP) -> Map:
    up, down, activation = _linear(mlp.linear_fc1), _linear(mlp.linear_fc2), mlp.activation_func
    if not mlp.config.gated_linear_unit:
        return lambda x: down(activation(up(x)))

    def gated(x: Tensor) -> Tensor:
        gate, neurons = up(x).chunk(2, dim=-1)
        return down(activation(gate).mul_(neurons))

    return gated


def _experts(layer: MoELayer) -> Map:
    """Return the map of an expert layer: by lists, where all experts are here as plain weights.

    Core's dispatcher makes lists for other ranks, which cost a token more than its experts do.
    """
    is_whole = layer.ep_group.size() == 1 and layer.config.expert_tensor_parallel_size == 1
    weights = plain.bare_experts(layer.experts)
    if weights is None or not is_whole or layer.shared_expert_overlap:
        return lambda x: layer(x[:, None])[0].squeeze(1)
    ups, downs = ([weight.t() for weight in one] for one in weights)
    has_latent = layer.config.moe_latent_size is not None
    into = _linear(layer.fc1_latent_proj) if has_latent else None
    out = _linear(layer.fc2_latent_proj) if has_latent else None
    shared = None if layer.shared_experts is None else _mlp(layer.shared_experts)
    choose = layer.router.as_lists

    def run(x: Tensor) -> Tensor:
        probs, chosen = choose(x)
        y = chosen_experts(x if into is None else into(x), ups, downs, chosen, probs)
        if out is not None:
            y = out(y)
        return y if shared is None else y + shared(x)

    return run


def _join(block: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return how an MTP block makes one [T, H] of embeddings and hidden states, [T, H] each."""
    if plain.bare_weight(block.eh_proj) is None:
        formats = partial(get_fp8_context, block.config) if block.config.fp8 else nullcontext

        def core(embedded: Tensor, hidden: Tensor) -> Tensor:
            with formats():
                joined: Tensor = block._concat_embeddings(hidden[:, None], embedded[:, None])
            return joined.squeeze(1)

        return core
    of_tokens, of_states, project = _norm(block.enorm), _norm(block.hnorm), _linear(block.eh_proj)
    return lambda embedded, hidden: project(
        torch.cat((of_tokens(embedded), of_states(hidden)), dim=-1)
    )


def _embedding(chunk: Hybrid) -> Map:
    """Return the map of tokens [B, W] to embeddings [T, H]."""
    words = chunk.embedding.word_embeddings
    if words.tp_group.size() > 1 or chunk.channels is not None:
        return lambda tokens: chunk.embed(tokens).transpose(0, 1).flatten(0, 1)
    weight = words.weight
    return lambda tokens: functional.embedding(tokens.flatten(), weight)


def _linear(module: Module) -> Map:
    """Return the map of a linear layer, [T, I] to [T, O], and of the norm that is in it."""
    weight = plain.bare_weight(module)
    if weight is None:
        return lambda x: module(x[:, None])[0].squeeze(1)
    matrix, bias = weight.t(), getattr(module, "bias", None)
    if bias is not None:
        into = partial(norm_within, module) if isinstance(module, plain.NormColumnLinear) else None
        return lambda x: torch.addmm(bias, x if into is None else into(x), matrix)
    if type(module) is plain.NormColumnLinear:
        scale, eps = module.layer_norm_weight, module.config.layernorm_epsilon
        channels = module.channels
        return lambda x: torch.mm(rms_norm(x, scale, eps, channels), matrix)
    if isinstance(module, plain.NormColumnLinear):
        return lambda x: torch.mm(norm_within(module, x), matrix)
    return lambda x: torch.mm(x, matrix)


def _norm(module: Module) -> Map:
    if isinstance(module, IdentityOp):
        return lambda x: x
    if type(module) is norms.Norm:
        return partial(rms_norm, weight=module.weight, eps=module.eps, channels=module.channels)
    return lambda x: module(x[:, None]).squeeze(1)
