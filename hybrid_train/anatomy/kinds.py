"""What each kind of layer consists of: one class a kind, with a list of its parameters.

Everything that has to know the tensors of a layer is a loop over these lists: counts, FLOPs,
memory, sizes of GEMMs, parameter groups, first values, formats, rules of divisibility, names in
checkpoints. A new kind of layer is a class here and a line in `KINDS`.
"""

import enum
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from hybrid_train.anatomy.axes import Axis, Dim, Part, Sizes, dim, width
from hybrid_train.schema import model as sections
from hybrid_train.schema.optimizer import ParameterKind
from hybrid_train.schema.parallel import RecomputeModule

CONV_WIDTH = 4  # taps of the causal convolution in a Mamba layer; the same in the whole family


class Draw(enum.Enum):
    """How the first values of a tensor are drawn; `model/build.py` has the formulas."""

    normal = enum.auto()
    residual = enum.auto()  # normal, smaller by the root of the number of layers
    ones = enum.auto()
    taps = enum.auto()
    tap_biases = enum.auto()
    decay_rates = enum.auto()
    step_sizes = enum.auto()
    zeros = enum.auto()


@dataclass(frozen=True)
class Parameter:
    """One tensor of a layer.

    Attributes:
        name: in the module of the layer; the tensors of experts have a number behind it.
        dims: its dimensions; of one expert, where it is one of experts.
        key: in a checkpoint, below the layer; its parts, if the first dimension has several, are
            stored apart unless they alternate.
        split: the dimension that tensor ranks divide among them; None: each has all of it.
        of_experts: whether each expert has one, numbered in checkpoints by a first axis.
        linear: the kind of linear layer it is the weight of, "mamba.in_proj".
        kind: by which weight decay is chosen; None for matrices inside the layers.
        draw: how it begins.
        float32: whether it stays in float32 in a model of another format.
        buffer: whether it has no gradient.
        counts: whether it counts as a parameter.
    """

    name: str
    dims: tuple[Dim, ...]
    key: str = ""
    split: int | None = None
    of_experts: bool = False
    linear: str = ""
    kind: ParameterKind | None = None
    draw: Draw = Draw.normal
    float32: bool = False
    buffer: bool = False
    counts: bool = True

    @property
    def stored(self) -> str:
        """Its key in a checkpoint, below the layer."""
        return self.key or self.name

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of the tensor; of one expert, where it is one of experts."""
        return tuple(one.size(sizes) for one in self.dims)

    def elements(self, sizes: Sizes) -> int:
        """Count the elements, of all experts."""
        return math.prod(self.shape(sizes)) * (sizes.experts if self.of_experts else 1)

    def tensors(self, sizes: Sizes) -> int:
        """Count the tensors of the published layout, where parts stand apart that are one here."""
        parts = 1 if self.dims[0].apart else len(self.dims[0].parts)
        return parts * (sizes.experts if self.of_experts else 1)


def norm(name: str, sizes: Sizes) -> tuple[Parameter, ...]:
    """Return the tensors of a norm of hidden states; LayerNorm's weight is stored minus 1."""
    dims, draw = (dim(Axis.hidden),), Draw.zeros if sizes.norm_bias else Draw.ones
    weight = Parameter(name, dims, kind=ParameterKind.norms, draw=draw)
    if not sizes.norm_bias:
        return (weight,)
    bias = name.removesuffix("weight") + "bias"
    return weight, Parameter(bias, dims, kind=ParameterKind.biases, draw=Draw.zeros)


class LayerKind:
    """A kind of layer; what is not said holds for most.

    Attributes:
        letter: in the pattern.
        groups: axes whose elements share those of another: (groups, heads).
        context: heads and groups that context ranks divide among them, if they divide any.
    """

    letter: ClassVar[str]
    groups: ClassVar[tuple[Axis, Axis] | None] = None
    context: ClassVar[tuple[Axis, Axis] | None] = None

    def parameters(self, sizes: Sizes) -> tuple[Parameter, ...]:
        """List the tensors of a layer, its norm first."""
        raise NotImplementedError

    def recomputed(self, sizes: Sizes) -> tuple[RecomputeModule, ...]:
        """Return the modules whose activations can be computed again."""
        del sizes
        return ()

    def flops_beside_weights(self, sizes: Sizes, sequence_length: int) -> int:
        """Count the forward operations of a token that no weight takes part in."""
        del sizes, sequence_length
        return 0

    def cached_per_token(self, sizes: Sizes) -> int:
        """Count the elements that generation keeps of each token."""
        del sizes
        return 0

    def cached_states(self, sizes: Sizes) -> tuple[int, int]:
        """Count the elements kept per sequence: states, and last inputs of a convolution."""
        del sizes
        return 0, 0


