"""Takes random Hugging Face folders through everything that is done with one.

python -m tests.hf_walk [SEEDS [FIRST]]     30 folders, from seed 0 on; a table, 1 if one fails

Each is imported and verified, its loss and the gradients of all its parameters are compared with
transformers' own, it is exported straight away, then trained on twice in a row and exported again.
"""

import contextlib
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.token_files import write_documents
from hybrid_train.hf import config_json
from hybrid_train.hf.families.nemotron_h import NEMOTRON_H
from hybrid_train.hf.verify import load_theirs
from hybrid_train.hf.write import Checkpoint, open_checkpoint
from hybrid_train.schema.optimizer import Schedule
from hybrid_train.schema.train import Train
from tests.hf_random import random_folder
from tests.jobs.command import finish, start, train
from tests.tiny import RUNTIME, alone, batch_of

TOLERANCE = 1e-4  # root mean square of an error, as a share of that of the gradient
NOISE = 1e-4  # a gradient below this share of the largest is compared with that share
LENGTH = 40
CPU = ("runtime=cpu", "runtime.threads=1")


@dataclass
class Outcome:
    """What became of one folder; no faults if all is well."""

    seed: int
    what: str = ""
    loss_error: float = math.nan
    gradient_error: float = math.nan  # the largest of all parameters
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Walk, print a line for each folder, and return 1 if one has a fault."""
    number, first = (int(one) for one in (*sys.argv[1:], *("30", "0")[len(sys.argv) - 1 :]))
    warnings.filterwarnings("ignore")
    print(f"{'seed':>4}  {'loss':>8}  {'gradient':>8}  folder, faults")
    failed = 0
    for seed in range(first, first + number):
        with tempfile.TemporaryDirectory() as place:
            found = walk(seed, Path(place))
        failed += bool(found.faults)
        said = "".join(f"\n        {fault}" for fault in found.faults)
        errors = f"{found.loss_error:8.1e}  {found.gradient_error:8.1e}"
        print(f"{seed:4}  {errors}  {found.what}{said}", flush=True)
    print(f"{number - failed} of {number} folders without a fault")
    return int(failed > 0)


def walk(seed: int, place: Path) -> Outcome:
    """Take the folder of a seed the whole way."""
    outcome = Outcome(seed)
    folder, imported = random_folder(seed, place / "hf"), place / "imported"
    outcome.what = _in_words(folder)
    with _fault(outcome, "import"):
        command("convert", f"import={folder}", f"output={imported}")
        with _fault(outcome, "verify"):
            command("verify", f"checkpoint={imported}", f"hf={folder}", f"length={LENGTH}", *CPU)
        with _fault(outcome, "gradients"):
            _compare_gradients(outcome, folder, imported)
        with _fault(outcome, "train on, export"):
            outcome.faults += file_differences(folder, exported(imported, place / "back"))
            last = trained_on(imported, folder, place)
            outcome.faults += file_differences(folder, exported(last, place / "trained"))
    return outcome


@contextlib.contextmanager
def _fault(outcome: Outcome, what: str) -> Iterator[None]:
    """Note an error as a fault, and go on."""
    try:
        yield
    except Exception as error:  # whatever it is, the other folders are walked, too
        outcome.faults.append(f"{what}: {str(error).strip() or type(error).__name__}"[:600])


def _in_words(folder: Path) -> str:
    config = config_json.read_config(folder)
    model = config_json.to_model(config, folder / config_json.FILE)
    moe = f"{model.moe.top_k}/{model.moe.experts}" if "E" in model.pattern else "-"
    return f"{model.pattern} vocabulary {model.vocab_size}, experts {moe}" + (
        ", tied" if model.tie_embeddings else ""
    )


def command(*words: str) -> str:
    """Run `hybrid-train` and return what it said.

    Raises:
        RuntimeError: with that, if it failed.
    """
    done = finish(start(*words))
    if done.code != 0:
        raise RuntimeError(f"{words[0]} ended with {done.code}: {done.said[-400:]}")
    return done.said


def exported(run_dir: Path, output: Path) -> Path:
    """Export a run."""
    command("convert", f"export={run_dir}", f"output={output}")
    return output


def trained_on(imported: Path, folder: Path, place: Path) -> Path:
    """Train for two steps from an imported folder, then for two more in a run of its own."""
    tokenizer, prefix = open_tokenizer(folder), place / "tokens"
    documents = [
        [*tokenizer.encode(f"line {n} of words "), tokenizer.end_of_document] for n in range(99)
    ]
    write_documents(prefix, documents, vocab_size=tokenizer.vocab_size)
    last = imported
    for name in ("first", "second"):
        done = train(
            place / name, "data=files", f"data.train=[{prefix}]", f"data.tokenizer={folder}",
            f"checkpoint.load={last}", "checkpoint.load_only=weights", "train.tokens=512",
        )  # fmt: skip
        if done.code != 0:
            raise RuntimeError(f"train ended with {done.code}: {done.said[-600:]}")
        last = place / name
    return last


def file_differences(source: Path, export: Path) -> list[str]:
    """Name every file but tensors that an export has not as it was, and what is no strict JSON."""
    names = {_name(path, folder) for folder in (source, export) for path in _files(folder)}
    found = []
    for name in sorted(names - {config_json.FILE}):
        before, after = (
            (folder / name).read_bytes() if (folder / name).is_file() else None
            for folder in (source, export)
        )
        if before != after:
            found.append(f"{name} {'is gone' if after is None else 'differs'} in {export.name}")
    said, kept = (
        json.loads((folder / config_json.FILE).read_text()) for folder in (source, export)
    )
    if said.get("time_step_limit") == [0.0, math.inf]:
        del said["time_step_limit"]  # no JSON; it is the default
    for key in said.keys() | kept.keys():
        if said.get(key) != kept.get(key):
            found.append(f"config.json, {key}: {said.get(key)} -> {kept.get(key)}")
    for path in export.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda word: found.append(f"{word} in a JSON"))
    return found


def _files(folder: Path) -> list[Path]:
    tensors = (".safetensors", ".safetensors.index.json")
    return [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(tensors)]


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))


def _compare_gradients(outcome: Outcome, folder: Path, imported: Path) -> None:
    """Compare one step of ours, without the terms that transformers lacks, with autograd there."""
    checkpoint = open_checkpoint(imported)
    assert checkpoint.model.vocab_size is not None
    rows = torch.randint(
        checkpoint.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(7)
    )
    loss, ours = _our_gradients(checkpoint, rows)
    model = load_theirs(folder, checkpoint.model)
    logits = model(rows[:, :-1], use_cache=False).logits
    theirs_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    theirs_loss.backward()  # type: ignore[no-untyped-call]
    outcome.loss_error = abs(loss - theirs_loss.item())
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    errors = dict(_gradient_errors(checkpoint, ours, theirs))
    outcome.gradient_error = max(errors.values())
    worst = {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE}
    if worst:
        some = dict(list(worst.items())[:4])
        outcome.faults.append(f"{len(worst)} of {len(errors)} gradients differ: {some}")
    if not outcome.loss_error <= TOLERANCE:
        outcome.faults.append(f"loss {loss:.6f}, transformers says {theirs_loss.item():.6f}")


def _our_gradients(checkpoint: Checkpoint, rows: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Take one step of the engine that trains; return its loss and the gradients by our names."""
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model
    from tests.parity import shards

    job = checkpoint.job
    job.runtime, job.schedule = RUNTIME, Schedule(peak_lr=0.0)
    job.train = Train(tokens="1M", sequence_length=LENGTH, microbatch=2, global_batch=2)
    job.objective.mtp_loss_scale = job.objective.moe_aux_loss_scale = 0.0
    job.optimizer.clip_grad_norm = 0.0
    with alone() as groups:
        built = build_model(job, groups, checkpoint.vocab_size, on_gpu=False)
        engine = build_engine(job, built, groups, torch.device("cpu"))
        read_weights(checkpoint.found.path, engine.network.chunks, engine.network.groups)
        engine.network.optimizer.reload_model_params()
        report = engine.step(cycle([batch_of(rows)]), tokens_seen=0)
        found = shards.assemble(iter(list(shards.gradients(engine.network.chunks))))
    return report.loss, found


