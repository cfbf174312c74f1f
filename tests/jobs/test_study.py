"""A study from its YAML file to its table, stopped and started again; with stages, and without."""

import json
import signal
import time
from pathlib import Path

import pytest

from hybrid_train.config import frozen
from tests.jobs.command import TIMEOUT_S, Finished, contents, finish, last_step, start

pytestmark = pytest.mark.xdist_group("train")

STEPS = 6  # of 256 tokens
STUDY = """\
# @package _global_
# Rates, for a test
title: Rates
run_dir: {folder}/study
seeds: [1, 2]
baseline: plain
base: [experiment=tiny_cpu, data.folder={corpus}, train.tokens={tokens}]
variants:
  plain: {{}}
  none: {{overrides: [schedule.peak_lr=0], published: "4 % (somebody, 2020)"}}
"""


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of its user's own, which is nothing but a YAML file."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study").mkdir()
    text = STUDY.format(folder=folder, corpus=corpus, tokens=STEPS * 256)
    (folder / "study" / "rates.yaml").write_text(text)
    return folder


def study(folder: Path, *words: str) -> Finished:
    return finish(start(*arguments(folder, *words)))


def arguments(folder: Path, *words: str) -> list[str]:
    return ["study", f"hydra.searchpath=[file://{folder}]", "name=rates", *words]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Finished:
    return study(folder)


