"""Rules about the model by itself: its pattern, sizes of single layers, positions, gates and norms.

Where a comment names a file, it is one of Megatron-Core 0.19.2.
"""

from collections.abc import Iterator

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import distinct, layers
from hybrid_train.schema.data import Packing
from hybrid_train.schema.job_roots import CountJob
from hybrid_train.schema.layer_ranges import layers_of
from hybrid_train.schema.model import SECTIONS, Activation, NormKind, RopeScaling
from hybrid_train.schema.pattern import parse, repair
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob

_ROPE = "model.attention.rope"


def pattern_is_legal(job: TrainJob, _: int) -> Iterator[Problem]:
    """The pattern can be read."""
    try:
        parse(job.model.pattern)
    except ValueError as error:
        yield Problem("model.pattern", job.model.pattern, str(error), repair(job.model.pattern))


def layer_rules_decide(job: TrainJob | CountJob, _: int) -> Iterator[Problem]:
    """Every rule of `model.layers` gives sizes to layers that no earlier one has sizes for."""
    rules, found = job.model.layers, layers(job.model)
    for number, rule in enumerate(rules):
        path = f"model.layers.{number}"
        if not rule.given:
            yield Problem(path, str(rule), "gives no size")
        elif not any(layer.rule == number for layer in found):
            kinds = {name.partition(".")[0] for name in rule.given}
            within = layers_of(rule.layers, len(parse(job.model.pattern).main))
            there = any(
                layer.number in within and SECTIONS[layer.letter] in kinds
                for layer in found
                if layer.depth == 0
            )
            words = "decides nothing: earlier rules cover all of it" if there else ""
            yield Problem(path, str(rule), words or "matches no layer with such sizes")
    for layer in distinct(job.model):
        if layer.rule is not None and layer.sizes.top_k > layer.sizes.experts > 0:
            path = f"model.layers.{layer.rule}.{Axis.experts.value}"
            yield Problem(path, layer.sizes.experts, "must not be below model.moe.top_k")


def _gates_are_of_all_layers(job: TrainJob | CountJob, _: int) -> Iterator[Problem]:
    # One flag and one function for MLPs and experts (transformer_config.py, gated_linear_unit).
    if "E" not in job.model.pattern:
        return
    mlp, rule = job.model.mlp, "beside expert layers (E), for which Megatron-Core has the same flag"
    if mlp.gated:
        yield Problem("model.mlp.gated", True, f"must be false {rule}", "false")
    if mlp.activation is not Activation.squared_relu:
        wanted = Activation.squared_relu.value
        yield Problem(
            "model.mlp.activation", mlp.activation.value, f"must be {wanted} {rule}", wanted
        )


def _heads_have_one_norm(job: TrainJob | CountJob, _: int) -> Iterator[Problem]:
    # Core takes the kind of the norm of hidden states for that of heads, too.
    model = job.model
    if "*" in model.pattern and model.attention.qk_norm and model.norm is NormKind.layer_1p:
        rule = "needs model.norm=rms: no model has another norm of its heads"
        yield Problem("model.attention.qk_norm", True, rule, "false")


def _positions_have_attention(job: TrainJob | CountJob, _: int) -> Iterator[Problem]:
    theta = job.model.attention.rope.theta
    if theta is not None and "*" not in job.model.pattern:
        rule = "turns queries and keys, and the pattern has no attention layers (*)"
        yield Problem(f"{_ROPE}.theta", theta, rule, "null")


def _channels_turn_in_pairs(job: TrainJob | CountJob, _: int) -> Iterator[Problem]:
    attention = job.model.attention
    rope, size = attention.rope, attention.head_dim
    turned = rope.turned(size)
    if rope.theta is None or "*" not in job.model.pattern or (turned and not turned % 2):
        return
    rule = f"turns {turned} of the {size} channels of a head; must turn an even number of them"
    legal = [even / size for even in range(2, size + 1, 2) if int(even / size * size) == even]
    nearest = min(legal, key=lambda share: abs(share - rope.fraction), default=None)
    yield Problem(
        f"{_ROPE}.fraction", rope.fraction, rule, nearest, beside=("model.attention.head_dim",)
    )


def _factors_are_of_pairs(job: TrainJob | CountJob, _: int) -> Iterator[Problem]:
    attention = job.model.attention
    rope, pairs = attention.rope, attention.rope.turned(attention.head_dim) // 2
    if rope.scaling is not RopeScaling.longrope or "*" not in job.model.pattern:
        return
    for name in ("short_factors", "long_factors"):
        number = len(getattr(rope, name))
        if number != pairs:
            rule = f"has {number}; must have {pairs}, one for each pair of channels that is turned"
            yield Problem(f"{_ROPE}.{name}", getattr(rope, name), rule)


def rows_take_one_list(job: TrainJob, _: int) -> Iterator[Problem]:
    """The length of a packed row does not choose factors that its documents are too short for."""
    rope, length = job.model.attention.rope, job.train.sequence_length
    is_packed = job.data.packing is not Packing.none
    if rope.scaling is RopeScaling.longrope and is_packed and length > rope.original_length:
        rule = (
            f"must be at most {_ROPE}.original_length ({rope.original_length}) where documents are "
            "packed: the row would take the long factors, and a document in it the short ones"
        )
        yield Problem("train.sequence_length", length, rule, rope.original_length)


# Of a model that is counted, too.
MODEL_RULES = (
    layer_rules_decide,
    _gates_are_of_all_layers,
    _heads_have_one_norm,
    _positions_have_attention,
    _channels_turn_in_pairs,
    _factors_are_of_pairs,
)
