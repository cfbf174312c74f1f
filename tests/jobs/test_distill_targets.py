"""The job distill_targets from its command line to files, and runs that read them."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybrid_train.schema.units import show_bytes
from tests.jobs.command import Finished, contents, finish, start, tensors, untimed
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("stored targets")]
RUN = ("experiment=tiny_cpu", "runtime.threads=1", "objective=distill")
# Two phases with rows of other lengths and other layouts of a batch, which grows at first.
PHASES = (
    "train.phases=[{name: short}, {name: long, start: 1024, sequence_length: 128, microbatch: 1}]",
    *(
        "train.batch_ramp.tokens=512",
        "train.batch_ramp.start_batch=2",
        "train.batch_ramp.increment=2",
    ),
)
STEPS = 10


class Student:
    """Runs of one student, with a teacher and without."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.data = folder, f"data.folder={corpus}"
        done = finish(start("train", *RUN[:2], self.data, f"run_dir={folder / 'teacher'}"))
        assert done.code == 0, done.said

    @property
    def teacher(self) -> str:
        return f"objective.teacher={self.folder / 'teacher'}"

    def write(self, name: str, *words: str) -> Finished:
        return finish(start(*self.command(name, *words)))

    def command(self, name: str, *words: str) -> list[str]:
        output = f"output={self.folder / name}"
        return ["distill_targets", *RUN, self.data, self.teacher, "run_dir=unused", output, *words]

    def train(self, name: str, *words: str) -> Finished:
        return finish(start("train", *RUN, self.data, f"run_dir={self.folder / name}", *words))

    def targets(self, name: str) -> str:
        return f"objective.targets={self.folder / name}"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Student:
    found = Student(tmp_path_factory.mktemp("stored"), corpus)
    done = found.write("whole")
    assert done.code == 0, done.said
    return found


@pytest.mark.parametrize(
    "words",
    [(), PHASES, ("data.packing=best_fit",)],
    ids=["rows of one length", "phases and a growing batch", "packed rows"],
)
def test_a_run_with_stored_hidden_states_is_that_with_the_teacher_to_the_bit(
    words: tuple[str, ...], student: Student
) -> None:
    name = "-".join(word.partition("=")[0] for word in words) or "plain"
    for done in (
        student.write(f"{name} targets", *words),
        student.train(f"{name} with", student.teacher, *words),
        student.train(f"{name} without", student.targets(f"{name} targets"), *words),
    ):
        assert done.code == 0, done.said
    runs = [student.folder / f"{name} {how}" for how in ("with", "without")]
    last = max(int(one.name[5:]) for one in (runs[0] / "checkpoints").iterdir())
    weights = [_trained(run, last) for run in runs]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name in weights[0] if not weights[0][name].equal(weights[1][name])] == []
    assert untimed(runs[0]) == untimed(runs[1])


def test_rows_of_a_teacher_that_stand_for_no_token_are_in_no_targets(student: Student) -> None:
    wide = f"run_dir={student.folder / 'wide teacher'}"
    for done in (
        finish(start("train", *RUN[:2], student.data, wide, "model.vocab_size=1500")),
        student.write("of few rows", f"objective.teacher={student.folder / 'wide teacher'}"),
        student.train("of few", student.targets("of few rows")),
    ):
        assert done.code == 0, done.said


