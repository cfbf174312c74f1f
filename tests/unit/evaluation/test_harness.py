"""Tasks of lm-eval through our model and through lm-eval's own transformers backend on our export."""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_train.evaluation import harness
from hybrid_train.hf.read import import_folder
from hybrid_train.hf.write import export_checkpoint
from hybrid_train.schema.evaluation import Harness
from hybrid_train.schema.problems import UserError, collect
from tests.harness_tasks import LONGEST, TASKS, write_tasks
from tests.hf_random import random_folder
from tests.tiny import MEGATRON_WARNINGS, RUNTIME, alone

# HFLM says that it was given a model; datasets leaves a file open that it reads.
pytestmark = [*MEGATRON_WARNINGS, pytest.mark.filterwarnings("ignore::ResourceWarning")]
SAME = 1e-4  # nats, of a continuation or a whole text
SCORES = 1e-5  # relative, of perplexities of texts whose log-probabilities differ by less than SAME
CHAT = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# Around a text the tokenizer of the first folder puts nothing, of the others BOS, or BOS and EOS.
AROUND = {"nothing": "", "begin": "<s> $A", "both edges": "<s> $A </s>"}


@dataclass
class Folders:
    """A model as our run, as our export, and tasks for it."""

    run: Path
    export: Path
    tasks: Path

    def settings(self, **settings: Any) -> Harness:
        given: dict[str, Any] = {"tasks": list(TASKS), "max_length": LONGEST}
        return Harness(include=str(self.tasks), **given | settings)

    def theirs(self, batch: int = 4) -> HFLM:
        model = AutoModelForCausalLM.from_pretrained(self.export, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.export)
        return HFLM(
            pretrained=model, tokenizer=tokenizer, max_length=LONGEST, batch_size=batch,
            device="cpu",
        )  # fmt: skip


def written(folder: Path, around: str) -> Folders:
    """Import a random model whose tokenizer puts these tokens around a text, and export it."""
    source = random_folder(1, folder / "source")
    backend = json.loads((source / "tokenizer.json").read_text())
    backend["post_processor"] = None
    if around:
        parts = [
            {"Sequence": {"id": "A", "type_id": 0}}
            if one == "$A"
            else {"SpecialToken": {"id": one, "type_id": 0}}
            for one in around.split()
        ]
        special = {
            name: {"id": name, "ids": [number], "tokens": [name]}
            for name, number in (("<s>", 1), ("</s>", 2))
        }
        backend["post_processor"] = {
            "type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special,
        }  # fmt: skip
    (source / "tokenizer.json").write_text(json.dumps(backend))
    named = json.loads((source / "tokenizer_config.json").read_text())
    named.pop("add_bos_token", None)
    named.pop("chat_template", None)
    (source / "tokenizer_config.json").write_text(json.dumps(named | {"bos_token": "<s>"}))
    (source / "chat_template.jinja").write_text(CHAT)
    import_folder(source, folder / "run", None)
    export_checkpoint(folder / "run", folder / "export", None, 2**40)
    return Folders(folder / "run", folder / "export", write_tasks(folder / "tasks"))


@pytest.fixture(scope="module", params=AROUND)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return written(tmp_path_factory.mktemp("harness"), AROUND[request.param])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return written(tmp_path_factory.mktemp("harness"), "<s> $A")


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    with alone() as groups:
        yield groups


@pytest.fixture
def network(groups: Any) -> Callable[[Folders], Any]:
    from hybrid_train.jobs.networks import load_model

    return lambda folders: load_model(str(folders.run), RUNTIME, groups=groups).network


def both(folders: Folders, network: Any, settings: Harness) -> tuple[dict[str, Any], Any]:
    """The results of our model, and of theirs with tasks that are prepared alike."""
    ours = harness.run(harness.prepare(settings, folders.run), network)
    theirs = evaluate(
        folders.theirs(), harness.prepare(settings, folders.run).loaded, limit=settings.limit,
        bootstrap_iters=1000, apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.apply_chat_template, system_instruction=settings.system,
    )  # fmt: skip
    return ours, theirs


