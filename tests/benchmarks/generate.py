"""Decoding and prefill against transformers with its cache, and against the memory's bandwidth.

    python tests/benchmarks/generate.py [--precision bf16] [--threads 1] [--rounds 5] [override ...]

Overrides name the model, by default model=ladder_60m; its weights are untrained. Ours is the cached
model behind `generate`, in the batches that it makes. Theirs is transformers' own nemotron_h on our
export, a bare loop over its forward pass with its cache, logits of the last position alone, with
each way that it has of computing experts; the smallest ratio counts. Of these `batched_mm` copies
the experts of every token, gigabytes in a prefill: only steps are timed with it.

Rounds let all take turns on the same tokens, so that a busy machine slows them alike. A step
follows 128 tokens, and its most likely token is chosen on both sides and read by the next one.
Times are milliseconds by the clock / of the processor, all threads counted; with one thread the
latter is what neighbours disturb least. Of each step the best round, and the median of the rounds,
are averaged over the steps. The share of bandwidth is that of the bytes that a step cannot avoid
(weights, with those experts that were chosen; states, read and written; keys and values), divided
by the time of the step, in the rate at which as many threads read a buffer beyond all caches, right
after the steps. Last, greedy answers to prompts of unequal length are compared; in float32 it ends
with 1 if one differs.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hybrid_train.anatomy.counts import cache_size
from hybrid_train.config.compose import compose
from hybrid_train.runtime.start import process
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.runtime import Device, Runtime

if TYPE_CHECKING:
    from hybrid_train.jobs.networks import LoadedModel

PREFILLS = ((1, 512), (8, 256))  # batch, tokens of each
BATCHES, PAST, STEPS = (1, 8), 128, 12  # of decoding; STEPS in a round
PROMPTS, ANSWER = (5, 40, 17, 64), 24  # tokens of what is answered greedily
BUFFER_BYTES, PIECE_BYTES = 2 * 2**30, 64 * 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPERTS = ("eager", "grouped_mm", "batched_mm")
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Seconds:
    """What something took."""

    wall: float
    processor: float

    def over(self, other: "Seconds") -> str:
        return f"{self.wall / other.wall:.2f} / {self.processor / other.processor:.2f}"

    def __str__(self) -> str:
        return f"{self.wall * 1e3:.2f} / {self.processor * 1e3:.2f}"


class Side(Protocol):
    """A model that reads prompts of equal length and goes on with what it finds most likely."""

    name: str

    def read(self, prompts: Prompts) -> None: ...

    def begin(self, prompts: Prompts) -> None:
        """Read, untimed, before steps."""

    def step(self) -> None: ...


class Ours:
    """The cached model."""

    name = "ours"

    def __init__(self, loaded: "LoadedModel", batch: int) -> None:
        from hybrid_train.generation.cached_model import CachedModel

        loaded.network.train(False)
        self._model = CachedModel(loaded.network, batch)
        self._vocab_size = loaded.job.model.vocab_size
        self._rows = slice(0, batch)
        self._chosen: Prompts = ()

    def read(self, prompts: Prompts) -> None:
        for row in range(self._rows.stop):
            self._model.clear(row)
        self._take(prompts)

    def begin(self, prompts: Prompts) -> None:
        self.read(prompts)

    def step(self) -> None:
        self._take(self._chosen)

    def _take(self, tokens: Prompts) -> None:
        hidden = self._model.read(self._rows, tokens, [len(tokens[0])] * len(tokens))
        assert hidden is not None, "one stage is the last one"
        logits = self._model.logits(hidden[:, -1:])[..., : self._vocab_size]
        self._chosen = logits.argmax(-1).tolist()


class Theirs:
    """The model of transformers, with one of its ways of computing experts."""

    def __init__(self, model: Any, experts: str) -> None:
        self.name = experts
        self._model = model
        self._past: Any = None
        self._chosen = torch.empty(0)
        self.logits = torch.empty(0)  # behind the last token, [B, V]

    def read(self, prompts: Prompts) -> None:
        self._model.set_experts_implementation(self.name)
        self._past = None
        self._take(torch.tensor(prompts))

    def begin(self, prompts: Prompts) -> None:
        """Read with a way that copies no weights, then turn to that of the steps."""
        reader = Theirs(self._model, "grouped_mm")
        reader.read(prompts)
        self._past, self._chosen = reader._past, reader._chosen
        self._model.set_experts_implementation(self.name)

    def step(self) -> None:
        self._take(self._chosen)

    @torch.inference_mode()
    def _take(self, tokens: torch.Tensor) -> None:
        made = self._model(tokens, past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = made.past_key_values
        self.logits = made.logits[:, -1]
        self._chosen = self.logits.argmax(-1, keepdim=True)

    @property
    def chosen(self) -> list[int]:
        return self._chosen[:, 0].tolist()

    def chosen_experts(self, prompts: Prompts) -> float:
        """Return how many experts a layer chooses in a step behind these prompts, in the mean."""
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

        counts: list[int] = []

        def count(_module: Any, _given: Any, made: Any) -> None:
            counts.append(made[2].unique().numel())

        self.begin(prompts)
        routers = [one for one in self._model.modules() if isinstance(one, NemotronHTopkRouter)]
        hooks = [one.register_forward_hook(count) for one in routers]
        for _ in range(STEPS):
            self.step()
        for hook in hooks:
            hook.remove()
        return statistics.fmean(counts) if counts else 0.0


def timed(work: Callable[[], Any]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def in_turns(
    sides: Sequence[Side], rounds: int, turn: Callable[[Any], list[Seconds]]
) -> dict[str, list[list[Seconds]]]:
    """Let sides take turns, in one order and back: name -> what each part of each turn took."""
    found: dict[str, list[list[Seconds]]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            found[side.name].append(turn(side))
    return found


def mean_of(turns: list[list[Seconds]], pick: Callable[[Iterable[float]], float]) -> Seconds:
    """Pick a round for each part of a turn, and average over the parts."""
    parts = list(zip(*turns, strict=True))
    return Seconds(
        statistics.fmean(pick(one.wall for one in part) for part in parts),
        statistics.fmean(pick(one.processor for one in part) for part in parts),
    )


def second_per_byte() -> Seconds:
    """Return what reading a byte of the memory takes, in the best of many pieces of a buffer.

    A piece takes milliseconds, in which a neighbour seldom comes between: a rate that it had slowed
    would make a share of it too large.
    """
    buffer = torch.ones(BUFFER_BYTES // 4)
    ways: list[Callable[[torch.Tensor], Any]] = [torch.sum, torch.max, lambda x: torch.dot(x, x)]
    pieces = buffer.chunk(BUFFER_BYTES // PIECE_BYTES)
    found = [timed(lambda: way(piece)) for way in ways for piece in pieces]  # noqa: B023
    return Seconds(
        min(one.wall for one in found) / PIECE_BYTES,
        min(one.processor for one in found) / PIECE_BYTES,
    )


def bytes_of_step(model: Any, sizes: Any, batch: int, experts: float) -> float:
    """Return what a step has to move.

    Args:
        model: of transformers; it has the weights of ours, without those of drafts.
        sizes: the section of the config.
        batch: rows.
        experts: how many of a layer are chosen.
    """
    weights = 0.0
    for name, weight in model.named_parameters():
        share = experts / len(weight) if ".experts." in name else 1.0
        if "embed" in name:  # it is looked up
            share = batch / len(weight)
        weights += share * weight.nbytes
    cache = cache_size(sizes, kv_bytes=model.dtype.itemsize)
    states = 2 * (cache.ssm_per_sequence + cache.conv_per_sequence)
    seen = PAST + (STEPS + 1) / 2  # keys of the mean step, its own one counted
    return weights + batch * (states + cache.kv_per_token * (seen + 1))


def some_tokens(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(vocab_size, (batch, length), generator=generator).tolist()


@dataclass(frozen=True)
class Compared:
    """Both models, loaded, and how they are timed."""

    loaded: "LoadedModel"
    model: Any
    rounds: int

    @property
    def vocab_size(self) -> int:
        size = self.loaded.job.model.vocab_size
        assert size is not None
        return size

    def prefill(self, batch: int, length: int) -> None:
        prompts = some_tokens(self.vocab_size, batch, length)
        ways = [Theirs(self.model, experts) for experts in EXPERTS[:2]]
        found = in_turns(
            [Ours(self.loaded, batch), *ways],
            self.rounds,
            lambda side: [timed(lambda: side.read(prompts))],
        )
        show(f"prefill {batch} x {length}", found)

    def steps(self, batch: int) -> None:
        prompts = some_tokens(self.vocab_size, batch, PAST)
        ways = [Theirs(self.model, experts) for experts in EXPERTS]

        def turn(side: Any) -> list[Seconds]:
            side.begin(prompts)
            return [timed(side.step) for _ in range(STEPS)]

        found = in_turns([Ours(self.loaded, batch), *ways], self.rounds, turn)
        experts = ways[0].chosen_experts(prompts)
        moved = bytes_of_step(self.model, self.loaded.job.model, batch, experts)
        byte = second_per_byte()
        least = Seconds(byte.wall * moved, byte.processor * moved)
        show(f"step, batch {batch}", found, least)
        print(
            f"{'':16} {moved / 1e6:.1f} MB a step, {experts:.1f} experts of a layer; memory "
            f"{1e-9 / byte.wall:.1f} / {1e-9 / byte.processor:.1f} GB/s"
        )

    def same_answers(self) -> bool:
        """Compare greedy answers, and say where they part."""
        prompts = [some_tokens(self.vocab_size, 1, length)[0] for length in PROMPTS]
        pairs = zip(prompts, self._answers(prompts), strict=True)
        parted = [self._parts(number, *pair) for number, pair in enumerate(pairs)]
        same = len(parted) - sum(parted)
        print(f"greedy answers of {ANSWER} tokens: {same} of {len(parted)} agree")
        return not any(parted)

    def _answers(self, prompts: Prompts) -> list[list[int]]:
        from hybrid_train.generation.batching import Batching, stream
        from hybrid_train.generation.requests import Request
        from hybrid_train.generation.sampling import Sampling

        greedy = Sampling(temperature=0.0)
        asked = [Request(prompt=one, max_new_tokens=ANSWER, sampling=greedy) for one in prompts]
        batching = Batching(vocab_size=self.vocab_size, rows=len(asked))
        found: list[list[int]] = [[] for _ in asked]
        for new in stream(self.loaded.network, asked, batching):
            found[new.request] += new.tokens
        return found

    def _parts(self, number: int, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Tell, and say where, theirs goes on otherwise than our answer."""
        side = Theirs(self.model, EXPERTS[0])
        side.read([prompt])
        for place, token in enumerate(answer):
            if side.chosen != [token]:
                first, second = side.logits[0].topk(2).values.tolist()
                print(
                    f"answer {number} parts at its token {place}: {token} here, {side.chosen[0]} "
                    f"there, whose two top logits lie {first - second:.1e} apart"
                )
                return True
            side.step()
        return False


