"""The job generate with an imported model: it begins and ends as transformers does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_train.config.compose import compose
from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.hf.origin import Origin
from hybrid_train.hf.read import import_folder
from hybrid_train.jobs import cli
from hybrid_train.jobs.generate import PromptReader
from hybrid_train.schema.problems import UserError
from tests.hf_random import random_folder
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("generate")]

NEW = 12
BEGIN, END = ("<s>", 1), ("</s>", 2)


def template(*edges: tuple[str, int]) -> dict[str, Any]:
    """A post-processor of tokenizer.json that puts tokens on the edges of a text."""
    parts: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    for name, _ in edges:
        parts.insert(0 if name == "<s>" else 9, {"SpecialToken": {"id": name, "type_id": 0}})
    tokens = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in edges}
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": tokens}


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in content.items() if value != "absent"}
    path.write_text(json.dumps(kept))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary is that of its tokenizer, so that both draw from the same tokens."""
    folder = random_folder(1, tmp_path_factory.mktemp("generate") / "hf")
    edit(folder / "tokenizer.json", post_processor=None)
    edit(folder / "tokenizer_config.json", add_bos_token="absent", bos_token="<s>")
    return folder


@pytest.fixture
def texts(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Calls the job; returns each prompt with its continuation."""

    def call(run_dir: Path, *words: str) -> list[str]:
        capsys.readouterr()
        given = ("runtime=cpu", "runtime.threads=1", f"max_new_tokens={NEW}")
        assert cli.main(["generate", f"checkpoint={run_dir}", *given, *words]) == 0
        out = capsys.readouterr().out.removesuffix("\n")
        parts = out.split("--- prompt ")[1:]
        return [part.partition("---\n")[2].removesuffix("\n") for part in parts] or [out]

    return call


def by_transformers(folder: Path, prompt: str, **settings: Any) -> str:
    """The prompt with what transformers writes behind it, token by token the most likely one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**given, do_sample=False, max_new_tokens=NEW, **settings)[0]
    before = tokenizer.decode(given.input_ids[0], skip_special_tokens=True)
    return str(prompt + tokenizer.decode(made, skip_special_tokens=True)[len(before) :])


@pytest.mark.parametrize(
    ("processor", "add"),
    [
        pytest.param(None, "absent", marks=pytest.mark.slow),
        pytest.param(template(BEGIN), "absent", marks=pytest.mark.slow),
        (template(BEGIN, END), "absent"),
        pytest.param(None, True, marks=pytest.mark.slow),
        (template(BEGIN), False),
    ],
    ids=["nothing", "begin", "both edges", "settings do not add", "nor take away"],
)
def test_a_prompt_begins_as_the_tokenizer_says(
    source: Path, processor: Any, add: Any, tmp_path: Path, texts: Callable[..., list[str]]
) -> None:
    edit(source / "tokenizer.json", post_processor=processor)
    edit(source / "tokenizer_config.json", add_bos_token=add)
    import_folder(source, tmp_path / "run", None)
    prompts = ("hello world", "<turn>user")
    words = [f"prompt={prompt}" for prompt in prompts]
    expected = [by_transformers(source, prompt) for prompt in prompts]
    assert texts(tmp_path / "run", *words, "special_tokens=true") == expected


def test_text_ends_at_each_of_the_ends(
    source: Path, tmp_path: Path, texts: Callable[..., list[str]]
) -> None:
    edit(source / "tokenizer.json", post_processor=template(BEGIN))
    edit(source / "tokenizer_config.json", add_bos_token="absent")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    ends = []  # the third token behind each of two prompts
    for prompt in ("hello", "line"):
        given = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**given, do_sample=False, max_new_tokens=3, eos_token_id=[1])
        ends.append(int(made[0, -1]))
    edit(source / "generation_config.json", eos_token_id=ends)
    import_folder(source, tmp_path / "run", None)
    expected = [by_transformers(source, prompt) for prompt in ("hello", "line")]
    assert texts(tmp_path / "run", "prompt=hello", "prompt=line") == expected
    longer = by_transformers(source, "hello", eos_token_id=[1])
    assert longer.startswith(expected[0])
    assert len(longer) > len(expected[0])


def run_of(source: Path, folder: Path, **settings: Any) -> Path:
    edit(source / "tokenizer.json", **{"post_processor": template(BEGIN)} | settings)
    edit(source / "tokenizer_config.json", add_bos_token="absent")
    import_folder(source, folder / "run", None)
    return folder / "run"


def test_the_begin_can_be_left_out_and_special_tokens_are_text_unless_asked_for(
    source: Path, tmp_path: Path, texts: Callable[..., list[str]]
) -> None:
    run = run_of(source, tmp_path)
    edit(source / "tokenizer.json", post_processor=None)
    assert texts(run, "prompt=hello", "bos=false") == [by_transformers(source, "hello")]
    as_text, as_token = (
        texts(run, "prompt=<turn>user", f"special_tokens={word}") for word in ("false", "true")
    )
    assert as_text != as_token


SHORT = {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}


@pytest.mark.parametrize(
    ("words", "settings", "code", "message"),
    [
        (["prompt=   "], SHORT, 2, "prompt 1 = '   ': the tokenizer makes no token of it"),
        (["prompt=a", "prompt= "], SHORT, 2, "prompt 2 = ' ': the tokenizer makes no token"),
        (["prompt="], SHORT, 0, "12 tokens"),
        (["prompt=<s>a", "special_tokens=true"], {}, 0, "prompt 1 begins with '<s>' twice"),
        ([f"prompt={'word ' * 400}"], {}, 0, "and the model was trained on sequences of 512"),
    ],
)
def test_prompts_that_are_no_good_get_a_sentence(
    source: Path, words: list[str], settings: dict[str, Any], code: int, message: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = run_of(source, tmp_path, **{"normalizer": None} | settings)
    edit(source / "tokenizer.json", normalizer=None)
    given = ("runtime=cpu", "runtime.threads=1", "max_new_tokens=12", "temperature=1")
    assert cli.main(["generate", f"checkpoint={run}", *given, *words]) == code
    assert message in capsys.readouterr().err


def test_a_token_that_the_model_lacks_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(source, tmp_path)
    path = run / "tokenizer" / "tokenizer.json"
    added = json.loads(path.read_text())["added_tokens"]
    edit(path, added_tokens=[*added, added[-1] | {"id": 900, "content": "<new>"}])
    words = ("prompt=a<new>", "special_tokens=true", "runtime=cpu")
    assert cli.main(["generate", f"checkpoint={run}", *words]) == 2
    message = "token 270 ('<new>') is beyond the vocabulary of the model, which has 270"
    assert message in capsys.readouterr().err


def test_a_row_of_the_model_that_stands_for_no_token_is_refused() -> None:
    """Embeddings are padded: Qwen2.5 has 151,936 or 152,064 rows for 151,665 tokens."""
    tokenizer = train_byte_level_bpe(["a"], 257)
    job = compose("train", ["experiment=tiny_cpu", "model.vocab_size=512"])
    reader = PromptReader(job, tokenizer, Origin(Path(), None, is_same_tokenizer=False), "")
    reader._check_tokens("prompt 1", [256])
    with pytest.raises(UserError, match="token 257 is beyond the vocabulary of the tokenizer"):
        reader._check_tokens("prompt 1", [5, 257])
