"""Stored targets under every layout of two processes: written alike, and read alike."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.jobs.command import Finished, finish, metrics, start
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stored targets"), *MEGATRON_WARNINGS]
RUN = ("experiment=tiny_cpu", "runtime.threads=1", "objective=distill")
LAYOUTS = {
    "tensor": ("parallel.tensor=2",),
    "pipeline": ("parallel.pipeline=2",),
    "virtual pipeline": ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "expert": ("parallel.expert=2",),
    "data": (),
    "context": ("parallel.context=2",),
}
KINDS = {"hidden": (), "top_k": ("what=top_k", "objective.top_k=7")}
READ = {"hidden": (), "top_k": ("objective.mtp=cross_entropy",)}
ROUNDING = 2e-5  # of hidden states and logits; float32 sums of another order
LOSS_ROUNDING = 2e-4  # of a loss after ten steps


def command(job: str, *words: str, processes: int = 1) -> Finished:
    done = finish(start(job, *RUN, *words, processes=processes))
    assert done.code == 0, done.said
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A teacher, and its targets of both kinds as one process writes them."""
    folder = tmp_path_factory.mktemp("targets")
    data = f"data.folder={corpus}"
    done = finish(start("train", *RUN[:2], data, f"run_dir={folder / 'teacher'}"))
    assert done.code == 0, done.said
    for kind, words in KINDS.items():
        write(folder, corpus, folder / kind, *words)
        read(folder, corpus, f"{kind} alone", folder / kind, *READ[kind])
    return folder


def write(folder: Path, corpus: Path, output: Path, *words: str, processes: int = 1) -> Finished:
    teacher = (f"objective.teacher={folder / 'teacher'}", f"run_dir={folder / 'student'}")
    given = (*teacher, f"data.folder={corpus}", f"output={output}", *words)
    return command("distill_targets", *given, processes=processes)


def read(
    folder: Path, corpus: Path, run: str, targets: Path, *words: str, processes: int = 1
) -> list[dict[str, float]]:
    """Train with stored targets; return the metrics."""
    run_dir = folder / "runs" / run.replace(", ", "_").replace(" ", "_")
    given = (f"objective.targets={targets}", f"run_dir={run_dir}", f"data.folder={corpus}")
    command("train", *given, *words, processes=processes)
    return metrics(run_dir)


def differences(one: Path, other: Path) -> dict[str, float]:
    """Return the largest difference of each tensor of two folders, which have the same files."""
    found: dict[str, float] = {}
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for file in files:
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        for name in mine:
            apart = (mine[name].double() - theirs[name].double()).abs().max()
            found[name] = max(found.get(name, 0.0), float(apart))
    found.pop("sums")  # of the very bytes
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_writes_what_one_process_writes(
    kind: str, layout: str, folder: Path, corpus: Path
) -> None:
    output = folder / f"{kind} by {layout}".replace(", ", "_").replace(" ", "_")
    write(folder, corpus, output, *KINDS[kind], *LAYOUTS[layout], processes=2)
    apart = differences(folder / kind, output)
    print(f"{kind}, {layout}: {apart}")
    assert apart.pop("digests") == 0
    assert apart.pop("head.safetensors", 0.0) == 0
    assert apart.pop("tokens", 0.0) == 0
    assert max(apart.values()) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_student_reads_them_under_a_layout_as_one_process_does(
    kind: str, layout: str, folder: Path, corpus: Path
) -> None:
    words = (*READ[kind], *LAYOUTS[layout])
    found = read(folder, corpus, f"{kind}, {layout}", folder / kind, *words, processes=2)
    expected = metrics(folder / "runs" / f"{kind}_alone")
    for name in ("loss", "cross_entropy", "validation_loss", "validation_agreement"):
        mine, theirs = ([line[name] for line in run if name in line] for run in (found, expected))
        print(f"{kind}, {layout}: {name} {mine[-1]} for {theirs[-1]}")
        assert mine == pytest.approx(theirs, rel=LOSS_ROUNDING)


def test_targets_are_finished_under_another_layout(folder: Path, corpus: Path) -> None:
    output = folder / "resumed"
    write(folder, corpus, output)
    (output / "targets.json").rename(output / "unfinished.json")  # as one that was killed
    removed = [output / "train-0" / f"{number:08d}.safetensors" for number in (0, 2)]
    for path in removed:
        path.unlink()
    said = write(folder, corpus, output, "parallel.tensor=2", processes=2)
    assert re.search(r"in 2 files to be written", said.err)
    assert differences(folder / "hidden", output)["digests"] == 0
    assert max(differences(folder / "hidden", output).values()) < ROUNDING