def show(work: str, found: dict[str, list[list[Seconds]]], least: Seconds | None = None) -> None:
    """Print the lines of one piece of work."""
    ours = [mean_of(found["ours"], pick) for pick in (min, statistics.median)]
    for name, turns in found.items():
        best, median = (mean_of(turns, pick) for pick in (min, statistics.median))
        ends = ["", ""] if name == "ours" else [best.over(ours[0]), median.over(ours[1])]
        ends.append("" if least is None else least.over(best))
        print(f"{work:16} {name:11} {best!s:>17} {median!s:>17}", *(f"{e:>13}" for e in ends))
        work = ""


def make(settings: Sequence[str], folder: Path) -> None:
    """Write an untrained run, and its export."""
    from hybrid_train.hf.write import export_checkpoint

    untrained_run(["train.sequence_length=1024", *settings], folder)
    export_checkpoint(folder / "run", folder / "hf", None, 2**40)


def untrained_run(settings: Sequence[str], folder: Path) -> int:
    """Write an untrained run to `run` in a folder; return the size of its vocabulary."""
    from hybrid_train.checkpoint import store
    from hybrid_train.config import frozen
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.model.build import build_model
    from hybrid_train.training.hooks.checkpointing import content_of

    base = ["experiment=tiny_cpu", "precision=fp32", f"run_dir={folder / 'run'}"]
    job = compose("train", [*base, *settings])
    assert job.model.vocab_size is not None, "the model needs a vocabulary"
    groups = build_groups(job.parallel, job.runtime.timeout_s)
    try:
        built = build_model(job, groups, job.model.vocab_size, on_gpu=False)
        engine = build_engine(job, built, groups, torch.device("cpu"))
        frozen.freeze(job, folder / "run")
        store.save(folder / "run", content_of(engine), {"step": 0, "tokens": 0}, keep=1)
    finally:
        destroy_groups()
    return job.model.vocab_size


