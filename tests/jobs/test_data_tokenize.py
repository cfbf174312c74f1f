"""`hybrid-train data tokenize` killed again and again, on a full disk, with a very long line."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from hybrid_train.data.prepare.finished import verify_whole
from hybrid_train.data.token_files import TokenReader
from hybrid_train.data.tokenizers import train_byte_level_bpe

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300
LINES = [f"    value_{i} = compute(x, {i}) if it's {i * i} else None\n" for i in range(2000)]
TOKENIZER = train_byte_level_bpe(LINES, vocab_size=600)


def start(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "hybrid_train", "data", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out + err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and a file of 12 MB in 400 documents, some of its lines bad."""
    made = tmp_path_factory.mktemp("text")
    TOKENIZER.save(made / "tokenizer")
    draw = random.Random(1)
    with (made / "a.jsonl").open("wb") as file:
        for number in range(400):
            text = "".join(draw.choices(LINES, k=draw.randrange(1, 1200)))
            file.write(orjson.dumps({"text": text}) + b"\n")
            if number % 100 == 50:
                file.write(b"no JSON\n")
    return made


def words(folder: Path, output: Path, workers: int, **changes: object) -> list[str]:
    settings = {
        "input": folder / "a.jsonl", "output": output, "tokenizer": folder / "tokenizer",
        "workers": workers, "block_kb": 64, "save_interval_s": 0, "max_bad_share": 0.1, **changes,
    }  # fmt: skip
    return ["tokenize", *(f"{name}={value}" for name, value in settings.items())]


@pytest.mark.slow
def test_a_job_killed_at_random_moments_loses_no_document_and_doubles_none(
    folder: Path, tmp_path: Path
) -> None:
    code, said = finish(start(*words(folder, tmp_path / "straight", 1, word_cache="false")))
    assert code == 0, said
    draw = random.Random(3)
    state = tmp_path / "out.partial" / "state.json"
    kills = done = 0
    for attempt in range(30):
        process = start(*words(folder, tmp_path / "out", 1 + attempt % 3))
        # At a random moment after some work of its own, so that the kills fall into the work.
        goal, deadline = done + draw.randrange(1, 70), time.monotonic() + TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            done = position(state)
            if done >= goal:
                time.sleep(draw.random() * 0.02)
                break
        process.send_signal(signal.SIGKILL)
        code, said = finish(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
        kills += 1
        assert not (tmp_path / "out.idx").exists()
    assert kills >= 3
    code, said = finish(start(*words(folder, tmp_path / "out", 2))) if code else (code, said)
    assert code == 0, said
    for suffix in ("bin", "idx", "bad.jsonl", "json"):
        straight = (tmp_path / f"straight.{suffix}").read_bytes()
        assert (tmp_path / f"out.{suffix}").read_bytes() == straight
    assert not state.parent.exists()
    assert verify_whole(str(tmp_path / "out"), None).faults == []


def position(state: Path) -> int:
    """Blocks that are done."""
    try:
        return int(orjson.loads(state.read_bytes())["position"][1])
    except (FileNotFoundError, orjson.JSONDecodeError):
        return 0


def test_workers_end_with_a_killed_job(folder: Path, tmp_path: Path) -> None:
    process = start(*words(folder, tmp_path / "out", 2))
    deadline = time.monotonic() + TIMEOUT_S
    while position(tmp_path / "out.partial" / "state.json") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in listed.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_worker_is_told_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    process = start(*words(folder, tmp_path / "out", 1))
    deadline = time.monotonic() + TIMEOUT_S
    while position(tmp_path / "out.partial" / "state.json") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in children(process.pid):  # the worker, and Python's tracker of shared resources
        os.kill(pid, signal.SIGKILL)
    code, said = finish(process)
    assert code == 2
    assert "a worker was ended by signal 9; the system may lack memory" in said
    assert "Traceback" not in said
    code, said = finish(start(*words(folder, tmp_path / "out", 1)))
    assert code == 0, said
    assert "going on behind document" in said
    assert len(TokenReader(tmp_path / "out")) == 400


@pytest.mark.slow
def test_ctrl_c_saves_the_position(folder: Path, tmp_path: Path) -> None:
    # A shell has its background jobs ignore Ctrl-C, and their children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # The bare library is slow enough for the signal to come before the end.
    slowly = words(folder, tmp_path / "out", 1, save_interval_s=1000, word_cache="false")
    process = start(*slowly)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + TIMEOUT_S
    written = tmp_path / "out.partial" / "tokens.bin"
    while (not written.exists() or not written.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    assert said.endswith("hybrid-train: interrupted\n")
    assert position(tmp_path / "out.partial" / "state.json") > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip("needs the right to mount a small disk" + (f": {done.stderr}" if done else ""))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_nothing_but_the_time(
    folder: Path, tmp_path: Path, small_disk: Path
) -> None:
    code, said = finish(start(*words(folder, small_disk / "out", 2)))
    assert code == 2, said
    assert "the disk is full" in said
    assert "Traceback" not in said
    assert position(small_disk / "out.partial" / "state.json") > 0
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    code, said = finish(start(*words(folder, small_disk / "out", 1)))
    assert code == 0, said
    assert "going on behind document" in said
    assert len(TokenReader(small_disk / "out")) == 400
    assert verify_whole(str(small_disk / "out"), None).faults == []


@pytest.mark.slow
def test_a_line_of_100_megabytes_takes_a_few_times_its_size(folder: Path, tmp_path: Path) -> None:
    text = "".join(LINES) * (100_000_000 // sum(map(len, LINES)))
    with (tmp_path / "long.jsonl").open("wb") as file:
        for one in ("before", text, "after"):
            file.write(orjson.dumps({"text": one}) + b"\n")
    asked = words(folder, tmp_path / "out", 1, input=tmp_path / "long.jsonl", block_kb=1024)
    # In a process of its own, whose children are those of this job alone.
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:]).returncode\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
        "sys.exit(done)\n"
    )
    program = [sys.executable, "-m", "hybrid_train", "data", *asked]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1])  # of the largest process
    assert peak < 8 * len(text), f"{peak / len(text):.1f} times the line"
    reader = TokenReader(tmp_path / "out")
    assert len(reader) == 3
    assert TOKENIZER.decode(reader[2][:-1].tolist()) == "after"
    once = TOKENIZER.encode("".join(LINES[:50]))
    assert reader[1][: len(once) - 5].tolist() == once[:-5]


def test_a_job_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from hybrid_train.jobs.cli import main\n"
        "for line in sys.argv[1:]:\n"
        "    assert main(['data', *line.split('\\n')]) == 0, line\n"
        "print({'torch', 'megatron'} & set(sys.modules))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output, few = tmp_path / "out", tmp_path / "few.jsonl"
    few.write_bytes(b"".join((folder / "a.jsonl").read_bytes().splitlines(keepends=True)[:20]))
    jobs = (
        words(folder, output, 1, input=few),
        ["inspect", f"input={output}", "document=0"],
        ["verify", f"input={output}"],
        ["count", f"input={output}"],
        ["split", f"input={output}", f"output={output}-part", "shares=[0.5,0.5]"],
        ["merge", f"input={output}-part-*", f"output={tmp_path / 'merged'}"],
        ["train_tokenizer", f"input={few}", f"output={tmp_path / 't'}", "vocab_size=300"],
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *map("\n".join, jobs)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
