"""Token files behind a URL read as local ones do, whatever the server does."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from hybrid_train.data.documents import FileDocuments
from hybrid_train.data.token_files import spaced_parts, verify
from hybrid_train.schema.data import Remote
from hybrid_train.schema.problems import UserError
from tests.unit.data.corpus import VOCAB, write_corpus
from tests.unit.data.http_folder import HttpFolder, serve

BLOCK = 4096
LENGTHS = [
    1,
    2,
    5000,
    17,
    4000,
    3,
    900,
    2500,
]  # two bytes each: seven blocks, some end in a document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "served" / "a", LENGTHS)
    return tmp_path / "served"


@pytest.fixture
def server(folder: Path) -> Iterator[HttpFolder]:
    with serve(folder) as started:
        yield started


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(cache=str(tmp_path / "cache"), block_bytes=BLOCK, read_ahead=0, first_wait_s=0)


def all_of(documents: FileDocuments) -> list[list[int]]:
    return [documents.read(d, 0, n).tolist() for d, n in enumerate(documents.lengths.tolist())]


def test_a_remote_prefix_reads_and_is_named_as_the_local_one(
    folder: Path, server: HttpFolder, remote: Remote
) -> None:
    local = FileDocuments(str(folder / "a"))
    over_http = FileDocuments(f"{server.url}/a", VOCAB, remote=remote)
    assert over_http.lengths.tolist() == LENGTHS
    for document in np.random.default_rng(0).permutation(len(LENGTHS)).tolist():
        for start, stop in [(0, LENGTHS[document]), (LENGTHS[document] // 2, LENGTHS[document])]:
            expected = local.read(document, start, stop)
            np.testing.assert_array_equal(over_http.read(document, start, stop), expected)
    assert over_http.fingerprint() == local.fingerprint()


def test_verify_and_spread_take_a_url(folder: Path, server: HttpFolder, remote: Remote) -> None:
    found = verify(f"{server.url}/a", VOCAB, remote=remote)
    assert (found.documents, found.tokens) == (len(LENGTHS), sum(LENGTHS))
    np.testing.assert_array_equal(
        np.concatenate(list(spaced_parts(found, at_most=10**6, remote=remote))),
        np.fromfile(folder / "a.bin", dtype=np.uint16),
    )
    with pytest.raises(UserError, match=rf"{server.url}/a\.bin holds token .*vocabulary ends at 9"):
        verify(f"{server.url}/a", 10, remote=remote)


def test_files_of_any_file_system_of_fsspec_can_be_read(folder: Path, remote: Remote) -> None:
    memory = fsspec.filesystem("memory")
    for suffix in (".bin", ".idx"):
        memory.pipe_file(f"/corpus/a{suffix}", (folder / f"a{suffix}").read_bytes())
    found = FileDocuments("memory://corpus/a", VOCAB, remote=remote)
    assert all_of(found) == all_of(FileDocuments(str(folder / "a")))
    memory.rm("/corpus", recursive=True)
    with pytest.raises(UserError, match=r"memory://corpus/a\.idx does not exist"):
        FileDocuments("memory://corpus/a", remote=remote)


def test_each_block_is_fetched_once_and_the_index_too(server: HttpFolder, remote: Remote) -> None:
    first = all_of(FileDocuments(f"{server.url}/a", remote=remote))
    blocks = -(-2 * sum(LENGTHS) // BLOCK)
    assert len(server.bodies(".bin")) == blocks
    assert len(server.bodies(".idx")) == 1
    assert all_of(FileDocuments(f"{server.url}/a", remote=remote)) == first
    assert len(server.bodies(".bin")) == blocks
    assert len(server.bodies(".idx")) == 1
    assert server.encodings == {"identity"}  # a part of a compressed file is no part of the file


def test_blocks_ahead_are_fetched_for_a_reader_in_order(server: HttpFolder, remote: Remote) -> None:
    remote.read_ahead = 2
    documents = FileDocuments(f"{server.url}/a", remote=remote)
    documents.read(2, 0, 1)  # in block 0
    deadline = time.monotonic() + 30
    while len(server.bodies(".bin")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(server.bodies(".bin")) == ["bytes=0-4095", "bytes=4096-8191", "bytes=8192-12287"]


def test_a_reader_that_jumps_fetches_nothing_ahead(server: HttpFolder, remote: Remote) -> None:
    remote.read_ahead = 2
    documents = FileDocuments(f"{server.url}/a", remote=remote)
    documents.read(4, 3000, 3010)
    documents.read(2, 2500, 2510)
    time.sleep(0.2)  # what is fetched ahead would be asked for by now
    assert len(server.bodies(".bin")) == 2


def test_a_server_that_fails_every_third_request_is_asked_again(
    folder: Path, server: HttpFolder, remote: Remote
) -> None:
    server.fail_every = 3
    found = all_of(FileDocuments(f"{server.url}/a", remote=remote))
    assert found == all_of(FileDocuments(str(folder / "a")))
    assert len(server.bodies(".bin")) > -(-2 * sum(LENGTHS) // BLOCK)  # some were needed twice


def test_a_server_that_only_fails_is_named_after_the_last_try(
    server: HttpFolder, remote: Remote
) -> None:
    documents = FileDocuments(f"{server.url}/a", remote=remote)
    server.fail_every, remote.tries = 1, 5
    before = len(server.bodies(".bin"))
    with pytest.raises(UserError, match=rf"bytes 0 to 4096 of {server.url}/a\.bin.*5 tries.*check"):
        documents.read(0, 0, 1)
    assert len(server.bodies(".bin")) - before == 5
    server.fail_every = 0
    assert len(documents.read(0, 0, 1)) == 1  # the failure is not kept


def test_waits_between_tries_double(
    server: HttpFolder, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    server.fail_every, remote.tries, remote.first_wait_s = 1, 4, 0.5
    monkeypatch.setattr("hybrid_train.config.fsspec.time.sleep", waited.append)
    with pytest.raises(UserError, match="4 tries"):
        FileDocuments(f"{server.url}/a", remote=remote)
    assert waited == [0.5, 1, 2]


def test_an_address_where_nobody_answers_is_named(remote: Remote) -> None:
    with serve(Path()) as gone:
        pass
    with pytest.raises(UserError, match=rf"cannot read {gone.url}/a\.idx.*5 tries"):
        FileDocuments(f"{gone.url}/a", remote=remote)


def test_a_file_that_is_not_there_is_named_at_once(server: HttpFolder, remote: Remote) -> None:
    with pytest.raises(UserError, match=rf"{server.url}/b\.idx does not exist"):
        FileDocuments(f"{server.url}/b", remote=remote)
    assert len(server.requests) == 2  # HEAD, then GET by fsspec itself; no further try


def test_a_server_that_ignores_ranges_is_refused_before_it_sends_the_whole_file(
    server: HttpFolder, remote: Remote
) -> None:
    server.ranges = False
    documents = FileDocuments(f"{server.url}/a", remote=remote)  # the index is one block: it works
    with pytest.raises(UserError, match=rf"{server.url}/a\.bin: the server cannot send parts"):
        documents.read(4, 3000, 3010)


@pytest.mark.parametrize("change", ["longer", "shorter", "as long"])
def test_a_file_that_changes_while_it_is_read_is_an_error(
    folder: Path, server: HttpFolder, remote: Remote, change: str
) -> None:
    documents = FileDocuments(f"{server.url}/a", remote=remote)
    documents.read(0, 0, 1)
    data = (folder / "a.bin").read_bytes()
    new = {"longer": data + b"xx", "shorter": data[:-2], "as long": data[::-1]}[change]
    (folder / "a.bin").write_bytes(new)
    os.utime(folder / "a.bin", (10**9, 10**9))
    with pytest.raises(UserError, match=rf"{server.url}/a\.bin has changed since it was opened"):
        documents.read(7, 0, 2500)


@pytest.mark.parametrize("says_version", [True, False])
def test_other_files_under_the_same_url_are_read_anew(
    folder: Path, server: HttpFolder, remote: Remote, says_version: bool
) -> None:
    server.says_version = says_version
    old = FileDocuments(f"{server.url}/a", remote=remote)
    all_of(old)
    before = old.fingerprint()
    write_corpus(folder / "a", LENGTHS[::-1], seed=1)  # as long, index and tokens
    os.utime(folder / "a.bin", (10**9, 10**9))
    os.utime(folder / "a.idx", (10**9, 10**9))
    new = FileDocuments(f"{server.url}/a", remote=remote)
    assert all_of(new) == all_of(FileDocuments(str(folder / "a")))
    assert new.fingerprint() != before


def test_threads_may_read_one_file_at_once(
    folder: Path, server: HttpFolder, remote: Remote
) -> None:
    remote.read_ahead = 2
    documents = FileDocuments(f"{server.url}/a", remote=remote)
    expected = all_of(FileDocuments(str(folder / "a")))
    found: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: found.append(all_of(documents))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert len(server.bodies(".bin")) == -(-2 * sum(LENGTHS) // BLOCK)


READ_ALL = """
import hashlib, os, sys
from hybrid_train.schema.data import Remote
from hybrid_train.data.documents import FileDocuments
url, cache, limit, fork = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "fork"
remote = Remote(cache=cache, block_bytes=4096, cache_bytes=limit, read_ahead=1)
documents = FileDocuments(url, remote=remote)
documents.read(0, 0, 1)
if fork and (child := os.fork()):
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
digest = hashlib.sha256()
for _ in range(5):
    for d, n in enumerate(documents.lengths.tolist()):
        digest.update(documents.read(d, 0, n).tobytes())
