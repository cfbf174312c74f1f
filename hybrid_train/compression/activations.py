"""What of a model is scored while it runs, all at once: norms, neurons, heads, experts, layers.

    hidden         outputs of each norm over the hidden axis; the scores of all norms are summed
    ffn, shared    inputs of the second linear
    heads          norm of the output of each head, before the output projection
    kv_groups      sum of the scores of the heads of a group
    ssm_heads      x slice of in_proj, before the convolution, [heads, head channels]
    latent         what the experts get
    experts        see `expert_scores`
    cosine         of a layer: 1 - cos of what goes in and what comes out, mean over tokens and rows

Sources: Minitron, arXiv:2407.14679 (norms, neurons, heads); Minitron-SSM, arXiv:2504.11409 (Mamba);
ShortGPT, arXiv:2403.03853 (cosine).

Dimensions: S tokens of a row on this rank, B rows of a microbatch, C elements on this rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, functional

from hybrid_train.anatomy.axes import Axis, dim, sizes_of
from hybrid_train.anatomy.kinds import Parameter, final_norm, mtp_block
from hybrid_train.anatomy.layers import Layer, block_prefix, layers, main_layers, mtp_blocks
from hybrid_train.compression.expert_scores import ExpertScores, Undo, expert_specs
from hybrid_train.compression.passes import counted_tokens
from hybrid_train.compression.ranking import HIDDEN, LAYERS, name_of
from hybrid_train.compression.scores import Ledger, Part, RowScores, Spec
from hybrid_train.data.batch import Batch
from hybrid_train.megatron.norms import norm_within
from hybrid_train.megatron.plain import layer_modules
from hybrid_train.model.edits import watch_input
from hybrid_train.schema import model as sections
from hybrid_train.schema.importance import ImportanceJob, LayerMetric, OverRows, OverTokens
from hybrid_train.schema.model import Model
from hybrid_train.schema.optimizer import ParameterKind
from hybrid_train.training.network import Network

_FUSED = "layer_norm_weight"  # of a norm that is part of the linear behind it
_COSINE = LAYERS + LayerMetric.cosine.value


def modules_of_layers(chunk: Any, model: Model) -> Iterator[tuple[Layer, Module]]:
    """Yield the layers that a chunk holds, those of MTP blocks behind the main ones."""
    known = {(one.depth, one.number): one for one in layers(model)}
    for depth, number, module in layer_modules(chunk):
        yield known[depth, number], module


def _is_norm(one: Parameter) -> bool:
    return one.dims == (dim(Axis.hidden),) and one.kind is ParameterKind.norms


def _inner_axes(layer: Layer) -> Iterator[tuple[Axis, tuple[int, ...]]]:
    """Yield the axes of a layer whose elements tokens of rows show, and the shape of the scores."""
    sizes = layer.sizes
    if layer.letter == sections.Mamba.letter:
        yield Axis.ssm_heads, (sizes.ssm_heads, sizes.ssm_head_dim)
    elif layer.letter == sections.Attention.letter:
        yield Axis.heads, (sizes.heads,)
    elif layer.letter == sections.Mlp.letter:
        yield Axis.ffn, (sizes.ffn,)
    else:
        if sizes.shared_ffn:
            yield Axis.shared_ffn, (sizes.shared_ffn,)
        if sizes.latent:
            yield Axis.latent, (sizes.latent,)


class Activations:
    """Listens to the layers of a network, and sums up what they show.

    Attributes:
        specs: what is summed up; the same on every process.
    """

    def __init__(self, network: Network, model: Model, settings: ImportanceJob) -> None:
        """Take the network and how it is scored.

        Args:
            network: frozen, on its layout.
            model: its sizes.
            settings: which aggregations, and how experts and layers are scored.
        """
        self._network, self._model, self._settings = network, model, settings
        self._norms = list(self._norm_names())
        self.specs = dict(self._specs())
        self._ledger = Ledger(self.specs, network.device)
        over = settings.over_tokens, settings.over_rows
        self._rows = RowScores(self._ledger, network.groups, *over)
        self._layers = RowScores(self._ledger, network.groups, OverTokens.mean, OverRows.mean)
        self._counted: Tensor | None = None

    def _norm_names(self) -> Iterator[str]:
        for layer in layers(self._model):
            if layer.depth == 0 or self._settings.mtp_norms:
                yield from (layer.prefix + one.name for one in layer.parameters if _is_norm(one))
        sizes = sizes_of(self._model)
        yield from (one.name for one in final_norm(sizes) if _is_norm(one))
        blocks = mtp_blocks(self._model) if self._settings.mtp_norms else 0
        for depth in range(1, blocks + 1):
            found = (one for one in mtp_block(sizes) if _is_norm(one))
            yield from (block_prefix(depth) + one.name for one in found)

    def _specs(self) -> Iterator[tuple[str, Spec]]:
        rows = self._settings.over_rows
        for name in self._norms:
            yield name, RowScores.spec((self._model.hidden_size,), rows)
        for layer in layers(self._model):
            for axis, shape in _inner_axes(layer):
                yield name_of(layer, axis), RowScores.spec(shape, rows)
            if layer.letter == sections.Moe.letter:
                yield from expert_specs(layer, self._settings.over_tokens).items()
        if LayerMetric.cosine in self._settings.layers:
            for layer in main_layers(self._model):
                yield f"{_COSINE}.{layer.number}", RowScores.spec((1,), OverRows.mean)

    def see(self, batch: Batch) -> None:
        """Say which microbatch the next pass is of."""
        self._counted = counted_tokens(batch)

    def close(self) -> None:
        """Add up what was seen since the last call; every process calls this after a schedule."""
        self._rows.close()
        self._layers.close()

    def collect(self) -> dict[str, Tensor]:
        """Return the scores as a ranking names them; every process calls this at the end.

        Raises:
            UserError: on all processes, if one is not finite.
        """
        found = self._ledger.collect()
        norms = [found.pop(name) for name in self._norms]
        scores = {HIDDEN: torch.stack(norms).sum(dim=0), **found}
        main = main_layers(self._model)
        if LayerMetric.cosine in self._settings.layers:
            cosines = [scores.pop(f"{_COSINE}.{one.number}") for one in main]
            scores[_COSINE] = torch.cat(cosines)
        for layer in layers(self._model):
            if layer.letter == sections.Attention.letter:
                of_heads = scores[name_of(layer, Axis.heads)]
                groups = of_heads.view(layer.sizes.kv_groups, -1).sum(dim=1)
                scores[name_of(layer, Axis.kv_groups)] = groups
        return scores

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to passes, each of a microbatch that `see` was told of."""
        with contextlib.ExitStack() as stack:
            for chunk in self._network.chunks:
                for undo in self._watch(chunk):
                    stack.callback(undo)
            yield

    def _watch(self, chunk: Any) -> Iterator[Undo]:
        yield from self._watch_norms(chunk)
        for layer, module in modules_of_layers(chunk, self._model):
            yield from self._watch_layer(layer, module)

    def _watch_norms(self, chunk: Any) -> Iterator[Undo]:
        held: dict[str, Module] = dict(chunk.named_modules())
        first = int(chunk.decoder.layers[0].layer_number) - 1 if len(chunk.decoder.layers) else 0
        for name in self._norms:
            path, _, leaf = name.rpartition(".")
            module = held.get(_on_this_stage(path, first))
            if module is None:
                continue
            part = self._repeated(name)
            if leaf == _FUSED:
                yield module.register_forward_pre_hook(self._see_fused_norm(part)).remove
            else:
                yield module.register_forward_hook(self._see_output(part)).remove

    def _watch_layer(self, layer: Layer, module: Any) -> Iterator[Undo]:
        held = dict(module.named_modules())
        inputs = {
            Axis.heads: "self_attention.linear_proj",
            Axis.ffn: "mlp.linear_fc2",
            Axis.shared_ffn: "mlp.shared_experts.linear_fc2",
        }
        for axis, shape in _inner_axes(layer):
            part = self._split(name_of(layer, axis), shape[0])
            if axis is Axis.ssm_heads:
                yield module.mixer.in_proj.register_forward_hook(self._see_x(part, layer)).remove
            elif axis is Axis.latent:
                part = self._repeated(part.name)
                yield module.mlp.fc1_latent_proj.register_forward_hook(
                    self._see_output(part)
                ).remove
            else:
                yield watch_input(held[inputs[axis]], self._see_input(part, layer, axis))
        if layer.letter == sections.Moe.letter:
            yield from self._experts(layer, module.mlp).watch()
        if layer.depth == 0 and LayerMetric.cosine in self._settings.layers:
            part = self._repeated(f"{_COSINE}.{layer.number}")
            yield module.register_forward_hook(self._see_layer(part), with_kwargs=True).remove

    def _experts(self, layer: Layer, mlp: Module) -> ExpertScores:
        return ExpertScores(
            layer, mlp, self._ledger, self._network.groups, over=self._settings.over_tokens,
            metric=self._settings.experts, counted=self._now,
        )  # fmt: skip

    def _now(self) -> Tensor:
        assert self._counted is not None, "nobody said which microbatch runs"
        return self._counted

    def _repeated(self, name: str) -> Part:
        """Return the part of what all tensor ranks have alike."""
        groups = self._network.groups
        tells = groups.tp.rank() == 0 and groups.cp.rank() == 0
        return Part(name, speaks=tells, tells_counts=tells)

    def _split(self, name: str, elements: int) -> Part:
        """Return the part of what tensor ranks divide among them."""
        groups = self._network.groups
        number, first = elements // groups.tp.size(), groups.cp.rank() == 0
        own = slice(groups.tp.rank() * number, (groups.tp.rank() + 1) * number)
        return Part(name, (own,), (...,), first, first and groups.tp.rank() == 0)

    def _see_fused_norm(self, part: Part) -> Callable[..., None]:
        def see(linear: Any, arguments: tuple[Any, ...]) -> None:
            self._rows.see(part, norm_within(linear, arguments[0].float()), self._now())

        return see

    def _see_output(self, part: Part) -> Callable[..., None]:
        def see(_: Module, __: Any, output: Any) -> None:
            self._rows.see(part, _first(output), self._now())

        return see

    def _see_x(self, part: Part, layer: Layer) -> Callable[..., None]:
        inner = layer.sizes.ssm_heads * layer.sizes.ssm_head_dim // self._network.groups.tp.size()

        def see(_: Module, __: Any, output: Any) -> None:
            self._rows.see(part, _first(output)[..., inner : 2 * inner], self._now())

        return see

    def _see_input(self, part: Part, layer: Layer, axis: Axis) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            if axis is Axis.heads:
                heads = x.float().unflatten(-1, (-1, layer.sizes.head_dim))
                x = torch.linalg.vector_norm(heads, dim=-1)
            self._rows.see(part, x, self._now())

        return see

    def _see_layer(self, part: Part) -> Callable[..., None]:
        def see(_: Module, arguments: Any, named: Mapping[str, Any], output: Any) -> None:
            given = named["hidden_states"] if "hidden_states" in named else arguments[0]
            before, after = (
                functional.normalize(one.float(), dim=-1) for one in (given, _first(output))
            )
            # 1 - cos, without the difference of two numbers near 1.
            apart = (before - after).square().sum(dim=-1, keepdim=True) / 2
            self._layers.see(part, apart, self._now())

        return see


def _first(output: Any) -> Tensor:
    """Return the tensor that a module makes: alone, or with a bias or a context."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _on_this_stage(path: str, first: int) -> str:
    """Return the path of a module in a chunk whose layers begin behind `first` others."""
    words = path.split(".")
    if words[:2] == ["decoder", "layers"]:
        words[2] = str(int(words[2]) - first)
    return ".".join(words)
