"""The language of layer patterns: strings only.

One letter per layer: M Mamba-2, * attention, - MLP, E experts. `|` cuts the main part into
pipeline stages. Each `/` begins one depth of multi-token prediction (MTP); all depths have the
same layers. "MEM*|M-M-/*E/*E" is two stages of four layers, then two MTP depths of two.

Source: the hybrid pattern strings of Nemotron-H (arXiv:2504.03624); the cuts and MTP parts are
those that Megatron-Core 0.19.2 reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from hybrid_train.schema.model import LAYER_KINDS
from hybrid_train.schema.units import counted

KINDS = {kind.letter: kind.words for kind in LAYER_KINDS}
LEGAL = ", ".join(f"{letter} ({kind})" for letter, kind in KINDS.items())
_CUT = "|"
_MTP = "/"


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern."""

    stages: tuple[str, ...]  # main layers, one string per pipeline stage that was cut by hand
    mtp: str = ""  # layers of one MTP depth; empty: no MTP
    mtp_depths: int = 0

    @property
    def main(self) -> str:
        """The main layers without cuts."""
        return "".join(self.stages)

    @property
    def layers(self) -> str:
        """Every layer that computes, those of each MTP depth included."""
        return self.main + self.mtp * self.mtp_depths

    @property
    def is_cut(self) -> bool:
        """Whether the pattern itself says where pipeline stages end."""
        return len(self.stages) > 1

    def count(self, letter: str) -> int:
        """Count the layers of one kind, those of each MTP depth included."""
        return self.layers.count(letter)

    def repeats(self, length: int) -> bool:
        """Tell whether the main layers are the first so many again and again: the two of *-*-."""
        return self.main == self.main[:length] * (len(self.main) // length)

    def cut(self, lengths: Sequence[int]) -> "Pattern":
        """Return the pattern cut into stages of so many main layers each; of one: without cuts.

        Raises:
            ValueError: if a stage has no layer, or the stages have not as many as the main part.
        """
        if min(lengths) < 1 or sum(lengths) != len(self.main):
            raise ValueError(
                f"{counted(len(self.main), 'layer')} cannot make stages of {list(lengths)}"
            )
        ends = list(accumulate(lengths))
        stages = tuple(self.main[start:end] for start, end in pairwise([0, *ends]))
        return Pattern(stages, self.mtp, self.mtp_depths)

    def in_words(self) -> str:
        """Say how many layers of each kind there are: "23M 6* 23E", with "+ 2 x *E" for MTP."""
        counts = {letter: self.main.count(letter) for letter in KINDS}
        main = " ".join(f"{count}{letter}" for letter, count in counts.items() if count)
        return f"{main} + {self.mtp_depths} x {self.mtp}" if self.mtp else main

    def __str__(self) -> str:
        """Write the pattern the way Megatron-Core reads it."""
        return _CUT.join(self.stages) + (_MTP + self.mtp) * self.mtp_depths


def parse(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        ValueError: with the place of the first fault and the legal letters.
    """
    for place, letter in enumerate(text):
        if letter not in KINDS and letter not in (_CUT, _MTP):
            raise _fault(text, place, f"{letter!r} is no kind of layer; legal are {LEGAL}")
    main, *depths = text.split(_MTP)
    stages = main.split(_CUT)
    if not main:
        raise _fault(text, 0, f"there are no main layers; legal are {LEGAL}")
    place = 0
    for stage in stages:
        if not stage:
            raise _fault(text, place, f"a pipeline stage has no layers between its {_CUT!r}")
        place += len(stage) + 1
    for depth in depths:
        if not depth:
            raise _fault(text, place, f"no layers follow {_MTP!r}")
        if _CUT in depth:
            cut = place + depth.index(_CUT)
            raise _fault(text, cut, f"{_CUT!r} cuts main layers only, not those after {_MTP!r}")
        if depth != depths[0]:
            raise _fault(text, place, f"every MTP depth must have the layers {depths[0]!r}")
        place += len(depth) + 1
    return Pattern(tuple(stages), depths[0] if depths else "", len(depths))


def repair(text: str) -> str | None:
    """Return the legal pattern nearest to `text`: capitals for small letters, faults left out."""
    kept = "".join(c for c in text.upper() if c in KINDS or c in (_CUT, _MTP))
    main, *depths = kept.split(_MTP)
    stages = tuple(stage for stage in main.split(_CUT) if stage)
    depths = [layers for depth in depths if (layers := depth.replace(_CUT, ""))]
    if not stages:
        return None
    return str(Pattern(stages, depths[0] if depths else "", len(depths)))


def _fault(text: str, place: int, reason: str) -> ValueError:
    """Point at one character of the pattern."""
    arrow = " " * place + "^"
    return ValueError(f"at character {place + 1}\n      {text}\n      {arrow} {reason}")
