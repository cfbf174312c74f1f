"""Which recipe core gives to which linear layer, found by the names that real models have.

Transformer Engine is not needed: the plain layers are asked here in its place what core tells them.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from hybrid_train.anatomy.gemm_formats import (
    Linear,
    formats_of,
    linears,
)
from hybrid_train.config.compose import compose
from hybrid_train.schema.model import Mtp
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.precision import (
    AmaxChoice,
    Backend,
    GemmFormat,
    GradientElement,
    Precision,
    PrecisionRule,
)
from hybrid_train.schema.train import TrainJob
from tests.tiny import MEGATRON_WARNINGS, VOCAB, tiny_job
from tests.unit.config.test_core_accepts import one_of

pytestmark = MEGATRON_WARNINGS

SUPER = compose("check", ["experiment=nemotron3_super", "processes=1024"])
EVERYWHERE = "MEM*M-E*/*E/*E"  # eight layers, to be cut into four stages
UNTOLD = "untold"  # what a module has that core has told nothing
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1)]  # pipeline ranks, chunks of each


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> None:
    """Send what asks for CUDA to the CPU, for the rest of this process."""
    from hybrid_train.runtime import cpu

    cpu.install()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the plain layers remember what core tells Transformer Engine's after a model is built.

    And let core believe that Transformer Engine is new enough, which it asks for FP8 and experts.
    """
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import transformer_config

    from hybrid_train.megatron import plain
    from hybrid_train.model import build

    def remember(module: Any, config: Any) -> None:
        module.told = None if config is None else config.config_key

    linears = (layers.ColumnParallelLinear, layers.RowParallelLinear)  # ours, and the head
    for one in (*linears, plain.DuplicatedLinear, plain.GroupedLinear):
        monkeypatch.setattr(one, "finish_init", remember, raising=False)
    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda _: True)
    monkeypatch.setattr(build, "_choose_backend", lambda *_, **__: Backend.native)


def expected(job: TrainJob) -> dict[Linear, str | None]:
    """The key of the recipe of every linear layer, from the formats that the job asks for."""
    plain = (GemmFormat.fp32, GemmFormat.bf16)
    keys: dict[Linear, str | None] = {}
    for linear, formats in formats_of(job.model, job.precision).items():
        (format,) = set(formats.formats.values())
        keys[linear] = "unquantized" if format in plain else format.value
        if format is GemmFormat.fp8_delayed:  # by the region around the whole pass
            keys[linear] = None
    return keys


def built(job: TrainJob) -> Iterator[Any]:
    """The chunks of all pipeline ranks of a job."""
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.model.build import build_model

    for rank in range(job.parallel.pipeline):
        with one_of(job.parallel.pipeline, rank):
            groups = build_groups(job.parallel, timeout_s=60)
            try:
                yield from build_model(job, groups, VOCAB, on_gpu=False).chunks
            finally:
                destroy_groups()


def keys_of(job: TrainJob) -> dict[Linear, str | None]:
    """What core has told every linear layer of a model; each is held once."""
    from hybrid_train.megatron.plain import linear_modules

    found: dict[Linear, str | None] = {}
    for chunk in built(job):
        for linear, module in linear_modules(chunk):
            assert linear not in found
            found[linear] = getattr(module, "told", UNTOLD)
    return found


def super_job(pattern: str, pipeline: int = 1, virtual: int = 1) -> TrainJob:
    """The published exceptions of Nemotron 3 Super on a model of tiny sizes."""
    parallel = Parallel(pipeline=pipeline, virtual_pipeline=virtual)
    job = tiny_job(pattern, precision=SUPER.precision, parallel=parallel)
    job.model.mamba.heads = 16  # 560 packed rows: core wants a multiple of 16 with FP8
    return job


@pytest.mark.parametrize(("pipeline", "virtual"), LAYOUTS)
def test_core_finds_the_recipe_of_every_linear_layer(
    told: None, pipeline: int, virtual: int
) -> None:
    job = super_job(EVERYWHERE, pipeline, virtual)
    job.model.mtp = Mtp(repeated_block=False)
    assert keys_of(job) == expected(job)
    assert set(expected(job).values()) == {"nvfp4", "mxfp8", "unquantized"}


def test_layers_by_number_are_found_on_their_stage(told: None) -> None:
    """Every layer in another format than its neighbours: a shift by one would show."""
    rules = [
        PrecisionRule(format=format, layers=str(layer))
        for layer, format in enumerate(
            [GemmFormat.bf16, GemmFormat.mxfp8, GemmFormat.fp8_blockwise] * 2, start=1
        )
    ]
    job = super_job(EVERYWHERE, pipeline=2, virtual=2)
    job.precision = Precision(format=GemmFormat.nvfp4, exceptions=rules)
    assert keys_of(job) == expected(job)