class MambaKind(LayerKind):
    """M: in_proj holds z, x, B, C and dt; x, B and C pass a convolution, then the scan."""

    letter = sections.Mamba.letter
    groups = (Axis.ssm_groups, Axis.ssm_heads)
    context = (Axis.ssm_heads, Axis.ssm_groups)
    inner: ClassVar = (Axis.ssm_heads, Axis.ssm_head_dim)
    state: ClassVar = (Axis.ssm_groups, Axis.ssm_state)
    channels: ClassVar = Dim((Part(inner, "x"), Part(state, "B"), Part(state, "C")), apart=True)
    packed: ClassVar = Dim(
        (Part(inner, "z"), *channels.parts, Part((Axis.ssm_heads,), "dt")),
        words="the rows of mamba.in_proj",
        apart=True,
    )

    def parameters(self, sizes: Sizes) -> tuple[Parameter, ...]:
        def of_heads(name: str, kind: ParameterKind, draw: Draw) -> Parameter:
            dims = (dim(Axis.ssm_heads),)
            return Parameter(f"mixer.{name}", dims, split=0, kind=kind, draw=draw, float32=True)

        return (
            *norm("mixer.in_proj.layer_norm_weight", sizes),
            Parameter(
                "mixer.in_proj.weight", (self.packed, dim(Axis.hidden)), split=0,
                linear="mamba.in_proj",
            ),
            Parameter(
                "mixer.conv1d_weight", (self.channels, width(1), width(CONV_WIDTH)),
                key="mixer.conv1d.weight", split=0, kind=ParameterKind.convolutions,
                draw=Draw.taps,
            ),
            Parameter(
                "mixer.conv1d_bias", (self.channels,), key="mixer.conv1d.bias", split=0,
                kind=ParameterKind.biases, draw=Draw.tap_biases,
            ),
            of_heads("A_log", ParameterKind.A_log, Draw.decay_rates),
            of_heads("D", ParameterKind.D, Draw.ones),
            of_heads("dt_bias", ParameterKind.dt_bias, Draw.step_sizes),
            Parameter(
                "mixer.norm.weight", (dim(*self.inner),), split=0, kind=ParameterKind.norms,
                draw=Draw.ones,
            ),
            Parameter(
                "mixer.out_proj.weight", (dim(Axis.hidden), dim(*self.inner)), split=1,
                linear="mamba.out_proj", draw=Draw.residual,
            ),
        )  # fmt: skip

    def recomputed(self, sizes: Sizes) -> tuple[RecomputeModule, ...]:
        del sizes
        return (RecomputeModule.mamba,)

    def flops_beside_weights(self, sizes: Sizes, sequence_length: int) -> int:
        """Count the recurrence.

        It costs two products of N x P per head and token: dt B x^T into the state and C out of it,
        4 H N P in all. A chunked scan of length Q does about Q (G N + H P) more; that is the price
        of an algorithm, which changes with Q while the result does not, so it is not counted as
        work of the model.

        Figures published for this family come from Megatron-LM's counter, which takes D = 2h and
        7 D N for the scan. They agree with ours within 1% where D = 2h, and are 8% higher for
        Nano 3 30B, where D = 1.5h.
        """
        del sequence_length  # linear in it
        return 4 * self.cached_states(sizes)[0]

    def cached_states(self, sizes: Sizes) -> tuple[int, int]:
        states = sizes.ssm_heads * sizes.ssm_head_dim * sizes.ssm_state
        return states, CONV_WIDTH * self.channels.size(sizes)


