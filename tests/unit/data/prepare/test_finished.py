"""Token files are merged, split and verified; no document changes on the way."""

import itertools
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from hybrid_train.data.prepare import finished
from hybrid_train.data.prepare.finished import (
    histogram,
    merge,
    split_by_shares,
    split_by_tokens,
    verify_whole,
)
from hybrid_train.data.prepare.inputs import find_prefixes
from hybrid_train.data.prepare.manifest import TokenizerFacts, read_manifest
from hybrid_train.data.token_files import HEADER, TokenReader, write_documents
from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.schema.problems import UserError
from tests.unit.data.corpus import END, VOCAB, write_corpus
from tests.unit.data.prepare.texts import CORPUS, ids_of, job, json_lines, names, read_ids, run

FACTS = TokenizerFacts("made up", "0" * 64, VOCAB, END)


@pytest.fixture
def made(tmp_path: Path) -> list[str]:
    """Three prefixes of one tokenizer, with manifests."""
    for number in range(3):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(json_lines(CORPUS[10 * number : 10 * number + 10]))
        run(job(tmp_path, path, output=str(tmp_path / f"part-{number}")))
    return [str(tmp_path / f"part-{number}") for number in range(3)]


def test_merged_files_hold_the_documents_of_all(made: list[str], tmp_path: Path) -> None:
    output = str(tmp_path / "whole")
    assert merge(made, output, overwrite=False)[0] == 30
    assert read_ids(output) == ids_of(CORPUS[:30])
    assert verify_whole(output, None).faults == []
    manifest = read_manifest(output)
    assert manifest is not None
    assert [one["documents"] for one in manifest.sources] == [10, 10, 10]
    # The same as if all had been tokenized at once.
    run(job(tmp_path, *(tmp_path / f"{n}.jsonl" for n in range(3)), output=str(tmp_path / "once")))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"whole.{suffix}").read_bytes() == (
            tmp_path / f"once.{suffix}"
        ).read_bytes()


def test_files_of_another_tokenizer_are_not_merged(made: list[str], tmp_path: Path) -> None:
    train_byte_level_bpe(CORPUS, 300).save(tmp_path / "other")
    path = tmp_path / "0.jsonl"
    run(job(tmp_path, path, output=str(tmp_path / "odd"), tokenizer=str(tmp_path / "other")))
    before = names(tmp_path)
    with pytest.raises(UserError, match=r"odd was made with the tokenizer .*other and .*part-0"):
        merge([*made, str(tmp_path / "odd")], str(tmp_path / "whole"), overwrite=False)
    write_corpus(tmp_path / "bare", [5, 6])
    with pytest.raises(UserError, match="bare has no manifest"):
        merge([*made, str(tmp_path / "bare")], str(tmp_path / "whole"), overwrite=False)
    assert [name for name in names(tmp_path) if not name.startswith("bare")] == before


def test_a_merge_refuses_its_own_input_and_what_exists(made: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is one of the inputs"):
        merge(made, made[0], overwrite=True)
    with pytest.raises(UserError, match=r"part-2\.bin, .* exists"):
        merge(made[:2], made[2], overwrite=False)
    assert read_ids(made[2]) == ids_of(CORPUS[20:30])


def write_sequences(prefix: Path, per_document: int) -> list[list[int]]:
    """Files of documents with several sequences, as some of Megatron's tools make them."""
    draw = np.random.default_rng(2)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    documents = []
    for _ in range(40):
        lengths = draw.integers(2, 9, per_document)
        ids = draw.integers(1, VOCAB, lengths.sum())
        ids[0], ids[-1] = len(documents) + 1, END  # no two documents are the same
        builder.add_document(ids, lengths.tolist())
        documents.append(ids.tolist())
    builder.finalize(f"{prefix}.idx")
    return documents


@pytest.mark.parametrize("per_document", [1, 3])
@pytest.mark.parametrize("span", [10, 10**6])
def test_shares_divide_the_documents_and_keep_their_order(
    tmp_path: Path, per_document: int, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "_CHUNK_TOKENS", span)
    documents = write_sequences(tmp_path / "a", per_document)
    outputs = [str(tmp_path / name) for name in ("x", "y", "z")]
    found = split_by_shares(str(tmp_path / "a"), outputs, [0.5, 0.3, 0.2], seed=1, overwrite=False)
    assert [count for _, count, _ in found] == [20, 12, 8]
    parts = [read_ids(output) for output in outputs]
    assert sorted(itertools.chain(*parts)) == sorted(documents)
    for part in parts:
        places = [documents.index(one) for one in part]
        assert places == sorted(places)
        assert places != list(range(places[0], places[0] + len(places)))  # drawn
    if per_document > 1:
        lengths = TokenReader(outputs[0]).lengths
        assert len(lengths) == 3 * 20
    other = [str(tmp_path / name) for name in ("u", "v", "w")]
    split_by_shares(str(tmp_path / "a"), other, [0.5, 0.3, 0.2], seed=2, overwrite=False)
    assert read_ids(other[0]) != parts[0]


def test_shares_that_leave_a_part_empty_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [5, 5, 5])
    with pytest.raises(UserError, match="3 documents, too few"):
        split_by_shares(
            str(tmp_path / "a"), [str(tmp_path / n) for n in "xy"], [0.99, 0.01], 1, overwrite=False
        )