def _gradient_errors(
    checkpoint: Checkpoint, ours: dict[str, Tensor], theirs: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    """Yield the error of each part of a gradient, under the released name."""
    # A router that always gives one expert all the weight has no gradient but rounding errors.
    least = NOISE * max(grad.square().mean().sqrt().item() for grad in theirs.values())
    for stored in NEMOTRON_H.table(checkpoint.model, checkpoint.vocab_size):
        if stored.key not in ours or stored.key.startswith("mtp."):
            continue
        for part in stored.parts:
            mine = ours[stored.key][part.at : part.at + part.rows]
            other = _their_gradient(part.name, theirs)
            if other is None:
                yield part.name, 0.0 if not mine.any() else math.inf
                continue
            if checkpoint.model.tie_embeddings and "embeddings" in part.name:
                other = other + theirs["lm_head.weight"]  # transformers 5.23 ties nothing
            other = other[part.start : part.stop].reshape(mine.shape)
            scale = max(other.square().mean().sqrt().item(), least)
            yield part.name, (mine - other).square().mean().sqrt().item() / scale


def _their_gradient(name: str, theirs: dict[str, Any]) -> Tensor | None:
    """Find a gradient under the names inside transformers, where experts are stacked."""
    inner = name.replace("backbone.", "model.", 1)
    head, experts, rest = inner.partition(".experts.")
    if not experts or ".shared_experts" in head:
        return theirs.get(inner)
    number, _, weight = rest.partition(".")
    stacked = theirs.get(f"{head}.experts.{weight.removesuffix('.weight')}")
    return None if stacked is None else stacked[int(number)]


if __name__ == "__main__":
    sys.exit(main())
