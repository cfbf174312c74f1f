"""Files of every kind give their texts, in order, and bad lines give their reasons."""

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hybrid_train.data.prepare.blocks import BlockDocuments, all_blocks, read_documents, read_lines
from hybrid_train.data.prepare.inputs import Source, find_sources
from hybrid_train.schema.prepare import Format
from hybrid_train.schema.problems import UserError
from tests.unit.data.prepare.texts import json_lines, some_texts

TEXTS = some_texts(50)


def sources(*inputs: Path | str, asked: Format = Format.auto, suffixes: tuple = ()) -> list[Source]:
    return find_sources([str(one) for one in inputs], asked, suffixes)


def parts(found: list[Source], *, key: str = "text", size: int = 500) -> list[BlockDocuments]:
    return [read_documents(found[one.source], one, key) for one in all_blocks(found, key, size)]


def texts(found: list[Source], **options: object) -> list[str]:
    return [text for part in parts(found, **options) for text in part.texts]  # type: ignore[arg-type]


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def parquet(folder: Path, column: pa.Array, name: str = "text", rows: int = 7) -> Path:
    table = pa.table({"id": pa.array(range(len(column))), name: column})
    pq.write_table(table, folder / "a.parquet", row_group_size=rows)
    return folder / "a.parquet"


@pytest.mark.parametrize("size", [1, 37, 500, 10**6])
def test_json_lines_do_not_depend_on_the_blocks(tmp_path: Path, size: int) -> None:
    path = written(tmp_path, "a.jsonl", json_lines(TEXTS))
    assert texts(sources(path), size=size) == TEXTS
    assert sum(part.last_line for part in parts(sources(path), size=size)) == len(TEXTS)


@pytest.mark.parametrize("size", [1, 37, 500, 10**6])
def test_packed_lines_are_those_of_the_plain_file(tmp_path: Path, size: int) -> None:
    content = json_lines(TEXTS)
    # two members, as `cat a.gz b.gz` makes them
    packed = gzip.compress(content[:900]) + gzip.compress(content[900:])
    assert texts(sources(written(tmp_path, "a.jsonl.gz", packed)), size=size) == TEXTS
    frames = zstandard.compress(content[:900]) + zstandard.compress(content[900:])
    assert texts(sources(written(tmp_path, "a.jsonl.zst", frames)), size=size) == TEXTS


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 500, 10**6])
def test_a_parquet_column_gives_its_rows(tmp_path: Path, kind: pa.DataType, size: int) -> None:
    path = parquet(tmp_path, pa.array(TEXTS).cast(kind), name="body")
    assert texts(sources(path), key="body", size=size) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "code"])
def test_going_on_at_a_block_gives_the_rest(tmp_path: Path, name: str) -> None:
    content = json_lines(TEXTS)
    if name == "a.parquet":
        parquet(tmp_path, pa.array(TEXTS))
    elif name == "code":
        for i, text in enumerate(TEXTS):
            written(tmp_path, f"code/{i:03}.py", text.encode())
    else:
        pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
        written(tmp_path, name, pack(content))
    found = sources(tmp_path / name)
    blocks = list(all_blocks(found, "text", 500))
    assert len(blocks) > 5
    for number in (1, 4, len(blocks) - 1, len(blocks)):
        assert list(all_blocks(found, "text", 500, (0, number))) == blocks[number:]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_plain_lines_are_documents_on_request(tmp_path: Path, ending: bytes) -> None:
    path = written(tmp_path, "a.txt", ending.join([b"one", b"", b"two words", b"three"]))
    assert texts(sources(path, asked=Format.lines), size=3) == ["one", "two words", "three"]
    whole = texts(sources(path))
    assert whole == [path.read_bytes().decode()]


def test_a_folder_of_source_code_is_one_source_with_a_document_a_file(tmp_path: Path) -> None:
    for name, content in {
        "b/x.py": b"x = 1", "a.py": b"a = 1", "a.md": b"# A", "picture.png": b"\x89PNG\0\0",
        ".git/config": b"hidden", "b/empty.py": b"",
    }.items():  # fmt: skip
        written(tmp_path, name, content)
    found = sources(tmp_path)
    (part,) = parts(found, size=10**6)
    assert (part.texts, part.binary, part.empty) == (["# A", "a = 1", "x = 1"], 1, 1)
    assert texts(sources(tmp_path, suffixes=(".py",))) == ["a = 1", "x = 1"]


def test_a_folder_of_shards_has_a_source_for_each(tmp_path: Path) -> None:
    written(tmp_path, "b.jsonl", json_lines(["b"]))
    written(tmp_path, "a/a.jsonl.gz", gzip.compress(json_lines(["a"])))
    written(tmp_path, "README.md", b"read me")
    found = sources(tmp_path)
    assert [Path(one.path).name for one in found] == ["b.jsonl", "a.jsonl.gz"]
    assert texts(found) == ["b", "a"]


def test_inputs_keep_their_order_and_globs_go_by_name(tmp_path: Path) -> None:
    for name in "cab":
        written(tmp_path, f"{name}.jsonl", json_lines([name]))
    assert texts(sources(tmp_path / "c.jsonl", tmp_path / "[ab].jsonl")) == ["c", "a", "b"]


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", json_lines(["a"]))
    with pytest.raises(UserError, match="named twice"):
        sources(path, tmp_path / "*.jsonl")


