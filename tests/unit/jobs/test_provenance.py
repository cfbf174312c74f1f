"""What an attempt says of its command, code, machines and libraries."""

import json
from pathlib import Path

import pytest

import hybrid_train
from hybrid_train.jobs import provenance
from hybrid_train.jobs.code_snapshot import code_of
from hybrid_train.jobs.provenance import command_line


def test_a_command_is_written_as_it_is_typed_without_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    words = ["/somewhere/bin/hybrid-train", "train", "run_dir=a b", "hooks.x.password=hunter2"]
    words += ["data.train=[https://me:secret@host.example/web]", "note=0123456789abcdef"]
    said = command_line(words)
    assert said.startswith("hybrid-train train 'run_dir=a b'")
    assert not [secret for secret in ("hunter2", "secret", "0123456789") if secret in said]
    assert command_line(["mine.py", "--api-key", "abc", "x"]) == "mine.py --api-key '<hidden>' x"


def test_libraries_have_their_versions_and_null_where_there_is_none() -> None:
    found = provenance.libraries()
    assert set(found) >= {
        *("python", "cuda", "torch", "megatron-core", "transformer-engine", "mamba-ssm", "numpy")
    }
    assert found["megatron-core"] == "0.19.2"


def test_all_of_it_is_plain_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch.distributed as dist

    def gather(said: list[str | None], here: str | None) -> None:
        said[:] = [here, None, here]  # two machines, one of them with two processes

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.chdir(tmp_path)
    found = json.loads(json.dumps(provenance.gathered()))
    assert found["code"]["version"] == hybrid_train.__version__
    (machine,) = found["machines"]
    assert machine["count"] == 2
    assert machine["processor"]
    assert machine["cores"] > 0
    assert machine["memory_bytes"] > 2**20
    assert "working_folder" not in found


def test_the_repository_of_the_working_folder_is_told_too(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "all_gather_object", lambda said, here: said.__setitem__(0, here))
    monkeypatch.chdir(checkout)
    (checkout / "runs").mkdir()
    (checkout / "runs" / "log").touch()  # what git does not know is no change
    assert provenance.gathered()["working_folder"] == code_of(checkout) | {"dirty": False}
    (checkout / "hybrid_train" / "a.py").write_text("2\n")
    assert provenance.gathered()["working_folder"]["dirty"]
