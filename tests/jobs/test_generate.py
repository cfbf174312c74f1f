"""The job generate from its command line to the text that it writes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.jobs import cli
from tests.jobs.command import finish, start, train
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("generate")]

Generate = Callable[..., int]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run folder of the smallest model after two steps."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    done = train(folder, f"data.folder={corpus}", "train.tokens=512")
    assert done.code == 0, done.said
    return folder


@pytest.fixture
def generate(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Calls the job with overrides on the trained model."""
    capsys.readouterr()  # what training said

    def call(*overrides: str) -> int:
        return cli.main(
            ["generate", f"checkpoint={checkpoint}", "runtime=cpu", "runtime.threads=1", *overrides]
        )

    return call


def test_the_same_call_writes_the_same_text(
    generate: Generate, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("prompt=import os", "max_new_tokens=6", "temperature=1", "top_k=9", "top_p=0.9")
    assert generate(*words) == 0
    first = capsys.readouterr()
    assert first.out.startswith("import os")
    assert len(first.out) > len("import os\n")
    assert "tokens/s" in first.err
    generate(*words)
    assert capsys.readouterr().out == first.out


def test_prompts_of_the_command_line_and_of_a_file_are_continued_together(
    generate: Generate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("class A:\n\n    def b(self)\n")
    given = ("prompt=x = [1, 2]", f"prompt_file={lines}", "max_new_tokens=3")
    assert generate(*given) == 0
    shown = capsys.readouterr().out
    for number, prompt in enumerate(("x = [1, 2]", "class A:", "    def b(self)"), start=1):
        assert f"--- prompt {number} of 3 ---\n{prompt}" in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "prompt_file=PATH"),
        (["prompt_file=nowhere.txt"], "there is no such file"),
        (["prompt=a", "top_p=2"], "top_p = 2.0: must be at most 1"),
        (["prompt=a", "temprature=1"], "temperature"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(
    generate: Generate, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert generate(*overrides) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


def test_a_file_without_prompts_is_refused(
    generate: Generate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n\n")
    assert generate(f"prompt_file={empty}") == 2
    assert "needs one prompt per line; it is empty" in capsys.readouterr().err


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_answers(
    generate: Generate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    given = [
        {"id": "greedy", "prompt": "import", "label": [1]},
        {"prompt": "def f(", "temperature": 1, "n": 3, "max_new_tokens": 4},
        {"tokens": [5, 6, 7], "seed": 8, "temperature": 0.5},
    ]
    prompts.write_text("\n".join(map(json.dumps, given)))
    words = (
        f"prompt_file={prompts}", f"output={output}", "log_probs=true", "max_new_tokens=5",
        "ignore_end=true", "batch=2",
    )  # fmt: skip
    assert generate(*words) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "22 tokens in" in shown.err
    whole = {(line["id"], line["generated"]["answer"]): line for line in lines_of(output)}
    assert sorted(map(str, whole)) == sorted(
        map(str, [("greedy", 0), (2, 0), (2, 1), (2, 2), (3, 0)])
    )
    first = whole["greedy", 0]
    assert first["label"] == [1]
    made = first["generated"]
    assert (made["finish"], made["new_tokens"], len(made["tokens"])) == ("length", 5, 5)
    assert len(made["log_probs"]) == 5
    assert all(one <= 0 for one in made["log_probs"])
    assert len({tuple(whole[2, n]["generated"]["tokens"]) for n in range(3)}) == 3

    # Killed in the middle of a line: what is whole stays, and the same lines are there at the end.
    kept = output.read_bytes()
    output.write_bytes(kept[: len(kept) // 2])
    assert generate(*words) == 0
    again = {(line["id"], line["generated"]["answer"]): line for line in lines_of(output)}
    assert {key: one["generated"]["tokens"] for key, one in again.items()} == {
        key: one["generated"]["tokens"] for key, one in whole.items()
    }
    assert generate(*words) == 0
    assert lines_of(output) == list(again.values())
    assert generate(*words, "top_k=5") == 2
    assert "choose another output" in capsys.readouterr().err


def test_an_answer_alone_is_the_answer_in_a_batch(
    generate: Generate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "x = "}\n{"prompt": "class A"}\n')
    words = ("temperature=1", "top_p=0.9", "max_new_tokens=8", "n=2")
    assert generate(f"prompt_file={prompts}", f"output={output}", *words) == 0
    last = lines_of(output)[-1]
    capsys.readouterr()
    alone = ("temperature=1", "top_p=0.9", "max_new_tokens=8")
    made = last["generated"]
    assert generate(f"prompt={last['prompt']}", f"seed={made['seed']}", *alone) == 0
    assert capsys.readouterr().out == last["prompt"] + made["text"] + "\n"


TEMPLATE = """{%- for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor -%}
{%- if enable_thinking is not defined or enable_thinking %}<think>{{ '\n' }}{% endif %}"""


@pytest.fixture
def with_template(checkpoint: Path) -> Iterator[None]:
    """A chat template lies in the folder of the run's tokenizer."""
    path = checkpoint / "tokenizer" / "chat_template.jinja"
    path.write_text(TEMPLATE)
    yield
    path.unlink()


MESSAGES = 'messages=[{"role": "user", "content": "Hi, you"}]'


@pytest.mark.usefixtures("with_template")
def test_a_chat_is_answered_and_its_thinking_ends_at_the_budget(
    generate: Generate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    words = ("max_new_tokens=60", "thinking_budget=4", "thinking_grace=3", "ignore_end=true")
    assert generate(MESSAGES, *words, f"output={output}") == 0
    (line,) = lines_of(output)
    assert line["messages"] == [{"role": "user", "content": "Hi, you"}]
    thought, closed, _ = line["generated"]["text"].partition("</think>\n\n")
    assert closed
    assert len(thought) < 60
    capsys.readouterr()
    assert generate(MESSAGES, "reasoning=off", "max_new_tokens=3", "stop=never") == 0
    assert "Hi, you" not in capsys.readouterr().out


@pytest.mark.usefixtures("with_template")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([MESSAGES, "thinking_budget=100"], "max_new_tokens = 128: leaves no room to answer"),
        ([MESSAGES, "template=rag"], "template = rag: "),
        ([MESSAGES, "template_variables={effort: low}"], "is no JSON"),
        ([MESSAGES, 'template_variables={"effort": "low"}'], "reads no effort"),
        (['messages=[{"role": "usr", "content": "a"}]'], "message 1 is of 'usr'"),
        (["messages=hello"], "messages: is no JSON"),
    ],
)
def test_what_a_chat_cannot_be_is_refused_before_the_model_loads(
    generate: Generate, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert generate(*overrides) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "loaded" not in shown.err


def test_a_run_without_a_template_answers_no_chat(
    generate: Generate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(MESSAGES) == 2
    assert "messages need a chat template" in capsys.readouterr().err


def test_a_stop_ends_the_text_and_is_not_shown(
    generate: Generate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("prompt=import os", "max_new_tokens=20", "ignore_end=true") == 0
    text = capsys.readouterr().out.removesuffix("\n")
    stop = text[-6:-4]
    cut = text.index(stop, len("import os"))
    assert generate("prompt=import os", "max_new_tokens=20", "ignore_end=true", f"stop={stop}") == 0
    assert capsys.readouterr().out == text[:cut] + "\n"


@pytest.mark.slow
def test_several_processes_write_what_one_does(checkpoint: Path, tmp_path: Path) -> None:
    words = ["generate", f"checkpoint={checkpoint}", "runtime=cpu", "runtime.threads=1", "batch=1"]
    words += ["prompt=import os", "prompt=def", "prompt=class A:", "max_new_tokens=6", "n=3"]
    words += ["temperature=0.8"]
    alone = finish(start(*words))
    assert alone.code == 0, alone.said
    for degrees in (["parallel.tensor=2"], ["parallel.pipeline=2"], []):
        several = finish(start(*words, *degrees, processes=2))
        assert several.out == alone.out, several.said
    written = tmp_path / "answers.jsonl"
    several = finish(start(*words, f"output={written}", processes=2))
    assert several.code == 0, several.said
    assert len(written.read_text().splitlines()) == 9
    wrong = finish(start(*words, "parallel.tensor=4", processes=2))
    assert wrong.code != 0
    assert "parallel.tensor = 4: must divide model.mamba.groups (2); nearest: 2" in wrong.err
    assert not wrong.out
