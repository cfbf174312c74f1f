import copy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hybrid_train.config import overrides
from hybrid_train.config.checks import RULES, check
from hybrid_train.config.compose import compose
from hybrid_train.config.rules_of_hardware import HARDWARE_RULES
from hybrid_train.config.rules_of_model import MODEL_RULES, rows_take_one_list
from hybrid_train.config.rules_of_precision import NATIVE_RULES, PRECISION_RULES
from hybrid_train.config.rules_of_switches import SWITCH_RULES
from hybrid_train.config.rules_of_teachers import TEACHER_RULES
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob

TINY = compose("train", ["experiment=tiny_cpu"])


def edited(*lines: str) -> TrainJob:
    """Return the tiny run with overrides set on it."""
    config = OmegaConf.structured(copy.deepcopy(TINY))
    given = overrides.read(lines, groups=())
    problems = [p for one in given.values for p in overrides.set_value(config, one, groups=())]
    assert not problems + given.problems
    job = OmegaConf.to_object(config)
    assert isinstance(job, TrainJob)
    return job


def broken(lines: list[str], world_size: int) -> list[Problem]:
    return list(check(edited(*lines), world_size))


# overrides on the tiny run, processes, path, part of the rule, nearest legal value
CASES = [
    ("model.pattern=MEX*", 1, "model.pattern", "'X' is no kind of layer", "ME*"),
    ("model.pattern=ME|M*", 1, "model.pattern", "has 2 stages", "MEM*"),
    ("parallel.pipeline=5 model.pattern=ME*-", 5, "parallel.pipeline", "main layers", 4),
    ("parallel.virtual_pipeline=2", 1, "parallel.virtual_pipeline", "needs parallel.pipeline", 1),
    ("parallel.tensor=3 model.pattern=*", 2, "parallel.tensor", "attention.heads (4)", 2),
    ("parallel.tensor=3 model.pattern=M", 2, "parallel.tensor", "mamba.heads (8)", 2),
    ("parallel.tensor=4 model.pattern=M", 4, "parallel.tensor", "mamba.groups (2)", 2),
    ("parallel.tensor=3 model.pattern=-", 2, "parallel.tensor", "mlp.intermediate_size", 2),
    ("parallel.tensor=3 model.pattern=E", 2, "parallel.tensor", "shared_intermediate_size", 2),
    ("parallel.tensor=3 model.pattern=-/-", 2, "parallel.tensor", "hidden_size (64)", 2),
    (
        "parallel.tensor=4 model.pattern=* model.attention.heads=12 model.attention.kv_heads=6",
        4,
        "parallel.tensor",
        "attention.kv_heads (6)",
        2,
    ),
    ("model.attention.kv_heads=3", 1, "model.attention.kv_heads", "attention.heads (4)", 2),
    ("model.mamba.groups=3", 1, "model.mamba.groups", "mamba.heads (8)", 2),
    ("parallel.context=3 model.pattern=M", 2, "parallel.context", "mamba.heads / tensor", 2),
    (
        "parallel.context=4 model.pattern=M model.mamba.heads=24 model.mamba.groups=6",
        4,
        "parallel.context",
        "mamba.groups / tensor (6)",
        2,
    ),
    ("parallel.expert=3", 3, "parallel.expert", "moe.experts (4)", 1),
    ("parallel.expert=2 model.pattern=M-", 2, "parallel.expert", "no expert layers", 1),
    ("parallel.expert_tensor=3", 3, "parallel.expert_tensor", "moe.intermediate_size", 1),
    ("parallel.sequence=true", 1, "parallel.sequence", "needs parallel.tensor > 1", "null"),
    ("parallel.sequence=false parallel.tensor=2", 2, "parallel.sequence", "must be on", "true"),
    (
        "parallel.tensor=2 train.sequence_length=63",
        2,
        "train.sequence_length",
        "must be a multiple of 2",
        64,
    ),
    (
        "parallel.context=2 train.sequence_length=62 model.pattern=M",
        2,
        "train.sequence_length",
        "must be a multiple of 4",
        64,
    ),
    (
        "parallel.tensor=8 model.pattern=* model.attention.heads=8 model.attention.kv_heads=1 "
        "model.attention.head_dim=2",
        8,
        "parallel.tensor",
        "rows of queries, keys and values (20)",
        4,
    ),
    ("train.sequence_length=1", 1, "train.sequence_length", "longer than the 1 MTP", 2),
    ("train.global_batch=5", 2, "train.global_batch", "must be a multiple of 2", 4),
    ("train.microbatch=3", 1, "train.microbatch", "must divide 4", 2),
    ("schedule.warmup_tokens=3k", 1, "schedule.warmup_tokens", "must not exceed", "2048"),
    ("schedule.decay_tokens=1M", 1, "schedule.decay_tokens", "must fit into", "2509"),
    (
        "parallel.tensor=2 model.vocab_multiple=27 data.vocab_size=513",
        2,
        "model.vocab_multiple",
        "must divide that",
        28,
    ),
    ("model.vocab_size=500", 1, "model.vocab_size", "at least data.vocab_size", 512),
    ("runtime.kernels=fused", 1, "runtime.kernels", "run on a GPU", "plain"),
    (
        "parallel.overlap_param_gather=true",
        1,
        "parallel.overlap_param_gather",
        "needs parallel.overlap_grad_reduce",
        "false",
    ),
    (
        "parallel.overlap_param_gather=true parallel.distributed_optimizer=false",
        1,
        "parallel.overlap_param_gather",
        "needs parallel.distributed_optimizer",
        "false",
    ),
    (
        "parallel.recompute=selective parallel.recompute_modules=[mlp,mamba] model.pattern=M*",
        1,
        "parallel.recompute_modules",
        "the model has no [mlp]",
        "[mamba]",
    ),
    (
        "parallel.recompute=selective parallel.recompute_modules=[]",
        1,
        "parallel.recompute_modules",
        "must name a module",
        "null",
    ),
    (
        "parallel.recompute=full parallel.recompute_layers=2",
        1,
        "parallel.recompute_layers",
        "an MTP depth",
        1,
    ),
    (
        "train.batch_ramp.tokens=3k train.batch_ramp.start_batch=2 train.batch_ramp.increment=2",
        1,
        "train.batch_ramp.tokens",
        "must not exceed train.tokens",
        2560,
    ),
    (
        "train.batch_ramp.tokens=1k train.batch_ramp.start_batch=3 train.batch_ramp.increment=2"
        " train.global_batch=8",
        1,
        "train.batch_ramp.start_batch",
        "must be a multiple of 2",
        4,
    ),
    (
        "train.batch_ramp.tokens=1k train.batch_ramp.start_batch=2 train.batch_ramp.increment=1",
        1,
        "train.batch_ramp.increment",
        "must be a multiple of 2",
        2,
    ),
    (
        "train.batch_ramp.tokens=1k train.batch_ramp.start_batch=4 train.batch_ramp.increment=2",
        1,
        "train.batch_ramp.start_batch",
        "must be less than train.global_batch",
        2,
    ),
    (
        "train.batch_ramp.tokens=1k train.batch_ramp.start_batch=2 train.batch_ramp.increment=4"
        " train.global_batch=8",
        1,
        "train.batch_ramp.increment",
        "must divide the 6 sequences",
        2,
    ),
    ("parallel.fsdp=true parallel.pipeline=2", 2, "parallel.fsdp", "no pipeline stages", "false"),
    (
        "parallel.fsdp=true parallel.distributed_optimizer=false",
        1,
        "parallel.fsdp",
        "needs parallel.distributed_optimizer",
        "false",
    ),
    ("parallel.fsdp=true parallel.recompute=full", 1, "parallel.fsdp", "wrong otherwise", "false"),
    (
        "optimizer.first_moment=bfloat16 parallel.distributed_optimizer=false",
        1,
        "optimizer.first_moment",
        "needs parallel.distributed_optimizer=true",
        "float32",
    ),
    (
        "optimizer.second_moment=float16 parallel.fsdp=true",
        1,
        "optimizer.second_moment",
        "needs parallel.fsdp=false",
        "float32",
    ),
    (
        "optimizer.main_gradients=bfloat16 precision.format=fp32",
        1,
        "optimizer.main_gradients",
        "needs precision.format=bf16",
        "float32",
    ),
    (
        "optimizer.main_gradients=bfloat16 precision.format=bf16",
        1,
        "optimizer.main_gradients",
        "needs precision.reduce_gradients_in_fp32=false",
        "float32",
    ),
    (
        "optimizer.first_moment=bfloat16 precision.format=bf16 "
        "precision.reduce_gradients_in_fp32=false",
        1,
        "optimizer.main_gradients",
        "beside optimizer.first_moment",
        "bfloat16",
    ),
    (
        "optimizer.master_weights=float16 precision.format=fp32",
        1,
        "optimizer.master_weights",
        "their own masters",
        "float32",
    ),
    # A number just above a power of two has 2^-3 to the next in float8; 0.95 takes 0.05 of it.
    ("optimizer.second_moment=float8", 1, "optimizer.second_moment", "too coarse", "float16"),
    (
        "optimizer.second_moment=bfloat16 optimizer.beta2=0.9997",
        1,
        "optimizer.second_moment",
        "needs 1 - beta2 > 2^-8",
        "float32",
    ),
    (
        "data.packing=best_fit parallel.context=2 runtime.kernels=fused",
        2,
        "runtime.kernels",
        "cannot keep documents of a row apart",
        "plain",
    ),
    ("checkpoint.load_only=weights", 1, "checkpoint.load_only", "needs checkpoint.load", "null"),
    ("profile.tool=torch profile.ranks=[0,2]", 2, "profile.ranks.1", "the last is 1", 1),
]


