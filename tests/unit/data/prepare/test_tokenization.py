"""Text becomes token files: the ids of the tokenizer, in order, however many processes work."""

import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import zstandard

from hybrid_train import __version__
from hybrid_train.data.prepare import journal
from hybrid_train.data.prepare.finished import verify_whole
from hybrid_train.data.prepare.manifest import read_manifest
from hybrid_train.data.sentencepiece import SentencePieceTokenizer
from hybrid_train.data.token_files import TokenReader, checksum
from hybrid_train.schema.formats import KEY, TOKEN_FILES, TOKENIZATION
from hybrid_train.schema.problems import UserError
from tests.full_disk import full_disk
from tests.unit.data.prepare.texts import (
    CORPUS,
    TOKENIZER,
    ids_of,
    job,
    json_lines,
    names,
    read_ids,
    run,
    some_texts,
)

TEXTS = some_texts(90)


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Inputs of several kinds, which together hold TEXTS."""
    folder = tmp_path / "in"
    (folder / "code").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(json_lines(TEXTS[:30]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS[30:50])))
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(json_lines(TEXTS[50:70])))
    for i, text in enumerate(TEXTS[70:90]):
        (folder / "code" / f"{i:02}.py").write_text(text)
    return [
        folder / name for name in ("a.jsonl", "b.jsonl.gz", "empty.jsonl", "c.jsonl.zst", "code")
    ]


def test_documents_come_in_order_and_close_with_their_end(
    tmp_path: Path, mixed: list[Path]
) -> None:
    finished, seen = run(job(tmp_path, *mixed), workers=2)
    expected = ids_of(TEXTS)
    assert read_ids(tmp_path / "out") == expected
    # Megatron's own reader finds the same.
    theirs = TokenReader(tmp_path / "out")
    assert [theirs[number].tolist() for number in range(len(theirs))] == expected
    assert names(tmp_path) == ["in", "out.bin", "out.idx", "out.json"]
    assert finished.manifest.tokens == sum(map(len, expected)) == seen[-1].tokens
    assert [counts.documents for counts in finished.counts.values()] == [30, 20, 0, 20, 20]
    tokens = [sum(map(len, expected[a:b])) for a, b in ((0, 30), (30, 50), (50, 50), (50, 70))]
    assert [counts.tokens for counts in finished.counts.values()][:4] == tokens
    sizes = [sum(len(text.encode()) for text in TEXTS[a:b]) for a, b in ((0, 30), (30, 50))]
    assert [counts.text_bytes for counts in finished.counts.values()][:2] == sizes
    assert seen[-1].bytes_read == seen[-1].total_bytes


def test_files_do_not_depend_on_workers_or_blocks(tmp_path: Path, mixed: list[Path]) -> None:
    run(job(tmp_path, *mixed), workers=1)
    run(job(tmp_path, *mixed, output=str(tmp_path / "other"), block_kb=3), workers=3)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"out.{suffix}").read_bytes() == (
            tmp_path / f"other.{suffix}"
        ).read_bytes()


def test_the_manifest_says_what_the_files_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["one", "two", ""]) + b"{}\n")
    run(job(tmp_path, path, max_bad_share=1))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.tokenizer is not None
    assert asdict(manifest.tokenizer) == {
        "path": str(tmp_path / "tokenizer"), "fingerprint": TOKENIZER.fingerprint,
        "vocab_size": TOKENIZER.vocab_size, "end_of_document": 0,
    }  # fmt: skip
    assert manifest.sources == [
        {"path": str(path), "bytes": path.stat().st_size, "documents": 2,
         "tokens": sum(map(len, ids_of(["one", "two"]))), "text_bytes": 6, "lines": 4, "bad": 1,
         "empty": 1, "binary": 0}
    ]  # fmt: skip
    found = {kind: checksum(tmp_path / f"out.{kind}") for kind in ("bin", "idx")}
    assert manifest.checksums == found
    assert manifest.dtype == "uint16"
    assert verify_whole(str(tmp_path / "out"), None).faults == []


def test_bad_lines_are_written_aside_with_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = json_lines(TEXTS[:40]).splitlines(keepends=True)
    lines[7:7] = [b"not json\n"]
    lines[30:30] = [b'{"text": null}\n', b"\xff\n"]
    path.write_bytes(b"".join(lines))
    finished, _ = run(job(tmp_path, path, max_bad_share=0.1), workers=2)
    assert read_ids(tmp_path / "out") == ids_of(TEXTS[:40])
    bad = [json.loads(line) for line in (tmp_path / "out.bad.jsonl").read_text().splitlines()]
    assert [(one["file"], one["line"]) for one in bad] == [(str(path), n) for n in (8, 31, 32)]
    assert [one["reason"].split(":")[0] for one in bad] == [
        "is not JSON", "'text' is null, not text", "is not UTF-8",
    ]  # fmt: skip
    assert finished.counts[str(path)].bad == 3


def test_too_many_bad_lines_stop_the_job_and_a_higher_share_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS[:30]) + b"x\n" * 3)
    asked = job(tmp_path, path, max_bad_share=0.05)
    with pytest.raises(UserError, match=r"3 of 33 lines .* line 31, is not JSON.* max_bad_share="):
        run(asked)
    assert names(tmp_path) == ["a.jsonl", "out.partial"]
    _, seen = run(job(tmp_path, path, max_bad_share=0.1))
    assert seen[0].documents == 30  # nothing is done twice
    assert read_ids(tmp_path / "out") == ids_of(TEXTS[:30])


def test_a_wrong_key_stops_early_and_leaves_the_way_free(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(CORPUS * 20, key="content"))
    with pytest.raises(UserError, match="has no key 'text'; it has id, content") as error:
        run(job(tmp_path, path))
    assert "6000 of" not in str(error.value)
    run(job(tmp_path, path, text_key="content", block_kb=64))
    assert read_ids(tmp_path / "out") == ids_of(CORPUS) * 20


@pytest.mark.parametrize("content", [b"", b"\n\n", json_lines(["", ""])])
def test_input_without_a_document_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"no document in 1 source"):
        run(job(tmp_path, tmp_path / "a.jsonl"))
    assert names(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_an_output_that_exists_is_refused_and_left_as_it_is(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a"]))
    (tmp_path / f"out{suffix}").write_bytes(b"precious")
    with pytest.raises(UserError, match=rf"out\{suffix} exists; .*overwrite=true"):
        run(job(tmp_path, tmp_path / "a.jsonl"))
    assert names(tmp_path) == ["a.jsonl", f"out{suffix}"]
    assert (tmp_path / f"out{suffix}").read_bytes() == b"precious"
    run(job(tmp_path, tmp_path / "a.jsonl", overwrite=True))
    assert read_ids(tmp_path / "out") == ids_of(["a"])


class Stopped(Exception):
    """What a test stops a job with."""


def stopped_after(asked: Any, count: int) -> None:
    """Run a job until `count` blocks are done."""
    from hybrid_train.data.prepare.tokenization import tokenize

    seen = []

    def report(progress: object) -> None:
        seen.append(progress)
        if len(seen) > count:
            raise Stopped

    with pytest.raises(Stopped):
        tokenize(asked, 1, report)


@pytest.mark.parametrize("count", [0, 7, 20])
def test_a_stopped_job_goes_on_where_it_was(tmp_path: Path, mixed: list[Path], count: int) -> None:
    stopped_after(job(tmp_path, *mixed), count)
    assert not (tmp_path / "out.idx").exists()
    # What was written after the last save is cut off.
    with (tmp_path / "out.partial" / "tokens.bin").open("ab") as file:
        file.write(b"more than the position knows")
    _, seen = run(job(tmp_path, *mixed), workers=2)
    assert (seen[0].documents > 0) == (count > 0)
    assert read_ids(tmp_path / "out") == ids_of(TEXTS)
    run(job(tmp_path, *mixed, output=str(tmp_path / "straight")))
    for suffix in ("bin", "idx", "json"):
        straight = (tmp_path / f"straight.{suffix}").read_bytes()
        assert (tmp_path / f"out.{suffix}").read_bytes() == straight


def test_another_command_does_not_go_on_with_the_work_of_one(
    tmp_path: Path, mixed: list[Path]
) -> None:
    stopped_after(job(tmp_path, *mixed), 5)
    mixed[0].touch()
    with pytest.raises(UserError, match=r"sources differ, for one .*a\.jsonl"):
        run(job(tmp_path, *mixed))
    with pytest.raises(UserError, match="block_kb was 1 and is 2"):
        run(job(tmp_path, *mixed, block_kb=2))
    run(job(tmp_path, *mixed, block_kb=2, overwrite=True))
    assert read_ids(tmp_path / "out") == ids_of(TEXTS)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_job_killed_while_files_move_to_their_place_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a", "b"]) + b"x\n")
    real = Path.replace

    def replace(self: Path, target: Any) -> Any:
        if self.suffix != ".new" and Path(target).parent == tmp_path:
            nonlocal moved
            if not moved:
                raise Stopped
            moved -= 1
        return real(self, target)

    asked = job(tmp_path, tmp_path / "a.jsonl", max_bad_share=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Stopped):
            run(asked)
    assert not (tmp_path / "out.idx").exists()
    run(asked)
    assert read_ids(tmp_path / "out") == ids_of(["a", "b"])
    assert "x" in (tmp_path / "out.bad.jsonl").read_text()
    assert verify_whole(str(tmp_path / "out"), None).faults == []
    assert not (tmp_path / "out.partial").exists()


def test_two_jobs_do_not_write_the_same_output(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a"]))
    asked = job(tmp_path, tmp_path / "a.jsonl")

    def report(_: object) -> None:
        with pytest.raises(UserError, match="another process is writing"):
            run(asked)
        raise Stopped

    from hybrid_train.data.prepare.tokenization import tokenize

    with pytest.raises(Stopped):
        tokenize(asked, 1, report)


@pytest.mark.parametrize("suffix", ["tokens.idx", "state.json.new"])
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    asked = job(tmp_path, tmp_path / "a.jsonl")
    with monkeypatch.context() as patch:
        full_disk(patch, suffix)
        with pytest.raises(UserError, match=r"the disk is full: .*out\.partial; free some space"):
            run(asked)
    run(asked)
    assert read_ids(tmp_path / "out") == ids_of(TEXTS)


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path, mixed: list[Path]) -> None:
    stopped_after(job(tmp_path, *mixed), 5)
    (tmp_path / "out.partial" / journal._STATE).write_text("{")
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        run(job(tmp_path, *mixed))


def change_state(folder: Path, version: int | None) -> None:
    """Say another version in the state of an unfinished tokenization, or none."""
    path = folder / "out.partial" / journal._STATE
    said = json.loads(path.read_text())
    stamp = said.pop(KEY)
    if version is not None:
        said[KEY] = stamp | {"version": version, "written_by": "9.9.9"}
    path.write_text(json.dumps(said))


def test_a_job_that_was_stopped_before_there_were_numbers_goes_on(
    tmp_path: Path, mixed: list[Path]
) -> None:
    stopped_after(job(tmp_path, *mixed), 7)
    change_state(tmp_path, None)
    _, seen = run(job(tmp_path, *mixed))
    assert seen[0].documents > 0
    assert read_ids(tmp_path / "out") == ids_of(TEXTS)


def test_what_a_newer_version_has_begun_is_refused_and_stays(
    tmp_path: Path, mixed: list[Path]
) -> None:
    stopped_after(job(tmp_path, *mixed), 7)
    change_state(tmp_path, TOKENIZATION.version + 1)
    before = (tmp_path / "out.partial" / "tokens.bin").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"by hybrid_train 9\.9\.9 \(unfinished tokenization"):
            run(job(tmp_path, *mixed, overwrite=overwrite))
    assert (tmp_path / "out.partial" / "tokens.bin").read_bytes() == before


def test_a_manifest_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a"]))
    run(job(tmp_path, tmp_path / "a.jsonl"))
    path = tmp_path / "out.json"
    said = json.loads(path.read_text())
    assert said["format"] == f"hybrid_train token files {TOKEN_FILES.version}"
    assert said["versions"]["hybrid_train"] == __version__
    said["versions"]["hybrid_train"] = "9.9.9"
    path.write_text(json.dumps(said | {"format": "hybrid_train token files 7"}))
    with pytest.raises(UserError, match=r"by hybrid_train 9\.9\.9 \(pair of token files, format 7"):
        read_manifest(tmp_path / "out")
    path.write_text(json.dumps(said | {"format": "token files"}))
    with pytest.raises(UserError, match="is no manifest of token files: its format is"):
        read_manifest(tmp_path / "out")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), vocab_size=120,
        byte_fallback=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return folder


def test_a_sentencepiece_model_makes_the_ids(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    finished, _ = run(job(tmp_path, tmp_path / "a.jsonl", tokenizer=str(model)), workers=2)
    tokenizer = SentencePieceTokenizer.load(model)
    assert read_ids(tmp_path / "out") == ids_of(TEXTS, tokenizer)
    assert finished.manifest.tokenizer is not None
    assert finished.manifest.tokenizer.fingerprint == tokenizer.fingerprint


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"id": 70_000, "content": "<far>", "single_word": False, "lstrip": False}
    token |= {"rstrip": False, "normalized": False, "special": False}
    content["added_tokens"].append(token)
    # Ids of added tokens follow those of the model, so the model has to reach that far.
    content["model"]["vocab"] |= {f"<{i}>": i for i in range(400, 70_000)}
    path.write_text(json.dumps(content))
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a<far>b"]))
    run(job(tmp_path, tmp_path / "a.jsonl"))
    (ids,) = read_ids(tmp_path / "out")
    assert 70_000 in ids
    assert (tmp_path / "out.bin").stat().st_size == 4 * len(ids)
    assert TokenReader(tmp_path / "out")[0].tolist() == ids
    assert np.fromfile(tmp_path / "out.bin", "<i4").tolist() == ids
