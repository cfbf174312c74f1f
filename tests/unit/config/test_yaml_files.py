"""A file of the user's own that cannot be read is told in a sentence, with its path and line."""

from pathlib import Path

import pytest

from hybrid_train.config.compose import compose
from hybrid_train.config.yaml_files import text_of
from hybrid_train.schema.problems import ConfigError, Problem, UserError

HEADER = "# @package _global_\n"


def problems(folder: Path, **files: str | bytes) -> list[Problem]:
    """Write experiments, choose the first, and return what is wrong with it."""
    (folder / "experiment").mkdir()
    for name, text in files.items():
        data = text if isinstance(text, bytes) else f"{HEADER}{text}".encode()
        (folder / "experiment" / f"{name}.yaml").write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        compose("train", [f"hydra.searchpath=[{folder}]", f"experiment={next(iter(files))}"])
    return list(refused.value.problems)


@pytest.mark.parametrize(
    ("text", "line", "rule"),
    [
        (b"", None, "is empty"),
        (b"# @package _global_\n# later\n", None, "is empty"),
        (b"# @package _global_\n---\n", None, "is empty"),
        (HEADER.encode("utf-16"), 1, "is not UTF-8"),
        (f"{HEADER}run_dir: läuft\n".encode("latin-1"), 2, "is not UTF-8"),
        (f"{HEADER}run_dir: a\n".encode("utf-8-sig"), 1, "byte order mark"),
        (b"# @package _global_\n- a\n- b\n", 1, "holds a list"),
        (b"# @package _global_\njust words\n", 1, "holds a single value"),
        (b"# @package _global_\ntrain:\n\tseed: 1\n", 3, "spaces, not tabs"),
        (b"# @package _global_\ntrain: {seed: 1\n", 3, "is no YAML"),
        (b"# @package _global_\na: 1\n---\nb: 1\n", 3, "is no YAML"),
        (b"# @package _global_\ntrain:\n  seed: 1\n  seed: 2\n", 4, "stands there twice"),
        (b"# @package _global_\n? [a, b]\n: 1\n", 2, "as a key"),
        (b"# @package _global_\ntrain: &t\n  seed: *t\n", 2, "within its own anchor"),
        (b"# @package _global_\nrun_dir: *nowhere\n", 2, "is no YAML"),
        (b"# @package _global_\nrun_dir: \x01\n", None, "is no YAML"),
        (b"# @package _global_\na: " + b"[" * 3000 + b"]" * 3000, None, "nested too deeply"),
        (b"# @package _global_\ndefaults: quickstart\n", 2, "defaults is a list"),
        (
            b"# @package _global_\ndefaults:\n  - override /model: [[a]]\n",
            3,
            "an entry of defaults",
        ),
        (b"# @package _global_\nhydra: {run: {dir: x}}\n", 2, "do nothing here"),
        (b"# @package _global_\ndefaults:\n  - override hydra/launcher: x\n", 3, "do nothing here"),
        (b"# @package _global_\n1: 2\n", 2, "reads as int; put it in quotes"),
        (b"# @package _global_\non: 2\n", 2, "reads as bool; put it in quotes"),
        (b'# @package _global_\nrun_dir: "a\\0b"\n', 2, "no text can have"),
        (b"# @package _global_\nmodel: {mlp: 1}\n", None, "another kind is wanted"),
        (b"# @package _global_\ntrain: [1]\n", None, "another kind is wanted"),
        (b"train: {seed: 1}\n", 1, "lacks the first line `# @package _global_`"),
        (b"# mine\n\ntrain: {seed: 1}\n# @package _global_\n", 1, "lacks the first line"),
    ],
)
def test_a_file_that_is_no_config_is_told_with_its_line(
    tmp_path: Path, text: bytes, line: int | None, rule: str
) -> None:
    (found,) = problems(tmp_path, mine=text)
    place = f"{tmp_path}/experiment/mine.yaml"
    assert found.path == (f"{place}, line {line}" if line else found.path)
    assert found.path.startswith(place)
    assert rule in found.rule


def test_files_that_include_each_other_are_told_as_a_circle(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, one="defaults: [two]\n", two="defaults: [/experiment/one]\n")
    assert found.path == f"{tmp_path}/experiment/two.yaml, line 2"
    assert "experiment/one -> experiment/two -> experiment/one" in found.rule


def test_a_file_that_includes_itself_is_a_circle_of_one(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, one="defaults:\n  - quickstart\n  - one\n")
    assert "experiment/one -> experiment/one" in found.rule


def test_aliases_that_multiply_are_counted_and_not_written_out(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (found,) = problems(tmp_path, mine="\n".join(lines))
    assert "more than 100,000 values" in found.rule


def test_a_choice_that_is_in_no_folder_is_told_with_its_line_and_a_near_one(tmp_path: Path) -> None:
    text = "defaults:\n  - quickstart\n  - override /model: nemotron_nano\n  - schedul/wsd\n"
    model, schedule = problems(tmp_path, mine=text)
    assert model.path == f"{tmp_path}/experiment/mine.yaml, line 4"
    assert (model.value, model.nearest) == ("model/nemotron_nano", "model/nemotron3_nano")
    assert schedule.value == "experiment/schedul/wsd"


def test_every_faulty_file_is_told_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, one="defaults: [two, three]\n", two=b"- a\n", three=b"")
    assert [Path(one.path.split(",")[0]).stem for one in found] == ["two", "three"]


def test_a_folder_in_place_of_a_file_and_a_file_without_permission_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment" / "mine.yaml").mkdir(parents=True)
    with pytest.raises(ConfigError, match="must be one of"):
        compose("train", [f"hydra.searchpath=[{tmp_path}]", "experiment=mine"])
    path = tmp_path / "config.yaml"
    path.touch()

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"config\.yaml cannot be read: Permission denied"):
        text_of(path)
