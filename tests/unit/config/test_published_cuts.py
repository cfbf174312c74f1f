"""Cuts that were published: composed by name, and counted on their parents.

Source of the counts: the children's checkpoints, to the unit; of Nano 3 22B the printed digits.
"""

from dataclasses import replace

import pytest

from hybrid_train.anatomy.counts import parameters
from hybrid_train.compression.choosing import choose
from hybrid_train.compression.cut_rules import remarks
from hybrid_train.config.compose import compose
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import ConfigError
from hybrid_train.schema.pruning import PruneJob
from tests.rankings import random_ranking, with_scores

# cut -> parent, child with its sizes, parameters
CUTS = {
    "nemotron_h_4b": ("nemotron_h_8b", "nemotron_h_4b", 4_489_223_040),
    "nemotron_h_47b": ("nemotron_h_56b", "nemotron_h_47b", 46_791_554_816),
    "nemotron_nano_v2_9b": ("nemotron_nano_v2_12b", "nemotron_nano_v2_9b", 8_888_227_328),
    "minitron_8b": ("nemotron4_15b", "minitron_8b", 8_271_699_968),
    "minitron_4b": ("minitron_8b", "minitron_4b", 4_190_509_056),
    "llama3_1_minitron_4b_width": (
        "llama3_1_8b", "llama3_1_minitron_4b_width", 4_512_746_496,
    ),
    "llama3_1_minitron_4b_depth": (
        "llama3_1_8b", "llama3_1_minitron_4b_depth", 4_540_469_248,
    ),
    "mistral_nemo_minitron_8b": ("mistral_nemo_12b", "mistral_nemo_minitron_8b", 8_414_105_600),
}  # fmt: skip


def job_of(name: str, *lines: str) -> PruneJob:
    job = compose("prune", [f"cut={name}", "checkpoint=here", "output=runs/child", *lines])
    assert isinstance(job, PruneJob)
    return job


def model_of(name: str) -> Model:
    return compose("count", [f"model={name}"]).model


def child_of(job: PruneJob, parent: Model) -> Model:
    ranking = random_ranking(parent)
    scores = ranking.scores["layers.cosine"]
    named = {f"layers.{job.depth.metric}": scores} if job.depth.metric else {}
    return choose(parent, with_scores(ranking, named), job, rows_of(parent)).model


def rows_of(model: Model) -> int:
    assert model.vocab_size is not None
    return padded_vocab_size(model.vocab_size, model.vocab_multiple)


@pytest.mark.parametrize("name", CUTS)
def test_a_child_has_the_published_sizes_and_parameters(name: str) -> None:
    parent, child, number = CUTS[name]
    cut, published = child_of(job_of(name), model_of(parent)), model_of(child)
    totals = {parameters(one, rows_of(one)).total for one in (cut, published)}
    assert totals == {number}
    assert sorted(cut.pattern) == sorted(published.pattern), "as many layers of each kind"
    apart = {"pattern": published.pattern, "init_std": published.init_std}
    assert replace(cut, **apart) == published, "but for its first values, which nobody draws"


def test_nano_22b_has_the_printed_parameters() -> None:
    cut = child_of(job_of("nemotron3_nano_22b"), parent := model_of("nemotron3_nano"))
    count = parameters(cut, rows_of(cut))
    assert f"{count.total / 1e9:.1f} {count.active / 1e9:.1f}" == "22.3 3.0"
    assert cut.pattern == parent.pattern
    (expert,) = remarks(parent, cut)
    assert "parallel.expert=16" in expert, "104 experts divide among 8 ranks, not among 16"


def test_the_second_stage_of_nano_9b_cuts_the_shortened_parent_by_the_same_name() -> None:
    shortened = child_of(job_of("nemotron_nano_v2_9b_depth"), model_of("nemotron_nano_v2_12b"))
    assert len(shortened.pattern) == 56
    assert shortened.hidden_size == 5120
    ranking = random_ranking(shortened)  # of widths alone: no layer goes
    child = choose(shortened, ranking, job_of("nemotron_nano_v2_9b"), rows_of(shortened)).model
    assert child.pattern == shortened.pattern
    assert parameters(child, rows_of(child)).total == CUTS["nemotron_nano_v2_9b"][2]


def test_a_transformer_loses_whole_blocks_and_keeps_its_last_one() -> None:
    job, parent = job_of("llama3_1_minitron_4b_depth"), model_of("llama3_1_8b")
    found = choose(parent, None, job, rows_of(parent))  # a list of blocks needs no ranking
    blocks = sorted({(one.parent.number + 1) // 2 for one in found.selection.layers})
    assert blocks == [*range(1, 16), 32]
    assert found.model.pattern == "*-" * 16


def test_heads_go_within_their_groups_and_all_groups_stay() -> None:
    parent = model_of("minitron_8b")
    cut = child_of(job_of("minitron_4b"), parent)
    assert (parent.attention.heads, cut.attention.heads) == (48, 24)
    assert cut.attention.kv_heads == parent.attention.kv_heads == 8


def test_what_is_typed_beside_a_published_cut_holds() -> None:
    job = job_of("nemotron_h_4b", "model.hidden_size=2560", "depth.drop=[3,17-32]", "mtp=drop")
    assert (job.model.hidden_size, job.model.mamba.heads) == (2560, 112)
    assert job.depth.drop == ["3", "17-32"]
    assert job.mtp.value == "drop"
    with pytest.raises(ConfigError, match=r"cut = nemotron_h_4: .* nearest: nemotron_h_4b"):
        job_of("nemotron_h_4")