@pytest.mark.parametrize(
    ("lines", "world_size", "path", "rule", "legal"), CASES, ids=[f"{c[2]}:{c[3]}" for c in CASES]
)
def test_a_broken_rule_is_mended_by_the_nearest_value(
    lines: str, world_size: int, path: str, rule: str, legal: object
) -> None:
    given = lines.split()
    found = [p for p in broken(given, world_size) if p.path == path and rule in p.rule]
    assert len(found) == 1
    assert str(found[0].nearest) == str(legal)
    mended = broken([*given, f"{path}={found[0].nearest}"], world_size)
    assert not [p for p in mended if p.path == path]


def test_the_tiny_run_breaks_no_rule() -> None:
    assert broken([], 1) == []


def test_every_rule_has_a_case_that_breaks_it() -> None:
    # The number of processes is no setting; it has its own test below. So have number formats,
    # cards, switches, teachers and parts of a model, in test_gemm_formats.py,
    # test_native_rules.py, test_hardware_rules.py, test_switch_rules.py, test_teacher_rules.py and
    # test_model_rules.py.
    elsewhere = {"_processes_fit_the_degrees", "phases_are_in_order", "cluster_fits_the_run"}
    elsewhere |= {rule.__name__ for rule in (*MODEL_RULES, rows_take_one_list)}
    elsewhere |= {rule.__name__ for rule in (*PRECISION_RULES, *NATIVE_RULES)}
    elsewhere |= {rule.__name__ for rule in (*HARDWARE_RULES, *SWITCH_RULES, *TEACHER_RULES)}
    unbroken = {rule.__name__ for rule in RULES} - elsewhere
    for lines, world_size, *_ in CASES:
        if "X" in lines:  # a pattern that cannot be read leaves nothing to check
            continue
        job = edited(*lines.split())
        unbroken -= {rule.__name__ for rule in RULES if list(rule(job, world_size))}
    assert unbroken == set()