def test_an_input_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, "corpus.jsonl", b"")
    with pytest.raises(UserError, match=r"corpsu.jsonl: there is no .* mean .*corpus\.jsonl\?"):
        sources(tmp_path / "corpsu.jsonl")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": 3}', "'text' is a number, not text"),
        (b'{"text": null}', "'text' is null, not text"),
        (b'{"body": "a", "id": 2}', "has no key 'text'; it has body, id"),
        (b"{}", "has no key 'text', nor any other"),
        (b"[1]", "is no JSON object but a list"),
        (b'"text"', "is no JSON object but a text"),
        (b'{"text": "a"', "is not JSON: "),
        (b'{"text": "caf\xe9"}', "is not UTF-8: byte 0xe9 at 13"),
        (b'{"text": "\\ud800"}', "is not JSON: "),
    ],
)
@pytest.mark.parametrize("size", [5, 10**6])
def test_a_bad_line_is_told_with_its_number_and_reason(
    tmp_path: Path, line: bytes, reason: str, size: int
) -> None:
    content = json_lines(["one"]) + b"\n" + line + b"\n" + json_lines(["two"])
    path = written(tmp_path, "a.jsonl", content)
    found = parts(sources(path), size=size)
    assert [text for part in found for text in part.texts] == ["one", "two"]
    before = 0
    bad = []
    for part in found:
        bad += [(before + one.line, one) for one in part.bad]
        before += part.last_line
    ((number, one),) = bad
    assert (number, one.file, one.size) == (3, str(path), len(line))
    assert one.reason.startswith(reason)
    assert one.text == line.decode("utf-8", "backslashreplace")
    assert sum(part.lines for part in found) == 3  # the blank line is none


def test_bad_rows_of_parquet_are_told(tmp_path: Path) -> None:
    column = pa.array([b"a", None, b"\xff", b""], pa.binary())
    (part,) = parts(sources(parquet(tmp_path, column)), size=10**6)
    assert (part.texts, part.empty) == (["a"], 1)
    assert [(one.line, one.reason) for one in part.bad] == [
        (2, "is null, not text"), (3, "is not UTF-8: byte 0xff at 0"),
    ]  # fmt: skip


def test_a_file_that_is_no_text_is_told_with_the_line_of_the_fault(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", b"one\ntwo \xff\n")
    ((one,),) = (part.bad for part in parts(sources(path)))
    assert (one.line, one.reason) == (2, "is not UTF-8: byte 0xff at 8")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + (b"one" if name == "a.txt" else json_lines(["one"]))
    path = written(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    assert texts(sources(path)) == ["one"]


def test_the_mark_of_a_file_that_was_joined_to_another_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    path = written(tmp_path, "a.jsonl", mark + json_lines(["one"]) + mark + json_lines(["two"]))
    assert texts(sources(path)) == ["one", "two"]
    path = written(tmp_path, "a.txt", mark + b"one\n" + mark + b"two\n")
    assert texts(sources(path, asked=Format.lines)) == ["one", "two"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_packed_file_under_a_plain_name_says_so(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = written(tmp_path, "a.jsonl", pack(json_lines(TEXTS)))
    first = parts(sources(path), size=10**6)[0].bad[0]
    assert first.reason.startswith("is no text but packed by ")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_whole_text_in_another_unicode_is_read_by_its_mark(tmp_path: Path, encoding: str) -> None:
    text = "def f():\n    return 'caf\u00e9'\n"
    for name in ("a.txt", "code/a.py"):
        written(tmp_path, name, ("\ufeff" + text).encode(encoding))
    (part,) = parts(sources(tmp_path / "code"), size=10**6)
    assert (part.texts, part.binary) == ([text], 0)
    assert texts(sources(tmp_path / "a.txt")) == [text]
    damaged = ("\ufeff" + text).encode(encoding)[:-1]
    ((one,),) = (p.bad for p in parts(sources(written(tmp_path, "b.txt", damaged))))
    assert one.reason.startswith(f"is not {encoding[:6].upper()}")


def test_a_text_with_zero_bytes_is_bad(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "no mark, but UTF-16".encode("utf-16-le"))
    for asked in (Format.text, Format.lines):
        (part,) = parts(sources(path, asked=asked))
        assert part.texts == []
        assert "has zero bytes, as binary files and UTF-16 have" in part.bad[0].reason


@pytest.mark.parametrize("asked", [Format.jsonl, Format.lines])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_lines_in_another_unicode_are_bad_and_the_first_says_why(
    tmp_path: Path, asked: Format, encoding: str
) -> None:
    path = written(tmp_path, "a.jsonl", json_lines(["one", "two"]).decode().encode(encoding))
    (part,) = parts(sources(path, asked=asked), size=10**6)
    assert part.texts == []
    name = encoding.upper()
    said = f"is {name}, not UTF-8; convert the file: iconv -f {name} -t UTF-8"
    assert part.bad[0].reason == said
    assert len(part.bad) == part.lines


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(json_lines(TEXTS), mtime=0)[:-20]),
        ("a.jsonl.gz", b"no gzip at all"),
        ("a.jsonl.zst", b"no zstd at all"),
        ("a.parquet", b"no parquet at all"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(UserError, match=str(path)):
        parts(sources(path))


@pytest.mark.parametrize(
    ("key", "message"),
    [("body", "no column 'body'; there are id, text"), ("id", "'id' holds int64, not text")],
)
def test_a_parquet_file_without_the_column_is_refused(
    tmp_path: Path, key: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        texts(sources(parquet(tmp_path, pa.array(["a"]))), key=key)


def test_a_range_reads_the_lines_that_begin_in_it(tmp_path: Path) -> None:
    path = str(written(tmp_path, "a", b"ab\n\ncdef\ng"))
    size = 10
    for cuts in ([0, size], [0, 1, size], [0, 3, size], [0, 4, 5, 6, 9, size], [*range(size + 1)]):
        pieces = [read_lines(path, a, b) for a, b in itertools.pairwise(cuts)]
        assert b"".join(pieces) == b"ab\n\ncdef\ng"
        assert all(not piece or piece[-1:] in (b"\n", b"g") for piece in pieces)