def test_a_shard_closes_with_the_document_that_fills_it(tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "a", [5, 5, 5, 30, 1, 1, 8])
    found = split_by_tokens(str(tmp_path / "a"), str(tmp_path / "s"), 10, overwrite=False)
    assert [(count, tokens) for _, count, tokens in found] == [(2, 10), (2, 35), (3, 10)]
    assert [one for prefix, _, _ in found for one in read_ids(prefix)] == documents
    whole = str(tmp_path / "whole")
    merge([prefix for prefix, _, _ in found], whole, overwrite=False)
    for suffix in ("bin", "idx"):
        assert Path(f"{whole}.{suffix}").read_bytes() == (tmp_path / f"a.{suffix}").read_bytes()


def test_whole_files_pass(made: list[str]) -> None:
    found = verify_whole(made[0], None)
    assert (found.documents, found.faults, found.unchecked) == (10, [], [])


def changed(path: Path, position: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(data)


def test_one_changed_bit_is_found(made: list[str]) -> None:
    path = Path(f"{made[0]}.bin")
    changed(path, 40, bytes([path.read_bytes()[40] ^ 1]))
    (fault,) = verify_whole(made[0], None).faults
    assert "part-0.bin has another checksum" in fault


def test_an_id_beyond_the_vocabulary_is_found_wherever_it_is(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [5000] * 40)  # `token_files.verify` looks at parts of it
    assert verify_whole(str(tmp_path / "a"), FACTS).faults == []
    changed(tmp_path / "a.bin", 2 * 123_457, struct.pack("<H", VOCAB))
    (fault,) = verify_whole(str(tmp_path / "a"), FACTS).faults
    assert fault == f"token 123457 is {VOCAB}, but the vocabulary of made up ends at {VOCAB - 1}"


def test_documents_without_an_end_are_counted(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [5, 7, 11])
    changed(tmp_path / "a.bin", 2 * 11, struct.pack("<H", 3))
    (fault,) = verify_whole(str(tmp_path / "a"), FACTS).faults
    assert fault == f"1 documents do not end with the end-of-document token {END}"


@pytest.mark.parametrize("field", ["length", "offset", "boundary"])
def test_an_index_that_disagrees_with_itself_is_found(tmp_path: Path, field: str) -> None:
    write_corpus(tmp_path / "a", [5, 7, 11])
    place, content = {
        "length": (HEADER.size, struct.pack("<i", 6)),
        "offset": (HEADER.size + 12 + 8, struct.pack("<q", 12)),
        "boundary": (HEADER.size + 36 + 8, struct.pack("<q", 3)),
    }[field]
    changed(tmp_path / "a.idx", place, content)
    faults = verify_whole(str(tmp_path / "a"), FACTS).faults
    assert any("the index contradicts itself" in fault for fault in faults)


def test_files_that_do_not_belong_together_are_found(made: list[str]) -> None:
    shutil.copy(f"{made[1]}.idx", f"{made[0]}.idx")
    assert verify_whole(made[0], None).faults
    Path(f"{made[2]}.bin").unlink()
    (fault,) = verify_whole(made[2], None).faults
    assert "part-2.bin does not exist" in fault


def test_documents_without_a_token_are_open_and_nothing_else(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [[], []], vocab_size=50)
    write_documents(tmp_path / "b", [[1, 0], [], [2, 0]], vocab_size=50)
    for name, count in (("a", 2), ("b", 1)):
        (fault,) = verify_whole(str(tmp_path / name), FACTS).faults
        assert fault.startswith(f"{count} documents do not end with the end-of-document token")


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [5])
    found = verify_whole(str(tmp_path / "a"), None)
    assert found.unchecked == [
        "checksums: there is no manifest", "token ids: name the tokenizer, tokenizer=FOLDER",
    ]  # fmt: skip


def test_another_tokenizer_than_that_of_the_files_is_told(made: list[str]) -> None:
    (fault,) = [one for one in verify_whole(made[0], FACTS).faults if "another tokenizer" in one]
    assert "made up" in fault


def test_prefixes_are_named_by_files_globs_and_folders(made: list[str], tmp_path: Path) -> None:
    assert find_prefixes([f"{made[1]}.idx", f"{made[0]}.bin", made[2]]) == [
        made[1],
        made[0],
        made[2],
    ]
    assert find_prefixes([str(tmp_path / "part-*")]) == made
    assert find_prefixes([str(tmp_path)]) == made
    with pytest.raises(UserError, match=r"prat-1: there is no .*did you mean .*part-1\?"):
        find_prefixes([str(tmp_path / "prat-1")])


def test_a_histogram_has_a_line_for_each_power_of_two() -> None:
    lines = histogram(np.array([2, 3, 3, 9], dtype=np.int32))
    counts = [(*line.split()[:1], *line.split()[2:4]) for line in lines]
    assert counts == [("2", "3", "3"), ("4", "7", "0"), ("8", "15", "1")]
    lines = histogram(np.array([0, 0, 1], dtype=np.int32))
    assert [line.split()[:4] for line in lines] == [["0", "-", "0", "2"], ["1", "-", "1", "1"]]
