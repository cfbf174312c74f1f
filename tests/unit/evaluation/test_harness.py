"""Tasks of lm-eval through our model, and through its own transformers backend on our export."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval.evaluator import evaluate

from hybrid_train.evaluation import harness
from hybrid_train.schema.evaluation import Harness
from hybrid_train.schema.problems import UserError, collect
from tests.harness_folders import AROUND, Folders, written
from tests.tiny import MEGATRON_WARNINGS, RUNTIME, alone

# HFLM says that it was given a model; datasets leaves a file open that it reads.
pytestmark = [*MEGATRON_WARNINGS, pytest.mark.filterwarnings("ignore::ResourceWarning")]
SAME = 1e-4  # nats, of a continuation or a whole text
ROUNDING = 2.0**-23
SCORES = 1e-5  # relative, of perplexities of texts whose log-probabilities differ by less than SAME


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
            for a, b in zip(log_probs(mine), log_probs(other), strict=True):
                apart.append(abs(a - b))
                # Theirs adds up in float32, which rounds a sum of hundreds of nats by 6e-5.
                assert apart[-1] < SAME + ROUNDING * abs(b)
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
    assert largest > 0
    assert ours["cut"] > 0  # some contexts were longer than the model reads
    assert any(any(sample["resps"][0]) for sample in ours["samples"]["answers"])


def test_conversations_have_the_same_prompts_and_answers(
    one: Folders, network: Callable[[Folders], Any]
) -> None:
    settings = one.settings(
        tasks=["choices", "answers"], apply_chat_template=True, system="a good line", limit=3
    )
    ours, theirs = both(one, network(one), settings)
    assert_same(ours, theirs)
    (context, _), *_ = ours["samples"]["choices"][0]["arguments"]
    assert context.startswith("<turn>system\na good line</turn>\n<turn>user\n")
    assert context.endswith("<turn>assistant\n")


def test_results_are_plain_have_hashes_and_leave_the_random_state(
    one: Folders, network: Callable[[Folders], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    random.seed(3)
    np.random.seed(3)
    expected = (random.random(), np.random.rand())
    random.seed(3)
    np.random.seed(3)
    settings = one.settings(tasks=["last_word"], limit=2)
    first, again = (harness.run(harness.prepare(settings, one.run), network(one)) for _ in range(2))
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
    with pytest.raises(UserError, match=r"template = brief: .* has default"):
        harness.prepare(one.settings(apply_chat_template=True, template="brief"), one.run)
    assert [one.path for one in collect(Harness(template="brief"))] == ["template"]


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
    with pytest.raises(UserError, match=r"harness.tasks = arc_easy: .*ai2_arc"):
        harness.prepare(one.settings(tasks=["texts", "arc_easy"]), one.run)
    with pytest.raises(UserError, match=r"no such task .*nearest: arc_easy"):
        harness.prepare(one.settings(tasks=["arc_esy"]), one.run)