def log_probs(sample: dict[str, Any]) -> list[float]:
    """All that a model said of one document."""
    said = [answer[0] for answer in sample["resps"]]
    return [float(one[0] if isinstance(one, list | tuple) else one) for one in said]


def assert_same(ours: dict[str, Any], theirs: Any) -> float:
    """Compare prompts, answers and metrics; return the largest difference, nats."""
    apart = [0.0]
    for name, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][name], samples, strict=True):
            assert mine["prompt_hash"] == other["prompt_hash"]
            assert mine["doc_hash"] == other["doc_hash"]
            if name == "answers":
                assert mine["resps"] == other["resps"]
                continue
            pairs = zip(log_probs(mine), log_probs(other), strict=True)
            apart += [abs(a - b) for a, b in pairs]
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=SCORES), metric
    return max(apart)


def test_tasks_have_the_log_likelihoods_and_scores_of_lm_eval_on_our_export(
    folders: Folders, network: Callable[[Folders], Any]
) -> None:
    ours, theirs = both(folders, network(folders), folders.settings())
    largest = assert_same(ours, theirs)
    print(f"largest difference from lm-eval's transformers backend: {largest:.2g} nats")
    assert 0 < largest < SAME
    assert ours["cut"] > 0  # some contexts were longer than the model reads
    assert any(any(sample["resps"][0]) for sample in ours["samples"]["answers"])


def test_conversations_have_the_same_prompts_and_answers(
    one: Folders, network: Callable[[Folders], Any]
) -> None:
    settings = one.settings(
        tasks=["choices", "answers"], apply_chat_template=True, system="a good line", limit=3
    )
    ours, theirs = both(one, network(one), settings)
    assert assert_same(ours, theirs) < SAME
    (context, _), *_ = ours["samples"]["choices"][0]["arguments"]
    assert context.startswith("<turn>system\na good line</turn>\n<turn>user\n")
    assert context.endswith("<turn>assistant\n")


def test_texts_have_the_tokens_of_lm_evals_backend(folders: Folders) -> None:
    theirs = folders.theirs()
    reader = harness.Reader.of(folders.run, folders.settings())
    ours = harness.LiveModel(reader, None, folders.settings())  # type: ignore[arg-type]
    texts = ["hello world", " a  b", "<s>line", "<turn>user\nü</turn>", "x \n ", "one</s>two", ""]
    for text in texts:
        assert ours.tok_encode(text) == theirs.tok_encode(text), text
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(
            text, add_special_tokens=False
        )
    for context in texts[:-1]:
        for continuation in ("hel", " line", "\n", "</turn>"):
            pair = (context, continuation)
            assert ours._encode_pair(*pair) == theirs._encode_pair(*pair), pair
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id


def test_a_conversation_goes_on_from_what_the_answer_begins_with(one: Folders) -> None:
    reader = harness.Reader.of(one.run, one.settings(apply_chat_template=True))
    ours = harness.LiveModel(reader, None, one.settings())  # type: ignore[arg-type]
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a good"}]
    for add in (True, False):
        said = history[: 1 + (not add)]
        assert ours.apply_chat_template(said, add) == one.theirs().apply_chat_template(said, add)


