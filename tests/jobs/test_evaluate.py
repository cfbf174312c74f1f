"""The job evaluate from its command line to table and files; and tasks that a run asks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.jobs import cli
from tests.jobs.command import (
    Finished,
    assert_equal_to_the_bit,
    contents,
    finish,
    metrics,
    start,
    train,
)
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("evaluate")]
Evaluate = Callable[..., int]
FEW = ("limit=4", "task.heldout.tokens=600", "task.copying.words=[4]")
IN_TRAINING = (
    "evaluate.tasks=[heldout,sums,copying]",
    *("evaluate.limit=3", "evaluate.task.heldout.tokens=400", "evaluate.task.copying.words=[4]"),
)
STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Path]:
    """Two run folders of the smallest model, of other seeds."""
    folder = tmp_path_factory.mktemp("evaluate")
    made = folder / "a", folder / "b"
    for seed, run_dir in enumerate(made):
        given = (f"data.folder={corpus}", "train.tokens=512", f"train.seed={seed}")
        done = train(run_dir, *given)
        assert done.code == 0, done.said
    return made


@pytest.fixture
def evaluate(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Calls the job with overrides on the first of the models, unless they name others."""
    capsys.readouterr()  # what training said

    def call(*overrides: str) -> int:
        named = any(one.startswith("checkpoint=") for one in overrides)
        of = [] if named else [f"checkpoint={runs[0]}"]
        return cli.main(["evaluate", "runtime=cpu", "runtime.threads=1", *of, *FEW, *overrides])

    return call


