"""The linear layers of a model chunk, each with its place and kind."""

from collections.abc import Iterator

from torch.nn import Module

from hybrid_train.anatomy.product_formats import MTP, MTP_PROJECTION, Linear

# Where the modules of a layer are in Megatron's -> kind.
PLACES = {
    "mixer.in_proj": "mamba.in_proj",
    "mixer.out_proj": "mamba.out_proj",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.linear_proj": "attention.proj",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
    "mlp.fc1_latent_proj": "moe.latent.down",
    "mlp.experts.linear_fc1": "moe.experts.fc1",
    "mlp.experts.linear_fc2": "moe.experts.fc2",
    "mlp.fc2_latent_proj": "moe.latent.up",
    "mlp.shared_experts.linear_fc1": "moe.shared.fc1",
    "mlp.shared_experts.linear_fc2": "moe.shared.fc2",
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
