"""The job `prune`: cuts a smaller model out of a checkpoint, as a run folder of its own."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.kinds import CHOSEN, EMBEDDING
from hybrid_train.anatomy.layers import layers, mtp_blocks
from hybrid_train.checkpoint import layout, lineage
from hybrid_train.checkpoint.lineage import WEIGHTS, Parent, parent_of
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.compression import slicing
from hybrid_train.compression.choosing import Chosen, choose
from hybrid_train.compression.cut_rules import remarks
from hybrid_train.compression.ranking import Ranking, read_for
from hybrid_train.compression.slicing import Accounted, Slice
from hybrid_train.config import frozen
from hybrid_train.config.launcher import require_alone
from hybrid_train.config.secrets import masked
from hybrid_train.data.any_tokenizer import copy_tokenizer, has_vocabulary
from hybrid_train.hf import config_json, origin
from hybrid_train.hf.files import new_folder, refusals_named
from hybrid_train.hf.read import imported_job
from hybrid_train.hf.write import Checkpoint, open_checkpoint, trained_length
from hybrid_train.jobs import provenance
from hybrid_train.jobs.fetched_checkpoint import folder_of
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.model import SECTIONS, Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.pruning import Cut, PruneJob
from hybrid_train.schema.units import show_bytes

REPORT = "prune.json"  # in the folder of the child
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """A child and what becomes of each tensor of its parent.

    Attributes:
        parent: the checkpoint that is cut.
        chosen: the child, and what it is made of.
        accounts: of every tensor of the checkpoint.
    """

    parent: Checkpoint
    chosen: Chosen
    accounts: Sequence[Accounted]

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of the weights that went in, came out and were cut; of all else that stayed."""
        weights = [one for one in self.accounts if one.is_weight]
        came_in, went_out = (
            sum(one.bytes for one in weights),
            sum(one.kept_bytes for one in weights),
        )
        return {
            "in": came_in,
            "out": went_out,
            "cut": sum(one.bytes - one.kept_bytes for one in weights),
            "beside_weights": sum(one.bytes for one in self.accounts if not one.is_weight),
        }

    @property
    def dropped(self) -> list[int]:
        """The main layers of the parent that are not in the child, from 1."""
        stay = {one.parent.number for one in self.chosen.selection.layers if not one.parent.depth}
        number = len(parse(self.parent.model.pattern).main)
        return [layer for layer in range(1, number + 1) if layer not in stay]


def run(job: PruneJob) -> None:
    """Cut the child, and print what became of the parent; nothing is left behind if it fails.

    Raises:
        UserError: if checkpoint, ranking and cut do not fit each other, or a file is damaged.
    """
    require_alone("prune")
    start_logging()
    source, output = folder_of(job.checkpoint, "checkpoint"), Path(job.output).absolute()
    with refusals_named(checkpoint=source, output=output):
        parent = open_checkpoint(source)
        ranking = None if job.ranking is None else read_for(Path(job.ranking), parent.found)
        rows = padded_vocab_size(parent.vocab_size, parent.model.vocab_multiple)
        chosen = choose(parent.model, ranking, job, rows)
        if job.dry_run:
            with StoredTensors(parent.found.path) as stored:
                pruned, _ = _planned(parent, chosen, stored)
        else:
            came_from = parent_of(WEIGHTS, masked(job.checkpoint), parent.found)
            pruned = prune(parent, came_from, chosen, output, _asked(job, ranking))
    _show(pruned)
    done = "dry_run=true: nothing was written" if job.dry_run else f"{output} is the child"
    print(f"\n{done}")  # noqa: T201  the result of the command


def prune(
    parent: Checkpoint, came_from: Parent, chosen: Chosen, output: Path, asked: dict[str, Any]
) -> Pruned:
    """Write a child as a run folder with one checkpoint, at step 0.

    Args:
        parent: the checkpoint that is cut.
        came_from: the same, for the lineage of the child.
        chosen: the child.
        output: its run folder; must not be there yet.
        asked: how it was chosen, for its report.

    Raises:
        UserError: if a tensor is damaged, missing or not known; nothing is left behind.
    """
    with StoredTensors(parent.found.path) as stored:
        pruned, made_of = _planned(parent, chosen, stored)
        length, dtype = trained_length(parent), stored.dtype(EMBEDDING.stored)
        with new_folder(output) as partial:
            weights = layout.path_of(partial, 0)
            weights.mkdir(parents=True)
            slicing.write(weights, stored, made_of)
            slicing.require_accounted(weights, pruned.accounts)
            layout.write_position(weights, {"step": 0, "tokens": 0})
            layout.write_checksums(weights, {})
            _keep_tokenizer(parent.found.run_dir, partial)
            frozen.freeze(imported_job(chosen.model, output, length, dtype), partial)
            lineage.write(partial, provenance.made_by("prune"), [came_from])
            said = {"parent": asdict(came_from), **asked, **_report(pruned)}
            text = json.dumps(said, indent=1) + "\n"
            (partial / REPORT).write_text(text, encoding="utf-8")
    return pruned


