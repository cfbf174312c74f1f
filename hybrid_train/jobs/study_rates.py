"""The learning rate of each kind of objective, chosen before the variants of a study run.

The first variant of a kind trains with every candidate, each on the same share of the tokens and
with a seed that is not reported; the lowest loss wins. These trials are stages like others: equal
ones run once for all studies. What was chosen is written into the folder of the study, which keeps
to it.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hybrid_train.jobs.study_stages import PlannedStage, Stages
from hybrid_train.schema import formats
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.study import RATES_FILE, StudyJob
from hybrid_train.tracking.gaps import TAIL, WINDOWS, curve
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.tracking.metrics import show

KEY = "schedule.peak_lr"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The rate of a kind of objective.

    Attributes:
        chosen: the rate.
        losses: at the end of each trial, by rate; None: the trial failed.
        tokens: of a trial.
        seed: of all trials.
        lines: overrides of the trials but the rate; with others the choice is made anew.
    """

    chosen: float
    losses: dict[str, float | None]
    tokens: int
    seed: int
    lines: list[str]

    def sentence(self, kind: str) -> str:
        """Say what was tried and what came out."""
        tried = ", ".join(
            f"{rate}: {'failed' if loss is None else show('loss', loss)}"
            for rate, loss in self.losses.items()
        )
        rates = [float(rate) for rate in self.losses]
        end = {max(rates): "largest", min(rates): "smallest"}.get(self.chosen)
        beyond = f"; it is the {end} that was tried, a better one may lie beyond" if end else ""
        return (
            f"Rate of {kind}: {self.chosen}, by the losses after {self.tokens} tokens with seed "
            f"{self.seed} ({tried}){beyond}."
        )


@dataclass(frozen=True)
class Trial:
    """A run that tries a rate."""

    kind: str
    rate: float
    stage: PlannedStage
    tokens: int
    lines: list[str]

    def loss(self) -> float | None:
        """Return the loss at its end; None if it has not ended well."""
        if not self.stage.is_finished():
            return None
        loss = curve(read_metrics(self.stage.path / FILE_NAME)).mean(WINDOWS[TAIL])
        return loss if math.isfinite(loss) else None


class Rates:
    """Knows the rates that were chosen, and plans trials for those that were not.

    Attributes:
        choices: by kind of objective.
        trials: those that have to end before the others can be chosen.
    """

    def __init__(self, study: StudyJob, stages: Stages) -> None:
        self.choices: dict[str, Choice] = {}
        self.trials: list[Trial] = []
        self._study, self._stages = study, stages
        self._written = written(Path(study.run_dir))
        self._asked: set[str] = set()

    def of(self, kind: str, lines: Sequence[str], run_tokens: int) -> float | None:
        """Return the rate of a kind of objective; None if it is not chosen yet.

        Args:
            kind: of the objective.
            lines: overrides of a variant; the first that asks for a kind is tried.
            run_tokens: of a run of it.
        """
        if kind not in self._asked:
            self._asked.add(kind)
            self._ask(kind, lines, int(run_tokens * self._study.rates.share))
        return self.choices[kind].chosen if kind in self.choices else None

    def _ask(self, kind: str, lines: Sequence[str], tokens: int) -> None:
        asked = self._study.rates
        own = [*lines, f"train.tokens={tokens}", f"train.seed={asked.seed}"]
        known = self._written.get(kind)
        rates = [str(rate) for rate in asked.candidates]
        if known and known.lines == own and list(known.losses) == rates:
            self.choices[kind] = known
            return
        for rate in asked.candidates:
            name = f"rate {rate} of {kind}"
            stage = self._stages.plan(name, "train", [*own, f"{KEY}={rate}"], asked.seed)
            if stage is not None:  # else one that it reads cannot run, which is reported there
                self.trials.append(Trial(kind, rate, stage, tokens, own))


def written(run_dir: Path) -> dict[str, Choice]:
    """Return what a study has chosen so far, by kind of objective."""
    path = run_dir / RATES_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        formats.RATES.require_readable(found.pop(formats.KEY, None), path)
        return {kind: Choice(**one) for kind, one in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: this is not what a study wrote there ({error}); remove it, and the rates are "
            "chosen again"
        ) from error


def choose(study: StudyJob, trials: Sequence[Trial]) -> None:
    """Choose between trials that have ended, and write that down.

    Raises:
        UserError: if no trial of a kind has ended well.
    """
    run_dir = Path(study.run_dir)
    choices = written(run_dir)
    for kind in dict.fromkeys(one.kind for one in trials):
        tried = {one.rate: one for one in trials if one.kind == kind}
        losses = {rate: one.loss() for rate, one in tried.items()}
        ended = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not ended:
            logs = ", ".join(str(one.stage.log) for one in tried.values())
            raise UserError(
                f"rates.candidates: no rate of {kind} was trained with to the end, so none can be "
                f"chosen; their logs are {logs}"
            )
        first = next(iter(tried.values()))
        choices[kind] = Choice(
            chosen=min(ended, key=lambda rate: ended[rate]),
            losses={str(rate): loss for rate, loss in losses.items()},
            tokens=first.tokens,
            seed=study.rates.seed,
            lines=first.lines,
        )
        _log.info("%s", choices[kind].sentence(kind))
    run_dir.mkdir(parents=True, exist_ok=True)
    half = run_dir / f"{RATES_FILE}.tmp"
    known = {kind: asdict(one) for kind, one in choices.items()}
    half.write_text(json.dumps({formats.KEY: formats.RATES.stamp(), **known}, indent=2))
    half.replace(run_dir / RATES_FILE)
