"""The linear layers of a model chunk, each with its place and kind."""

from collections.abc import Iterator

from torch.nn import Module

from hybrid_train.anatomy.kinds import MTP_PROJECTION, possible_parameters
from hybrid_train.anatomy.product_formats import MTP, Linear

# Where the modules of a layer are in Megatron's -> kind.
PLACES = {
    one.name.removesuffix(".weight"): one.linear for one in possible_parameters() if one.linear
}


def linear_modules(chunk: Module) -> Iterator[tuple[Linear, Module]]:
    """Yield what `anatomy.product_formats.linears` lists, as far as this chunk holds it."""
    for layer in chunk.decoder.layers:  # type: ignore[union-attr]
        yield from _of_layer(layer, 0, int(layer.layer_number), "")
    block = getattr(chunk, "mtp", None)
    for depth, one in enumerate(block.layers if block is not None else (), start=1):
        yield Linear(depth, 0, MTP_PROJECTION), one.eh_proj
        for number, layer in enumerate(one.mtp_model_layer.layers, start=1):
            yield from _of_layer(layer, depth, number, f"{MTP}.")


def _of_layer(
    layer: Module, depth: int, number: int, prefix: str
) -> Iterator[tuple[Linear, Module]]:
    held = dict(layer.named_modules())
    for place, kind in PLACES.items():
        if place in held:
            yield Linear(depth, number, prefix + kind), held[place]