def test_results_are_plain_have_hashes_and_leave_the_random_state(
    one: Folders, network: Callable[[Folders], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    random.seed(3)
    np.random.seed(3)
    expected = (random.random(), np.random.rand())
    random.seed(3)
    np.random.seed(3)
    settings = one.settings(tasks=["last_word"], limit=2)
    first, again = (
        harness.run(harness.prepare(settings, one.run), network(one)) for _ in range(2)
    )
    assert (random.random(), np.random.rand()) == expected
    assert json.loads(json.dumps(first)) == first == again
    assert capsys.readouterr().out == ""
    assert len(first["config_hashes"]["last_word"]) == 64
    assert first["n-samples"]["last_word"] == {"original": 6, "effective": 2}
    assert first["results"]["last_word"]["acc_stderr,none"] == 0.0
    other = one.settings(tasks=["last_word"], limit=2, num_fewshot=1)
    changed = harness.prepare(other, one.run).loaded["tasks"]["last_word"].dump_config()
    assert changed["num_fewshot"] == 1


def edited(folders: Folders, folder: Path, task: str, **changes: Any) -> str:
    """Write a folder with one task, changed; return its path."""
    config = yaml.safe_load((folders.tasks / f"{task}.yaml").read_text())
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(config | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("answers", {"generation_kwargs": {"num_beams": 4}}, "has generation_kwargs num_beams"),
        ("answers", {"generation_kwargs": {"max_gen_toks": 96}}, "leaves nothing of max_length"),
        ("answers", {"unsafe_code": True}, "runs code that the model writes"),
        ("texts", {"dataset_path": "nobody/nothing", "dataset_kwargs": {}}, "nobody/nothing"),
        ("texts", {"dataset_kwargs": {"data_files": "none.jsonl"}}, "none.jsonl"),
        ("letters", {"doc_to_text": "{{nothing[1]}}"}, "cannot be loaded: .*; repair the task"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_without_a_model(
    one: Folders, tmp_path: Path, task: str, changes: dict[str, Any], message: str
) -> None:
    settings = one.settings(tasks=[task])
    settings.include = edited(one, tmp_path, task, **changes)
    with pytest.raises(UserError, match=message) as caught:
        harness.prepare(settings, one.run)
    assert str(caught.value).startswith(f"harness.tasks = {task}: ")
    assert caught.value.on_all_ranks


def test_a_folder_that_is_not_there_and_a_missing_template_are_refused(
    one: Folders, tmp_path: Path
) -> None:
    settings = one.settings()
    settings.include = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"harness.include = .*nowhere: must be a folder"):
        harness.prepare(settings, one.run)
    with pytest.raises(UserError, match="template = brief: .* has default"):
        harness.prepare(one.settings(apply_chat_template=True, template="brief"), one.run)
    assert [one.path for one in collect(Harness(template="brief"))] == ["template"]


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(
    one: Folders, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(one.run, run_dir, ignore=shutil.ignore_patterns("checkpoints"))
    config = run_dir / "config.yaml"
    config.write_text(re.sub(r"vocab_size: \d+", "vocab_size: 61", config.read_text()))
    with pytest.raises(UserError, match=r"has \d+ tokens, but the model knows 61"):
        harness.prepare(one.settings(), run_dir)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("{{['a', word[3:], 'b', 'c']}}", r"letters: document \d asks .* of an empty text"),
        ("{{['a', word * 99, 'b', 'c']}}", "a continuation of .* cannot be scored with max_length"),
    ],
)
def test_a_continuation_that_cannot_be_scored_is_refused(
    one: Folders, tmp_path: Path, network: Any, choices: str, message: str
) -> None:
    settings = one.settings(tasks=["letters"])
    settings.include = edited(one, tmp_path, "letters", doc_to_choice=choices)
    with pytest.raises(UserError, match=message):
        harness.run(harness.prepare(settings, one.run), network(one))


@pytest.mark.slow  # lm-eval reads the YAML files of all its tasks
def test_a_stock_task_without_its_data_and_an_unknown_one_are_refused(one: Folders) -> None:
    with pytest.raises(UserError, match="harness.tasks = arc_easy: .*ai2_arc"):
        harness.prepare(one.settings(tasks=["texts", "arc_easy"]), one.run)
    with pytest.raises(UserError, match="no such task .*nearest: arc_easy"):
        harness.prepare(one.settings(tasks=["arc_esy"]), one.run)