def metrics(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of the metrics of every run."""
    files = sorted(folder.glob("study/*/*/metrics.jsonl"))
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_a_wrong_variant_is_named_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    words = ('variants.none.overrides=["schedule.peak_rl=0"]', f"run_dir={tmp_path}/new")
    refused = study(folder, *words)
    assert refused.code == 2
    assert "none: schedule.peak_rl = 0: there is no such setting" in refused.err
    assert not (tmp_path / "new").exists()


def test_it_trains_every_variant_with_every_seed(folder: Path, finished: Finished) -> None:
    assert finished.code == 0, finished.said
    assert "4 runs: 2 variants x 2 seeds; 0 finished before" in finished.err
    assert "run 4 of 4" in finished.err
    for variant in ("plain", "none"):
        for seed in (1, 2):
            run_dir = folder / "study" / variant / f"seed_{seed}"
            assert last_step(run_dir) == STEPS
            assert not (run_dir / "checkpoints").exists()
            assert "Trained 6 steps" in run_dir.with_suffix(".log").read_text()


def test_runs_of_a_seed_start_from_the_same_weights_and_data(
    folder: Path, finished: Finished
) -> None:
    assert finished.code == 0
    first = {
        (run.parent.name, run.name): json.loads((run / "metrics.jsonl").read_text().split("\n")[0])
        for run in folder.glob("study/*/seed_?")
    }
    assert first["plain", "seed_1"]["loss"] == first["none", "seed_1"]["loss"]
    assert first["plain", "seed_1"]["loss"] != first["plain", "seed_2"]["loss"]


def test_what_came_out_is_in_three_files_and_on_the_console(
    folder: Path, finished: Finished
) -> None:
    data = json.loads((folder / "study" / "study.json").read_text())
    losses = {
        variant: [
            [json.loads(line)["loss"] for line in path.read_text().splitlines()]
            for path in sorted(folder.glob(f"study/{variant}/*/metrics.jsonl"))
        ]
        for variant in ("plain", "none")
    }
    # Of 6 steps the last 5 % and the last 10 % are the last step.
    gaps = [b[-1] / a[-1] - 1 for a, b in zip(losses["plain"], losses["none"], strict=True)]
    found = data["variants"]["none"]["gaps"]["end"]
    assert found["mean"] == pytest.approx(sum(gaps) / 2)
    assert (found["lowest"], found["highest"]) == pytest.approx((min(gaps), max(gaps)))
    assert found["mean"] > 0  # without a rate nothing is learned
    assert data["variants"]["plain"]["gaps"]["end"]["mean"] == 0
    shown = f"{100 * found['mean']:+.2f}"
    text = (folder / "study" / "study.md").read_text()
    for page in (text, finished.out):
        assert shown in page
        assert "4 % (somebody, 2020)" in page
    assert "schedule.peak_lr=0" in text
    assert data["torch"] in text
    assert (folder / "study" / "plots" / "gap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_command_repeats_only_what_is_missing(folder: Path, finished: Finished) -> None:
    assert finished.code == 0
    before = metrics(folder)
    lost = folder / "study" / "none" / "seed_2" / "metrics.jsonl"
    lost.unlink()
    again = study(folder)
    assert again.code == 0, again.said
    assert "3 finished before" in again.err
    assert again.err.count("  left ") == 1
    after = metrics(folder)
    assert {path for path in before if before[path] != after[path]} == {str(lost)}
    assert untimed(after[str(lost)][0]) == untimed(before[str(lost)][0])


def untimed(content: bytes) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in content.splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_study_whose_settings_changed_needs_another_folder(
    folder: Path, finished: Finished
) -> None:
    assert finished.code == 0
    before = contents(folder)
    refused = study(folder, "overrides=train.tokens=2560")
    assert refused.code == 2
    assert "train.tokens: 1536 there, 2560 here" in refused.err
    assert contents(folder) == before


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_log_and_missing_in_the_table(
    folder: Path, tmp_path: Path
) -> None:
    wild = '"schedule.peak_lr=5","optimizer.weight_decay=1000","model.init_std=10"'
    words = (f"variants.none.overrides=[{wild}]", "seeds=[1]")
    failed = study(folder, f"run_dir={tmp_path}/study", *words)
    assert failed.code != 0
    assert "none seed 1 failed with exit code" in failed.err
    assert f"{tmp_path}/study/none/seed_1.log ends:" in failed.err
    assert "loss is nan" in failed.err
    assert "Missing, since they failed: none seed 1" in failed.out
    assert json.loads((tmp_path / "study" / "study.json").read_text())["missing"] == ["none seed 1"]


@pytest.mark.slow
def test_an_interrupted_study_goes_on_with_the_same_command(folder: Path, tmp_path: Path) -> None:
    words = (f"run_dir={tmp_path}/study", "parallel=1", "seeds=[1]")
    process = start(*arguments(folder, *words))
    deadline = time.monotonic() + TIMEOUT_S
    while last_step(tmp_path / "study" / "plain" / "seed_1") < STEPS:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stopped = finish(process)
    assert stopped.code == 128 + signal.SIGINT, stopped.said
    assert "stopped by SIGINT; the same command goes on" in stopped.err
    assert not (tmp_path / "study" / "study.json").exists()
    again = study(folder, *words)
    assert again.code == 0, again.said
    assert "1 finished before" in again.err
    assert (tmp_path / "study" / "study.json").exists()


STAGED = """\
# @package _global_
# From a parent, for a test
title: Parents
run_dir: {folder}/staged
stages_dir: {folder}/kept
stages:
  parent:
    overrides: [experiment=tiny_cpu, data.folder={corpus}, train.tokens={tokens}]
  exported: {{command: convert, overrides: ["export={{parent}}"]}}
  same: {{command: verify, overrides: ["checkpoint={{parent}}", "hf={{exported}}", logits=false]}}
seeds: [1]
baseline: scratch
base: [experiment=tiny_cpu, data.folder={corpus}, train.tokens={tokens}]
variants:
  scratch: {{}}
  healed: {{overrides: ["checkpoint.load={{parent}}", checkpoint.load_only=weights]}}
parts: {{first: [scratch], second: [healed]}}
short_form: {{overrides: [train.tokens=512]}}
"""


@pytest.fixture(scope="module")
def staged(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that has stages."""
    folder = tmp_path_factory.mktemp("staged")
    (folder / "study").mkdir()
    text = STAGED.format(folder=folder, corpus=corpus, tokens=STEPS * 256)
    (folder / "study" / "rates.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def whole(staged: Path) -> Finished:
    return study(staged)


def kept(folder: Path) -> dict[str, Path]:
    """The folder that a stage has, or would have if it wrote one, by the command of the stage."""
    marks = folder.glob("kept/*.done.json")
    return {mark.name.partition("-")[0]: Path(str(mark)[: -len(".done.json")]) for mark in marks}


def test_stages_run_before_what_reads_them(staged: Path, whole: Finished) -> None:
    assert whole.code == 0, whole.said
    assert "3 stages; 3 to run" in whole.err
    assert kept(staged).keys() == {"train", "convert", "verify"}
    parent = kept(staged)["train"]
    assert last_step(parent) == STEPS
    assert (parent / "checkpoints").is_dir()
    assert (kept(staged)["convert"] / "config.json").is_file()
    log = Path(f"{kept(staged)['verify']}.log").read_text()
    assert f"{kept(staged)['convert']} is the model of {parent}" in log
    log = (staged / "staged" / "healed" / "seed_1.log").read_text()
    assert f"starting from the weights of {parent}/checkpoints" in log
    assert "Not paired" not in whole.out  # same model, same batches


def test_the_report_counts_the_tokens_of_stages(staged: Path, whole: Finished) -> None:
    assert whole.code == 0
    data = json.loads((staged / "staged" / "study.json").read_text())
    assert [(one["name"], one["tokens"]) for one in data["stages"]] == [
        ("parent", STEPS * 256), ("exported", None), ("same", None),
    ]  # fmt: skip
    assert data["variants"]["scratch"]["tokens_with_stages"] == STEPS * 256
    assert data["variants"]["healed"]["tokens"] == STEPS * 256
    assert data["variants"]["healed"]["tokens_with_stages"] == 2 * STEPS * 256
    assert "fewer than the three that a claim needs" in whole.out
    assert "## Stages" in (staged / "staged" / "study.md").read_text()


@pytest.mark.slow
def test_a_finished_stage_stays_and_serves_another_study(
    staged: Path, whole: Finished, tmp_path: Path
) -> None:
    assert whole.code == 0
    before = (kept(staged)["train"] / "metrics.jsonl").stat().st_mtime_ns
    mark = Path(f"{kept(staged)['convert']}.done.json")
    mark.unlink()  # as if the study had been killed between the end of the stage and its mark
    again = study(staged, f"run_dir={tmp_path}/other", "part=second")
    assert again.code == 0, again.said
    assert "3 stages; 1 to run" in again.err
    assert mark.is_file()
    assert (kept(staged)["train"] / "metrics.jsonl").stat().st_mtime_ns == before
    assert "2 runs" in again.err


@pytest.mark.slow
def test_the_short_form_has_a_folder_and_stages_of_its_own(staged: Path, whole: Finished) -> None:
    assert whole.code == 0
    short = study(staged, "short=true")
    assert short.code == 0, short.said
    assert last_step(staged / "staged" / "short" / "healed" / "seed_1") == 2
    assert last_step(staged / "staged" / "healed" / "seed_1") == STEPS
    assert len(list((staged / "kept").glob("train-*.done.json"))) == 2


def test_what_waits_for_a_stage_that_fails_is_not_started(staged: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    words = (f"stages.same.overrides=['checkpoint={{parent}}','hf={tmp_path}/hf',logits=false]",)
    failed = study(staged, *words, f"stages_dir={tmp_path}/kept", f"run_dir={tmp_path}/new")
    assert failed.code == 2, failed.said
    assert "same failed with exit code 2" in failed.err
    assert json.loads((tmp_path / "new" / "study.json").read_text())["missing"] == []


@pytest.mark.slow
def test_a_rate_is_chosen_before_the_variants_run(folder: Path, tmp_path: Path) -> None:
    words = ("rates.candidates=[1e-9,3e-3,2]", "rates.share=0.5", "seeds=[1]")
    chosen = study(folder, *words, f"stages_dir={tmp_path}/kept", f"run_dir={tmp_path}/study")
    assert chosen.code == 0, chosen.said
    assert "3 rates to try; 3 stages to run for them" in chosen.err
    assert "Rate of next_token: 0.003, by the losses after 768 tokens with seed 0" in chosen.out
    data = json.loads((tmp_path / "study" / "study.json").read_text())
    losses = data["rates"]["next_token"]["losses"]
    assert losses["0.003"] < min(losses["1e-09"], losses["2.0"] or float("inf"))
    log = (tmp_path / "study" / "plain" / "seed_1" / "config.yaml").read_text()
    assert "peak_lr: 0.003" in log
    assert last_step(tmp_path / "study" / "plain" / "seed_1") == STEPS


@pytest.mark.slow
def test_the_study_of_distillation_works_in_its_short_form(corpus: Path, tmp_path: Path) -> None:
    places = (f"run_dir={tmp_path}/study", f"stages_dir={tmp_path}/kept")
    words = (*places, "short=true", f"overrides=data.folder={corpus}")
    short = finish(start("study", "name=distillation", *words))
    assert short.code == 0, short.said
    assert kept(tmp_path).keys() == {"train", "distill_targets"}
    data = json.loads((tmp_path / "study" / "short" / "study.json").read_text())
    against = {name: one["against"] for name, one in data["variants"].items()}
    assert against == {"ce": "ce", "kd": "ce", "top_4": "kd", "hidden_mse": "kd"}
    assert data["variants"]["kd"]["paired"]
    log = (tmp_path / "study" / "short" / "hidden_mse" / "seed_1" / "metrics.jsonl").read_text()
    assert "hidden_loss" in log


@pytest.mark.slow
def test_the_study_of_pruning_works_in_its_short_form(corpus: Path, tmp_path: Path) -> None:
    places = (f"run_dir={tmp_path / 'study'}", f"stages_dir={tmp_path / 'stages'}")
    words = (*places, "short=true", f"overrides=data.folder={corpus}")
    done = finish(start("study", "name=pruning", *words))
    assert done.code == 0, done.said
    found = json.loads((tmp_path / "study" / "short" / "study.json").read_text())
    variants = found["variants"]
    assert list(variants) == ["scratch", "width", "random"]
    kept = {(stage["command"], stage["name"]): Path(stage["path"]) for stage in found["stages"]}
    child = kept["prune", "cut_width"]
    healed = tmp_path / "study" / "short" / "width" / "seed_1"
    assert frozen.load(healed).model == frozen.load(child).model
    # The loss before the first step is that of the child, and the same in another run of it.
    before = {name: one["start_validation_loss"]["mean"] for name, one in variants.items()}
    assert len(set(before.values())) == 3
    assert "| before | after |" in (tmp_path / "study" / "short" / "study.md").read_text()


ARCHITECTURES = {  # the study, a variant beside the baseline, and figures that its table must have
    "hybrid_against_transformer": ("hybrid", {"heldout.loss", "decoding.cache_bytes"}),
    "latent_moe": ("latent", {"heldout.loss", "heldout.bits_per_byte"}),
    "mtp": ("on", {"heldout.loss", "decoding.acceptance_length"}),
    "long_context": ("hybrid_long", {"heldout.loss", "needle.accuracy"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_studies_of_architecture_work_in_their_short_forms(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    places = (f"run_dir={tmp_path / 'study'}", f"stages_dir={tmp_path / 'stages'}")
    words = (*places, "short=true", f"overrides=data.folder={corpus}")
    done = finish(start("study", f"name={name}", *words))
    assert done.code == 0, done.said
    variant, wanted = ARCHITECTURES[name]
    found = json.loads((tmp_path / "study" / "short" / "study.json").read_text())
    assert list(found["variants"])[1:] == [variant]
    figures = found["variants"][variant]["figures"]
    assert wanted <= figures.keys()
    for metric in wanted:
        assert f"| {metric} | " in (tmp_path / "study" / "short" / "study.md").read_text()
        assert all(one["number"] == 1 for one in figures[metric].values())
    run = tmp_path / "study" / "short" / variant / "seed_1"
    assert not (run / "checkpoints").exists()
    if name == "long_context":
        assert frozen.load(run).parallel.context == 2
        groups = figures["heldout.loss"].keys()
        assert groups == {"", "position=0-63", "position=64-255", "position=256-511"}