def test_the_depths_of_mtp_are_told_apart(told: None) -> None:
    """Core numbers them from 1 while it builds and from 0 after."""
    job = super_job("M*/*E/*E")
    job.model.mtp = Mtp(repeated_block=False)
    rules = [PrecisionRule(format=GemmFormat.bf16, modules=["mtp.eh_proj", "mtp.moe"])]
    job.precision = Precision(format=GemmFormat.mxfp8, exceptions=rules)
    found = keys_of(job)
    assert found == expected(job)
    assert {linear.depth for linear in found} == {0, 1, 2}


@pytest.mark.parametrize(
    "format",
    [GemmFormat.fp8_tensorwise, GemmFormat.fp8_blockwise, GemmFormat.mxfp8],
)
def test_core_takes_fp8_for_the_whole_model(told: None, format: GemmFormat) -> None:
    job = super_job(EVERYWHERE)
    job.model.hidden_size = 32
    job.precision = Precision(format=format)
    assert set(keys_of(job).values()) == {format.value}


def test_layers_of_delayed_scaling_are_left_to_the_region_around_them(told: None) -> None:
    job = super_job("MEM*M-E*")
    rule = PrecisionRule(format=GemmFormat.bf16, layers="first 2")
    job.precision = Precision(format=GemmFormat.fp8_delayed, exceptions=[rule])
    found = keys_of(job)
    assert found == expected(job)
    assert set(found.values()) == {None, "unquantized"}


def test_embedding_and_head_are_told_nothing_else(told: None) -> None:
    """In a real run they have no such method: they are core's own layers under both flavours."""
    (chunk,) = built(super_job("M*"))
    assert chunk.output_layer.told == "unquantized"
    assert not hasattr(chunk.embedding, "finish_init")


def fields(job: TrainJob) -> dict[str, object]:
    from hybrid_train.megatron import native_recipes

    return native_recipes.config_fields(job)


def test_an_unquantized_model_has_no_recipe() -> None:
    from hybrid_train.megatron import native_recipes

    job = tiny_job("M*", precision=Precision())
    assert fields(job) == {}
    assert native_recipes.recipe_of_chunk(job.model, job.precision, parse("M*"), 0) is None


FIELDS = [
    (Precision(format=GemmFormat.fp8_tensorwise), ("hybrid", "tensorwise")),
    (
        Precision(format=GemmFormat.fp8_tensorwise, gradient_element=GradientElement.e4m3),
        ("e4m3", "tensorwise"),
    ),
    (Precision(format=GemmFormat.fp8_blockwise), ("e4m3", "blockwise")),
    (Precision(format=GemmFormat.mxfp8), ("e4m3", "mxfp8")),
    (
        Precision(format=GemmFormat.mxfp8, gradient_element=GradientElement.e5m2),
        ("hybrid", "mxfp8"),
    ),
]


@pytest.mark.parametrize(("precision", "wanted"), FIELDS)
def test_fp8_fields_name_the_format(precision: Precision, wanted: tuple[str, str]) -> None:
    found = fields(tiny_job("M*", precision=precision))
    assert (found["fp8"], found["fp8_recipe"]) == wanted
    assert "fp4" not in found


def test_delayed_scaling_reaches_core_by_its_own_fields(told: None) -> None:
    from hybrid_train.megatron.transformer_config import transformer_config

    precision = Precision(
        format=GemmFormat.fp8_delayed, amax_history=7, amax_choice=AmaxChoice.most_recent
    )
    config = transformer_config(tiny_job("M*", precision=precision), on_gpu=False, native=True)
    assert (config.fp8, config.fp8_recipe) == ("hybrid", "delayed")
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (7, "most_recent")


def test_the_whole_model_has_the_format_that_pads_tokens_of_experts_most() -> None:
    """A format that needs multiples of 128 tokens, beside one of 32 that is the usual one."""
    rule = PrecisionRule(format=GemmFormat.nvfp4, modules=["moe.experts"])
    precision = Precision(format=GemmFormat.mxfp8, exceptions=[rule])
    assert fields(tiny_job("ME", precision=precision)) == {"fp4": "e2m1", "fp4_recipe": "nvfp4"}
    rule.format, precision.format = GemmFormat.mxfp8, GemmFormat.fp8_tensorwise
    assert fields(tiny_job("ME", precision=precision))["fp8_recipe"] == "mxfp8"
    rule.format, precision.format = GemmFormat.fp8_tensorwise, GemmFormat.bf16
    assert fields(tiny_job("ME", precision=precision))["fp8_recipe"] == "tensorwise"


