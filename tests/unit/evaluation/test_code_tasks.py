"""Questions about code: where they come from, what their choices are, where tokens part."""

import re
from pathlib import Path

import pytest

from hybrid_train.data.quickstart import source_files, split, standard_library
from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.evaluation.code_tasks import FillInTask, NextLineTask, held_out
from hybrid_train.evaluation.items import Item
from hybrid_train.evaluation.tasks import build_tasks
from hybrid_train.schema.evaluation import FillIn, NextLine
from hybrid_train.schema.problems import UserError
from tests.unit.evaluation.own_tasks import settings_of


def test_held_out_code_is_what_the_quickstart_corpus_validates_on() -> None:
    root = standard_library()
    train, validation = split(root, source_files(root))
    names = [code.name for code in held_out([])]
    assert names == [path.relative_to(root).as_posix() for path in validation]
    assert not set(names) & {path.relative_to(root).as_posix() for path in train}


def parts(item: Item) -> tuple[list[str], int]:
    name, _, line = item.name.rpartition(":")
    lines = (standard_library() / name).read_text().split("\n")
    return [one.rstrip() for one in lines], int(line) - 1


def test_the_right_line_is_the_next_one_and_the_others_stand_elsewhere_in_the_file() -> None:
    for item in NextLineTask(NextLine(items=100, context_lines=5)).items():
        lines, at = parts(item)
        assert item.prompt == "\n".join(lines[max(0, at - 5) : at]).lstrip("\n")
        assert item.answer == f"\n{lines[at]}"
        indent = item.answer[: -len(item.answer.lstrip())]
        known = {line.lstrip() for line in lines}
        for choice in item.choices:
            assert choice.startswith(indent)
            assert choice[len(indent) :] in known - {""}
            assert abs(len(choice) - len(item.answer)) <= 0.25 * len(item.answer)
            assert choice == item.answer or choice.lstrip() not in item.prompt.split("\n")


def test_a_word_that_is_left_out_stands_there_and_the_others_elsewhere_in_the_file() -> None:
    for item in FillInTask(FillIn(items=100, context_lines=3)).items():
        lines, at = parts(item)
        assert (item.prompt + item.answer).split("\n")[-1] == lines[at]
        assert lines[at].endswith(item.answer)
        for choice in item.choices:
            assert choice.endswith(item.answer[1 + word_length(item.answer) :])
            assert abs(len(choice) - len(item.answer)) <= 2
            assert re.search(rf"\S {choice[1 : 1 + word_length(choice)]}\b", "\n".join(lines))


def word_length(choice: str) -> int:
    found = re.match(r" (\w+)", choice)
    assert found is not None
    return len(found[1])


def test_no_file_has_many_more_questions_than_another() -> None:
    items = NextLineTask(NextLine(items=200)).items()
    counts = [sum(item.document == name for item in items) for name in {i.document for i in items}]
    assert len(counts) > 20
    assert max(counts) < 20


@pytest.mark.parametrize("name", ["next_line", "fill_in", "needle"])
def test_tokens_of_a_prompt_stay_what_they_are_before_each_choice(name: str) -> None:
    texts = ["\n".join(code.lines) for code in held_out([])]
    tokenizer = train_byte_level_bpe(texts, 1000)
    for item in build_tasks([name], settings_of(name, items=60))[0].items():
        prompt = tokenizer.encode(item.prompt)
        for choice in item.choices:
            assert tokenizer.encode(item.prompt + choice)[: len(prompt)] == prompt


def test_files_and_folders_of_ones_own_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n")
    text = tmp_path / "b.txt"
    text.write_text("one\n\ntwo  \n")
    found = {code.name: code.lines for code in held_out([str(folder), str(text)])}
    assert found == {str(folder / "a.py"): ["x = 1", ""], str(text): ["one", "", "two", ""]}


def test_files_that_cannot_be_used_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "few.py").write_text("value = other\n" * 30)
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("missing.py", "cannot be read: No such file"),
        ("bytes.py", "is no text in UTF-8"),
        ("empty", "has no Python files"),
        ("few.py", "task.next_line.items = 7: 1 file of held-out code give 0 questions"),
    ):
        with pytest.raises(UserError, match=said):
            NextLineTask(NextLine(items=7, files=[str(tmp_path / name)])).items()
