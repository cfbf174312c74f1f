"""Times `hybrid-train data tokenize` beside a plain pool of processes and the bare library.

python tests/benchmarks/tokenize_text.py [--rounds 3] [--copies 1] [--vocab 32768]

All three take the same JSONL (one document per source file of the standard library) and the same
byte-level BPE, with two processes. The pool does what is publicly described of Megatron-LM's
preprocessing: `Pool.imap` over lines, `json.loads`, one call of the Hugging Face tokenizer a
document, `IndexedDatasetBuilder` in the main process. The bare library encodes texts that lie in
memory already. Ours is timed as a command, start-up included; of the pool and of the library the
imports do not count. The outputs of ours and of the pool are compared, to the byte.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROCESSES = 2
WAYS = ("ours", "pool", "library")
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main() -> int:
    """Make the corpus, run the rounds, print speeds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1, help="of the corpus, one behind the other")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--timed", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.timed:
        way, folder = arguments.timed
        print({"pool": pool, "library": library}[way](Path(folder)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents, size = make(folder, arguments.copies, arguments.vocab)
        print(f"{documents} documents, {size / 1e6:.1f} MB of text, vocabulary {arguments.vocab}")
        rounds(folder, arguments.rounds)
    return 0


def make(folder: Path, copies: int, vocab: int) -> tuple[int, int]:
    """Write the corpus and train the tokenizer; return documents and bytes."""
    from hybrid_train.data.tokenizers import train_byte_level_bpe

    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_bytes().decode("utf-8", "replace")
            texts += [text] if text else []
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(copies):
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    train_byte_level_bpe(texts, vocab).save(folder / "tokenizer")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return copies * len(texts), copies * sum(len(text.encode()) for text in texts)


def rounds(folder: Path, count: int) -> None:
    """Time the three ways in turn, `count` times."""
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens = 0
    for _ in range(count):
        seconds = {way: timed(way, folder) for way in WAYS}
        tokens = tokens or num_tokens(folder)
        for way in WAYS:
            speeds[way].append(tokens / seconds[way])
        print("  ".join(f"{way} {speeds[way][-1] / 1e6:.2f}M tokens/s" for way in WAYS), flush=True)
    middle = {way: statistics.median(found) for way, found in speeds.items()}
    for other in ("pool", "library"):
        ratios = [a / b for a, b in zip(speeds["ours"], speeds[other], strict=True)]
        print(
            f"ours / {other}: {middle['ours'] / middle[other]:.2f} "
            f"(rounds from {min(ratios):.2f} to {max(ratios):.2f})"
        )


def timed(way: str, folder: Path) -> float:
    """Return the seconds of one way, each in a process of its own."""
    for suffix in ("bin", "idx", "json"):
        (folder / f"{way}.{suffix}").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--timed", way, str(folder)]
    if way == "ours":
        command = [
            sys.executable, "-m", "hybrid_train", "data", "tokenize", f"output={folder / 'ours'}",
            f"input={folder / 'corpus.jsonl'}", f"tokenizer={folder / 'tokenizer'}",
            f"workers={PROCESSES}",
        ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return seconds if way == "ours" else float(done.stdout)


def num_tokens(folder: Path) -> int:
    """Compare the files of both ways and return how many tokens each has."""
    for suffix in ("bin", "idx"):
        if (folder / f"ours.{suffix}").read_bytes() != (folder / f"pool.{suffix}").read_bytes():
            sys.exit(f"ours.{suffix} and pool.{suffix} differ")
    return (folder / "ours.bin").stat().st_size // 2


def pool(folder: Path) -> float:
    """Tokenize line by line in a pool; the main process writes. Return the seconds."""
    warnings.filterwarnings("ignore")
    import numpy as np
    import transformers  # noqa: F401 - workers inherit it
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    start = time.perf_counter()
    vocab = len(json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    builder = IndexedDatasetBuilder(str(folder / "pool.bin"), dtype=DType.optimal_dtype(vocab))
    context = multiprocessing.get_context("fork")
    with (
        (folder / "corpus.jsonl").open() as lines,
        context.Pool(PROCESSES, open_tokenizer, (str(folder / "tokenizer"),)) as workers,
    ):
        for ids in workers.imap(encode_line, lines, 32):
            builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(folder / "pool.idx"))
    return time.perf_counter() - start


def open_tokenizer(folder: str) -> None:
    global tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)


def encode_line(line: str) -> list[int]:
    text = json.loads(line)["text"]
    return [*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]


def library(folder: Path) -> float:
    """Return the seconds of the library alone: two processes, texts in memory."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for number in range(PROCESSES):
        ours, theirs = context.Pipe()
        context.Process(target=encode_part, args=(theirs, str(folder), number)).start()
        pipes.append(ours)
    for one in pipes:
        one.recv()  # ready
    start = time.perf_counter()
    for one in pipes:
        one.send("go")
    for one in pipes:
        one.recv()
    return time.perf_counter() - start


def encode_part(pipe, folder: str, number: int) -> None:
    from tokenizers import Tokenizer

    bare = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
    lines = Path(folder, "corpus.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[number::PROCESSES]]
    pipe.send("ready")
    pipe.recv()
    for start in range(0, len(texts), 64):
        bare.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)
    pipe.send("done")


if __name__ == "__main__":
    sys.exit(main())
