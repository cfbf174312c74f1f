"""Each switch becomes the fields of core that it names, and core's own validation takes them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.config.compose import compose
from hybrid_train.schema.gpu import CudaGraphs, Gpu, GraphPart, NcclGroup, OffloadedPart
from hybrid_train.schema.parallel import Dispatcher, Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.train import TrainJob
from tests.tiny import LENGTH, MEGATRON_WARNINGS, some_rows, tiny_job, tiny_model

pytestmark = MEGATRON_WARNINGS
PATTERN = "ME*-E"
PAGE = Path(__file__).parents[3] / "docs" / "gpu.md"
# A switch by path -> a section that has it on, and what core's config holds then.
ON: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parallel.dispatcher": (
        {"parallel": Parallel(expert=2, dispatcher=Dispatcher.hybridep),
         "gpu": Gpu(dispatcher_sms=16)},
        {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep",
         "moe_flex_dispatcher_num_sms": 16},
    ),
    "parallel.overlap_tensor": (
        {"parallel": Parallel(tensor=2, overlap_tensor=True)}, {"tp_comm_overlap": True},
    ),
    "parallel.overlap_shared_experts": (
        {"parallel": Parallel(overlap_shared_experts=True)}, {"moe_shared_expert_overlap": True},
    ),
    "parallel.overlap_expert_gradients": (
        {"parallel": Parallel(expert=2, overlap_expert_gradients=True)},
        {"overlap_dispatch_backward_with_experts_wgrad": True},
    ),
    "gpu.cuda_graphs": (
        {"gpu": Gpu(cuda_graphs=CudaGraphs.layers, cuda_graph_warmup_steps=5,
                    cuda_graph_parts=[GraphPart.mamba, GraphPart.moe_router])},
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_warmup_steps": 5},
    ),
    "gpu.fused_permutation": ({"gpu": Gpu(fused_permutation=True)}, {"moe_permute_fusion": True}),
    "gpu.fused_router": ({"gpu": Gpu(fused_router=True)}, {"moe_router_fusion": True}),
    "gpu.fused_squared_relu": (
        {"gpu": Gpu(fused_squared_relu=True)}, {"use_fused_weighted_squared_relu": True},
    ),
    "gpu.offloaded_parts": (
        {"gpu": Gpu(offloaded_parts=[OffloadedPart.expert_fc1])},
        {"fine_grained_activation_offloading": True, "offload_modules": ["expert_fc1"]},
    ),
    "precision.fp8_attention": (
        {"precision": Precision(format=GemmFormat.fp8_tensorwise, fp8_attention=True)},
        {"fp8_dot_product_attention": True},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def switches(groups: Any) -> Any:
    """Megatron must be imported behind the emulation, hence the fixture."""
    from hybrid_train.megatron import gpu_switches

    return gpu_switches


@pytest.fixture
def config_on_gpu(groups: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What core's config is on a GPU with Transformer Engine, of which core asks for versions."""
    from megatron.core.transformer import transformer_config as core
    from megatron.core.transformer.moe import moe_utils

    from hybrid_train.megatron.transformer_config import transformer_config

    monkeypatch.setattr(core, "is_te_min_version", lambda *_, **__: True)
    for name in ("fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index",
                 "fused_sort_chunks_by_index_with_probs", "fused_unpermute"):  # fmt: skip
        monkeypatch.setattr(moe_utils, name, object())
    return lambda job: transformer_config(job, on_gpu=True, fused=True)


def job_with(path: str) -> TrainJob:
    sections, _ = ON[path]
    job = tiny_job(PATTERN, **sections)
    job.model.moe.latent_size = None
    return job


@pytest.mark.parametrize("path", ON)
def test_a_switch_sets_its_fields_and_core_accepts_them(config_on_gpu: Any, path: str) -> None:
    config, expected = config_on_gpu(job_with(path)), ON[path][1]
    assert {name: getattr(config, name) for name in expected} == expected


def test_captured_parts_are_cores_modules(config_on_gpu: Any) -> None:
    config = config_on_gpu(job_with("gpu.cuda_graphs"))
    assert [one.name for one in config.cuda_graph_modules] == ["mamba", "moe_router"]
    graphs = Gpu(cuda_graphs=CudaGraphs.layers)
    dense, experts = tiny_job("M*-", gpu=graphs), tiny_job("M*-E", gpu=graphs)
    captured = [
        [one.name for one in config_on_gpu(job).cuda_graph_modules] for job in (dense, experts)
    ]
    assert captured == [["attn", "mamba", "mlp"], ["attn", "mamba"]]
    with_mtp = config_on_gpu(tiny_job("ME/*E", gpu=graphs))  # whose * layer core does not capture
    assert [one.name for one in with_mtp.cuda_graph_modules] == ["mamba"]


