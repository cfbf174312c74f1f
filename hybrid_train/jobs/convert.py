"""The jobs `convert` and `verify`: folders of other programs in and out, and a comparison.

`verify` names every tensor that differs in name, shape, format or value.
"""

import gc
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hybrid_train.checkpoint import layout, lineage
from hybrid_train.checkpoint.block_moves import Format, Rows, require_finite
from hybrid_train.checkpoint.lineage import WEIGHTS, Parent, parent_of
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.config.launcher import require_alone
from hybrid_train.config.secrets import masked
from hybrid_train.hf import config_json
from hybrid_train.hf.files import refusals_named
from hybrid_train.hf.read import Folder, import_folder
from hybrid_train.hf.tensors import Theirs, theirs_from_ours
from hybrid_train.hf.write import Checkpoint, Weights, export_checkpoint, open_checkpoint
from hybrid_train.jobs.fetched_checkpoint import folder_of
from hybrid_train.jobs.provenance import made_by
from hybrid_train.nvidia.checkpoint_folders import Trainer, trainer_of
from hybrid_train.nvidia.export_checkpoint import export_as
from hybrid_train.nvidia.import_checkpoint import import_checkpoint
from hybrid_train.runtime import optional
from hybrid_train.runtime.logs import start_logging
from hybrid_train.runtime.start import process
from hybrid_train.schema.job_roots import ConvertJob, ExportFormat, VerifyJob, WeightFormat
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_log = logging.getLogger(__name__)


@dataclass
class Differences:
    """Every tensor that is not the same on both sides, in words; empty lists if all are."""

    tensors: int = 0  # compared
    only_ours: list[str] = field(default_factory=list)
    only_theirs: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)  # of equal values, or they stand below too
    values: list[str] = field(default_factory=list)

    @property
    def is_same_model(self) -> bool:
        """Whether all is equal but for number formats, up to the narrower of the two."""
        return not (self.only_ours or self.only_theirs or self.shapes or self.values)

    def lines(self) -> list[str]:
        """Say what differs, each kind with its number."""
        kinds = {
            "only in the checkpoint": self.only_ours,
            "only in the folder": self.only_theirs,
            "of another shape": self.shapes,
            "of another number format": self.formats,
            "of other values": self.values,
        }
        return [
            f"{counted(len(found), 'tensor')} {kind}: {_some(found)}"
            for kind, found in kinds.items()
            if found
        ]


def run_convert(job: ConvertJob) -> None:
    """Convert; nothing is left behind if it fails."""
    require_alone("convert")
    start_logging()
    gc.freeze()  # what was imported stays: among 100,000 small objects its sweeps take their time
    dtype = None if job.dtype is WeightFormat.keep else Format[job.dtype.name].value
    output = Path(job.output).absolute()
    if job.import_ is not None:
        source = Path(job.import_)
        with refusals_named(**{"import": source, "output": output}):
            done = _import(source, output, dtype, job.tokenizer)
            parent = Parent(
                WEIGHTS, job.import_, str(source.absolute()), None, layout.digest_of(source)
            )
    else:
        assert job.export is not None, "the checks ask for one of them"
        source = folder_of(job.export, "export")
        with refusals_named(export=source, output=output):
            if job.format is ExportFormat.huggingface:
                done = export_checkpoint(source, output, dtype, int(job.shard_gb * 1e9))
            else:
                done = export_as(source, output, dtype, Trainer[job.format.name])
            parent = parent_of(WEIGHTS, masked(job.export), layout.locate(source))
    lineage.write(output, made_by("convert"), [parent])
    _log.info("%s", done)


def _import(source: Path, output: Path, dtype: torch.dtype | None, tokenizer: str | None) -> str:
    if trainer_of(source) is not None:
        place = None if tokenizer is None else Path(tokenizer)
        return import_checkpoint(source, output, dtype, place)
    if tokenizer is not None:
        raise UserError(
            f"tokenizer = {tokenizer}: {source} is a Hugging Face folder, which has its own; "
            "leave it out"
        )
    return import_folder(source, output, dtype)


def run_verify(job: VerifyJob) -> None:
    """Print what differs.

    Raises:
        UserError: if the two are not the same model.
    """
    require_alone("verify")
    if job.logits:
        optional.require("transformers", "verify with logits=true")
    start_logging()
    source = folder_of(job.checkpoint, "checkpoint")
    with refusals_named(checkpoint=source, hf=Path(job.hf)):
        _verify(job, source)


