"""Log-likelihood requests of lm-eval: ours against its transformers backend, in one run.

    python tests/benchmarks/lm_eval_speed.py [--threads 1] [--rounds 3] [--items 16] [override ...]

Overrides name the model, by default model=ladder_60m; its weights are untrained, in float32, and
lm-eval's backend (HFLM) gets our export of them. Requests are Python source of this machine's
standard library, tokenized by a tokenizer that is trained on it: questions with worked examples
before them (200 to 600 tokens, 4 choices), the same with choices of one token, these with the same
examples before all, short ones (15 to 40 tokens, 4 choices), and single continuations. Both sides
get the same list through lm-eval's interface, so tokenization counts.

Each side runs with several batch sizes (of ours: tokens of a microbatch), theirs with each way of
computing experts that is of use; a first round, not counted, drops those that take more than 1.3
times the best of their side. Then all take turns. Times are of the processor, all threads counted,
which neighbours disturb least, and by the clock; of each way the best round counts. Log-likelihoods
are compared: it ends with 1 if one differs by more than 1e-4 nats.
"""

import argparse
import logging
import os
import random
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lm_eval.api.instance import Instance

from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.runtime.start import process
from hybrid_train.schema.evaluation import Harness
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.runtime import Device, Runtime
from tests.benchmarks.generate import untrained_run

THEIR_BATCHES = (1, 4, 16, 64)
OUR_TOKENS = (512, 2048, 8192)
EXPERTS = ("eager", "grouped_mm")
HOPELESS = 1.3  # times the best of a side in the first round
LONGEST = 1024  # tokens that the model reads at once
SAME = 1e-4  # nats
Answers = list[tuple[float, bool]]
Way = Callable[[list[Instance]], Answers]


@dataclass(frozen=True)
class Kind:
    """One kind of requests: lengths in words of source, each about 3 tokens."""

    context: tuple[int, int]
    choices: int
    continuation: tuple[int, int]
    examples: int = 0  # words that all contexts begin with


KINDS = {
    "4 choices, worked examples": Kind((70, 200), 4, (1, 5)),
    "4 letters, worked examples": Kind((70, 200), 4, (0, 0)),
    "4 letters, one set of worked examples": Kind((15, 30), 4, (0, 0), 100),
    "4 choices, short": Kind((5, 13), 4, (1, 5)),
    "1 continuation": Kind((30, 100), 1, (2, 8)),
}


