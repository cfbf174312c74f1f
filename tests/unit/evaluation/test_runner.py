"""Tasks on a model: choices against whole logits, written answers against greedy decoding."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybrid_train.evaluation.items import Item
from hybrid_train.schema.evaluation import Asking
from hybrid_train.schema.problems import UserError
from tests.asked import log_probs, subject, tokenizer
from tests.tiny import MEGATRON_WARNINGS, alone

pytestmark = MEGATRON_WARNINGS
ROUNDING = 2e-5  # nats a token
PROMPTS = ("def add(a, b):", "x = [1, 2", "", "import")
CHOICES = ("\n    return a + b", ", 3]\n", "é", " os\n")


@pytest.fixture(scope="module")
def asked() -> Iterator[Any]:
    with alone() as groups:
        yield subject(groups)


class Mixed:
    """Items with choices and items that are answered in writing, in turn."""

    name = "mixed"

    def __init__(self, right: str = CHOICES[0]) -> None:
        self._right = right

    def items(self) -> Sequence[Item]:
        chosen = [
            Item(f"choice {number}", prompt, self._right, CHOICES, group=f"group={number % 2}")
            for number, prompt in enumerate(PROMPTS)
        ]
        written = [
            Item(f"text {number}", prompt, "a", max_tokens=6, stop=("(", "\n"), document="one")
            for number, prompt in enumerate(PROMPTS)
        ]
        return [item for pair in zip(chosen, written, strict=True) for item in pair]

    def grade(self, item: Item, answer: str) -> float:
        if item.choices:
            return float(answer == item.answer)
        # A verifier that likes some answers, whatever they are.
        return float(hashlib.sha256(answer.encode()).digest()[0] < 100)


def questions(task: Any = None, **settings: Any) -> Any:
    from hybrid_train.evaluation.runner import Questions

    return Questions(task or Mixed(), {}, Asking(**settings))


def test_a_choice_is_the_likeliest_by_whole_logits_and_by_byte(asked: Any) -> None:
    found = {one.name: one for one in questions().run(asked)}
    assert list(found) == [one.name for one in Mixed().items()]
    for number, prompt in enumerate(PROMPTS):
        before = tokenizer().encode(prompt) or [0]
        sums = []
        for choice in CHOICES:
            ids = before + tokenizer().encode(choice)
            assert not prompt or tokenizer().encode(prompt + choice) == ids
            logs, labels = log_probs(asked, ids)[len(before) - 1 : -1], ids[len(before) :]
            sums.append(float(logs.gather(1, torch.tensor(labels)[:, None]).sum()))
        one = found[f"choice {number}"]
        assert one.said["log_probs"] == pytest.approx(sums, abs=10 * ROUNDING)
        best = max(range(len(CHOICES)), key=sums.__getitem__)
        per_byte = [each / len(c.encode()) for each, c in zip(sums, CHOICES, strict=True)]
        best_per_byte = max(range(len(CHOICES)), key=per_byte.__getitem__)
        assert one.said["choice"] == CHOICES[best]
        assert one.values["accuracy"] == (float(best == 0), 1)
        assert one.values["accuracy_per_byte"] == (float(best_per_byte == 0), 1)
        assert one.group == f"group={number % 2}"
        right = questions(Mixed(CHOICES[best])).run(asked)
        assert {each.name: each for each in right}[one.name].values["accuracy"] == (1, 1)


def test_a_written_answer_is_the_greedy_text_up_to_the_first_stop(asked: Any) -> None:
    found = {one.name: one for one in questions().run(asked)}
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer().encode(prompt) or [0]
        start = len(ids)
        while len(ids) < start + 6:
            ids.append(int(log_probs(asked, ids)[-1].argmax()))
            if ids[-1] == 0:
                break
        text = tokenizer().decode(ids[start:], skip_special=True)
        for stop in ("(", "\n"):
            text = text.partition(stop)[0]
        one = found[f"text {number}"]
        assert one.said["answers"] == [text]
        grade = Mixed().grade(Mixed().items()[1], text)
        assert one.values == {"score": (grade, 1)}
        assert one.document == "one"


def test_of_several_samples_pass_at_k_is_estimated_and_answers_follow_the_seed(asked: Any) -> None:
    from hybrid_train.evaluation.intervals import pass_at_k

    def run(seed: int) -> dict[str, Any]:
        made = questions(samples=6, temperature=1.0, seed=seed)
        return {one.name: one for one in made.run(asked) if one.name.startswith("text")}

    first, again, other = run(1), run(1), run(2)
    assert first == again != other
    assert len({text for one in first.values() for text in one.said["answers"]}) > 6
    rights = set()
    for one in first.values():
        right = sum(one.said["grades"])
        rights.add(right)
        assert one.values["score"] == (pytest.approx(right / 6), 1)
        for k in (1, 2, 4, 6):
            wanted = float(pass_at_k([6], [int(right)], k)[0])
            assert one.values[f"pass@{k}"] == (wanted, 1)
    assert len(rights) > 1


def test_an_answer_does_not_depend_on_the_items_beside_it(asked: Any) -> None:
    given = {"samples": 3, "temperature": 1.0, "batch": 2}
    whole = questions(**given).run(asked)
    part = questions(**given, limit=4).run(asked)
    assert [(one.name, one.said.get("answers")) for one in part] == [
        (one.name, one.said.get("answers")) for one in whole[:4]
    ]


def test_what_merges_across_the_border_is_encoded_apart_and_counted(
    asked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reader = asked.reader
    assert tokenizer().encode("return")[:2] != tokenizer().encode("re")  # "et" is a token
    text, is_joint = reader.continued("re", "turn")
    assert not is_joint
    assert list(text.tokens) == tokenizer().encode("re") + tokenizer().encode("turn")
    assert text.start == len(tokenizer().encode("re"))
    text, is_joint = reader.continued("return", " a")
    assert is_joint
    assert tokenizer().decode(text.tokens[text.start :]) == " a"

    class Merging(Mixed):
        def items(self) -> Sequence[Item]:
            return [Item("one", "re", "turn", ("turn", " a"))]

    with caplog.at_level("INFO"):
        questions(Merging()).run(asked)
    assert "merges letters of prompt and choice in 1 choice of 2" in caplog.text


def test_a_token_that_the_model_does_not_know_is_refused_before_anything_runs(asked: Any) -> None:
    class Small:
        vocab_size = 20

        def __getattr__(self, name: str) -> Any:
            raise AssertionError("the model was asked")

    with pytest.raises(UserError, match=r"mixed.*beyond the vocabulary of the model, which has 20"):
        questions().run(replace(asked, network=Small()))


def test_hashes_tell_items_apart_and_settings_of_writing_count_where_something_is_written() -> None:
    class Chosen(Mixed):
        def items(self) -> Sequence[Item]:
            return [one for one in super().items() if one.choices]

    assert questions().items_hash == questions().items_hash != questions(limit=3).items_hash
    assert questions(Mixed(CHOICES[1])).items_hash != questions().items_hash
    assert questions(Chosen(), temperature=1.0).settings == {}
    assert questions(temperature=1.0).settings == {"samples": 1, "temperature": 1.0}
