import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hybrid_train import __version__
from hybrid_train.config import launcher
from hybrid_train.config.commands import COMMANDS
from hybrid_train.config.compose import draft
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.jobs import cli
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob

ROOT = conf_dir().parent
QUICKSTART = "experiment=quickstart"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every command in an empty folder of its own, outside any launcher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRID_TRAIN_CONF", str(conf_dir()))
    for name in (*launcher.NAMES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command that works prints."""
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command that fails prints; it writes nothing to the disk."""
    assert cli.main(arguments) == 2
    assert list(Path.cwd().iterdir()) == []
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_the_printed_config_is_the_composed_one(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("train", QUICKSTART, "schedule=wsd", "train.tokens=3M", "--cfg", "job")
    text = output(capsys, *asked)
    assert "tokens: 3M" in text
    assert "decay_tokens: ${share:" in text
    resolved = output(capsys, *asked, "--resolve")
    assert "decay_tokens: '600000'" in resolved


@pytest.mark.parametrize("part", ["hydra", "all"])
def test_hydras_own_part_is_printed_on_request(
    capsys: pytest.CaptureFixture[str], part: str
) -> None:
    text = output(capsys, "train", QUICKSTART, "--cfg", part)
    assert text.startswith("hydra:")
    assert ("run_dir: runs/quickstart" in text) == (part == "all")


def test_info_says_where_the_config_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", QUICKSTART, "--info", "defaults"]) == 0
    assert "experiment/quickstart" in capsys.readouterr().out
    assert cli.main(["train", "--info", "config", QUICKSTART, "run_dir=a(1)"]) == 0


def test_experiments_lists_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "experiments")
    for file in (conf_dir() / "experiment").glob("*.yaml"):
        tokens = draft("train", [f"experiment={file.stem}"]).config.train.tokens
        assert re.search(rf"^{file.stem} +\S+ +\S+ +{tokens} ", text, re.MULTILINE)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--version") == f"hybrid-train {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("trian",), "there is no command 'trian'; did you mean train?"),
        (("tokenize",), "did you mean data tokenize?"),
        (("help",), "did you mean --help?"),
        (("experiment",), "did you mean experiments?"),
        ((QUICKSTART,), "the command comes first: hybrid-train train experiment=quickstart"),
        (("train", "quickstart"), "nearest: experiment=quickstart"),
        (("train", "experiment=quikstart"), "nearest: quickstart"),
        (("study", "name=precison"), "nearest: precision"),
        (("train", "--hlep"), "did you mean --help?"),
        (("train", "--dry-run"), "train has no option --dry-run; submit and distill_targets have"),
        (("dance",), "there are train, resume, check, rehearse, submit, status"),
        (("--multirun",), "which command?"),
        (("train", "--force"), "unrecognized arguments: --force"),
        (("train", "--cfg", "jobs"), "invalid choice: 'jobs'"),
        (("experiments", "a=1"), "experiments takes no settings"),
        (("train", QUICKSTART, "trian.tokens=1"), "nearest: train.tokens=1"),
        (("train", QUICKSTART, "trian.tokens=1", "--cfg", "job"), "nearest: train.tokens=1"),
        (("train", "trian.tokens=1", "--help"), "nearest: train.tokens=1"),
        (("train", "model=quikstart"), "nearest: quickstart"),
        (("train", QUICKSTART, "model.pattern=MEXM"), "^ 'X' is no kind of layer"),
        (("train",), "schedule.peak_lr = ???: are not set"),
        (("generate", "checkpoint=nowhere", "prompt=x"), "there is no such folder"),
        (("train", QUICKSTART, "train.seed=1,2"), "need --multirun"),
        (("",), "there is no command ''; there are train,"),
        (("train", "train", "train"), "train = (nothing): write settings as KEY=VALUE"),
        (("train", "--resolve"), "--resolve belongs to --cfg"),
        (("train", "--cfg", "job", "--multirun"), "--cfg and --multirun do not go together"),
        (("train", "--json"), "train has no option --json; check, rehearse, status, doctor have"),
        (("experiments", "--cfg", "job"), "experiments has no option --cfg"),
        (("train", "--config-name", "x"), "a file of your own is experiment=NAME"),
        (("train", "-cn", "x"), "there is no option --config-name"),
        (("train", "-cp", "x"), "use --config-dir PATH"),
        (("train", "--config-dir"), "--config-dir/-cd: expected one argument"),
        (("train", "--config-dir", "nowhere"), "there is no such folder"),
        (("train", QUICKSTART, "hydra.run.dir=x"), "run_dir=PATH is the folder of a run"),
        (("train", QUICKSTART, "hydra/job_logging=none"), "Hydra's own settings do nothing here"),
        (("train", QUICKSTART, "hydra.searchpath=[x]"), "x: there is no such folder"),
        (("train", QUICKSTART, "hydra.searchpath=x"), "must be a list of folders"),
        (("train", QUICKSTART, "run_dir=\udcff"), "run_dir = \\udcff: has bytes that are no text"),
        (("train", QUICKSTART, *(f"a.b{n}=1" for n in range(600))), "are too many"),
    ],
)
def test_what_cannot_run_is_explained_without_a_traceback(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str
) -> None:
    told = complaint(capsys, *arguments)
    assert told.startswith("hybrid-train: ")
    assert text in told
    assert "Traceback" not in told


