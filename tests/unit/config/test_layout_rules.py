"""Sizes of single layers are held against the same rules as those of the whole model."""

import pytest

from hybrid_train.config.checks import split_problems
from hybrid_train.config.compose import compose
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.problems import ConfigError
from tests.tiny import tiny_job
from tests.unit.config.test_checks import broken

# rules of model.layers on a model M-M-E*, processes and degrees, path of the problem, part of it
LAYER_RULES = [
    ("{layers:9,mlp:{intermediate_size:96}}", "", "model.layers.0", "matches no layer"),
    ("{layers:1,mlp:{intermediate_size:96}}", "", "model.layers.0", "matches no layer"),
    ("{layers:1}", "", "model.layers.0", "gives no size"),
    ("{mlp:{intermediate_size:96}},{layers:2,mlp:{intermediate_size:32}}", "", "model.layers.1",
     "earlier rules cover all of it"),
    ("{layers:2..3,mlp:{intermediate_size:96}}", "", "model.layers.0.layers", "must read"),
    ("{layers:2,mlp:{intermediate_size:97}}", "parallel.tensor=2", "parallel.tensor",
     "model.layers.0.mlp.intermediate_size (97)"),
    ("{layers:3,mamba:{heads:6}}", "parallel.tensor=2 parallel.context=2", "parallel.context",
     "model.layers.0.mamba.heads / tensor (3)"),
    ("{layers:5,moe:{experts:5}}", "parallel.expert=2", "parallel.expert",
     "model.layers.0.moe.experts (5)"),
    ("{layers:5,moe:{experts:1}}", "", "model.layers.0.moe.experts", "model.moe.top_k"),
    ("{layers:6,attention:{heads:3}}", "", "model.attention.kv_heads",
     "model.layers.0.attention.heads (3)"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "degrees", "path", "words"), LAYER_RULES)
def test_sizes_of_layers_are_held_against_the_rules_of_all_sizes(
    rules: str, degrees: str, path: str, words: str
) -> None:
    lines = ["model.pattern=M-M-E*", f"model.layers=[{rules}]", *degrees.split()]
    found = [f"{problem.path}: {problem.rule}" for problem in broken(lines, 4)]
    assert any(one.startswith(f"{path}: ") and words in one for one in found), found


def test_sound_sizes_of_layers_are_accepted() -> None:
    rules = "{layers:2,mlp:{intermediate_size:96}},{mamba:{heads:16},moe:{experts:2}}"
    assert broken(["model.pattern=M-M-E*", f"model.layers=[{rules}]"], 1) == []


def test_a_count_refuses_sizes_of_layers_that_there_are_not() -> None:
    lines = ["model=tiny", "model.vocab_size=64", "model.layers=[{layers:999,mamba:{heads:16}}]"]
    with pytest.raises(ConfigError, match="matches no layer with such sizes"):
        compose("count", lines)


# A model of 4 heads, 2 groups, 4 experts and 7 rows: degrees, processes, what is said.
SPLITS = [
    (Parallel(), 3, []),
    (Parallel(tensor=2, pipeline=2), 4, ["tensor = 2: must divide the vocabulary (7); nearest: 1"]),
    (Parallel(pipeline=7), 7, ["pipeline = 7: makes 7 stages of 6 main layers"]),
    (Parallel(expert=3), 3, ["expert = 3: must divide model.moe.experts (4); nearest: 2"]),
    (Parallel(pipeline=2), 3, ["needs a multiple of 2 processes", "torchrun --nproc-per-node 4"]),
]


@pytest.mark.parametrize(("parallel", "processes", "words"), SPLITS)
def test_a_model_that_is_loaded_is_held_against_its_layout(
    parallel: Parallel, processes: int, words: list[str]
) -> None:
    job = tiny_job(parallel=parallel)
    job.model.vocab_size, job.model.vocab_multiple = 7, 1
    job.train.sequence_length = 3  # the run's own, of no matter here
    found = "\n".join(map(str, split_problems(job, processes)))
    assert all(one in found for one in words), found
    assert bool(found) == bool(words)