def _verify(job: VerifyJob, source: Path) -> None:
    checkpoint = open_checkpoint(source)
    found = _compare_tensors(checkpoint, Path(job.hf))
    for line in (f"{counted(found.tensors, 'tensor')} compared", *found.lines()):
        print(line)  # noqa: T201  the result of the command
    verdict = [] if found.is_same_model else ["the tensors differ"]
    if job.logits and (found.only_ours or found.only_theirs or found.shapes):
        print("logits: not compared, since tensors are missing")  # noqa: T201
    elif job.logits and not _logits_agree(job, checkpoint):
        verdict.append("the logits differ")
    if verdict:
        raise UserError(f"{job.hf} is not the model of {job.checkpoint}: {' and '.join(verdict)}")
    print(f"{job.hf} is the model of {job.checkpoint}")  # noqa: T201


def _compare_tensors(checkpoint: Checkpoint, folder: Path) -> Differences:
    with StoredTensors(checkpoint.found.path) as stored, Folder(folder) as theirs:
        weights = Weights(stored, best=False)
        checkpoint.require_model(weights)
        return differences(checkpoint, weights, theirs)


def _logits_agree(job: VerifyJob, checkpoint: Checkpoint) -> bool:
    folder = Path(job.hf)
    model = config_json.to_model(config_json.read_config(folder), folder / config_json.FILE)
    generator = torch.Generator().manual_seed(job.seed)
    size = (job.sequences, job.length)
    tokens = torch.randint(checkpoint.vocab_size, size, generator=generator)
    with process(job.runtime, job.seed) as device:
        from hybrid_train.hf import verify  # Megatron comes with the second
        from hybrid_train.jobs.networks import load_model
        from hybrid_train.megatron.data_parallel import destroy_groups

        theirs = verify.their_logits(verify.load_theirs(folder, model).to(device), tokens).cpu()
        try:
            loaded = load_model(str(checkpoint.found.path), job.runtime, format=GemmFormat.fp32)
            ours = verify.our_logits(loaded.model, tokens, checkpoint.vocab_size).cpu()
        finally:
            destroy_groups()
        found = verify.compare_logits(ours, theirs, job.tolerance)
    print(found)  # noqa: T201
    return found.first is None


def _some(found: list[str], most: int = 5) -> str:
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def differences(checkpoint: Checkpoint, weights: Weights, folder: Folder) -> Differences:
    """Compare every tensor of both sides, a part at a time."""
    theirs = checkpoint.theirs()
    found = Differences()
    present, stored, wide = folder.names, weights.names, checkpoint.padded(weights)
    found.only_theirs = sorted(present - theirs.keys())
    for name, one in theirs.items():
        lacking = [piece.key for piece in one.pieces.values() if piece.key not in stored]
        if name not in present:
            found.only_ours.append(name)
        elif lacking:
            found.only_theirs.append(f"{name} ({lacking[0]})")
        elif folder.shape(name) != one.shape:
            found.shapes.append(f"{name}: {one.shape} here, {folder.shape(name)} there")
        else:
            found.tensors += 1
            _compare(one, wide, folder, found)
    keys = {piece.key for one in theirs.values() for piece in one.pieces.values()}
    found.only_ours += sorted(stored - keys)
    return found


def _compare(one: Theirs, weights: Rows, folder: Folder, found: Differences) -> None:
    here = weights.dtype(next(iter(one.pieces.values())).key)
    there = folder.dtype(one.name)
    if here != there:
        found.formats.append(f"{one.name}: {_word(here)} here, {_word(there)} there")
    narrow = min((here, there), key=lambda dtype: dtype.itemsize)
    row, largest, first = 0, 0.0, None
    for part in theirs_from_ours(one, weights):
        ours = weights.read(part.name, part.start, part.stop)
        require_finite(weights, part.name, ours, part.start)
        ours = ours.view(part.shape)
        block = folder.read(one.name, row, row + len(ours))
        if not _equal(ours, block, narrow):
            change = (ours.double() - block.double()).abs()
            largest = max(largest, change.max().nan_to_num(torch.inf).item())
            if first is None:
                unequal = (ours.to(narrow) != block.to(narrow)).nonzero()[0].tolist()
                first = [row + unequal[0], *unequal[1:]]
        row += len(ours)
    if first is not None:
        found.values.append(f"{one.name}: by at most {largest:.3g}, first at {first}")


def _equal(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(ours.to(dtype), theirs.to(dtype))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