def test_a_working_folder_that_is_gone_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["train", QUICKSTART]) == 2
    assert "the working folder is gone" in capsys.readouterr().err


def test_only_the_first_process_explains_a_wrong_config(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    second_of_two(monkeypatch)
    monkeypatch.setattr(cli, "FIRST_SPEAKS_S", 0)
    assert complaint(capsys, "train", "model=quikstart") == ""


def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be what torchrun starts as the second of two processes."""
    told = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "a"}
    for name, value in {**told, **where}.items():
        monkeypatch.setenv(name, str(value))


def started(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Let the job `train` be another function."""
    module = ModuleType("hybrid_train.jobs.train")
    vars(module)["run"] = run
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_job_gets_its_typed_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainJob] = []
    started(monkeypatch, seen.append)
    assert cli.main(["train", QUICKSTART, "train.seed=7"]) == 0
    assert seen[0].train.seed == 7


def test_the_first_line_says_what_starts_with_what_and_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    started(monkeypatch, lambda _: said.append(capsys.readouterr().err))
    assert cli.main(["train", QUICKSTART, "model.pattern=ME*"]) == 0
    assert said[-1] == (
        "Starting: hybrid-train train experiment=quickstart 'model.pattern=ME*'\n"
        "Its run folder is runs/quickstart, a new one.\n"
    )
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "config.yaml").touch()
    assert cli.main(["train", QUICKSTART]) == 0
    assert said[-1].endswith("Its run folder is runs/quickstart, which has a run.\n")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").touch()  # no run folder: the command itself will say so
    assert cli.main(["train", QUICKSTART, "run_dir=notes"]) == 0
    assert said[-1] == "Starting: hybrid-train train experiment=quickstart run_dir=notes\n"


def test_only_the_first_process_says_what_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started(monkeypatch, lambda _: None)
    second_of_two(monkeypatch)
    assert cli.main(["train", QUICKSTART, "train.microbatch=2"]) == 0
    assert capsys.readouterr().err == ""


def test_a_command_that_says_nothing_first_imports_no_torch() -> None:
    modules = [one.module for one in COMMANDS.values() if not one.says_what_starts]
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "    assert 'torch' not in sys.modules, name"
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_a_job_refuses_is_told_with_the_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: TrainJob) -> None:
        raise UserError("the disk is full")

    started(monkeypatch, refuse)
    told = complaint(capsys, "train", QUICKSTART)
    assert told.endswith("new one.\nhybrid-train: the disk is full\n")
    second_of_two(monkeypatch)
    words = ("train", QUICKSTART, "train.microbatch=2")
    assert complaint(capsys, *words) == "hybrid-train: rank 1: the disk is full\n"


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG, errno.EISDIR]
)
def test_a_path_that_the_system_refuses_is_told_without_a_traceback(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_: TrainJob) -> None:
        raise OSError(number, os.strerror(number), "runs/a/history.jsonl")

    started(monkeypatch, write)
    told = complaint(capsys, "train", QUICKSTART)
    assert f"\nhybrid-train: runs/a/history.jsonl cannot be used: {os.strerror(number)}; " in told
    assert "Traceback" not in told


def test_another_error_of_the_system_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(_: TrainJob) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "a mistake of ours")

    started(monkeypatch, lose)
    with pytest.raises(FileNotFoundError):
        cli.main(["train", QUICKSTART])


def test_an_interrupted_job_ends_with_the_code_of_shells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: TrainJob) -> None:
        raise KeyboardInterrupt

    started(monkeypatch, interrupt)
    assert cli.main(["train", QUICKSTART]) == 130
    assert capsys.readouterr().err.endswith("new one.\nhybrid-train: interrupted\n")


def test_a_sweep_is_refused_under_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    second_of_two(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    assert "without torchrun" in complaint(capsys, "train", QUICKSTART, "train.seed=1,2", "-m")


@pytest.mark.parametrize(
    ("arguments", "code"), [(("--version",), 0), (("train", "trian.tokens=1"), 2)]
)
def test_the_process_ends_with_the_exit_code(
    empty_folder: Path, arguments: tuple[str, ...], code: int
) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", "-m", "hybrid_train", *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("data",), "data what? There are tokenize, merge,"),
        (("data", "tokenise"), "no command 'data tokenise'; did you mean data tokenize?"),
        (("data", "tokenize", "inptu=a"), "nearest: input=a"),
        (("data", "tokenize", "input=a"), "`hybrid-train data tokenize --help` lists"),
        (("data", "merge", "input=a", "output=x.bin"), "nearest: x"),
        (("data", "split", "input=a", "output=x"), "shares, tokens_per_shard = neither"),
        (("data", "split", "input=a", "output=x", "shares=[0.5,0.6]"), "add up to 1"),
        (("data", "split", "input=a,b", "output=x", "shares=[1]"), "takes one prefix"),
        (
            ("data", "tokenize", "input=a", "output=x", "tokenizer=t", "max_bad_share=2"),
            "at most 1",
        ),
        (("data", "tokenize", "input=a", "output=x", "tokenizer=t", "format=json"), "jsonl"),
        (("data", "train_tokenizer", "input=a", "output=x", "vocab_size=9"), "at least 257"),
    ],
)
def test_what_a_job_of_two_words_cannot_do_is_explained(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], text: str
) -> None:
    assert text in complaint(capsys, *words)
