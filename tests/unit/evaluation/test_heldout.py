"""Held-out text against ten lines that do the same by the definition, in float64."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_train.data.documents import Joined
from hybrid_train.schema.evaluation import HeldOut as Settings
from hybrid_train.schema.problems import UserError, collect
from tests.asked import TEXTS, Texts, log_probs, sources, subject, tokenizer
from tests.tiny import MEGATRON_WARNINGS, alone

pytestmark = MEGATRON_WARNINGS
LENGTH = 16  # of a window; half of the documents are longer
ROUNDING = 2e-5  # nats a token: float32 sums of another order, through six layers


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    with alone() as groups:
        yield groups


def held_out(**settings: Any) -> Any:
    from hybrid_train.evaluation.heldout import HeldOut

    given = {"length": LENGTH, "seed": 1} | settings
    asked = Settings(positions=given.pop("positions", []))
    return HeldOut(given.pop("sources", sources()), tokenizer(), asked, **given)


def reference(subject: Any, text: str, other: Any = None) -> np.ndarray[Any, Any]:
    """Nats, tokens, bytes, right tokens, divergence and agreement of a text, by the definition."""
    ids = [0, *subject.reader.tokenizer.encode(text), 0]
    found = np.zeros(6)
    for start in range(0, len(ids) - 1, LENGTH):
        window = ids[start : start + LENGTH + 1]
        logs, labels = log_probs(subject, window)[:-1], torch.tensor(window[1:])
        found[:2] -= float(logs.gather(1, labels[:, None]).sum()), -len(labels)
        found[3] += int((logs.argmax(-1) == labels).sum())
        if other is not None:
            theirs = log_probs(other, window)[:-1]
            found[4] += float((theirs.exp() * (theirs - logs)).sum())
            found[5] += int((theirs.argmax(-1) == logs.argmax(-1)).sum())
    found[2] = len(text.encode())
    return found


def texts_of(source: str) -> tuple[str, ...]:
    return TEXTS[:3] if source == "code" else TEXTS[3:]


@pytest.mark.parametrize("coarse", [False, True], ids=["own tokenizer", "other tokenizer"])
def test_loss_bits_per_byte_and_accuracy_are_those_of_the_reference(
    groups: Any, coarse: bool
) -> None:
    from hybrid_train.evaluation.results import Checkpoint, Result, overall

    asked = subject(groups, coarse=coarse)
    items = held_out().run(asked)
    assert sorted(one.name for one in items) == ["code/0", "code/1", "code/2", "rest/0", "rest/1"]
    total = np.zeros(6)
    for one in items:
        source, number = one.name.split("/")
        wanted = reference(asked, texts_of(source)[int(number)])
        assert one.group == source
        assert one.values["loss"] == pytest.approx(wanted[:2], abs=ROUNDING * wanted[1])
        assert one.values["accuracy"] == (wanted[3], wanted[1])
        bits = (wanted[0] / math.log(2), wanted[2])
        assert one.values["bits_per_byte"] == pytest.approx(bits, abs=ROUNDING * wanted[1])
        total += wanted
    found, loss = overall(items), total[0] / total[1]
    assert found["loss"] == pytest.approx(loss, abs=ROUNDING)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=ROUNDING)
    assert found["bits_per_byte"] == pytest.approx(total[0] / math.log(2) / total[2], rel=ROUNDING)
    checkpoint = Checkpoint("a", "1", asked.reader.tokenizer.fingerprint)
    figures = list(Result("heldout", checkpoint, {}, "", 0, {}, tuple(items)).figures())
    overall_ones = {one.metric: one.value for one in figures if not one.group}
    assert overall_ones == pytest.approx(found, rel=1e-12)
    assert {one.group for one in figures} == {"", "code", "rest"}


def test_two_models_are_compared_by_the_definition(groups: Any) -> None:
    asked, other = subject(groups), subject(groups)
    for weight in other.network.chunks[0].parameters():
        weight.data.mul_(1.2)
    both = dataclasses.replace(asked, against=other.network)
    for one in held_out(against="another").run(both):
        source, number = one.name.split("/")
        wanted = reference(asked, texts_of(source)[int(number)], other)
        assert one.values["divergence"] == pytest.approx((wanted[4], wanted[1]), rel=1e-4)
        assert one.values["agreement"] == (wanted[5], wanted[1])


def test_the_first_token_is_no_label_where_documents_did_not_see_each_other(groups: Any) -> None:
    """Its bytes do not count either: they are text that nothing was predicted of."""
    asked = subject(groups, is_packed=True)
    one = next(one for one in held_out().run(asked) if one.name == "rest/1")
    ids = [*tokenizer().encode(TEXTS[4]), 0]
    assert one.values["loss"][1] == len(ids) - 1
    first = tokenizer().decode(ids[:1])
    assert one.values["bits_per_byte"][1] == len(TEXTS[4].encode()) - len(first.encode())


def test_documents_are_drawn_by_the_seed_and_a_limit_cuts_the_same_list() -> None:
    many = {"many": Joined("many", [Texts([f"text {number}\n" for number in range(50)])])}
    made = [held_out(sources=many, seed=seed) for seed in (1, 1, 2)]
    drawn = [[document.number for document in one.documents] for one in made]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == list(range(50)) != drawn[0]
    limited = held_out(sources=many, limit=7)
    assert [one.number for one in limited.documents] == drawn[0][:7]
    assert limited.items_hash != held_out(sources=many).items_hash


def test_documents_end_when_there_are_tokens_enough() -> None:
    from hybrid_train.evaluation.heldout import HeldOut

    texts = Joined("many", [Texts(["12345\n"] * 50)])
    length, budget = int(texts.lengths[0]), 20
    found = HeldOut({"many": texts}, tokenizer(), Settings(tokens=str(budget)), length=4, seed=0)
    *whole, last = found.documents
    assert [len(one.tokens) for one in whole] == [length] * (budget // length)
    assert len(last.tokens) == budget % length
    assert whole[0].text.startswith(last.text)


def test_without_held_out_text_the_setting_that_names_some_is_said() -> None:
    with pytest.raises(UserError, match=r"task.heldout.files=\[PREFIX\]"):
        held_out(sources={})


def test_split_by_position_each_token_counts_once_at_its_place_in_its_window(groups: Any) -> None:
    """Against the definition, window by window; all over all equals what is not split."""
    from hybrid_train.evaluation.results import overall

    asked, bounds = subject(groups), [0, 2, 7, LENGTH]
    items = held_out(positions=bounds[1:-1]).run(asked)
    wanted = {f"position={a}-{b - 1}": np.zeros(2) for a, b in itertools.pairwise(bounds)}
    for text in TEXTS:
        ids = [0, *tokenizer().encode(text), 0]
        for start in range(0, len(ids) - 1, LENGTH):
            window = ids[start : start + LENGTH + 1]
            logs, labels = log_probs(asked, window)[:-1], torch.tensor(window[1:])
            nats = -logs.gather(1, labels[:, None])[:, 0]
            for first, end in itertools.pairwise(bounds):
                part = nats[first:end]
                wanted[f"position={first}-{end - 1}"] += float(part.sum()), len(part)
    found = {group: np.zeros(2) for group in wanted}
    for one in items:
        if one.group:
            found[one.group] += one.values["loss"]
    for group, value in wanted.items():
        assert found[group][1] == value[1]
        assert found[group][0] == pytest.approx(value[0], abs=ROUNDING * value[1])
    whole, split = overall(held_out().run(asked)), overall(items)
    assert split == pytest.approx(whole, rel=1e-12)
    assert {one.document for one in items} == {one.name for one in held_out().run(asked)}


def test_a_position_that_no_window_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"positions = \[4, 16\]: must lie below .* window, 16"):
        held_out(positions=[4, LENGTH])
    (problem,) = collect(Settings(positions=[4, 2]))
    assert (problem.path, problem.nearest) == ("positions", [2, 4])
    (problem,) = collect(Settings(positions=[4], length=4))
    assert problem.path == "positions"