print(digest.hexdigest(), flush=True)
os._exit(0)
"""


def digest_of(folder: Path) -> str:
    documents = FileDocuments(str(folder / "a"))
    parts = [documents.read(d, 0, n).tobytes() for d, n in enumerate(LENGTHS)]
    return hashlib.sha256(b"".join(parts * 5)).hexdigest()


def start_reader(server: HttpFolder, remote: Remote, *, fork: bool) -> "subprocess.Popen[str]":
    limit = 4 * BLOCK  # less than the file: what one writes, others remove
    arguments = [f"{server.url}/a", str(remote.cache), str(limit), "fork" if fork else ""]
    command = [sys.executable, "-W", "ignore", "-c", READ_ALL, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_may_share_a_folder_that_is_too_small_for_them(
    folder: Path, server: HttpFolder, remote: Remote
) -> None:
    readers = [start_reader(server, remote, fork=False) for _ in range(3)]
    outputs = [reader.communicate(timeout=60)[0].strip() for reader in readers]
    assert outputs == [digest_of(folder)] * 3


def test_a_forked_process_reads_on(folder: Path, server: HttpFolder, remote: Remote) -> None:
    reader = start_reader(server, remote, fork=True)
    assert reader.communicate(timeout=60)[0].strip() == digest_of(folder)
    assert reader.returncode == 0


def test_a_protocol_that_nobody_knows_is_named(remote: Remote) -> None:
    with pytest.raises(UserError, match=r"nowhere://a\.idx: .*Protocol not known"):
        FileDocuments("nowhere://a", remote=remote)