def test_captured_steps_are_cores_full_iteration_and_need_no_parts(config_on_gpu: Any) -> None:
    config = config_on_gpu(tiny_job("M*-/*-", gpu=Gpu(cuda_graphs=CudaGraphs.step)))
    assert (config.cuda_graph_impl, config.cuda_graph_modules) == ("full_iteration", [])
    assert config.cuda_graph_warmup_steps == 3
    assert not config.recompute_granularity


def test_the_fused_activation_is_the_one_that_core_looks_for(config_on_gpu: Any) -> None:
    from megatron.core.activations import squared_relu

    assert config_on_gpu(job_with("gpu.fused_squared_relu")).activation_func is squared_relu


@pytest.mark.parametrize("path", ON)
def test_a_cpu_leaves_out_what_it_cannot_do_and_says_so(switches: Any, path: str) -> None:
    from hybrid_train.megatron.transformer_config import transformer_config

    job = job_with(path)
    said = list(switches.left_out(job, on_gpu=False, fused=False))
    if path == "parallel.overlap_shared_experts":
        assert said == []
        return
    assert [line.partition(" ")[0] for line in said] == [path]
    plain, config = (transformer_config(one, on_gpu=False) for one in (_without_switches(job), job))
    different = {name for name in vars(plain) if getattr(plain, name) != getattr(config, name)}
    assert different <= {"init_method", "output_layer_init_method", "embedding_init_method"}


def _without_switches(job: TrainJob) -> TrainJob:
    plan = Parallel(tensor=job.parallel.tensor, expert=job.parallel.expert)
    plain = tiny_job(PATTERN, parallel=plan, precision=Precision(format=job.precision.format))
    plain.model.moe.latent_size = None
    return plain


def test_plain_kernels_on_a_gpu_leave_out_what_needs_transformer_engine(switches: Any) -> None:
    job = tiny_job(PATTERN, gpu=Gpu(fused_router=True, high_priority_groups=[NcclGroup.ep]))
    (line,) = switches.left_out(job, on_gpu=True, fused=False)
    assert line == "gpu.fused_router needs a GPU and Transformer Engine"


def test_nccl_is_told_its_options_and_gloo_none(switches: Any) -> None:
    gpu = Gpu(high_priority_groups=[NcclGroup.ep, NcclGroup.dp_cp], nccl_config="nccl.yaml")
    assert switches.group_options(gpu, on_gpu=True) == {
        "high_priority_stream_groups": ["ep", "dp_cp"],
        "nccl_communicator_config_path": "nccl.yaml",
    }
    assert switches.group_options(gpu, on_gpu=False) == {}


def test_groups_have_the_names_that_core_asks_for(switches: Any) -> None:
    import megatron.core

    source = (Path(megatron.core.__path__[0]) / "parallel_state.py").read_text()
    asked = set(re.findall(r'get_nccl_options\("(\w+)"', source))
    assert len(asked) > 10
    assert {group.value for group in NcclGroup} <= asked


def test_each_training_pass_prepares_the_offload_as_core_does(groups: Any) -> None:
    model = tiny_model(tiny_job("M"), groups)
    prepared: list[str] = []
    model.preprocess_for_fine_grained_offloading = lambda: prepared.append("offload")
    tokens = some_rows()[:, :LENGTH]
    model(tokens)
    assert prepared == []
    model.config.fine_grained_activation_offloading = True
    model(tokens)
    assert prepared == ["offload"]
    with torch.no_grad():
        model(tokens)
    assert prepared == ["offload"]


def test_each_switch_is_a_setting(switches: Any) -> None:
    job = compose("check", ["experiment=tiny_cpu"])
    for switch in switches.SWITCHES:
        section, name = switch.path.split(".")
        assert hasattr(getattr(job, section), name), switch.path


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_switch_has_a_row_that_says_what_it_needs(switches: Any) -> None:
    for switch in switches.SWITCHES:
        name = switch.path.partition(".")[2]
        own = [row for row in rows() if switch.path in row[0] or f"`{name}`" in row[0]]
        assert own, switch.path
        places = " ".join(row[3] for row in own)
        expected = {
            "nothing": "any machine",
            "gpu": "GPU",
            "kernels": "GPU with Transformer Engine",
        }
        assert expected[switch.needs.name] in places or "the same" in places, switch.path


def test_each_field_of_megatron_is_named(switches: Any) -> None:
    text = PAGE.read_text()
    for switch in switches.SWITCHES:
        if switch.path in ON and switch.asked(job := job_with(switch.path)):
            for field in switch.fields(job).keys() - {"cuda_graph_warmup_steps", "activation_func"}:
                assert f"`{field}" in text, (switch.path, field)
        elif switch.elsewhere:
            assert switch.elsewhere.rpartition("(")[2].rpartition(".")[2].rstrip(")") in text
