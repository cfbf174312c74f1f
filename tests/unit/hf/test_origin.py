"""What a run keeps of the Hugging Face folder it began with, and what an export gives back."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from hybrid_train.checkpoint import layout
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.hf import origin
from hybrid_train.hf.origin import Origin
from hybrid_train.hf.read import import_folder
from hybrid_train.hf.write import export_checkpoint
from hybrid_train.schema.problems import UserError
from tests.hf_random import CHAT, random_folder
from tests.hf_walk import file_differences
from tests.sampled import sampled

HUGE = 2**40  # bytes of a file: one file for all
# Chat templates in their own files, several ends, no generation config; seeds that have them.
SEEDS = sampled(range(6), 0, 1)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    # A job that ran in this process before keeps its messages from pytest.
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with everything beside its weights that there can be."""
    folder = random_folder(3, tmp_path / "hf")
    ids = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3}
    write(folder / "generation_config.json", ids | {"top_p": 0.9, "suppress_tokens": [7]})
    edit(folder / "config.json", **ids, notes="mine", sep_token_id=4)
    edit(folder / "tokenizer_config.json", bos_token="<s>", pad_token="<pad>", unk_token="<unk>")
    for name in ("chat_templates/a.jinja", "additional_chat_templates/b.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CHAT)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def edit(path: Path, **changes: Any) -> None:
    write(path, json.loads(path.read_text()) | changes)


def later(run: Path, name: str, tokenizer: Path) -> Path:
    """A run that starts from the weights of another, and has the same after no step."""
    new = run.with_name(name)
    shutil.copytree(layout.path_of(run, 0), layout.path_of(new, 0))
    frozen.freeze(frozen.load(run), new)
    open_tokenizer(tokenizer).save(new / layout.TOKENIZER)
    origin.pass_on(run, new)
    return new


@pytest.mark.parametrize("seed", SEEDS)
def test_an_export_after_any_number_of_runs_gives_every_file_back(
    seed: int, tmp_path: Path
) -> None:
    folder, run = random_folder(seed, tmp_path / "hf"), tmp_path / "imported"
    import_folder(folder, run, None)
    for number in range(3):
        export_checkpoint(run, tmp_path / f"out_{number}", None, HUGE)
        assert file_differences(folder, tmp_path / f"out_{number}") == []
        run = later(run, f"run_{number}", folder)


def test_templates_and_settings_of_every_kind_come_back(source: Path, tmp_path: Path) -> None:
    import_folder(source, tmp_path / "run", None)
    run = later(tmp_path / "run", "next", tmp_path / "run" / layout.TOKENIZER)
    export_checkpoint(run, tmp_path / "out", None, HUGE)
    assert file_differences(source, tmp_path / "out") == []


def test_what_an_import_leaves_behind_is_said(source: Path, tmp_path: Path, said: Any) -> None:
    (source / "modeling_x.py").write_text("raise SystemExit")
    (source / "figures").mkdir()
    (source / "figures" / "a.png").write_bytes(b"png")
    import_folder(source, tmp_path / "run", None)
    assert "left out, and not part of an export: figures/a.png, modeling_x.py" in said.text


def test_files_of_the_origin_stand_before_poorer_ones_of_the_same_tokenizer(
    source: Path, tmp_path: Path, said: Any
) -> None:
    import_folder(source, tmp_path / "run", None)
    poor = tmp_path / "poor"
    poor.mkdir()
    shutil.copy(source / "tokenizer.json", poor)
    write(poor / "tokenizer_config.json", {"eos_token": "</s>"})
    (poor / "chat_template.jinja").write_text("another")
    export_checkpoint(later(tmp_path / "run", "next", poor), tmp_path / "out", None, HUGE)
    assert file_differences(source, tmp_path / "out") == []
    assert "data.tokenizer that differ are left out: tokenizer_config.json, chat_temp" in said.text


def test_a_run_on_another_tokenizer_exports_its_ids_and_says_so(
    source: Path, tmp_path: Path, said: Any
) -> None:
    import_folder(source, tmp_path / "run", None)
    other = train_byte_level_bpe(["some text"], 300, special_tokens=["<x>", "<end>"])
    other.save(tmp_path / "other")
    edit(tmp_path / "other" / "tokenizer_config.json", eos_token="<end>", bos_token=None)
    run = later(tmp_path / "run", "next", tmp_path / "other")
    assert "another tokenizer than" in said.text
    export_checkpoint(run, tmp_path / "out", None, HUGE)
    config, texts = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("config", "generation_config")
    )
    ids = {"eos_token_id": 1, "pad_token_id": 1}
    assert ids.items() <= config.items()
    assert config["notes"] == "mine"
    assert "sep_token_id" not in config
    assert texts == ids | {"bos_token_id": 0, "top_p": 0.9}
    assert "eos_token_id [2, 5] -> 1" in said.text
    assert "left out: suppress_tokens" in said.text
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"chat_template.jinja", "chat_templates", "chat_template.json"} & copied
    assert Origin.of(run).ends(open_tokenizer(tmp_path / "other")) == {1}


