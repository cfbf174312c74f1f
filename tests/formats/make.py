"""Makes the examples in this folder, with the code of any checkout of the project.

    python tests/formats/make.py CHECKOUT [run_folder|corpus|targets]

Each is an archive NAME_VERSION.tar.xz of some kilobytes: a run folder after two steps with its
checkpoint, a corpus with its tokenizer, and the targets that this run is the teacher of. The
version is the one that the checkout writes; those before numbers are 1. Run it with the tag of a
release before a format changes.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RUN, CORPUS, TARGETS = "run_folder", "corpus", "targets"
STEPS = 2
ROW, ROWS = 32, 2  # tokens of a row, rows of a step
# The smallest of everything: each tensor takes a kilobyte of a checkpoint, however small it is.
TRAINING = (
    *("train", "experiment=tiny_cpu", "data=streams", "schedule=constant", "model.pattern=M-"),
    *("schedule.peak_lr=1e-3", "schedule.warmup_tokens=0", "runtime.threads=1"),
    *("model.hidden_size=8", "model.mlp.intermediate_size=8", "model.mamba.heads=1"),
    *("model.mamba.head_dim=16", "model.mamba.state_size=4", "model.mamba.groups=1"),
    *("model.vocab_multiple=1", "model.tie_embeddings=true"),
    *(f"train.sequence_length={ROW}", f"train.global_batch={ROWS}", "train.microbatch=2"),
    *(f"train.tokens={STEPS * ROW * ROWS}", f"run_dir={RUN}"),
)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TOKENIZER = ("data", "train_tokenizer", "input=text.jsonl", f"output={CORPUS}/tokenizer")
TOKENS = ("data", "tokenize", "input=text.jsonl", f"output={CORPUS}/text", "workers=1")


def main(checkout: Path, wanted: set[str]) -> None:
    """Make the examples that are wanted with a checkout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if RUN in wanted:
            make_run(checkout, folder)
        if CORPUS in wanted:
            make_corpus(checkout, folder)
        if TARGETS in wanted:
            make_targets(checkout, folder)


def make_run(checkout: Path, folder: Path) -> None:
    run(checkout, folder, *TRAINING)
    without_the_machine(folder / RUN / "history.jsonl")
    pack(folder / RUN, run_version(folder / RUN))


def make_corpus(checkout: Path, folder: Path) -> None:
    texts = [" ".join(WORDS[(start + n) % 10] for n in range(40)) for start in range(10)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "text.jsonl").write_text("".join(lines))
    run(checkout, folder, *TOKENIZER, "vocab_size=280")
    run(checkout, folder, *TOKENS, f"tokenizer={CORPUS}/tokenizer")
    pack(folder / CORPUS, corpus_version(folder / CORPUS))


def make_targets(checkout: Path, folder: Path) -> None:
    run(checkout, folder, *TRAINING)
    teacher = ("objective=distill", f"objective.teacher={RUN}", f"output={TARGETS}")
    run(checkout, folder, "distill_targets", *TRAINING[1:], *teacher)
    path = folder / TARGETS / "targets.json"
    path.write_text(path.read_text().replace(str(folder), "."))  # the machine's own
    pack(folder / TARGETS, run_version(folder / TARGETS))


def run(checkout: Path, folder: Path, *words: str) -> None:
    """Run a command with the code of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hybrid_train", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def without_the_machine(history: Path) -> None:
    """Take the name of the machine out of the history."""
    history.write_text(re.sub(r'"host": "[^"]*"', '"host": "example"', history.read_text()))


def run_version(folder: Path) -> int:
    stamp = folder / "format.json"
    return int(json.loads(stamp.read_text())["version"]) if stamp.is_file() else 1


def corpus_version(folder: Path) -> int:
    return int(json.loads((folder / "text.json").read_text())["format"].rpartition(" ")[2])


def pack(folder: Path, version: int) -> None:
    """Write the archive of a folder; the same files make the same bytes."""
    target = HERE / f"{folder.name}_{version}.tar.xz"
    with tarfile.open(target, "w:xz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".png":
                content = path.read_bytes()
                entry = tarfile.TarInfo(str(path.relative_to(folder)))
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), set(sys.argv[2:]) or {RUN, CORPUS, TARGETS})