class AttentionKind(LayerKind):
    """*: grouped queries; each group holds its queries, then its key, then its value."""

    letter = sections.Attention.letter
    groups = (Axis.kv_groups, Axis.heads)
    packed: ClassVar = Dim(
        (
            Part((Axis.heads, Axis.head_dim), "q"),
            Part((Axis.kv_groups, Axis.head_dim), "k"),
            Part((Axis.kv_groups, Axis.head_dim), "v"),
        ),
        by=Axis.kv_groups,
        free=Axis.head_dim,
        words="the rows of queries, keys and values",
    )
    inner: ClassVar = dim(Axis.heads, Axis.head_dim, free=Axis.head_dim)

    def parameters(self, sizes: Sizes) -> tuple[Parameter, ...]:
        bias = Parameter(
            "self_attention.linear_qkv.bias", (self.packed,), split=0, kind=ParameterKind.biases,
            draw=Draw.zeros,
        )  # fmt: skip
        of_heads = tuple(
            Parameter(
                f"self_attention.{name}_layernorm.weight", (dim(Axis.head_dim),),
                kind=ParameterKind.norms, draw=Draw.ones,
            )
            for name in "qk"
        )  # fmt: skip
        return (
            *norm("self_attention.linear_qkv.layer_norm_weight", sizes),
            Parameter(
                "self_attention.linear_qkv.weight", (self.packed, dim(Axis.hidden)), split=0,
                linear="attention.qkv",
            ),
            *((bias,) if sizes.qkv_bias else ()),
            *(of_heads if sizes.qk_norm else ()),
            Parameter(
                "self_attention.linear_proj.weight", (dim(Axis.hidden), self.inner), split=1,
                linear="attention.proj", draw=Draw.residual,
            ),
        )  # fmt: skip

    def recomputed(self, sizes: Sizes) -> tuple[RecomputeModule, ...]:
        del sizes
        return (RecomputeModule.core_attn,)

    def flops_beside_weights(self, sizes: Sizes, sequence_length: int) -> int:
        """Count two products per key seen: with the query, and with the value.

        A causal token t sees t keys, (L + 1) / 2 on average; D = heads * head_dim:
        2 * 2 * D * (L + 1) / 2.
        """
        return 2 * self.inner.size(sizes) * (sequence_length + 1)

    def cached_per_token(self, sizes: Sizes) -> int:
        return sum(part.size(sizes) for part in self.packed.parts if part.name != "q")


def _up_and_down(
    module: str, kind: str, outer: Axis, inner: Axis, *, gated: int = 0
) -> tuple[Parameter, ...]:
    """Return the weights of down(act(up(x))), or of down(act(gate(x)) * up(x)).

    Gates and neurons are one matrix, the gates first; core's checkpoints have it whole.
    """
    experts = kind == "moe.experts"
    neurons = (Part((inner,), "gate"), Part((inner,), "up")) if gated else (Part((inner,)),)

    def key(number: int) -> str:  # Transformer Engine's name of the tensor that has all experts
        return f"{module}.experts.linear_fc{number}.weight" if experts else ""

    return (
        Parameter(
            f"{module}.linear_fc1.weight", (Dim(neurons), dim(outer)), key(1), split=0,
            of_experts=experts, linear=f"{kind}.fc1",
        ),
        Parameter(
            f"{module}.linear_fc2.weight", (dim(outer), dim(inner)), key(2), split=1,
            of_experts=experts, linear=f"{kind}.fc2", draw=Draw.residual,
        ),
    )  # fmt: skip


class MlpKind(LayerKind):
    """-: up and down projection, with a gate where the model has gates."""

    letter = sections.Mlp.letter

    def parameters(self, sizes: Sizes) -> tuple[Parameter, ...]:
        return (
            *norm("mlp.linear_fc1.layer_norm_weight", sizes),
            *_up_and_down("mlp", "mlp", Axis.hidden, Axis.ffn, gated=sizes.gated),
        )

    def recomputed(self, sizes: Sizes) -> tuple[RecomputeModule, ...]:
        del sizes
        return (RecomputeModule.mlp,)