def source_words() -> list[str]:
    """Words of Python source, each with the white space before it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / f"{name}.py").read_text() for name in ("ast", "argparse", "typing"))
    words = text.split(" ")
    return [" " + word for word in words if word.strip()]


def requests_of(kind: Kind, items: int, words: Sequence[str]) -> list[Instance]:
    draw, found = random.Random(1), []

    def some(least: int, most: int) -> str:
        count = draw.randint(least, most)
        first = draw.randrange(len(words) - count)
        return "".join(words[first : first + count])

    examples = some(kind.examples, kind.examples)
    for number in range(items):
        context = examples + some(*kind.context)
        for choice in range(kind.choices):
            continuation = (
                some(*kind.continuation) if kind.continuation[1] else " " + "ABCD"[choice]
            )
            found.append(
                Instance("loglikelihood", {}, (context, continuation), choice, ("t", number, 1))
            )
    return found


def make(settings: Sequence[str], folder: Path, words: Sequence[str]) -> None:
    """Write an untrained run with a tokenizer, and its export."""
    from hybrid_train.hf.write import export_checkpoint

    vocab_size = untrained_run([f"train.sequence_length={LONGEST}", *settings], folder)
    tokenizer = train_byte_level_bpe(words, vocab_size)
    tokenizer.save(folder / "run" / "tokenizer")
    export_checkpoint(folder / "run", folder / "hf", None, 2**40)


def our_ways(folder: Path, runtime: Runtime) -> dict[str, Way]:
    from hybrid_train.evaluation.harness import LiveModel
    from hybrid_train.evaluation.reader import LmEvalReader
    from hybrid_train.jobs.networks import load_model

    network = load_model(str(folder / "run"), runtime, format=GemmFormat.fp32).network
    found: dict[str, Way] = {}
    for tokens in OUR_TOKENS:
        settings = Harness(batch_tokens=tokens)
        model = LiveModel(LmEvalReader.of(folder / "run", settings), network, settings)
        found[f"ours, {tokens} tokens"] = model.loglikelihood
    return found


def their_ways(folder: Path) -> dict[str, Way]:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, NemotronHForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model = NemotronHForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    found: dict[str, Way] = {}
    for batch in THEIR_BATCHES:
        for experts in EXPERTS:
            side = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=LONGEST)

            def way(requests: list[Instance], side: Any = side, experts: str = experts) -> Answers:
                model.set_experts_implementation(experts)
                answers: Answers = side.loglikelihood(requests, disable_tqdm=True)
                return answers

            found[f"theirs, batch {batch}, {experts}"] = way
    return found


@dataclass
class Timed:
    """What the rounds of one way took, and what it found."""

    processor: float = float("inf")  # s, the best round
    wall: float = float("inf")
    answers: Sequence[tuple[float, bool]] = ()

    def take(self, way: Way, requests: list[Instance]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        self.answers = way(requests)
        self.wall = min(self.wall, time.perf_counter() - wall)
        self.processor = min(self.processor, time.process_time() - processor)


def race(sides: Sequence[Mapping[str, Way]], requests: list[Instance], rounds: int) -> list[Timed]:
    """Let the ways of both sides take turns; print them; return the best of each side."""
    kept: dict[str, Way] = {}
    for side in sides:
        first = {name: Timed() for name in side}
        slow: dict[str, int] = {}  # experts -> the batch from which on it was hopeless
        for name, way in side.items():
            family = name.split(", ")[-1] if name.startswith("theirs") else name
            if family not in slow:  # a larger batch of theirs pads more
                first[name].take(way, requests)
                best = min(one.processor for one in first.values())
                if first[name].processor > 2 * HOPELESS * best:
                    slow[family] = 1
        best = min(one.processor for one in first.values())
        kept |= {n: way for n, way in side.items() if first[n].processor < HOPELESS * best}
    found = {name: Timed() for name in kept}
    for number in range(rounds):
        for name in list(kept) if number % 2 == 0 else list(kept)[::-1]:
            found[name].take(kept[name], requests)
    for name, one in found.items():
        rate = len(requests) / one.processor
        print(f"  {name:32} {one.processor:7.2f} / {one.wall:7.2f} s {rate:8.1f} requests/s")
    return [
        min((one for name, one in found.items() if name in side), key=lambda one: one.processor)
        for side in sides
    ]


def compare(options: argparse.Namespace, folder: Path, runtime: Runtime) -> bool:
    """Print a table for each kind of requests; tell whether all answers agree."""
    from hybrid_train.megatron.data_parallel import destroy_groups

    words = source_words()
    make(options.settings, folder, words)
    sides, largest = [our_ways(folder, runtime), their_ways(folder)], 0.0
    try:
        for name, kind in KINDS.items():
            requests = requests_of(kind, options.items, words)
            print(f"{name}: {len(requests)} requests; processor / clock", flush=True)
            ours, theirs = race(sides, requests, options.rounds)
            pairs = list(zip(ours.answers, theirs.answers, strict=True))
            apart = max(abs(one[0] - other[0]) for one, other in pairs)
            greedy = sum(one[1] == other[1] for one, other in pairs)
            largest = max(largest, apart)
            print(
                f"  over ours: {theirs.processor / ours.processor:.2f} of the processor, "
                f"{theirs.wall / ours.wall:.2f} by the clock; largest difference {apart:.1e} nats, "
                f"greedy equal {greedy} of {len(pairs)}",
                flush=True,
            )
    finally:
        destroy_groups()
    return largest < SAME


def main() -> int:
    """Compare both on this machine's processors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("settings", nargs="*", default=["model=ladder_60m"], help="overrides")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    runtime = Runtime(device=Device.cpu, threads=options.threads)
    with tempfile.TemporaryDirectory() as name, process(runtime, 0):
        print(
            f"{' '.join(options.settings)}, fp32, {options.threads} thread(s), "
            f"{options.rounds} rounds, load {os.getloadavg()[0]:.1f}"
        )
        return int(not compare(options, Path(name), runtime))


if __name__ == "__main__":
    sys.exit(main())
