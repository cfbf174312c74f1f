"""A student's objective: what it is a mean of, and that nothing else has an influence."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid_train.schema.objective import Distill, MtpTarget, WeighedTeacher
from hybrid_train.schema.problems import UserError
from tests.distilled import student_job, write_teacher
from tests.parity import shards
from tests.tiny import (
    BATCH,
    LENGTH,
    MEGATRON_WARNINGS,
    VOCAB,
    batch_of,
    losses_of,
    some_rows,
    tiny_engine,
)

pytestmark = MEGATRON_WARNINGS
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def teachers(groups: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whose weights are those that a student starts from, and others."""
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "same": write_teacher(folder / "same", groups),
        "other": write_teacher(folder / "other", groups, seed=7),
        "wider": write_teacher(folder / "wider", groups, hidden_size=48, vocab_multiple=80),
        # The same weights, of which it calls three rows tokens that are padding of the student.
        "more tokens": write_teacher(folder / "more tokens", groups, vocab_size=64),
    }


def batches(size: int = BATCH, mask: Tensor | None = None, rows: Tensor | None = None) -> Any:
    rows = some_rows() if rows is None else rows
    mask = some_mask() if mask is None else mask
    return [batch_of(*parts) for parts in zip(rows.split(size), mask.split(size), strict=True)]


def some_mask() -> Tensor:
    """Weights of labels, of which rows have different numbers."""
    mask = torch.ones(BATCH, LENGTH)
    for number in range(BATCH):
        mask[number, : 3 * number] = 0.0
    return mask


