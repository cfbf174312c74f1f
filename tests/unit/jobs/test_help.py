"""Help pages: what they list, that they fit on two screens, and the values that they show."""

import re
from pathlib import Path

import pytest

from hybrid_train.config import describe
from hybrid_train.config.commands import COMMANDS, root_of
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.jobs import cli
from hybrid_train.jobs import help as help_page
from hybrid_train.jobs.help import MOST_USED

QUICKSTART = "experiment=quickstart"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRID_TRAIN_CONF", str(conf_dir()))


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command that works prints."""
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("--help=all",)])
def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], arguments: tuple) -> None:
    text = output(capsys, *arguments)
    for name, job in COMMANDS.items():
        assert re.search(rf"^  {name} +{job.summary}", text, re.MULTILINE)
    for flag in cli.FLAGS:
        assert flag in text
    assert "torchrun --nproc-per-node 2 -m hybrid_train train experiment=quickstart" in text


@pytest.mark.parametrize("name", [name for name, one in COMMANDS.items() if one.schema])
def test_the_help_of_a_command_fits_on_two_screens_and_has_whole_sentences(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(help_page, "_PIPED_WIDTH", help_page.SCREEN_COLUMNS)
    text = output(capsys, *name.split(), "--help")
    assert len(text.splitlines()) <= 2 * help_page.SCREEN_LINES
    assert text.startswith(f"`hybrid-train {name}` {COMMANDS[name].summary}"[:79])
    assert f"`hybrid-train {name} --help=all`" in text
    assert "${" not in text
    assert "???" not in text
    used = MOST_USED[root_of(name)]
    known = {one.name: one for one in describe.settings(root_of(name), [])}
    assert used.keys() <= known.keys()
    for key, sentence in used.items():
        assert re.fullmatch(r"[A-Z][^.]*(?:\.\d[^.]*)*.*\.", sentence), sentence
        assert re.search(rf"^  {re.escape(key)} ", text, re.MULTILINE)
    unset = {one.name for one in known.values() if one.default == describe.UNSET}
    in_groups = tuple(f"{group}." for group in describe.choices(root_of(name)))
    assert not {key for key in unset - used.keys() if not key.startswith(in_groups)} - {"title"}


@pytest.mark.parametrize("name", [name for name, one in COMMANDS.items() if not one.schema])
def test_a_command_without_settings_says_what_it_does(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, name, "--help")
    assert text == f"`hybrid-train {name}` {COMMANDS[name].summary}. It takes no settings.\n"


def test_help_shows_what_a_value_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "train", "--help")
    assert re.search(r"train\.tokens +must be set +The run ends", text)
    assert re.search(r"schedule\.warmup_tokens +0\.02 of train\.tokens +The learning rate", text)
    assert re.search(r"^  schedule +wsd +constant, cosine, ", text, re.MULTILINE)
    assert re.search(r"^  model +\(none\) +child_hybrid, ladder_10m, ", text, re.MULTILINE)
    text = output(capsys, "train", QUICKSTART, "--help")
    assert re.search(r"train\.tokens +1\.15M +The run ends", text)
    assert re.search(r"schedule\.warmup_tokens +23000 +The learning rate", text)
    assert re.search(r"^  schedule +cosine +constant, wsd", text, re.MULTILINE)
    assert re.search(r"^  model +quickstart +child_hybrid, ladder_10m, ", text, re.MULTILINE)


def test_an_unknown_form_of_help_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help=al"]) == 2
    assert "ignored explicit argument 'al'" in capsys.readouterr().err


def test_all_help_shows_groups_choices_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "train", "--help=all")
    assert re.search(r"parallel=tp2 +Tensor parallel 2", text)
    assert re.search(r"experiment=quickstart +A small hybrid", text)
    assert re.search(r"train\.tokens +must be set +\"2M\"", text)
    assert "${" not in text
    assert re.search(r"checkpoint\.interval +500 +steps between saves", text)
    assert re.search(r"runtime\.device +auto +auto, cpu, cuda", text)
    assert re.search(r"optimizer\.no_decay +\[norms,biases,A_log,D,dt_bias\] +norms, biases,", text)
    assert re.search(r"parallel\.recompute_modules +null +core_attn, layernorm, mamba,", text)
    assert not re.search(r"\.kind ", text)


def test_help_of_a_command_takes_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "train", "schedule=constant", "schedule.peak_lr=0.5", "--help")
    assert re.search(r"schedule\.peak_lr +0\.5", text)
    assert "schedule.decay_tokens" not in text


def test_a_family_of_jobs_lists_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "data", "--help")
    for name, job in COMMANDS.items():
        line = re.search(rf"^  {name} +{job.summary}", text, re.MULTILINE)
        assert (line is not None) == name.startswith("data "), name


def test_a_job_of_two_words_has_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "data", "tokenize", "--help=all")
    assert text.startswith("`hybrid-train data tokenize` turns text into token files")
    assert re.search(r"max_bad_share +0\.01 +of the lines", text)
    assert "GROUP" not in text  # it has none
    asked = ("data", "tokenize", "input=a,b*.jsonl", "output=x", "tokenizer=t", "--cfg", "job")
    assert "- a,b*.jsonl" in output(capsys, *asked)
