"""No credential gets into a run folder, and nobody else may write there."""

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.jobs.command import ROOT, Finished, arguments, checkpoints
from tests.unit.data.http_folder import serve
from tests.warm import interpreter

pytestmark = pytest.mark.xdist_group("train")

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}
PASSWORD = "pa55-of-the-url"


def command(*words: str) -> Finished:
    """Run a command with credentials around it, and a mask that lets everybody write."""
    program = [interpreter.warm(), "-m", "hybrid_train", *words]
    done = subprocess.run(
        ["sh", "-c", 'umask 000; exec "$@"', "sh", *program],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**interpreter.environment(), **SECRETS},
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as files of one's own: token files and their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    for path in corpus.rglob("*"):
        if path.suffix in {".bin", ".idx"}:
            shutil.copy2(path, folder / path.name)
    (tokenizer,) = (path.parent for path in corpus.rglob("tokenizer.json"))
    shutil.copytree(tokenizer, folder / "tokenizer")
    return folder


def test_no_credential_is_written_and_nobody_else_may_write(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "made" / "run"
    with serve(data) as server:
        url = server.url.replace("://", f"://me:{PASSWORD}@")
        overrides = (
            "data=files", f"data.tokenizer={data / 'tokenizer'}", f"data.train=[{url}/train]",
            f"data.validation=[{url}/validation]", f"data.cache={tmp_path / 'cache'}",
            "train.tokens=1280", "tracking=wandb", "tracking.tensorboard=true",
            f"tracking.wandb.name={SECRETS['HF_TOKEN']}",
        )  # fmt: skip
        done = command(*arguments(run_dir, *overrides))
        assert done.code == 0, done.err
        assert server.requests
        # The folder holds no password, so the same command must still know its run.
        again = command(*arguments(run_dir, *overrides))
        assert again.code == 0, again.err
        assert "is complete" in again.said
        config = command("train", *arguments(run_dir, *overrides)[1:], "--cfg", "job")
    page = command("report", f"run_dir={run_dir}")
    assert page.code == 0, page.err
    state = command("status", f"run_dir={run_dir}", "json=true")
    assert json.loads(state.out)["state"] == "finished"
    assert "://<hidden>@127.0.0.1" in (run_dir / "config.yaml").read_text()
    assert checkpoints(run_dir)
    secrets = [PASSWORD, *SECRETS.values()]
    for path in run_dir.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [one for one in secrets if one.encode() in content], path
    for said in (done.said, again.said, config.said, page.said, state.said):
        assert not [one for one in secrets if one in said]
    for path in (run_dir.parent, run_dir, *run_dir.rglob("*")):
        if not path.is_symlink():
            assert not path.stat().st_mode & stat.S_IWOTH, path


def test_an_address_without_its_password_is_not_asked(data: Path, tmp_path: Path) -> None:
    done = command(
        *arguments(
            tmp_path / "run", "data=files", f"data.tokenizer={data / 'tokenizer'}",
            "data.train=['https://<hidden>@127.0.0.1/train']", "train.tokens=1280",
        )
    )  # fmt: skip
    assert done.code == 2
    assert "a run folder holds no credentials, so they are missing here" in done.err