def test_core_reads_every_entry_of_a_recipe() -> None:
    from megatron.core.extensions.transformer_engine import TEQuantizationParams
    from megatron.core.quantization.utils import get_quant_config_or_none

    from hybrid_train.megatron import native_recipes

    job = super_job("M*ME")
    recipe = native_recipes.recipe_of_chunk(job.model, job.precision, parse("M*ME"), 0)
    names = {
        "decoder.layers.0.mixer.in_proj": ("fp4", "nvfp4"),
        "decoder.layers.0.mixer.out_proj": ("fp8", "mxfp8"),
        "decoder.layers.1.self_attention.linear_qkv": (None, None),
        "decoder.layers.1.self_attention.core_attention": (None, None),
        "output_layer": (None, None),
    }
    for name, (bits, factory) in names.items():
        config = get_quant_config_or_none(name, recipe)
        assert config is not None
        found = TEQuantizationParams.parse_from_config(config)
        assert found.evaluation_recipe is None
        training = found.training_recipe
        assert (training.fp4_quantization_recipe, training.fp8_quantization_recipe) == (
            "custom" if bits == "fp4" else None,
            "custom" if bits == "fp8" else None,
        )
        assert training.custom_recipe_factory == factory
        assert training.override_quantized_autocast


def test_core_is_told_which_weights_to_build_in_fp8() -> None:
    """Those of main layers; an MTP block has another name while it is built."""
    from megatron.core.extensions.transformer_engine import TEQuantizationParams
    from megatron.core.quantization.utils import get_quant_config_or_none

    from hybrid_train.megatron import native_recipes

    attention = PrecisionRule(format=GemmFormat.mxfp8, modules=["attention"])
    job = tiny_job("M*M/-", precision=Precision(format=GemmFormat.fp8_tensorwise))
    job.precision.exceptions = [attention, PrecisionRule(format=GemmFormat.bf16, layers="3")]
    names = {
        "decoder.layers.0.mixer.in_proj": True,
        "decoder.layers.1.self_attention.linear_qkv": False,  # mxfp8
        "decoder.layers.2.mixer.in_proj": False,  # bf16
        "mtp.layers.0.mtp_model_layer.layers.0.mlp.linear_fc1": False,
        "output_layer": False,
    }
    for asked in (True, False):
        job.precision.fp8_param_gather = asked
        recipe = native_recipes.recipe_of_chunk(job.model, job.precision, parse("M*M/-"), 0)
        for name, is_kept in names.items():
            config = get_quant_config_or_none(name, recipe)
            assert config is not None
            training = TEQuantizationParams.parse_from_config(config).training_recipe
            assert training.fp8_param is (asked and is_kept), name
            if is_kept:
                assert training.custom_recipe_factory == "fp8_tensorwise"


def test_the_recipe_of_super_is_the_published_one() -> None:
    """All 88 layers in four stages: Mamba's out_proj in MXFP8, attention, latent, MTP, the last."""
    from hybrid_train.megatron import native_recipes

    pattern = parse(SUPER.model.pattern)
    cut = pattern if pattern.is_cut else pattern.cut([22] * 4)
    keys = set()
    for linear in linears(SUPER.model):
        key = key_of(cut, linear)
        keys.add(key)
        published = "nvfp4"
        in_bf16 = linear.module.startswith(("attention", "moe.latent"))
        if linear.depth or linear.layer > 74 or in_bf16:
            published = "unquantized"
        elif linear.module == "mamba.out_proj":
            published = "mxfp8"
        assert key == published, linear
    assert keys == {"nvfp4", "mxfp8", "unquantized"}
    assert native_recipes.config_fields(SUPER) == {"fp4": "e2m1", "fp4_recipe": "nvfp4"}


def key_of(cut: Pattern, linear: Linear) -> str:
    """The key that core finds for a layer on the stage that holds it."""
    from megatron.core.quantization.quant_config import MatchContext

    from hybrid_train.megatron import native_recipes

    before = 0
    chunk = len(cut.stages) - 1
    for number, layers in enumerate(cut.stages):
        if not linear.depth and before < linear.layer <= before + len(layers):
            chunk = number
            break
        before += len(layers)
    recipe = native_recipes.recipe_of_chunk(SUPER.model, SUPER.precision, cut, chunk)
    assert recipe is not None
    (name,) = native_recipes.paths_in_core(linear, before + 1)
    key = recipe.match_to_config_key(MatchContext(name, None))
    assert key is not None
    return key


def test_a_name_of_a_recipe_becomes_our_object(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import fp8_utils

    from hybrid_train.megatron import native_recipes, patches

    made = []

    def recipe(format: GemmFormat, precision: Precision) -> object:
        made.append((format, precision))
        return object()

    monkeypatch.setattr(fp8_utils, "_get_custom_recipe", fp8_utils._get_custom_recipe)
    monkeypatch.setattr(native_recipes.te, "recipe", recipe)
    precision = Precision(format=GemmFormat.nvfp4, hadamard=False)
    patches.for_recipes(native_recipes.recipe_maker(precision))
    assert fp8_utils._get_custom_recipe("nvfp4") is fp8_utils._get_custom_recipe("nvfp4")
    assert made == [(GemmFormat.nvfp4, precision)]
