"""The file of answers: whole lines, nothing twice, nothing of another batch."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.generation.answers import Answer, AnswerFile, Question, all_of
from hybrid_train.generation.prompts import read_prompts
from hybrid_train.generation.requests import Finish, NewTokens
from hybrid_train.generation.thinking import Budget
from hybrid_train.schema.job_roots import GenerateJob
from hybrid_train.schema.problems import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_byte_level_bpe(["a"], vocab_size=257)


def questions(
    tokenizer: Tokenizer, *texts: str, budget: Budget | None = None, **settings: Any
) -> list[Question]:
    prompts = read_prompts(GenerateJob(checkpoint="unused", prompt=list(texts), **settings))
    return [
        Question(
            prompt=one, text=str(one.content), tokens=tokenizer.encode(str(one.content)),
            budget=budget, ends=frozenset({tokenizer.end_of_document}),
        )
        for one in prompts
    ]  # fmt: skip


def answered(
    tokenizer: Tokenizer, question: Question, number: int, text: str, finish: Finish = Finish.length
) -> Answer:
    answer = Answer(question, number, tokenizer)
    tokens = tokenizer.encode(text)
    for token in tokens:
        answer.take(token)
    answer.add(NewTokens(request=0, tokens=tokens, log_probs=[-1.0] * len(tokens), finish=finish))
    return answer


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(path: Path, tokenizer: Tokenizer, some: Sequence[Question]) -> list[tuple[int, int]]:
    """Answer what is missing; return what that was."""
    done = []
    with AnswerFile(path, "run/step") as file:
        for question, number in file.missing(some):
            file.write(answered(tokenizer, question, number, f"{question.text}{number}"))
            done.append((int(question.prompt.name), number))
    return done


def test_a_line_says_what_was_asked_and_what_came(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (question,) = questions(tokenizer, "a\u20ac", seed=7)
    answer = answered(tokenizer, question, 0, "b\u20ac")
    answer.log_probs[1] = -math.inf
    with AnswerFile(tmp_path / "out.jsonl", "run/step", log_probs=True) as file:
        file.write(answer)
    (line,) = written(file.path)
    made = line.pop("generated")
    assert line == {"id": 1, "prompt": "a\u20ac"}
    assert made.pop("key") == question.key(0, "run/step", log_probs=True)
    assert made == {
        "answer": 0, "text": "b\u20ac", "tokens": tokenizer.encode("b\u20ac"),
        "log_probs": [-1.0, None, -1.0, -1.0], "finish": "length", "prompt_tokens": 4,
        "new_tokens": 4, "seed": 7,
    }  # fmt: skip


def test_a_killed_batch_goes_on_with_what_is_missing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    some = questions(tokenizer, "a", "b", "c", n=2, temperature=1.0)
    path = tmp_path / "out.jsonl"
    everything = [(prompt, answer) for prompt in (1, 2, 3) for answer in (0, 1)]
    assert fill(path, tokenizer, some) == everything
    whole = path.read_bytes()
    for cut in range(0, len(whole), 37):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        assert fill(path, tokenizer, some) == everything[lines:]
        assert path.read_bytes() == whole
    assert fill(path, tokenizer, some) == []


def test_prompts_and_answers_may_be_added(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, tokenizer, questions(tokenizer, "a", "b", temperature=1.0))
    more = questions(tokenizer, "a", "b", "c", temperature=1.0, n=2)
    assert fill(path, tokenizer, more) == [(1, 1), (2, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize(
    "change",
    [{"seed": 5}, {"temperature": 0.9}, {"stop": ["x"]}, {"ignore_end": True}, {"text": "z"}],
    ids=str,
)
def test_answers_of_another_batch_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, tokenizer, questions(tokenizer, "a", "b", temperature=1.0))
    with path.open("ab") as file:
        file.write(b"a part of a line")
    before = path.read_bytes()
    settings = {"temperature": 1.0} | change
    text = str(settings.pop("text", "b"))
    with pytest.raises(UserError, match=r"line 1|line 2") as error:
        fill(path, tokenizer, questions(tokenizer, "a", text, **settings))
    assert "choose another output" in str(error.value)
    assert path.read_bytes() == before


def test_a_file_of_something_else_is_refused_and_left_alone(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nmore")
    with pytest.raises(UserError, match="line 1 is no answer that was generated"):
        AnswerFile(path, "run/step")
    assert path.read_text() == "my notes\nmore"


@pytest.mark.parametrize(
    "content",
    ["notes", '{"id": "x", "prompt": "a"}', '{"id": 1, "prompt": "a", "generated": 3}', '{"id": 2'],
)
def test_a_tail_that_is_of_no_answer_is_refused_and_left_alone(
    tokenizer: Tokenizer, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="ends with a part of a line with which no answer"):
        fill(path, tokenizer, questions(tokenizer, "a"))
    assert path.read_text() == content


def test_an_output_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in [
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is a device or a pipe"),
        (Path("/dev/full"), "is a device or a pipe"),
        (Path("/proc/x.jsonl"), "cannot be written: No such file"),
        (tmp_path / "none" / "x.jsonl", "cannot be written: No such file"),
    ]:
        with pytest.raises(UserError, match=said):
            AnswerFile(path, "run/step")


def test_a_file_is_of_one_job_at_a_time(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, some = tmp_path / "out.jsonl", questions(tokenizer, "a")
    with (
        AnswerFile(path, "run/step"),
        pytest.raises(UserError, match="another job writes into it now"),
    ):
        fill(path, tokenizer, some)
    assert fill(path, tokenizer, some) == [(1, 0)]


def test_an_answer_that_is_there_twice_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, some = tmp_path / "out.jsonl", questions(tokenizer, "a")
    fill(path, tokenizer, some)
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(UserError, match="line 2 is answer 0 to id 1, as is line 1"):
        fill(path, tokenizer, some)


@pytest.mark.parametrize(
    "line",
    [
        {"id": 1, "generated": {"answer": [1], "key": "x"}},
        {"id": 1, "generated": {"answer": True, "key": "x"}},
        {"id": 1.0, "generated": {"answer": 1, "key": "x"}},
        {"id": 1, "generated": {"answer": 1, "key": None}},
        {"id": 1, "generated": [1]},
        [1],
    ],
    ids=str,
)
def test_a_line_of_other_types_is_refused(tmp_path: Path, line: object) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="line 1 is no answer that was generated"):
        AnswerFile(path, "run/step")


def test_an_end_token_has_its_text_and_a_stop_has_none(tokenizer: Tokenizer) -> None:
    (question,) = questions(tokenizer, "a", stop=["st"])
    answer = Answer(question, 0, tokenizer)
    watch = question.request(0, lambda: answer).watch()
    b, s, t, exclamation = tokenizer.encode("bst!")
    assert [watch.take(token) for token in (b, s)] == [False, False]
    assert answer.add(NewTokens(request=0, tokens=[b, s], log_probs=[0, 0])) == "b"
    ended = NewTokens(request=0, tokens=[exclamation], log_probs=[0], finish=Finish.end)
    assert answer.add(ended) == "s!"
    answer = Answer(question, 0, tokenizer)
    assert [answer.take(token) for token in (b, s, t)] == [False, False, True]
    new = NewTokens(request=0, tokens=[b, s, t], log_probs=[0] * 3, finish=Finish.stop)
    assert answer.add(new) == answer.text == "b"


def test_the_request_has_the_settings_of_the_prompt(tokenizer: Tokenizer) -> None:
    budget = Budget(tokens=0, grace=0, opened="<think>", closed="</think>", end=[1, 2])
    settings = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
    }  # fmt: skip
    (question,) = questions(
        tokenizer, "<think>", budget=budget, n=2, seed=3, max_new_tokens=9, **settings
    )
    first, second = (Answer(*one, tokenizer) for one in all_of([question]))
    request = question.request(second.number, lambda: second)
    assert vars(request.sampling) == settings | {"seed": 4}
    assert request.max_new_tokens == 9
    assert first.forced() == 1
    first.take(1)
    assert first.forced() == 2