class ExpertsKind(LayerKind):
    """E: router, experts, and if there are such a shared expert and latent projections."""

    letter = sections.Moe.letter

    def parameters(self, sizes: Sizes) -> tuple[Parameter, ...]:
        experts, shared = "mlp.experts", "mlp.shared_experts"
        work, hidden = Axis.latent if sizes.latent else Axis.hidden, Axis.hidden
        down = Parameter(
            "mlp.fc1_latent_proj.weight", (dim(work), dim(hidden)), linear="moe.latent.down"
        )
        up = Parameter(
            "mlp.fc2_latent_proj.weight", (dim(hidden), dim(work)), linear="moe.latent.up",
            draw=Draw.residual,
        )  # fmt: skip
        return (
            *norm("pre_mlp_layernorm.weight", sizes),
            Parameter(
                "mlp.router.weight", (dim(Axis.experts), dim(hidden)), kind=ParameterKind.routers
            ),
            Parameter(
                "mlp.router.expert_bias", (dim(Axis.experts),), draw=Draw.zeros, float32=True,
                buffer=True, counts=bool(sizes.moves_bias),
            ),
            *((down,) if sizes.latent else ()),
            *_up_and_down(experts, "moe.experts", work, Axis.expert_ffn),
            *((up,) if sizes.latent else ()),
            *(_up_and_down(shared, "moe.shared", hidden, Axis.shared_ffn) * bool(sizes.shared_ffn)),
        )  # fmt: skip

    def recomputed(self, sizes: Sizes) -> tuple[RecomputeModule, ...]:
        shared = (RecomputeModule.shared_experts,) if sizes.shared_ffn else ()
        return (RecomputeModule.layernorm, RecomputeModule.moe, RecomputeModule.moe_act, *shared)


KINDS: dict[str, LayerKind] = {
    kind.letter: kind for kind in (AttentionKind(), MambaKind(), MlpKind(), ExpertsKind())
}

# What can be chosen from within a layer of each kind; of all layers together the hidden channels.
# States and groups of the scan, the taps of its convolution and the size of an attention head stay.
CHOSEN: dict[str, tuple[Axis, ...]] = {
    sections.Mamba.letter: (Axis.ssm_head_dim, Axis.ssm_heads),
    sections.Attention.letter: (Axis.kv_groups, Axis.heads),
    sections.Mlp.letter: (Axis.ffn,),
    sections.Moe.letter: (Axis.experts, Axis.expert_ffn, Axis.shared_ffn, Axis.latent),
}

_VOCABULARY = (dim(Axis.vocab), dim(Axis.hidden))
EMBEDDING = Parameter(
    "embedding.word_embeddings.weight", _VOCABULARY, split=0, kind=ParameterKind.embeddings
)
HEAD = Parameter("output_layer.weight", _VOCABULARY, split=0, kind=ParameterKind.heads)
MTP_PROJECTION = "mtp.eh_proj"  # joins the token and the hidden state of a depth
_EVERY_PART = Sizes(**dict.fromkeys(Sizes._fields, 1))


def final_norm(sizes: Sizes) -> tuple[Parameter, ...]:
    """Return the tensors of the norm behind the last layer."""
    return norm("decoder.final_norm.weight", sizes)


@lru_cache(maxsize=1024)
def mtp_block(sizes: Sizes) -> tuple[Parameter, ...]:
    """Return the tensors that an MTP block has beside its layers; its last norm comes last."""
    return (
        *norm("enorm.weight", sizes),
        *norm("hnorm.weight", sizes),
        Parameter(
            "eh_proj.weight", (dim(Axis.hidden), dim(Axis.hidden, times=2)), split=0,
            linear=MTP_PROJECTION,
        ),
        *norm("final_layernorm.weight", sizes),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def parameters_of(letter: str, sizes: Sizes) -> tuple[Parameter, ...]:
    """List the tensors of a layer of one kind."""
    return KINDS[letter].parameters(sizes)


@lru_cache(maxsize=1024)
def weight_of(linear: str, sizes: Sizes) -> Parameter:
    """Return the weight of a kind of linear layer, "mamba.in_proj"."""
    found = (*mtp_block(sizes), *(one for letter in KINDS for one in parameters_of(letter, sizes)))
    return next(one for one in found if one.linear == linear)


def possible_parameters() -> list[Parameter]:
    """List every tensor that a layer of any kind can have; main layers or an MTP block's."""
    return [one for letter in KINDS for one in parameters_of(letter, _EVERY_PART)]


def outer_parameters() -> tuple[Parameter, ...]:
    """List the tensors that are in no layer."""
    return EMBEDDING, *final_norm(_EVERY_PART), HEAD, *mtp_block(_EVERY_PART)
