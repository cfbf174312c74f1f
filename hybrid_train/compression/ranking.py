"""A ranking on disk: how much each element of each axis of a model mattered, in one artifact.

    FOLDER/format.json  ranking.json  scores.safetensors

The scores serve every size: what is kept follows from them and from the sizes that are asked for.
`ranking.json` is written last, so a folder is whole or no ranking.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import Layer
from hybrid_train.anatomy.selection import Indices
from hybrid_train.checkpoint import layout
from hybrid_train.config.commands import command, setting
from hybrid_train.schema.formats import RANKING, require_readable_folder, write_stamp
from hybrid_train.schema.problems import UserError

FILE_NAME, SCORES = "ranking.json", "scores.safetensors"
HIDDEN = "hidden"  # [hidden]; the others begin with the prefix of their layer
LAYERS = "layers."  # + name of a metric: [main layers]
BLOCKS = "blocks."  # + name of a metric: [main layers, main layers], first and last of a block
NOT_MEASURED = float(np.finfo(np.float32).max)  # of a block: its length was not asked for
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Header:
    """What a ranking was made of.

    Attributes:
        run: folder of the run, as it was called.
        step: of the checkpoint.
        checksum: of its files; no other checkpoint is cut by this ranking.
        scores: what they were made of: activations, weights or random.
        rows: that were read; 0: none, and what is said of them is empty.
        sequence_length: tokens of a row.
        over_tokens: how scores of the tokens of a row become one.
        over_rows: how those of rows become one.
        data: what the rows were drawn from.
        seed: by which they were drawn.
    """

    run: str
    step: int
    checksum: str
    rows: int = 0
    sequence_length: int = 0
    over_tokens: str = ""
    over_rows: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    scores: str = "activations"


@dataclass(frozen=True)
class Ranking:
    """Scores of the elements of a model; a higher one mattered more.

    Attributes:
        header: what they were made of.
        scores: by name (`name_of`), float32: of a Mamba layer `ssm_heads` [heads, head channels],
            from which both of its axes follow; of the inner neurons of experts [experts, neurons];
            else one for each element.
    """

    header: Header
    scores: Mapping[str, Scores]

    def of(self, layer: Layer, axis: Axis) -> Scores:
        """Return the scores of an axis of a layer.

        Raises:
            UserError: if there are none.
        """
        return self._named(name_of(layer, axis))

    @property
    def hidden(self) -> Scores:
        """The scores of the hidden channels."""
        return self._named(HIDDEN)

    def layers(self, metric: str) -> Scores:
        """Return how much each main layer mattered, by a metric.

        Raises:
            UserError: if there is no such metric.
        """
        return self._named(LAYERS + metric)

    def blocks(self, metric: str) -> Scores:
        """Return how much the main layers [first, last], both from 0, mattered together.

        Raises:
            UserError: if there is no such metric.
        """
        return self._named(BLOCKS + metric)

    def _named(self, name: str) -> Scores:
        if name not in self.scores:
            known = ", ".join(sorted(self.scores)[:8])
            raise UserError(
                f"the ranking of {self.header.run} has no scores of {name}; it has {known}, ..."
            )
        return self.scores[name]


def name_of(layer: Layer, axis: Axis) -> str:
    """Return the name of the scores of an axis of a layer: `decoder.layers.3.ffn`."""
    return f"{layer.prefix}{axis.name}"


def order(scores: Sequence[float] | npt.NDArray[Any]) -> Indices:
    """Return the elements from the one that matters most; of equal ones the first comes first."""
    return np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")


def write(ranking: Ranking, folder: Path) -> None:
    """Write a ranking into an empty folder.

    Raises:
        UserError: if a score is not finite.
    """
    for name, scores in ranking.scores.items():
        if not np.isfinite(scores).all():
            raise UserError(f"scores of {name} are not finite; {folder} was not written")
    write_stamp(folder, RANKING)
    save_file({name: np.ascontiguousarray(one) for name, one in ranking.scores.items()},
              folder / SCORES)  # fmt: skip
    text = json.dumps(asdict(ranking.header), indent=2) + "\n"
    (folder / FILE_NAME).write_text(text, encoding="utf-8")


def read(folder: Path) -> Ranking:
    """Read a ranking.

    Raises:
        UserError: if it is none, not whole, or damaged.
    """
    if not (folder / FILE_NAME).is_file():
        raise UserError(f"{folder} is no ranking: it has no {FILE_NAME}")
    require_readable_folder(folder, RANKING)
    try:
        known = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        header, scores = Header(**known), load_file(folder / SCORES)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged: {error}") from error
    for name, one in scores.items():
        if not np.isfinite(one).all():
            raise UserError(f"{folder / SCORES}: scores of {name} are not finite")
    return Ranking(header, scores)


def read_for(folder: Path, found: layout.Found) -> Ranking:
    """Read the ranking of a checkpoint.

    Raises:
        UserError: if it is damaged, or was made of another checkpoint.
    """
    ranking = read(folder)
    made_of, own = ranking.header, layout.digest_of(found.path)
    if made_of.checksum != own:
        anew = command("importance", setting("checkpoint", found.path), "output=NEW_FOLDER")
        raise UserError(
            f"ranking = {folder}: it was made of {made_of.run}, step {made_of.step} (checksum "
            f"{made_of.checksum[:12]}), and {found.path} is another checkpoint (checksum "
            f"{own[:12]}); name that one, or rank this one: {anew}"
        )
    return ranking