def _planned(
    parent: Checkpoint, chosen: Chosen, stored: StoredTensors
) -> tuple[Pruned, dict[str, Slice]]:
    rows = padded_vocab_size(parent.vocab_size, parent.model.vocab_multiple)
    slicing.require_parent(stored, parent.model, rows)
    made_of = slicing.slices(parent.model, chosen.model, chosen.selection, rows)
    return Pruned(parent, chosen, slicing.account(stored, made_of)), made_of


def _keep_tokenizer(run_dir: Path, partial: Path) -> None:
    """Give the child the tokenizer of its parent, and the files of the folder that began it all."""
    copy_tokenizer(run_dir / layout.TOKENIZER, partial / layout.TOKENIZER)
    origin.pass_on(run_dir, partial)
    if not has_vocabulary(run_dir / layout.TOKENIZER):
        _log.warning("%s has no tokenizer: text cannot be generated from the child", run_dir)


def _asked(job: PruneJob, ranking: Ranking | None) -> dict[str, Any]:
    """Return how a child was chosen, as plain data."""
    made_of = None if ranking is None else {"folder": job.ranking, **asdict(ranking.header)}
    whole = frozen.to_dict(job)
    own = {name: whole[name] for name in Cut.__dataclass_fields__}
    return {"ranking": made_of, "cut": own}


def _report(pruned: Pruned) -> dict[str, Any]:
    """Return what prune.json says of both models, and of each tensor."""
    chosen = pruned.chosen
    return {
        "sizes": [
            {"setting": name, "parent": theirs, "child": ours}
            for name, theirs, ours in _sizes(pruned)
        ],
        "layers_dropped": pruned.dropped,
        "parameters": {"parent": chosen.parent_parameters, "child": chosen.parameters},
        "bytes": pruned.bytes,
        "tensors": [asdict(one) for one in pruned.accounts],
    }


def _show(pruned: Pruned) -> None:
    """Print the sizes of parent and child."""
    chosen, sizes = pruned.chosen, pruned.bytes
    share = chosen.parameters / chosen.parent_parameters
    show_numbers(
        console(),
        [
            *_sizes(pruned),
            ("parameters", f"{chosen.parent_parameters:,}", f"{chosen.parameters:,} ({share:.1%})"),
            ("weights", show_bytes(sizes["in"]), show_bytes(sizes["out"])),
        ],
        ("", "parent", "child"),
    )
    if pruned.dropped:
        numbers = ", ".join(map(str, pruned.dropped))
        print(f"\nlayers of the parent that are not in the child: {numbers}")  # noqa: T201
    if left := sizes["beside_weights"]:
        print(f"{show_bytes(left)} beside weights stay behind: the optimizer's state")  # noqa: T201
    for one in _notes(pruned.parent, chosen.model):
        print(f"note: {one}")  # noqa: T201


def _notes(parent: Checkpoint, child: Model) -> Iterator[str]:
    """Yield what takes the parent and not the child: layouts, number formats, an export."""
    yield from remarks(parent.model, child)
    try:
        config_json.family_for(child, parent.began)
    except UserError as error:
        yield str(error)


def _sizes(pruned: Pruned) -> Iterator[tuple[str, str, str]]:
    """Yield what was counted in parent and child: layers, MTP blocks, and each axis that is cut."""
    parent, child = pruned.parent.model, pruned.chosen.model
    for letter, section in SECTIONS.items():
        theirs, ours = (parse(model.pattern).main.count(letter) for model in (parent, child))
        if theirs:
            yield f"layers: {section}", str(theirs), str(ours)
    if mtp_blocks(parent):
        yield "MTP blocks", str(mtp_blocks(parent)), str(mtp_blocks(child))
    yield Axis.hidden.value, str(parent.hidden_size), str(child.hidden_size)
    for letter, axes in CHOSEN.items():
        for axis in axes:
            if said := _along(parent, letter, axis):
                yield axis.value, said, _along(child, letter, axis)


def _along(model: Model, letter: str, axis: Axis) -> str:
    """Return how many there are along an axis, from the least to the most of the layers."""
    numbers = {one.sizes.along(axis) for one in layers(model) if one.letter == letter} - {0}
    return (
        "-".join(str(number) for number in sorted({min(numbers), max(numbers)})) if numbers else ""
    )