def test_a_model_is_measured_and_the_table_has_a_line_for_each_figure(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("tasks=heldout,copying,sums") == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[0] == ["task", "group", "metric", "value", "95", "%", "interval"]
    assert [line[:3] for line in lines[1:5]] == [
        ["heldout", "-", one] for one in ("loss", "perplexity", "bits_per_byte", "accuracy")
    ]
    assert ["copying", "-", "score"] in [line[:3] for line in lines]
    assert ["sums", "-", "accuracy_per_byte"] in [line[:3] for line in lines]
    assert "sums of" in shown.err


def test_a_comparison_goes_on_where_it_was_killed_and_computes_nothing_again(
    evaluate: Evaluate, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "results"
    words = (f"checkpoint={runs[0]},{runs[1]}", "tasks=heldout,sums", f"output={output}")
    assert evaluate(*words, f"against={runs[1]}") == 0
    first = capsys.readouterr()
    files = contents(output)
    assert len(files) == 4
    assert f"{runs[1]} - {runs[0]}" in first.out.splitlines()[0]
    (gone,) = output.glob("b-*-sums.json")
    gone.unlink()
    assert evaluate(*words, f"against={runs[1]}") == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert contents(output) == files
    assert second.err.count("is read from") == 3
    assert second.err.count("loaded ") == 1 + 1  # the model, and what it is compared with
    figures = {one["metric"]: one["value"] for one in _result(output, "b-*-heldout")["figures"]}
    assert (figures["agreement"], figures["divergence"]) == (1, 0)
    figures = {one["metric"]: one["value"] for one in _result(output, "a-*-heldout")["figures"]}
    assert figures["divergence"] > 0


def _result(output: Path, pattern: str) -> Any:
    (path,) = output.glob(f"{pattern}.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "tasks = []: must name at least one task; nearest: heldout"),
        (["tasks=heldot"], "tasks = heldot: is no task; there are heldout, decoding"),
        (["tasks=heldot"], "nearest: heldout"),
        (["tasks=sums,sums"], "tasks = sums: is there twice"),
        (["tasks=sums", "against=tests"], "against = tests: must be null without the task heldout"),
        (["tasks=sums", "samples=4"], "samples = 4: must be 1 at temperature 0"),
        (["tasks=sums", "checkpoint=nowhere"], "checkpoint = nowhere: there is no such folder"),
        (["tasks=sums", "checkpoint=tests"], "no checkpoint in tests"),
        (["tasks=sums", "output=setup.py"], "output = setup.py: is a file"),
        (["tasks=sums", "output=tests"], "which is no result; choose another folder"),
        (["tasks=heldout", "task.heldout.files=[nowhere]"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert evaluate(*overrides) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "loaded" not in shown.err
    assert shown.out == ""


def test_results_of_other_settings_are_not_mixed(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert evaluate("tasks=sums", f"output={tmp_path}") == 0
    before = contents(tmp_path)
    assert evaluate("tasks=sums", f"output={tmp_path}", "limit=5") == 2
    assert "was made with other items; choose another output" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_run_without_its_validation_data_says_what_to_name_instead(
    evaluate: Evaluate, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    prefix = next(corpus.glob("vocab-*")) / "validation"
    hidden = prefix.parent.with_name("hidden")
    prefix.parent.rename(hidden)
    try:
        assert evaluate("tasks=heldout") == 2
        assert "is not there any more; name token files" in capsys.readouterr().err
        assert evaluate("tasks=heldout", f"task.heldout.files=[{hidden / 'validation'}]") == 0
    finally:
        hidden.rename(prefix.parent)


CAPITALS = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_tasks_of_lm_eval_stand_beside_the_others_and_are_read_again(
    evaluate: Evaluate, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    documents = [
        {"question": "2 + 2 =", "choices": [" 4", " 5"], "answer": n % 2} for n in range(6)
    ]
    file = tmp_path / "capitals.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in documents))
    (tmp_path / "capitals.yaml").write_text(CAPITALS.replace("FILE", str(file)))
    words = (
        *(f"checkpoint={runs[0]},{runs[1]}", "tasks=sums", f"output={tmp_path / 'results'}"),
        *("harness.tasks=[capitals]", f"harness.include={tmp_path}"),
    )
    assert evaluate(*words) == 0
    first = capsys.readouterr()
    lines = [line.split() for line in first.out.splitlines()]
    figures = next(line for line in lines if line[:3] == ["lm_eval", "capitals", "acc"])
    assert figures[3] == "0.5000"  # each choice is right in half of the documents
    assert evaluate(*words) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert second.err.count("is read from") == 4
    assert evaluate("tasks=sums", "harness.tasks=[captials]", f"harness.include={tmp_path}") == 2
    assert "nearest: capitals" in capsys.readouterr().err


def asked(run_dir: Path, corpus: Path, *overrides: str) -> Finished:
    given = (f"data.folder={corpus}", f"train.tokens={256 * STEPS}", "checkpoint.interval=3")
    return train(run_dir, *given, *overrides)


@pytest.mark.slow
def test_a_run_that_is_asked_trains_as_one_that_is_not_to_the_bit_and_so_it_resumes(
    tmp_path: Path, corpus: Path
) -> None:
    """All weights, moments, random states and losses; the answers stand beside them."""
    plain, with_tasks, resumed = (tmp_path / name for name in ("plain", "asked", "resumed"))
    assert asked(plain, corpus).code == 0
    done = asked(with_tasks, corpus, "evaluate.interval=2", *IN_TRAINING)
    assert done.code == 0, done.said
    lines = metrics(with_tasks)
    found = [answers(line) for line in lines]
    assert [bool(one) for one in found] == [False, True] * 3
    tasks = {name.split("/")[1] for name in found[-1]}
    assert tasks == {"heldout", "sums", "copying"}
    assert {"evaluation/heldout/bits_per_byte", "evaluation/copying/score"} <= found[-1].keys()
    assert all(line["validation_time_s"] > 0 for line in lines[1::2])

    first = asked(resumed, corpus, f"train.tokens={256 * 3}", "evaluate.interval=2", *IN_TRAINING)
    assert first.code == 0, first.said
    assert asked(resumed, corpus, "evaluate.interval=2", *IN_TRAINING).code == 0
    again = [answers(line) for line in metrics(resumed)]
    assert again[3:] == found[3:]
    leave_out(with_tasks, "evaluation/")
    assert_equal_to_the_bit(plain, with_tasks, STEPS)
    for run_dir in (plain, resumed):  # the shorter run ended with a validation
        leave_out(run_dir, "evaluation/", "validation_", "unigram_")
    assert_equal_to_the_bit(plain, resumed, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"]
)
def test_a_run_of_two_processes_is_asked_under_its_layout_and_trains_on_to_the_bit(
    layout: str, tmp_path: Path, corpus: Path
) -> None:
    pattern = "ME|*-" if "pipeline" in layout else "ME*-"
    given = (f"data.folder={corpus}", "train.tokens=1024", f"model.pattern={pattern}", layout)
    runs = {name: tmp_path / name for name in ("plain", "asked")}
    extra = {"plain": (), "asked": ("evaluate.interval=2", *IN_TRAINING)}
    for name, run_dir in runs.items():
        done = train(run_dir, *given, *extra[name], processes=2)
        assert done.code == 0, done.said
    assert len(answers(metrics(runs["asked"])[-1])) > 5
    leave_out(runs["asked"], "evaluation/")
    assert_equal_to_the_bit(runs["plain"], runs["asked"], 4)


def answers(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("evaluation/")}


def leave_out(run_dir: Path, *prefixes: str) -> None:
    """Take metrics whose names begin so out of metrics.jsonl."""
    lines = [
        {k: v for k, v in one.items() if not k.startswith(prefixes)} for one in metrics(run_dir)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


@pytest.mark.slow
def test_answers_that_a_layout_cannot_write_are_refused_before_the_first_step(
    tmp_path: Path, corpus: Path
) -> None:
    asked = ("evaluate.interval=2", "evaluate.tasks=[sums,copying]", "parallel.fsdp=true")
    done = train(tmp_path / "run", f"data.folder={corpus}", "train.tokens=512", *asked)
    assert done.code == 2
    assert (
        "copying has answers that the model writes, which parallel.fsdp=true does not" in done.err
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_report_draws_what_a_run_was_asked(tmp_path: Path, corpus: Path) -> None:
    done = asked(tmp_path / "run", corpus, "evaluate.interval=3", *IN_TRAINING)
    assert done.code == 0, done.said
    assert finish(start("report", f"run_dir={tmp_path / 'run'}")).code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    for title in ("Evaluation, bits per byte", "Evaluation, accuracy", "Evaluation, score"):
        assert title in page