@pytest.mark.parametrize(
    ("lines", "needed"),
    [
        ("parallel.tensor=2", 2),
        ("parallel.expert=2", 2),
        ("parallel.tensor=2 parallel.expert=2", 4),
        ("parallel.tensor=2 parallel.expert=2 parallel.expert_tensor=1", 2),
        ("parallel.pipeline=2 parallel.expert=4", 8),
    ],
)
def test_too_few_processes_are_refused_with_the_number_needed(lines: str, needed: int) -> None:
    given = [*lines.split(), "train.global_batch=64", "train.microbatch=1"]
    (problem,) = broken(given, 1)
    assert problem.path == "parallel"
    assert f"a multiple of {needed} processes, not 1" in problem.rule
    assert f"--nproc-per-node {needed} " in str(problem.nearest)
    assert broken(given, needed) == []


def test_sizes_of_layers_that_the_pattern_lacks_do_not_matter() -> None:
    sizes = ["model.attention.kv_heads=3", "model.moe.experts=5", "model.mamba.groups=3"]
    assert broken(["model.pattern=--", *sizes], 1) == []


def token_files(folder: Path, name: str) -> str:
    for suffix in (".bin", ".idx"):
        (folder / f"{name}{suffix}").touch()
    (folder / "tokenizer.json").touch()
    return str(folder / name)


def test_token_files_that_exist_are_accepted(tmp_path: Path) -> None:
    prefix = token_files(tmp_path, "code")
    job = compose("train", ["experiment=tiny_cpu", *own_files(tmp_path, prefix)])
    assert job.data.train == [prefix]


def own_files(folder: Path, prefix: str) -> list[str]:
    return ["data=files", f"data.train=[{prefix}]", f"data.tokenizer={folder}"]


@pytest.mark.parametrize(
    ("given", "rule", "meant"),
    [
        ("code.bin", "must be named without .bin or .idx", "code"),
        ("cod", "there is no file", "code"),
        ("half", "half.bin", None),
    ],
)
def test_token_files_that_do_not_exist_are_named(
    tmp_path: Path, given: str, rule: str, meant: str | None
) -> None:
    prefix = token_files(tmp_path, "code")
    (tmp_path / "half.idx").touch()
    job = compose("train", ["experiment=tiny_cpu", *own_files(tmp_path, prefix)])
    job.data.train = [str(tmp_path / given)]
    (problem,) = check(job, 1)
    assert problem.path == "data.train"
    assert rule in problem.rule
    if meant:
        assert problem.nearest == str(tmp_path / meant)


def test_own_data_needs_token_files_and_their_tokenizer(tmp_path: Path) -> None:
    prefix = token_files(tmp_path, "code")
    job = compose("train", ["experiment=tiny_cpu", *own_files(tmp_path, prefix)])
    job.data.train, job.data.tokenizer = [], None
    assert [p.path for p in check(job, 1)] == ["data.train", "data.tokenizer"]
    job.data.tokenizer = str(tmp_path / "nowhere")
    assert "tokenizer.json" in [p.rule for p in check(job, 1)][1]


def test_a_checkpoint_to_load_must_exist(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (problem,) = broken([f"checkpoint.load={tmp_path}/frist"], 1)
    assert problem.nearest == f"{tmp_path}/first"
    assert broken([f"checkpoint.load={tmp_path}/first", "checkpoint.load_only=weights"], 1) == []


def test_a_run_folder_must_be_possible(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = broken([f"run_dir={tmp_path}/file/run"], 1)
    assert f"{tmp_path}/file is a file" in problem.rule
    assert broken([f"run_dir={tmp_path}/new/run"], 1) == []