def test_another_start_leaves_nothing_of_the_first(source: Path, tmp_path: Path) -> None:
    import_folder(source, tmp_path / "run", None)
    run = later(tmp_path / "run", "next", source)
    assert Origin.of(run).folder is not None
    origin.pass_on(None, run)
    assert Origin.of(run).folder is None


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([2, 5], 2, {2, 5}),
        (5, [2, 7], {5}),  # as transformers: the generation config counts
        (None, [2, 7], {2, 7}),
        (None, None, {2}),  # that of the tokenizer
    ],
)
def test_ends_are_those_of_the_folder(
    source: Path, tmp_path: Path, generation: Any, config: Any, expected: set[int]
) -> None:
    edit(source / "generation_config.json", eos_token_id=generation)
    edit(source / "config.json", eos_token_id=config)
    import_folder(source, tmp_path / "run", None)
    tokenizer = open_tokenizer(tmp_path / "run" / layout.TOKENIZER)
    assert Origin.of(tmp_path / "run").ends(tokenizer) == expected


@pytest.mark.parametrize("wrong", ["2", [2, None], [[2]], True, {"id": 2}])
def test_ends_that_are_no_ids_are_refused(source: Path, tmp_path: Path, wrong: Any) -> None:
    edit(source / "generation_config.json", eos_token_id=wrong)
    import_folder(source, tmp_path / "run", None)
    with pytest.raises(UserError, match=r"eos_token_id is .* must be a token id, or a list"):
        Origin.of(tmp_path / "run").ends(open_tokenizer(source))


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_a_damaged_file_stops_the_import_and_leaves_nothing(
    source: Path, tmp_path: Path, name: str, text: str
) -> None:
    (source / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} (is no JSON|holds no settings)"):
        import_folder(source, tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_none_in_json_do_not_leave(source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", time_step_limit=[0, math.inf], mine={"a": [math.nan]})
    edit(source / "generation_config.json", top_p=math.inf)
    edit(source / "tokenizer_config.json", model_max_length=math.inf)
    import_folder(source, tmp_path / "run", None)
    export_checkpoint(tmp_path / "run", tmp_path / "out", None, HUGE)
    for path in (tmp_path / "out").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "time_step_limit" not in config  # the default says the same
    assert config["mine"] == {"a": [{"__float__": "NaN"}]}


def test_a_model_that_changed_gets_a_new_config_with_the_rest_of_the_old(
    source: Path, tmp_path: Path, said: Any
) -> None:
    import_folder(source, tmp_path / "run", None)
    job = frozen.load(tmp_path / "run")
    job.model.mamba.chunk_size, job.model.pattern = 2, f"{job.model.pattern}M".replace("M", "", 1)
    job.model.mamba.chunk_size = 2
    job.train.sequence_length = 4096
    frozen.freeze(job, tmp_path / "run")
    before = json.loads((source / "config.json").read_text())
    export_checkpoint(tmp_path / "run", tmp_path / "out", None, HUGE)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["max_position_embeddings"] == 4096
    if "M" in job.model.pattern:
        assert after["chunk_size"] == 2
        assert "config.json is written anew, since these changed: mamba.chunk_size" in said.text
    assert after["notes"] == "mine"
    assert after["eos_token_id"] == before["eos_token_id"]


def test_a_run_from_scratch_on_a_folder_keeps_the_files_of_its_tokenizer(
    source: Path, tmp_path: Path
) -> None:
    open_tokenizer(source).save(tmp_path / "run" / layout.TOKENIZER)
    found = Origin.of(tmp_path / "run")
    assert found.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    found.copy_tokenizer(tmp_path / "out")
    kept = ("chat_template.json", "chat_templates/a.jinja", "tokenizer_config.json")
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_the_tokenizer_that_replaces_another_leaves_no_file_of_it(
    source: Path, tmp_path: Path
) -> None:
    open_tokenizer(source).save(tmp_path / "kept")
    shutil.copy(source / "tokenizer.json", tmp_path / "tokenizer.json")
    write(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    open_tokenizer(tmp_path).save(tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    assert Backend.from_file(str(tmp_path / "kept" / "tokenizer.json")).get_vocab_size() > 256
