"""Prompts of a command line and of files: what is read, and how what is wrong is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.generation.prompts import Prompt, read_prompts, seed_of
from hybrid_train.schema.job_roots import GenerateJob, Reasoning
from hybrid_train.schema.problems import UserError

HI = [{"role": "user", "content": "hi"}]


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
        {"messages": HI, "temperature": 1, "stop": ["\n"], "reasoning": "off", "bos": None},
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
        {"messages": HI, "tools": [{"name": "f"}]},
        {"tokens": [3, 4]},
    ]
    found = of_lines(tmp_path, *lines)
    assert [one.content for one in found] == ["a", lines[1]["messages"], [3, 4]]
    assert [one.fields for one in found] == lines
    assert [one.name for one in found] == ["x", 2, 3]
    assert found[1].tools == [{"name": "f"}]


def test_variables_of_a_template_are_json(tmp_path: Path) -> None:
    (found,) = of_lines(tmp_path, {"messages": HI, "template_variables": {"effort": "low"}})
    assert found.variables == {"effort": "low"}
    chat = [json.dumps(HI)]
    (found,) = read_prompts(job(messages=chat, template_variables='{"b": 1}'))
    assert found.variables == {"b": 1}
    with pytest.raises(UserError, match="must be a JSON object"):
        _ = read_prompts(job(messages=chat, template_variables="[1]"))[0].variables


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
        ('{"prompt": "a", "x": 1e999}', "the number 1e999 is beyond those of float64"),
        ('{"prompt": "a", "prompt": "b"}', 'the field "prompt" is there twice'),
        ('{"prompt": "a", "x": {"y": 1, "y": 1}}', 'the field "y" is there twice'),
        ('{"prompt": "\\ud800 a"}', "half of a surrogate pair, '\\ud800'"),
        ('{"prompt": "a", "x": [{"\\udfff": 1}]}', "half of a surrogate pair"),
        (
            '{"prompt": "a", "temperature": 1' + 400 * "0" + "}",
            "temperature = inf: must be at most",
        ),
        ('{"prompt": "a", "top_p": -1' + 400 * "0" + "}", "top_p = -inf: must be at least"),
        ({"prompt": "a", "tools": []}, "tools is for messages alone"),
        ({"tokens": [1], "reasoning": "on"}, "reasoning is for messages alone"),
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


def test_a_text_beyond_ascii_and_a_mark_of_byte_order_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "\\ud83d\\ude00 \u20ac"}', encoding="utf-8")
    (found,) = read_prompts(job(prompt_file=str(path)))
    assert found.content == "\U0001f600 \u20ac"


def test_a_folder_and_the_output_are_no_prompt_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a file"):
        read_prompts(job(prompt_file=str(tmp_path)))
    path, link = tmp_path / "p.jsonl", tmp_path / "link"
    path.write_text('{"prompt": "a"}')
    link.symlink_to(path)
    with pytest.raises(UserError, match="is the file of the prompts"):
        read_prompts(job(prompt_file=str(path), output=str(link)))
    assert read_prompts(job(prompt_file=str(path), output=str(tmp_path / "out.jsonl")))


def test_what_a_template_alone_reads_needs_messages() -> None:
    with pytest.raises(UserError, match="reasoning: is for messages alone, and no prompt has them"):
        read_prompts(job(prompt=["a"], reasoning=Reasoning.on))
    found = read_prompts(job(prompt=["a"], messages=[json.dumps(HI)], reasoning=Reasoning.on))
    assert len(found) == 2


def test_fields_that_look_like_settings_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = {"prompt": "a", "temprature": 1, "drafts": 3, "label": 1, "top_k": 2}
    with caplog.at_level("WARNING", logger="hybrid_train"):
        of_lines(tmp_path, line, line)
    first, other = [record.getMessage() for record in caplog.records]
    assert "line 1: the field temprature sets nothing; if temperature is meant" in first
    assert "line 1: the field drafts is a setting of the whole job" in other
