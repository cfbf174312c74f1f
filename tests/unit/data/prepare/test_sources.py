"""What inputs name: through links, under any name, and the same by a folder and by a pattern."""

import gzip
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hybrid_train.data.prepare.inputs import find_sources
from hybrid_train.schema.prepare import Format
from hybrid_train.schema.problems import UserError
from tests.unit.data.prepare.test_documents import sources, texts, written
from tests.unit.data.prepare.texts import json_lines

LINES = [f"line {number}" for number in range(5)]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said beside, filled in."""
    said: list[str] = []
    log = logging.getLogger("hybrid_train.data.prepare.inputs")
    for level in ("info", "warning"):
        monkeypatch.setattr(log, level, lambda text, *words: said.append(text % words))
    return said


def linked(path: Path, target: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def test_a_folder_of_links_gives_what_its_pattern_gives(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    for number, line in enumerate(LINES):
        blob = written(tmp_path, f"blobs/{number:x}", json_lines([line]))
        linked(snapshot / "data" / f"part-{number}.jsonl", blob)
    written(snapshot, "data/part-9.jsonl", json_lines(["a file of its own"]))
    assert texts(sources(snapshot)) == [*LINES, "a file of its own"]
    assert texts(sources(snapshot / "data" / "*.jsonl")) == texts(sources(snapshot))
    assert texts(sources(snapshot / "**" / "*.jsonl")) == texts(sources(snapshot))
    # The blobs are reached as well, but have no name that tells what they are.
    assert sorted(texts(sources(tmp_path))) == sorted(texts(sources(snapshot)))


def test_links_to_folders_are_followed_and_may_go_in_circles(tmp_path: Path) -> None:
    written(tmp_path, "elsewhere/web/a.jsonl", json_lines(["a"]))
    written(tmp_path, "in/b.jsonl", json_lines(["b"]))
    for number in range(12):  # with 12 circles there are more ways than anybody can go
        linked(tmp_path / "in" / f"up{number}", tmp_path / "in")
        linked(tmp_path / "elsewhere" / "web" / f"back{number}", tmp_path / "in")
    linked(tmp_path / "in" / "web", tmp_path / "elsewhere" / "web")
    assert texts(sources(tmp_path / "in")) == ["b", "a"]
    assert sorted(texts(sources(tmp_path / "in" / "**" / "*.jsonl"))) == ["a", "b"]
    assert sorted(texts(sources(tmp_path / "in" / "**"))) == ["a", "b"]


@pytest.mark.parametrize("folder", ["in", "in/*", "in/**"])
def test_a_file_and_links_to_it_count_once(tmp_path: Path, folder: str) -> None:
    file = written(tmp_path, "in/m.jsonl", json_lines(["once"]))
    linked(tmp_path / "in" / "a.jsonl", file)
    linked(tmp_path / "in" / "z.jsonl", tmp_path / "in" / "a.jsonl")
    (found,) = sources(tmp_path / folder)
    assert found.path == str(file)


def test_source_code_that_two_inputs_name_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "lib/a.py", b"a = 1")
    written(tmp_path, "lib/sub/b.py", b"b = 1")
    linked(tmp_path / "other", tmp_path / "lib" / "sub")
    for second in ("lib/sub", "lib/sub/b.py", "other"):
        with pytest.raises(UserError, match=r"b\.py is named twice"):
            sources(tmp_path / "lib", tmp_path / second)
    assert sorted(texts(sources(tmp_path / "*"))) == ["a = 1", "b = 1"]


@pytest.mark.parametrize("target", ["nowhere.jsonl", "b.jsonl"])  # the second goes in a circle
def test_a_dead_link_where_there_should_be_data_is_refused(tmp_path: Path, target: str) -> None:
    written(tmp_path, "a.jsonl", json_lines(LINES))
    linked(tmp_path / "b.jsonl", tmp_path / target)
    for name in ("", "*.jsonl", "b.jsonl"):
        with pytest.raises(UserError, match=rf"b\.jsonl is a link to .*{target}, which is not th"):
            sources(tmp_path / name)


def test_a_dead_link_between_source_code_is_counted(tmp_path: Path, warnings: list[str]) -> None:
    written(tmp_path, "a.py", b"a = 1")
    linked(tmp_path / "b.py", tmp_path / "nowhere")
    assert texts(sources(tmp_path)) == ["a = 1"]
    assert warnings == [f"{tmp_path}: 1 dead links are left out: {tmp_path}/b.py, ..."]


PACKINGS = [(bytes, ""), (gzip.compress, ".GZ"), (zstandard.compress, ".Zst")]
type Pack = Callable[[bytes], bytes]


@pytest.mark.parametrize(("pack", "suffix"), PACKINGS)
@pytest.mark.parametrize("name", ["A.JSONL", "a.Json", "B.NDJSON"])
def test_suffixes_count_without_regard_to_capitals(
    tmp_path: Path, name: str, pack: Pack, suffix: str
) -> None:
    path = written(tmp_path, f"in/{name}{suffix}", pack(json_lines(LINES)))
    for asked in (path, path.parent, path.parent / "*"):
        assert texts(sources(asked)) == LINES


@pytest.mark.parametrize("pack", [pack for pack, _ in PACKINGS])
@pytest.mark.parametrize("name", ["part-00000", "part-r-00000.c000", "d.dump", "x.jsonl-1-of-2"])
def test_json_lines_without_a_known_suffix_are_known_by_their_content(
    tmp_path: Path, name: str, pack: Pack
) -> None:
    path = written(tmp_path, f"in/{name}", pack(json_lines(LINES)))
    written(tmp_path, "in/_SUCCESS", b"")  # Spark puts it there
    for asked in (path, path.parent, path.parent / "*"):
        assert texts(sources(asked)) == LINES
        assert texts(sources(asked, asked=Format.jsonl)) == LINES
    assert texts(sources(path, asked=Format.text)) == [json_lines(LINES).decode()]


def test_parquet_is_known_by_any_name(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(LINES)})
    for name in ("A.PARQUET", "part-00000", "d41d8cd98f"):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / name)
        for asked in (tmp_path / name / name, tmp_path / name):
            assert texts(sources(asked)) == LINES


def test_what_is_known_by_its_content_is_said_once(tmp_path: Path, warnings: list[str]) -> None:
    for number in range(3):
        written(tmp_path, f"part-0000{number}", json_lines([f"{number}", "more"]))
    assert len(texts(sources(tmp_path))) == 6
    (said,) = warnings
    assert said.startswith(f"{tmp_path}: 3 files of an unknown suffix: read as lines of JSON obj")


def test_files_of_two_kinds_without_a_suffix_are_not_guessed(tmp_path: Path) -> None:
    for number in range(3):
        written(tmp_path, f"part-{number}", json_lines(LINES))
    written(tmp_path, "notes", b"not JSON")
    for asked in (tmp_path, tmp_path / "*"):
        with pytest.raises(UserError, match=r"3 of 4 files hold lines of JSON objects.*format=js"):
            sources(asked)
    assert len(texts(sources(tmp_path / "part-*", asked=Format.jsonl))) == 15


def test_json_lines_among_source_code_are_source_code_and_it_is_said(
    tmp_path: Path, warnings: list[str]
) -> None:
    for name in ("a.py", "b.py", "Makefile", "c.json"):
        written(tmp_path, name, b'{\n  "pretty": 1\n}\n')
    written(tmp_path, "one_line.json", b'{"private": true}\n')
    assert len(texts(sources(tmp_path))) == 5
    assert not warnings  # one object in one line is ordinary JSON
    written(tmp_path, "records.json", json_lines(LINES))
    assert len(texts(sources(tmp_path))) == 6
    assert "1 of 6 files hold lines of JSON objects, for one" in warnings[0]


def test_other_files_beside_shards_are_named(tmp_path: Path, warnings: list[str]) -> None:
    written(tmp_path, "a.JSONL", json_lines(["a"]))
    written(tmp_path, "b.jsonl.xz", b"\xfd7zXZ\0")
    assert texts(sources(tmp_path)) == ["a"]
    assert warnings == [f"{tmp_path}: 1 other files are not read: {tmp_path}/b.jsonl.xz, ..."]


@pytest.mark.parametrize(("magic", "name"), [(b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz")])
def test_a_packing_that_is_not_read_is_named(tmp_path: Path, magic: bytes, name: str) -> None:
    path = written(tmp_path, "a.jsonl.packed", magic + b"\0" * 10)
    with pytest.raises(UserError, match=rf"packed by {name}, which is not read here"):
        sources(path)


def test_a_pipe_is_not_taken_for_an_empty_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "part-0")
    for path in (tmp_path / "part-0", tmp_path / "*"):
        with pytest.raises(UserError, match="part-0 is a pipe or a device"):
            sources(path)


def test_a_long_first_line_is_json_too(tmp_path: Path) -> None:
    long = ["x" * 200_000, "y"]
    assert texts(sources(written(tmp_path, "part-0", json_lines(long)))) == long


def test_chosen_suffixes_count_without_regard_to_capitals(tmp_path: Path) -> None:
    for name in ("a.PY", "b.py", "c.md"):
        written(tmp_path, name, name.encode())
    assert texts(sources(tmp_path, suffixes=(".py",))) == ["a.PY", "b.py"]


def test_a_name_with_a_comma_is_proposed_in_quotes(tmp_path: Path) -> None:
    written(tmp_path, "lr=1,seed=2.jsonl", b"")
    with pytest.raises(UserError) as refused:
        find_sources([f"{tmp_path}/lr=1,seed=2.json"], Format.auto, ())
    assert f"needs quotes: input='\"{tmp_path}/lr=1,seed=2.jsonl\"'" in str(refused.value)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, no_privilege: None) -> None:
    written(tmp_path, "in/a.jsonl", json_lines(LINES))
    written(tmp_path, "in/closed/b.jsonl", json_lines(LINES))
    (tmp_path / "in" / "closed").chmod(0)
    for name in ("in", "in/closed", "in/closed/b.jsonl", "in/closed/*.jsonl"):
        with pytest.raises(UserError, match=r"in/closed (may not|cannot) be read: [Pp]ermission"):
            sources(tmp_path / name)
    (tmp_path / "in" / "closed").chmod(0o700)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.py", "part-0"])
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, no_privilege: None, name: str
) -> None:
    path = written(tmp_path, f"in/{name}", b"")
    path.chmod(0)
    for asked in (path, path.parent, path.parent / "*"):
        with pytest.raises(UserError, match=rf"{name} (may not|cannot) be read: [Pp]ermission"):
            sources(asked)
