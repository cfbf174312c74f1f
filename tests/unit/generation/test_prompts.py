"""Prompts of a command line and of files: what is read, and how what is wrong is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.generation.prompts import Prompt, read_prompts, seed_of
from hybrid_train.schema.job_roots import GenerateJob, Reasoning
from hybrid_train.schema.problems import UserError


def job(**settings: Any) -> GenerateJob:
    return GenerateJob(checkpoint="unused", **settings)


def of_lines(folder: Path, *lines: object, **settings: Any) -> list[Prompt]:
    path = folder / "prompts.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts))
    return read_prompts(job(prompt_file=str(path), **settings))


def test_command_line_and_file_count_on_and_empty_lines_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two \n")
    found = read_prompts(job(prompt=["zero", ""], prompt_file=str(path)))
    assert [one.content for one in found] == ["zero", "", "one", "  two "]
    assert [one.name for one in found] == [1, 2, 3, 4]
    assert found[3].where == f"{path}, line 3"


def test_a_line_sets_what_it_names_and_the_rest_is_that_of_the_command(tmp_path: Path) -> None:
    one, other = of_lines(
        tmp_path,
        {"prompt": "a", "temperature": 1, "stop": ["\n"], "reasoning": "off", "bos": None},
        {"prompt": "b"},
        top_k=7,
        bos=True,
    )
    own = one.settings
    assert (own.temperature, own.stop, own.reasoning) == (1.0, ["\n"], Reasoning.off)
    assert (own.top_k, own.bos) == (7, None)
    assert (other.settings.temperature, other.settings.bos) == (0.0, True)


def test_a_line_is_text_messages_or_tokens_and_keeps_its_fields(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "id": "x", "label": [1, {"b": None}]},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "f"}]},
        {"tokens": [3, 4]},
    ]
    found = of_lines(tmp_path, *lines)
    assert [one.content for one in found] == ["a", lines[1]["messages"], [3, 4]]
    assert [one.fields for one in found] == lines
    assert [one.name for one in found] == ["x", 2, 3]
    assert found[1].tools == [{"name": "f"}]


def test_variables_of_a_template_are_json(tmp_path: Path) -> None:
    (found,) = of_lines(tmp_path, {"prompt": "a", "template_variables": {"effort": "low"}})
    assert found.variables == {"effort": "low"}
    (found,) = read_prompts(job(prompt=["a"], template_variables='{"b": 1}'))
    assert found.variables == {"b": 1}
    with pytest.raises(UserError, match="must be a JSON object"):
        _ = read_prompts(job(prompt=["a"], template_variables="[1]"))[0].variables


def test_each_answer_has_a_seed_of_its_own(tmp_path: Path) -> None:
    found = of_lines(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "seed": 5}, seed=9)
    seeds = [[seed_of(one, answer) for answer in range(2)] for one in found]
    assert seeds == [[9, 10], [9 + 2**32, 10 + 2**32], [5, 6]]
    (last,) = read_prompts(job(prompt=["a"], seed=2**64 - 1))
    assert seed_of(last, 1) == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is no JSON"),
        ('{"prompt": "a", "temperature": NaN}', "NaN is no JSON"),
        ("[1]", "must be a JSON object"),
        ({}, "needs one of prompt, messages, tokens; it has none"),
        ({"prompt": "a", "tokens": [1]}, "it has prompt and tokens"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"tokens": []}, "tokens must be a list of token ids"),
        ({"tokens": [1, -1]}, "tokens must be a list of token ids"),
        ({"tokens": [True]}, "tokens must be a list of token ids"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "message 1 is of 'usr'"),
        ({"prompt": "a", "id": 1.5}, "id = 1.5: must be a text or a whole number"),
        ({"prompt": "a", "generated": 1}, "the field generated is the place of the answer"),
        ({"prompt": "a", "top_p": 2}, "top_p = 2.0: must be at most 1"),
        ({"prompt": "a", "top_k": 1.5}, "top_k = 1.5: must be a whole number"),
        ({"prompt": "a", "top_k": True}, "top_k = true: must be a whole number"),
        ({"prompt": "a", "temperature": "1"}, 'temperature = "1": must be a number'),
        ({"prompt": "a", "stop": "x"}, 'stop = "x": must be a list of texts'),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "reasoning": True}, 'must be "on" or "off" or null'),
        ({"prompt": "a", "n": 2}, "must be 1 at temperature 0"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_number(
    tmp_path: Path, line: object, said: str
) -> None:
    with pytest.raises(UserError) as error:
        of_lines(tmp_path, {"prompt": "fine"}, line)
    assert f"{tmp_path / 'prompts.jsonl'}, line 2: " in str(error.value)
    assert said in str(error.value)


def test_two_prompts_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 3: id 1 is that of .*line 1"):
        of_lines(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "id": 1})
