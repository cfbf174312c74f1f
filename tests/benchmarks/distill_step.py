"""What a teacher costs: the step of a student against the same step without one.

    python tests/benchmarks/distill_step.py [--model ladder_10m] [--rounds 9] [--threads 2]

The teacher has the size of the student. Engines take turns, one step each, so that a busy machine
slows all alike; printed is the time of a step as a multiple of next-token prediction, the median of
the rounds, lowest and highest, and the same of the processor time, which others on the machine
change little. A forward pass is a third of a step: 1.33 is what can be hoped for. Last come stored
targets in place of the teacher, read from disk row by row.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, BATCH, VOCAB = 256, 4, 4096
TAUGHT = {
    "forward KL": (),
    "mixed, temperature 2": ("objective.reverse_share=0.5", "objective.temperature=2"),
    "half cross-entropy": ("objective.cross_entropy_share=0.5",),
    "64 tokens and a rest": ("objective.top_k=64",),
}
STORED = {  # what is stored, and with which settings it is read
    "stored hidden states": ("hidden", ()),
    "the same, MTP by labels": ("hidden", ("objective.mtp=cross_entropy",)),
    "stored 64 tokens": ("top_k", ("objective.mtp=cross_entropy",)),
}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ladder_10m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--names", nargs="*", default=[*TAUGHT, *STORED])
    options = parser.parse_args()

    from hybrid_train.runtime.start import process
    from hybrid_train.schema.runtime import Device, Runtime

    runtime = Runtime(device=Device.cpu, threads=options.threads)
    with process(runtime, 0), tempfile.TemporaryDirectory() as folder:
        compare(options.model, options.rounds, Path(folder) / "teacher", options.names)


def compare(model: str, rounds: int, teacher: Path, names: list[str]) -> None:
    """Let the objectives take turns."""
    from hybrid_train.megatron.data_parallel import build_groups

    plain = job_of(model, "train.seed=7")
    groups = build_groups(plain.parallel, 600)
    engines = {"next token": engine_of(plain, groups)}
    write(engines["next token"], plain, teacher)
    given = ("objective=distill", f"objective.teacher={teacher}")
    stored: dict[str, Any] = {}
    for name in names:
        words = (*given, *TAUGHT.get(name, ()))
        if name in STORED:
            what, own = STORED[name]
            stored[name] = store_targets(teacher, what, groups)
            words = ("objective=distill", f"objective.targets={stored[name].folder}", *own)
        engines[name] = engine_of(job_of(model, *words), groups, stored.get(name))
    clocks = {"time": time.perf_counter, "processor time": time.process_time}
    seconds: dict[tuple[str, str], list[float]] = {
        (clock, name): [] for clock in clocks for name in engines
    }
    for _ in range(rounds):
        for name, engine in engines.items():
            starts = {clock: read() for clock, read in clocks.items()}
            engine.step(batches(stored.get(name)), tokens_seen=10**6)
            for clock, read in clocks.items():
                seconds[clock, name].append(read() - starts[clock])
    print(f"{model}, {BATCH} x {LENGTH} tokens, vocabulary {VOCAB}, float32, {rounds} rounds")
    for (clock, name), times in seconds.items():
        plain_times = seconds[clock, "next token"]
        ratios = [own / other for own, other in zip(times, plain_times, strict=True)]
        print(
            f"{name:24} {clock:15} {statistics.median(times):7.3f} s "
            f"{statistics.median(ratios):6.2f}x "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def job_of(model: str, *words: str) -> Any:
    """Compose a job."""
    from hybrid_train.config import compose

    sizes = [f"train.sequence_length={LENGTH}", f"train.global_batch={BATCH}"]
    sizes += [f"train.microbatch={BATCH}", f"model.vocab_size={VOCAB}"]
    base = ["experiment=tiny_cpu", f"model={model}", "run_dir=/nonexistent", "precision=fp32"]
    return compose.compose("train", [*base, *sizes, *words])


def engine_of(job: Any, groups: Any, targets: Any = None) -> Any:
    """Build the engine of a job; its first step is taken here."""
    import torch

    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model

    built = build_model(job, groups, VOCAB, on_gpu=False)
    engine = build_engine(job, built, groups, torch.device("cpu"))
    engine.step(batches(targets), tokens_seen=10**6)
    return engine


def write(engine: Any, job: Any, run_dir: Path) -> None:
    """Write a run with the weights of an engine."""
    from hybrid_train.checkpoint import store
    from hybrid_train.config import frozen
    from hybrid_train.training.hooks.checkpointing import content_of

    frozen.freeze(job, run_dir)
    store.save(run_dir, content_of(engine), {"step": 1, "tokens": 0}, keep=1)


def store_targets(teacher: Path, what: str, groups: Any) -> Any:
    """Write targets of the fixed rows; return what reads them."""
    from hybrid_train.distillation.target_folder import Header, Part
    from hybrid_train.distillation.target_writer import PartRows, TargetWriter
    from hybrid_train.distillation.targets import open_targets
    from hybrid_train.distillation.teachers import Teacher
    from hybrid_train.jobs.networks import load_model
    from hybrid_train.schema.runtime import Runtime

    part = Part("train-0", "train", LENGTH, 0, BATCH, BATCH)
    network = load_model(str(teacher), Runtime(), groups=groups).network
    hidden = what == "hidden"
    header = Header(
        what=what, top_k=None if hidden else 64, dtype="float32", vocab_size=VOCAB,
        mtp_depths=network.chunks[0].mtp_num_depths if hidden else 0, tokenizer="", data={},
        seed=0, teacher={"source": "", "checksum": ""}, parts=[part],
    )  # fmt: skip
    rows, folder = [PartRows(part, reader(), BATCH)], teacher.with_name(what)
    TargetWriter(folder, header, Teacher("", 1.0, network), rows).write()
    return open_targets(folder)


class FixedRows:
    """The rows of a fixed batch."""

    def fill(self, row: int) -> Any:
        from fixed_batch import fixed_batch

        names = ("tokens", "labels", "loss_weights", "position_ids")
        batch = fixed_batch(VOCAB, BATCH, LENGTH)
        return {name: getattr(batch, name)[row].numpy() for name in names}


def reader(*transforms: Any) -> Any:
    """Return what reads the fixed rows."""
    from hybrid_train.data.batch import RowReader

    return RowReader(FixedRows(), transforms)


def batches(targets: Any = None) -> Any:
    """Return one microbatch of fixed tokens, with targets where there are any."""
    from fixed_batch import fixed_batch

    from hybrid_train.data.batch import stack

    if targets is None:
        return iter([fixed_batch(VOCAB, BATCH, LENGTH)])
    read = reader(targets)
    return iter([stack([read(number) for number in range(BATCH)])])


if __name__ == "__main__":
    main()
