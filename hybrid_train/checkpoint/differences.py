"""What a checkpoint holds that the model has not, and the other way round.

Only the layers of multi-token prediction (MTP) may differ: they serve training, and a run may begin
or end with them.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from hybrid_train.checkpoint.places import Place
from hybrid_train.megatron.checkpoints import Stored
from hybrid_train.runtime import ranks
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_BESIDE_WEIGHTS = ("optimizer.", "random.")
_MTP = "mtp."
_NAMED = 3  # tensors named in an error
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Differences:
    """Names of weights that one side alone has."""

    new: frozenset[str]  # in the model, not in the checkpoint
    dropped: frozenset[str]  # in the checkpoint, not in the model

    def shared(self, places: Sequence[Place]) -> list[Place]:
        """Return the places that the checkpoint can fill."""
        return [place for place in places if place.weight.key not in self.new]


def compare(folder: Path, stored: Stored, places: Sequence[Place]) -> Differences:
    """Compare a checkpoint with the model of all processes; say what differs.

    Raises:
        UserError: if more than MTP differs.
    """
    wanted = _of_all_processes(place.weight.key for place in places)
    saved = {key for key in stored if not key.startswith(_BESIDE_WEIGHTS)}
    differences = Differences(frozenset(wanted - saved), frozenset(saved - wanted))
    foreign = [key for key in differences.new | differences.dropped if not _is_of_mtp(key)]
    if foreign:
        error = UserError(
            f"{folder} is of another model; only MTP may be added or dropped\n"
            f"  not in the checkpoint: {_some(differences.new)}\n"
            f"  not in the model: {_some(differences.dropped)}"
        )
        error.everywhere = True
        raise error
    if differences.new and ranks.is_main():
        _log.warning(
            "not in the checkpoint, newly initialised with moments 0: %s", _count(differences.new)
        )
    if differences.dropped and ranks.is_main():
        _log.warning(
            "not in the model, dropped with their moments: %s", _count(differences.dropped)
        )
    return differences


def _is_of_mtp(key: str) -> bool:
    return key.rpartition("/")[2].startswith(_MTP)  # behind the name of the network, if it has one


def _of_all_processes(keys: Iterable[str]) -> set[str]:
    everyone: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, set(keys))
    return set().union(*everyone)


def _count(keys: Iterable[str]) -> str:
    """Count the tensors of each MTP block: "mtp.layers.0 (12 tensors)"."""
    blocks = Counter(".".join(key.split(".")[:3]) for key in keys)
    return ", ".join(
        f"{block} ({counted(number, 'tensor')})" for block, number in sorted(blocks.items())
    )


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more if names else "nothing"
