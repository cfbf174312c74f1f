"""Cuts a child whose Mamba heads are chosen over all groups at once: what `prune` refuses to do.

    python tests/benchmarks/naive_heads.py checkpoint=runs/parent ranking=runs/ranking \\
        output=runs/naive model.mamba.heads=8 mtp=drop

A head reads the states of its group. Those that are taken out of their places, as many for each
group, read those of another group where scores prefer some groups: this is what a cut costs that
knows of no groups (Minitron-SSM, arXiv:2504.11409). All else is as of `hybrid-train prune` with the
same settings: sizes, channels, other axes, the writer, the run folder, which heals as any other.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.selection import KeptLayer, chosen
from hybrid_train.checkpoint.lineage import WEIGHTS, parent_of
from hybrid_train.compression.choosing import Chosen, choose, top
from hybrid_train.compression.ranking import Ranking, read_for
from hybrid_train.config.compose import compose
from hybrid_train.hf.write import open_checkpoint
from hybrid_train.jobs.prune import prune
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.pruning import PruneJob


@dataclass(frozen=True)
class Ungrouped(KeptLayer):
    """A layer whose heads may have left their groups."""

    def _require_groups(self) -> None:
        """Let them."""


def ungrouped(grouped: Chosen, ranking: Ranking) -> Chosen:
    """Return a child with the Mamba heads that scored highest in each layer, of whatever group."""
    layers = [
        replace_heads(one, ranking) if Axis.ssm_heads in one.kept else one
        for one in grouped.selection.layers
    ]
    return replace(grouped, selection=replace(grouped.selection, layers=tuple(layers)))


def replace_heads(one: KeptLayer, ranking: Ranking) -> KeptLayer:
    """Return a layer with its best heads by the score over the channels that stay."""
    table = ranking.of(one.parent, Axis.ssm_heads).astype(np.float64)
    channels = chosen(one.kept, Axis.ssm_head_dim, one.parent.sizes)
    heads = top(np.linalg.norm(table[:, channels], axis=1), one.child.sizes.ssm_heads)
    return Ungrouped(one.parent, one.child, {**one.kept, Axis.ssm_heads: heads})


def main() -> None:
    """Cut the child, and say how many of its heads have another group than in the parent."""
    job = compose("prune", sys.argv[1:])
    assert isinstance(job, PruneJob)
    parent = open_checkpoint(Path(job.checkpoint))
    assert job.ranking is not None, "heads are chosen by a ranking"
    ranking = read_for(Path(job.ranking), parent.found)
    rows = padded_vocab_size(parent.vocab_size, parent.model.vocab_multiple)
    child = ungrouped(choose(parent.model, ranking, job, rows), ranking)
    came_from = parent_of(WEIGHTS, job.checkpoint, parent.found)
    prune(parent, came_from, child, Path(job.output).absolute(), {"heads": "over all groups"})
    for one in child.selection.layers:
        if isinstance(one, Ungrouped):
            theirs, ours = one.parent.sizes, one.child.sizes
            groups = one.kept[Axis.ssm_heads] // (theirs.ssm_heads // theirs.ssm_groups)
            now = np.arange(ours.ssm_heads) // (ours.ssm_heads // ours.ssm_groups)
            moved = int((groups != now).sum())
            print(f"layer {one.parent.number}: {moved} of {ours.ssm_heads} heads change groups")


if __name__ == "__main__":
    main()