def compare(options: argparse.Namespace, folder: Path, runtime: Runtime) -> bool:
    """Load both, print the table, and tell whether they answer alike."""
    from transformers import NemotronHForCausalLM
    from transformers.utils import logging as their_logging

    from hybrid_train.jobs.networks import load_model
    from hybrid_train.megatron.data_parallel import destroy_groups

    their_logging.disable_progress_bar()
    make(options.settings, folder)
    dtype = DTYPES[options.precision]
    model = NemotronHForCausalLM.from_pretrained(folder / "hf", dtype=dtype).eval()
    loaded = load_model(str(folder / "run"), runtime, format=GemmFormat(options.precision))
    try:
        compared = Compared(loaded, model, options.rounds)
        print(
            f"{' '.join(options.settings)}, {options.precision}, {options.threads} thread(s), "
            f"{options.rounds} rounds, load {os.getloadavg()[0]:.1f}"
        )
        heads = ("best ms", "median ms", "over ours", "medians", "of bandwidth")
        print(f"{'':28} {heads[0]:>17} {heads[1]:>17}", *(f"{head:>13}" for head in heads[2:]))
        for batch, length in PREFILLS:
            compared.prefill(batch, length)
        for batch in BATCHES:
            compared.steps(batch)
        return compared.same_answers()
    finally:
        destroy_groups()


def main() -> int:
    """Compare both on this machine's processors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("settings", nargs="*", default=["model=ladder_60m"], help="overrides")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    runtime = Runtime(device=Device.cpu, threads=options.threads)
    with tempfile.TemporaryDirectory() as name, process(runtime, 0):
        same = compare(options, Path(name), runtime)
    return int(options.precision == "fp32" and not same)


if __name__ == "__main__":
    sys.exit(main())