def _trained(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and state of the optimizer; a teacher that is built draws first values."""
    found = tensors(run_dir, step)
    assert any(name.startswith("optimizer.") for name in found)
    return {name: one for name, one in found.items() if not name.startswith("random.")}


def test_a_writer_that_is_killed_leaves_nothing_that_is_read_and_goes_on(student: Student) -> None:
    folder = student.folder / "killed"
    process = start(*student.command("killed"))
    deadline = time.monotonic() + 60
    while not list(folder.glob("train-0/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    finish(process)
    (folder / "targets.json").unlink(missing_ok=True)  # it was faster than this test
    if not (folder / "unfinished.json").is_file():
        shutil.copy(student.folder / "whole" / "targets.json", folder / "unfinished.json")
    refused = student.train("refused", student.targets("killed"))
    assert refused.code == 2
    assert "was never finished: the same hybrid-train distill_targets goes on" in refused.err
    assert not (student.folder / "refused").exists()
    half = folder / "train-0" / "00000001.safetensors.half"
    half.write_bytes(b"what a writer left behind")
    done = student.write("killed")
    assert done.code == 0, done.said
    assert contents(folder) == contents(student.folder / "whole")
    again = student.write("killed")
    assert again.code == 0
    assert "are in" in again.out
    assert "already" in again.out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("train.seed=5",), "train.seed=5; the targets have the order of 1234"),
        (("train.tokens=4096",), "tokens 0 to 4,096 in rows of 64 are not among the targets"),
        (("train.sequence_length=32",), "in rows of 32 are not among the targets, which have"),
    ],
)
def test_a_run_of_other_rows_is_refused_before_anything_is_written(
    words: tuple[str, ...], reason: str, student: Student
) -> None:
    done = student.train("other", student.targets("whole"), *words)
    assert done.code == 2
    assert reason in done.err
    assert not (student.folder / "other").exists()


def test_a_row_that_the_teacher_did_not_read_is_refused_by_its_number(student: Student) -> None:
    folder = shutil.copytree(student.folder / "whole", student.folder / "swapped")
    first, second = (folder / "train-0" / f"{number:08d}.safetensors" for number in (0, 1))
    shutil.copy(second, first)
    done = student.train("wrong row", student.targets("swapped"))
    assert done.code == 2
    assert "train row 0 is not the row that the teacher of" in done.err


def test_a_turned_bit_in_the_targets_is_noticed(student: Student) -> None:
    folder = shutil.copytree(student.folder / "whole", student.folder / "turned")
    path = folder / "train-0" / "00000000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last row of a file, in its values
    path.write_bytes(content)
    done = student.train("damaged", student.targets("turned"))
    assert done.code == 2
    assert "is damaged: train row" in done.err


def test_targets_of_another_kind_are_not_mixed_with_those_that_are_there(student: Student) -> None:
    before = contents(student.folder / "whole")
    done = student.write("whole", "what=top_k", "objective.top_k=4")
    assert done.code == 2
    assert "holds targets of another teacher, run or kind (other: what, top_k" in done.err
    assert contents(student.folder / "whole") == before


def test_check_and_a_dry_run_say_the_size_of_the_folder_that_is_written(student: Student) -> None:
    top = ("what=top_k", "objective.top_k=4")
    assert student.write("top of phases", *top, *PHASES).code == 0
    for name, number, words in (("whole", 0, ()), ("top of phases", 1, PHASES)):
        own = (*RUN, student.data, student.teacher, "run_dir=unused", "objective.top_k=4", *words)
        done = finish(start("check", "--json", *own))
        assert done.code == 0, done.said
        said = json.loads(done.out)["teachers"]["storable"]
        files = list((student.folder / name).rglob("*.safetensors"))
        values = [one for file in files for one in load_file(file).values()]
        assert said["kinds"][number]["bytes"] == sum(one.nbytes for one in values)
        written = json.loads((student.folder / name / "targets.json").read_text())["parts"]
        assert said["rows"] == sum(one["rows"] for one in written)
        read = finish(start("check", *RUN, student.targets(name), "run_dir=unused", *words[:1]))
        size = sum(
            one.stat().st_size for one in (student.folder / name).rglob("*") if one.is_file()
        )
        assert f"{show_bytes(size)}, {said['rows']} rows" in " ".join(read.out.split())
    dry = student.write("never", *top, "--dry-run")
    assert dry.code == 0, dry.said
    assert "48 rows take" in dry.out
    assert "tokens," in dry.out
    assert "nothing was written" in dry.out
    assert not (student.folder / "never").exists()


def test_the_header_says_what_the_targets_were_made_of(student: Student) -> None:
    said = json.loads((student.folder / "whole" / "targets.json").read_text())
    assert (said["what"], said["dtype"], said["vocab_size"]) == ("hidden", "float32", 512)
    assert said["teacher"]["step"] == STEPS
    assert [part["rows"] for part in said["parts"]] == [40, 8]


def test_hidden_states_in_fewer_bits_change_a_loss_by_their_rounding(student: Student) -> None:
    for done in (
        student.write("short", "dtype=bfloat16"),
        student.train("by short", student.targets("short")),
        student.train("by whole", student.targets("whole")),
    ):
        assert done.code == 0, done.said
    first = [
        json.loads((student.folder / run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for run in ("by short", "by whole")
    ]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.02)  # 8 bits of each hidden state


def test_a_run_goes_on_with_the_targets_of_its_teacher_alone(student: Student) -> None:
    steady = ("schedule=constant", "schedule.peak_lr=1e-3", "schedule.warmup_tokens=0")
    folder = shutil.copytree(student.folder / "whole", student.folder / "kept")
    given = (student.targets("kept"), *steady)
    half = student.train("going on", *given, "train.tokens=1280")
    assert half.code == 0, half.said
    text = (folder / "targets.json").read_text()
    said = json.loads(text)
    said["teacher"]["checksum"] = "0" * 64
    (folder / "targets.json").write_text(json.dumps(said))
    before = contents(student.folder / "going on")
    refused = student.train("going on", *given)
    assert refused.code == 2
    assert "has learned from another teacher so far" in refused.err
    assert contents(student.folder / "going on") == before
    (folder / "targets.json").write_text(text)
    for name in ("going on", "at once"):
        done = student.train(name, *given)
        assert done.code == 0, done.said
    runs = [_trained(student.folder / name, STEPS) for name in ("going on", "at once")]
    assert [name for name in runs[0] if not runs[0][name].equal(runs[1][name])] == []