def step(groups: Any, job: Any, microbatches: Sequence[Any]) -> tuple[Any, dict[str, Tensor]]:
    """Take a step; return its report and the gradients."""
    job.train.microbatch = len(microbatches[0].tokens)
    engine = tiny_engine(job, groups)
    report = engine.step(iter(microbatches), tokens_seen=0)
    return report, shards.assemble(shards.gradients(engine.network.chunks))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest element."""
    largest = max(value.abs().max() for value in one.values())
    return float(max((one[key] - other[key]).abs().max() for key in one) / largest)


@pytest.mark.parametrize("teacher", ["same", "more tokens"])
def test_a_teacher_that_is_the_student_leaves_nothing_to_learn(
    groups: Any, teachers: dict[str, Path], teacher: str
) -> None:
    report, gradients = step(groups, student_job(teachers[teacher]), batches())
    # Rounding of log q - log p, squared: the divergence of two distributions that are one.
    assert report.loss < EPSILON
    assert report.metrics["mtp_loss_1"] < EPSILON
    assert max(value.abs().max() for value in gradients.values()) < 8 * EPSILON
    assert "agreement" not in report.metrics


def test_another_teacher_gives_another_gradient(groups: Any, teachers: dict[str, Path]) -> None:
    found = {
        name: step(groups, student_job(teachers[name]), batches()) for name in ("other", "wider")
    }
    assert found["other"][0].loss > 0.01
    assert apart(found["other"][1], found["wider"][1]) > 0.1


def test_the_loss_is_what_ten_lines_in_float64_say(groups: Any, teachers: dict[str, Path]) -> None:
    """(1 - c) t^2 [(1 - r) KL(p || q) + r KL(q || p)] + c CE of every label that counts."""
    settings = {"temperature": 2.0, "reverse_share": 0.3, "cross_entropy_share": 0.2}
    job = student_job(teachers["wider"], mtp=MtpTarget.off, **settings)
    report, _ = step(groups, job, batches())
    logits = {}
    for name, network in networks(groups, job).items():
        batch = batches()[0]
        with torch.no_grad():
            model = network.chunks[0]
            outputs = model(batch.tokens, read=lambda outputs: outputs.logits())
        logits[name] = outputs[..., :VOCAB].double()
    p, q = ((logits[name] / 2).log_softmax(-1) for name in ("teacher", "student"))
    forward, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    labels = batch.labels[..., None]
    cross = -logits["student"].log_softmax(-1).gather(-1, labels).squeeze(-1)
    each = 0.8 * 4 * (0.7 * forward + 0.3 * reverse) + 0.2 * cross
    expected = float((each * some_mask()).sum() / some_mask().sum())
    assert report.loss == pytest.approx(expected, rel=32 * EPSILON)
    mean = float((cross * some_mask()).sum() / some_mask().sum())
    assert report.metrics["cross_entropy"] == pytest.approx(mean, rel=32 * EPSILON)


def networks(groups: Any, job: Any) -> dict[str, Any]:
    engine = tiny_engine(job, groups)
    return {"student": engine.network, "teacher": engine.objective._teachers[0].network}


def test_labels_and_rows_that_do_not_count_have_no_influence(
    groups: Any, teachers: dict[str, Path]
) -> None:
    job = student_job(teachers["other"], cross_entropy_share=0.5)
    report, gradients = step(groups, job, batches())
    for label, counts in ((0, False), (1, True)):
        (batch,) = batches()
        labels = batch.labels.masked_fill((batch.loss_weights > 0) == counts, label)
        again, others = step(groups, job, [replace(batch, labels=labels)])
        assert (again.loss == report.loss) is not counts
        assert (apart(gradients, others) == 0) is not counts


@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_that_is_cut_otherwise_gives_the_same_gradient(
    groups: Any, teachers: dict[str, Path], size: int
) -> None:
    whole, expected = step(groups, student_job(teachers["other"]), batches())
    report, gradients = step(groups, student_job(teachers["other"]), batches(size))
    assert report.loss == pytest.approx(whole.loss, rel=32 * EPSILON)
    assert apart(expected, gradients) < 256 * EPSILON


def test_several_teachers_count_by_their_weights(groups: Any, teachers: dict[str, Path]) -> None:
    alone = {
        name: step(groups, student_job(teachers[name]), batches())[0].loss
        for name in ("other", "wider")
    }
    named = [
        WeighedTeacher(checkpoint=str(teachers["other"]), weight=3.0),
        WeighedTeacher(checkpoint=str(teachers["same"]), weight=0.0),
        WeighedTeacher(checkpoint=str(teachers["wider"])),
    ]
    report, _ = step(groups, student_job(teachers=named), batches())
    expected = 0.75 * alone["other"] + 0.25 * alone["wider"]
    assert report.loss == pytest.approx(expected, rel=32 * EPSILON)


def test_mtp_depths_learn_the_labels_or_nothing(groups: Any, teachers: dict[str, Path]) -> None:
    job = student_job(teachers["other"], mtp=MtpTarget.cross_entropy)
    report, gradients = step(groups, job, batches())
    _, losses = losses_of(networks(groups, job)["student"].chunks[0].module, batches()[0])
    mask = pad(some_mask()[:, 1:], (0, 1))
    expected = float((losses[1] * mask).sum() / mask.sum())
    assert report.metrics["mtp_loss_1"] == pytest.approx(expected, rel=32 * EPSILON)
    own = [key for key in gradients if key.startswith("mtp.")]
    assert own
    assert all(gradients[key].any() for key in own)


@pytest.mark.parametrize("overlap", [False, True])
def test_mtp_blocks_that_are_off_stay_as_they_are_and_all_else_moves(
    overlap: bool, groups: Any, teachers: dict[str, Path]
) -> None:
    """Without a gradient, weight decay alone would move them; and no reduction waits for one."""
    job = student_job(teachers["other"], mtp=MtpTarget.off)
    job.parallel.overlap_grad_reduce = overlap
    engine = tiny_engine(job, groups)
    weights = dict(engine.network.chunks[0].module.named_parameters())
    before = {name: one.detach().clone() for name, one in weights.items()}
    report = engine.step(iter(batches(engine.microbatch)), tokens_seen=10**6)
    assert "mtp_loss_1" not in report.metrics
    still = {name for name, one in weights.items() if torch.equal(one, before[name])}
    assert still == {name for name in weights if name.startswith("mtp.")}


def test_a_validation_tells_how_often_both_hold_the_same_token_to_be_likeliest(
    groups: Any, teachers: dict[str, Path]
) -> None:
    found = {}
    for name in ("same", "other"):
        job = student_job(teachers[name])
        job.train.microbatch = BATCH
        found[name] = tiny_engine(job, groups).evaluate(batches())
    assert found["same"]["agreement"] == 1
    assert found["same"]["divergence"] < EPSILON
    assert found["other"]["agreement"] < 0.5
    assert found["same"]["cross_entropy"] == found["other"]["cross_entropy"]


def test_a_validation_keeps_no_more_slots_than_a_step(
    groups: Any, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And measures what one measures that keeps all of them."""
    engine = tiny_engine(student_job(teachers["other"]), groups)
    size, (teacher,) = engine.microbatch, engine.objective._teachers
    held = BATCH // size  # microbatches of a step
    several = [one for _ in range(3) for one in batches(size)][: 3 * held - 1]
    run_ahead, slots, numbers = teacher.run_ahead, [], []

    def counted(given: Any, *, with_mtp: bool) -> Any:
        gc.collect()
        assert [one for one in slots if one() is not None] == []  # those before are gone
        found = run_ahead(given, with_mtp=with_mtp)
        slots.extend(weakref.ref(one.token_extras["teacher_hidden.0"]) for one in found)
        numbers.append(len(found))
        return found

    monkeypatch.setattr(teacher, "run_ahead", counted)
    found = engine.evaluate(several)
    assert numbers == [held, held, held - 1]
    monkeypatch.setattr(engine, "sequences_per_step", 3 * BATCH)
    assert engine.evaluate(several) == pytest.approx(found, rel=4 * EPSILON)
    assert numbers[3:] == [3 * held - 1]


def test_a_teacher_that_is_no_number_ends_the_run_by_its_name(
    groups: Any, teachers: dict[str, Path]
) -> None:
    job = student_job(teachers["other"])
    job.train.microbatch = BATCH
    engine = tiny_engine(job, groups)
    (teacher,) = engine.objective._teachers
    next(teacher.network.chunks[0].decoder.parameters()).data[0] = torch.nan
    with pytest.raises(UserError, match=f"teacher {teachers['other']}: its hidden states"):
        engine.step(iter(batches()), tokens_seen=0)


def test_frozen_weights_that_are_equal_are_there_once(
    groups: Any, teachers: dict[str, Path]
) -> None:
    job = student_job(teachers["same"])
    engine = tiny_engine(job, groups)
    (teacher,) = engine.objective._teachers
    student = dict(engine.network.chunks[0].module.named_parameters())
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    student[names[0]].requires_grad_(False)
    engine.objective.prepare([])
    own = dict(teacher.network.chunks[0].named_parameters())
    assert own[names[0]].data_ptr() == student[names[0]].data_ptr()
    assert own[names[1]].data_ptr() != student[names[1]].data_ptr()  # it will be another


def test_settings_say_what_the_aim_is() -> None:
    said = {problem.path for problem in Distill().problems()}
    assert said == {"teacher"}
