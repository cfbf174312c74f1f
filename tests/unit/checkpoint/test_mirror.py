"""A copy behind a URL is whole or nobody's: the marker comes last, goes first, and bytes agree."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.layout import Found
from hybrid_train.checkpoint.mirror import Mirror, TakenOverError
from hybrid_train.schema.problems import UserError

FILES = ("0.distcp", "1.distcp", ".metadata")
SIZE = 5000  # bytes of each


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    where = f"{tmp_path}/there" if request.param == "file" else f"/{uuid.uuid4().hex}"
    yield f"{request.param}://{where}/runs/a"
    if request.param == "memory" and fsspec.filesystem("memory").exists(where):
        fsspec.filesystem("memory").rm(where, recursive=True)


def checkpoint(run_dir: Path, step: int, content: bytes = b"x") -> Found:
    """Write a checkpoint as a save leaves it, of bytes that nobody reads."""
    folder = layout.path_of(run_dir, step)
    folder.mkdir(parents=True)
    for number, name in enumerate(FILES):
        (folder / name).write_bytes(content * SIZE + bytes([number]))
    layout.write_position(folder, {"step": step, "tokens": 10 * step, "source_tokens": {}})
    layout.write_checksums(folder, {})
    return Found(folder, step)


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def claimed(url: str, run_dir: Path) -> tuple[Mirror, str]:
    mirror = Mirror(url)
    owner, _ = mirror.claim(run_dir)
    return mirror, owner


def copied(url: str, run_dir: Path, *steps: int) -> Mirror:
    mirror, owner = claimed(url, run_dir)
    for step in steps:
        mirror.copy(checkpoint(run_dir, step), [], owner)
    return mirror


def store_of(url: str) -> tuple[Any, str]:
    files, root = fsspec.core.url_to_fs(url)
    return files, f"{root}/checkpoints"


def test_what_comes_back_is_what_went(url: str, tmp_path: Path) -> None:
    mirror = copied(url, tmp_path / "here", 5, 10)
    assert mirror.steps() == [5, 10]
    assert mirror.fetch(10, tmp_path / "back") == ""
    found = layout.complete(tmp_path / "back")
    assert [one.step for one in found] == [10]
    assert contents(found[0].path) == contents(layout.path_of(tmp_path / "here", 10))


def test_a_fetch_that_was_cut_off_at_any_file_goes_on_there(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = copied(url, tmp_path / "here", 5)
    here, get = layout.path_of(tmp_path / "here", 5), Mirror._get
    total = len(list(here.iterdir()))
    for last in range(total):
        back, came = tmp_path / f"back{last}", list[str]()

        def cut(self: Mirror, name: str, path: Path) -> None:
            if len(came) == last:  # noqa: B023  used before the next round
                path.write_bytes(b"half")
                raise KeyboardInterrupt
            get(self, name, path)
            came.append(name)  # noqa: B023

        monkeypatch.setattr(Mirror, "_get", cut)
        with pytest.raises(KeyboardInterrupt):
            mirror.fetch(5, back)
        assert layout.complete(back) == []
        again = list[str]()

        def watched(self: Mirror, name: str, path: Path) -> None:
            again.append(name)  # noqa: B023
            get(self, name, path)

        monkeypatch.setattr(Mirror, "_get", watched)
        assert mirror.fetch(5, back) == ""
        assert contents(layout.path_of(back, 5)) == contents(here)
        kept = {name for name in came if not name.endswith("checksums.json")}
        assert not kept & set(again)


def test_a_copy_that_was_cut_off_at_any_file_is_not_whole(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, owner = claimed(url, tmp_path)
    found, put = checkpoint(tmp_path, 5), Mirror._put
    names = len(list(found.path.iterdir()))
    for last in range(names):
        left = iter(range(last))

        def cut(self: Mirror, path: Path, name: str) -> int:
            if next(left, None) is None:  # noqa: B023  used before the next round
                raise KeyboardInterrupt
            return put(self, path, name)

        monkeypatch.setattr(Mirror, "_put", cut)
        with pytest.raises(KeyboardInterrupt):
            mirror.copy(found, [], owner)
        assert mirror.steps() == []
    monkeypatch.undo()
    mirror.copy(found, [], owner)
    assert mirror.steps() == [5]


def test_a_step_that_is_copied_anew_is_not_whole_meanwhile(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(url, tmp_path / "one", 5)
    mirror, owner = claimed(url, tmp_path / "two")
    seen, put = [], Mirror._put

    def watched(self: Mirror, path: Path, name: str) -> int:
        seen.append(mirror.steps())
        return put(self, path, name)

    monkeypatch.setattr(Mirror, "_put", watched)
    mirror.copy(checkpoint(tmp_path / "two", 5, b"other"), [], owner)
    assert seen == [[]] * (len(FILES) + 2)
    assert mirror.fetch(5, tmp_path / "back") == ""
    assert (layout.path_of(tmp_path / "back", 5) / "0.distcp").read_bytes()[:5] == b"other"


def owner_of(url: str) -> str:
    return str(json.loads(Mirror(url)._bytes("owner.json"))["id"])


def test_what_is_there_already_is_not_copied_again(url: str, tmp_path: Path) -> None:
    mirror, owner = claimed(url, tmp_path)
    found = checkpoint(tmp_path, 5)
    everything = sum(one.stat().st_size for one in found.path.iterdir())
    assert mirror.copy(found, [], owner) == everything
    assert mirror.copy(found, [], owner) == 0


def test_the_newest_stay_and_what_was_never_whole_goes(url: str, tmp_path: Path) -> None:
    mirror = copied(url, tmp_path, 5, 10, 15, 20)
    files, folder = store_of(url)
    files.rm_file(f"{folder}/step_00000020/position.json")
    mirror.tidy(2, owner_of(url))
    assert mirror.steps() == [10, 15]
    left = {name.split("/checkpoints/")[1].split("/")[0] for name in files.find(folder)}
    assert left == {"step_00000010", "step_00000015"}


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_whole(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, remove, calls = copied(url, tmp_path, 5, 10), Mirror._remove, [0]

    def cut(self: Mirror, names: list[str]) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        remove(self, names)

    monkeypatch.setattr(Mirror, "_remove", cut)
    with pytest.raises(KeyboardInterrupt):
        mirror.tidy(1, owner_of(url))
    assert mirror.steps() == [10]
    files, folder = store_of(url)
    assert files.exists(f"{folder}/step_00000005/0.distcp")


def test_what_names_no_file_of_the_run_is_left_alone(url: str, tmp_path: Path) -> None:
    """Marks of folders, as consoles of S3 make them; files of others; names that lead away."""
    copied(url, tmp_path / "here", 5)
    mirror = Mirror(url)
    strange = ["", "tokenizer/", "../../evil.txt", "checkpoints/step_00000005/../../../evil.txt"]
    names = mirror._names()
    beside = sorted([*names, "checkpoints/.DS_Store"])
    listed = [f"{mirror._root}/{name}" for name in (*beside, *strange)]
    mirror._files = SimpleNamespace(
        find=lambda *_, **__: listed, invalidate_cache=lambda: None, get_file=mirror._files.get_file
    )
    assert mirror._names() == beside
    assert mirror.steps() == [5]
    mirror.fetch_beside(tmp_path / "back")
    assert not (tmp_path / "evil.txt").exists()


def test_without_its_checksums_a_checkpoint_is_damaged(url: str, tmp_path: Path) -> None:
    mirror = copied(url, tmp_path / "here", 5)
    files, folder = store_of(url)
    files.rm_file(f"{folder}/step_00000005/checksums.json")
    assert mirror.fetch(5, tmp_path / "back") == "checksums.json is missing"


def test_what_came_back_damaged_can_be_had_back(url: str, tmp_path: Path) -> None:
    mirror = copied(url, tmp_path / "here", 5, 10)
    mirror.set_aside(10)
    assert mirror.steps() == [5]
    mirror.tidy(1, owner_of(url))
    assert {"0.distcp", "position.json.damaged"} <= mirror.files_of(10)
    owner, _ = mirror.claim(tmp_path / "here")
    mirror.copy(Found(layout.path_of(tmp_path / "here", 10), 10), [], owner)
    assert mirror.steps() == [5, 10]


def test_a_run_that_lost_the_url_removes_nothing_there(url: str, tmp_path: Path) -> None:
    mirror = copied(url, tmp_path / "here", 5, 10)
    before = owner_of(url)
    mirror.claim(tmp_path / "other")
    with pytest.raises(TakenOverError):
        mirror.tidy(1, before)
    assert mirror.steps() == [5, 10]


def test_a_byte_that_turned_there_is_found(url: str, tmp_path: Path) -> None:
    mirror = copied(url, tmp_path / "here", 5)
    files, folder = store_of(url)
    data = bytearray(files.cat_file(f"{folder}/step_00000005/1.distcp"))
    data[17] ^= 1
    files.pipe_file(f"{folder}/step_00000005/1.distcp", bytes(data))
    damaged = mirror.fetch(5, tmp_path / "back")
    assert damaged == "1.distcp has other bytes than were written"
    assert not list((tmp_path / "back" / "checkpoints").iterdir())


def test_a_byte_that_turned_on_the_way_is_fetched_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, get, turned = copied(url, tmp_path / "here", 5), Mirror._get, []

    def bad_once(self: Mirror, name: str, path: Path) -> None:
        get(self, name, path)
        if name.endswith("0.distcp") and not turned:
            turned.append(name)
            path.write_bytes(b"y" + path.read_bytes()[1:])

    monkeypatch.setattr(Mirror, "_get", bad_once)
    assert mirror.fetch(5, tmp_path / "back") == ""
    assert len(turned) == 1


def test_what_lies_beside_comes_along_and_back(url: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    mirror, owner = claimed(url, here)
    found = checkpoint(here, 5)
    (here / "tokenizer").mkdir()
    (here / "tokenizer" / "tokenizer.json").write_text("{}")
    (here / "config.yaml").write_text("model: {}\n")
    beside = [here / name for name in ("config.yaml", "tokenizer", "not there")]
    mirror.copy(found, beside, owner)
    mirror.fetch_beside(tmp_path / "config", only=["config.yaml"])
    assert contents(tmp_path / "config") == {"config.yaml": b"model: {}\n"}
    mirror.fetch_beside(tmp_path / "back")
    names = {str(one.relative_to(tmp_path / "back")) for one in (tmp_path / "back").rglob("*.*")}
    assert names == {"config.yaml", "tokenizer/tokenizer.json"}


def test_a_second_run_takes_over_and_the_first_copies_no_more(url: str, tmp_path: Path) -> None:
    first, owner = claimed(url, tmp_path / "one")
    _, before = Mirror(url).claim(tmp_path / "two")
    assert f"in {tmp_path / 'one'}" in before
    with pytest.raises(TakenOverError, match=rf"taken over by process \d+ on .*{tmp_path}/two"):
        first.copy(checkpoint(tmp_path / "one", 5), [], owner)
    assert first.steps() == []


def test_a_run_that_is_taken_over_in_the_middle_of_a_copy_leaves_nothing_whole(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, owner = claimed(url, tmp_path / "one")
    put = Mirror._put

    def interrupted(self: Mirror, path: Path, name: str) -> int:
        if path.name == "1.distcp":
            Mirror(url).claim(tmp_path / "two")
        return put(self, path, name)

    monkeypatch.setattr(Mirror, "_put", interrupted)
    with pytest.raises(TakenOverError):
        first.copy(checkpoint(tmp_path / "one", 5), [], owner)
    assert first.steps() == []


def test_a_run_that_goes_on_in_its_folder_or_after_an_end_in_order_warns_of_nobody(
    url: str, tmp_path: Path
) -> None:
    _, owner = claimed(url, tmp_path / "one")
    again, before = Mirror(url).claim(tmp_path / "one")
    assert before == ""
    assert again != owner
    Mirror(url).release(again)
    assert Mirror(url).claim(tmp_path / "two")[1] == ""


def test_a_probe_leaves_nothing_behind(url: str) -> None:
    files, root = fsspec.core.url_to_fs(url)
    Mirror(url).probe()
    assert files.find(root) == []


def test_no_credential_is_looked_for_in_a_run_folder() -> None:
    with pytest.raises(UserError, match="a run folder holds no credentials"):
        Mirror("s3://<hidden>@bucket/a")


def test_a_url_that_may_not_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file://.*file/a"):
        Mirror(f"file://{tmp_path}/file/a").probe()


def test_the_position_that_comes_alone_is_that_of_the_step(url: str, tmp_path: Path) -> None:
    copied(url, tmp_path / "here", 5).fetch_position(5, tmp_path / "back")
    path = layout.path_of(tmp_path / "back", 5) / "position.json"
    assert json.loads(path.read_text())["tokens"] == 50
