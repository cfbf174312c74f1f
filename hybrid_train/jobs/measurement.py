"""Models that are measured: opened, loaded one after the other, asked; and those in training."""

import functools
import gc
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_train.checkpoint import layout as files
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import AnyTokenizer, has_vocabulary
from hybrid_train.data.documents import Joined
from hybrid_train.data.run_data import RunData, open_held_out
from hybrid_train.evaluation import decoding, heldout
from hybrid_train.evaluation.reader import Reader
from hybrid_train.evaluation.results import Checkpoint, Result, ResultFolder, overall
from hybrid_train.evaluation.runner import ItemResult, Measure, Questions, Subject, digest
from hybrid_train.evaluation.tasks import build_tasks
from hybrid_train.hf.files import refusals_named
from hybrid_train.jobs.fetched_checkpoint import folder_of
from hybrid_train.jobs.networks import load_model
from hybrid_train.jobs.provenance import libraries
from hybrid_train.megatron.data_parallel import ProcessGroups
from hybrid_train.planning.phases import PhaseSpan
from hybrid_train.runtime import ranks
from hybrid_train.runtime.optional import require
from hybrid_train.schema.data import Data, Packing, Source
from hybrid_train.schema.evaluation import Asking, Harness
from hybrid_train.schema.job_roots import EvaluateJob
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted
from hybrid_train.training.loop import Run
from hybrid_train.training.network import Network

# Of lm-eval's metrics by word or byte: what is shown, and its unit in nats.
_BY_LENGTH = {
    "word_perplexity": ("nats_per_word", 1.0),
    "byte_perplexity": ("nats_per_byte", 1.0),
    "bits_per_byte": ("bits_per_byte", math.log(2)),
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A model that is measured, known without its weights.

    Attributes:
        label: what the command calls it.
        place: its run folder or checkpoint.
        job: of its run.
        reader: of its run.
        checkpoint: what a result says of it.
    """

    label: str
    place: Path
    job: TrainJob
    reader: Reader
    checkpoint: Checkpoint

    @classmethod
    def of(cls, source: str, setting: str) -> "Candidate":
        """Open what lies beside the weights.

        Raises:
            UserError: if there is no checkpoint or no tokenizer, or a file is damaged.
        """
        place = folder_of(source, setting)
        with refusals_named(**{setting: place}):
            found = files.locate(place)
            if not has_vocabulary(found.run_dir / files.TOKENIZER):
                raise UserError(
                    f"{found.run_dir} has no tokenizer, which tasks are written with; import it "
                    "again with tokenizer=FOLDER"
                )
            job = frozen.load(found.run_dir)
            is_packed = job.data.packing is not Packing.none
            reader = Reader.of(found.run_dir, is_packed=is_packed)
            name = f"{found.run_dir.name}/{found.path.name}"
            known = Checkpoint(name, files.digest_of(found.path), reader.tokenizer.fingerprint)
        return cls(source, place, job, reader, known)


def _require_alike(one: Candidate, other: Candidate) -> None:
    """Refuse two models whose next tokens are not the same tokens.

    Raises:
        UserError: naming both.
    """
    if one.checkpoint.tokenizer != other.checkpoint.tokenizer:
        raise _refused(
            f"against = {other.label}: has another tokenizer than {one.label}; the next tokens of "
            "both can only be compared where they are the same tokens"
        )
    mine, theirs = (
        (model.vocab_size, model.vocab_multiple) for model in (one.job.model, other.job.model)
    )
    if mine != theirs:
        raise _refused(
            f"against = {other.label}: has another vocabulary than {one.label}: model.vocab_size "
            f"and model.vocab_multiple are {theirs[0]} and {theirs[1]}, not {mine[0]} and {mine[1]}"
        )


def _refused(text: str) -> UserError:
    error = UserError(text)
    error.on_all_ranks = True  # every process reads the same files
    return error


def _measures_of(job: EvaluateJob, first: Candidate, against: Candidate | None) -> list[Measure]:
    """Make what is measured; held-out text is that of the first model."""
    other = None if against is None else f"{against.checkpoint.name} {against.checkpoint.digest}"
    return measures_of_run(job, first, against=other)


def measures_of_run(asking: Asking, run: Candidate, *, against: str | None = None) -> list[Measure]:
    """Make what is measured on a run that is over; held-out text is that of the run.

    Args:
        asking: which tasks, and how.
        run: the model.
        against: name of the model that held-out text compares with.

    Raises:
        UserError: on all processes, if what a task is made from is missing.
    """
    tokenizer, data = run.reader.tokenizer, run.job.data
    if asking.task.heldout.files:
        sources = {Path(one).name: Source(validation=[one]) for one in asking.task.heldout.files}
        data = Data(sources=sources, tokenizer=str(run.place))

    def text() -> dict[str, Joined]:
        return open_held_out(data, tokenizer)

    length = run.job.train.sequence_length
    return measures(asking, text, tokenizer, length=length, against=against)


def measures(
    asking: Asking,
    text: Callable[[], Mapping[str, Joined]],
    tokenizer: AnyTokenizer,
    *,
    length: int,
    against: str | None = None,
) -> list[Measure]:
    """Make what is measured, each with its items.

    Args:
        asking: which tasks, and how.
        text: opens held-out documents, by source.
        tokenizer: that made their tokens.
        length: tokens that a model has learned to read at once.
        against: name of the model that held-out text compares with.

    Raises:
        UserError: on all processes, if what a task is made from is missing.
    """
    of_text = [name for name in asking.task_names if name in (heldout.NAME, decoding.NAME)]
    own = [name for name in asking.task_names if name not in of_text]

    def made() -> Iterator[Measure]:
        opened = text() if of_text else {}
        if heldout.NAME in of_text:
            settings = asking.task.heldout
            yield heldout.HeldOut(
                opened, tokenizer, settings, length=settings.length or length, seed=asking.seed,
                limit=asking.limit, against=against,
            )  # fmt: skip
        if decoding.NAME in of_text:
            yield decoding.Decoding(opened, asking.task.decoding, seed=asking.seed)
        for task in build_tasks(own, asking.task):
            yield Questions(task, frozen.to_dict(getattr(asking.task, task.name)), asking)

    try:
        found = {one.name: one for one in made()}
    except UserError as error:
        error.on_all_ranks = True
        raise
    return [found[name] for name in asking.task_names]


class HarnessTasks:
    """Tasks of lm-eval, put to models; one `Measure`, whose groups are the tasks."""

    def __init__(self, settings: Harness, run_dirs: Sequence[Path]) -> None:
        """Load the tasks with their data.

        Args:
            settings: which tasks.
            run_dirs: of the models that will be asked.

        Raises:
            UserError: if lm-eval is not installed, or a task does not fit a run.
        """
        require("lm_eval", "harness.tasks")
        from hybrid_train.evaluation import harness  # an extra

        self.name, self._harness, self._asked = "lm_eval", harness, settings
        self._prepared = {one: harness.prepare(settings, one) for one in dict.fromkeys(run_dirs)}
        self.settings: dict[str, Any] = frozen.to_dict(settings)
        first = self._prepared[run_dirs[0]].loaded["tasks"]
        self.items_hash = digest(
            [
                [name, [repr(one) for one in itertools.islice(task.eval_docs, settings.limit)]]
                for name, task in first.items()
            ]
        )

    def run(self, subject: Subject) -> list[ItemResult]:
        """Ask a model; see `Measure`."""
        run_dir = subject.run_dir
        assert run_dir is not None, "tasks of lm-eval read what lies in a run folder"
        # The tasks hold their answers, so another checkpoint of a run has them made anew.
        prepared = self._prepared.pop(run_dir, None) or self._harness.prepare(self._asked, run_dir)
        samples = self._harness.run(prepared, subject.network)["samples"]
        return [
            ItemResult(
                f"{task}/{one['doc_id']}", dict(_values_of(one)), task,
                said={name: one[name] for name in ("doc_hash", "prompt_hash", "filtered_resps")},
            )
            for task, of_task in samples.items()
            for one in of_task
        ]  # fmt: skip


def _values_of(sample: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the metrics of a document: grades, or log-likelihoods by word or byte.

    What lm-eval calls the perplexity of a word is shown as nats, which add up over documents. A
    metric that is none of one document, such as F1, is left out.
    """
    for name in sample["metrics"]:
        found = sample[name]
        if name in _BY_LENGTH:
            label, unit = _BY_LENGTH[name]
            yield label, (-float(found[0]) / unit, float(found[1]))
        elif isinstance(found, int | float):
            yield name, (float(found), 1.0)


@dataclass(frozen=True)
class Evaluation:
    """All measures on all models: those that are there are read, the others computed."""

    job: EvaluateJob
    candidates: Sequence[Candidate]
    against: Candidate | None
    measures: Sequence[Measure]

    @classmethod
    def of(
        cls, job: EvaluateJob, candidates: Sequence[Candidate], against: Candidate | None
    ) -> "Evaluation":
        """Make what is measured, before any weights are read.

        Raises:
            UserError: on all processes, if a task cannot be made, or models cannot be compared.
        """
        if against is not None:
            for one in candidates:
                _require_alike(one, against)
        made = _measures_of(job, candidates[0], against) if job.task_names else []
        if job.harness.tasks:
            folders = [files.locate(one.place).run_dir for one in candidates]
            made.append(HarnessTasks(job.harness, folders))
        return cls(job, candidates, against, made)

    def results(self) -> list[list[Result]]:
        """Return the results of each measure, a model each; every process calls this."""
        folder = None if self.job.output is None else ResultFolder(Path(self.job.output))
        wanted, versions = self._wanted(), libraries()
        found = ranks.broadcast_from_main(
            lambda: [None] * len(wanted) if folder is None else folder.open(wanted)
        )
        done, groups, other = dict(enumerate(found)), None, None
        for candidate in self.candidates:
            missing = [
                place
                for place, one in enumerate(wanted)
                if done[place] is None and one.checkpoint == candidate.checkpoint
            ]
            if not missing:
                continue
            network = self._loaded(candidate, groups)
            groups = network.groups
            if self.against is not None and other is None:
                other = self._loaded(self.against, groups)
            for place in missing:
                measure = self.measures[place // len(self.candidates)]
                run_dir = files.locate(candidate.place).run_dir
                subject = Subject(network, candidate.reader, other, run_dir)
                items = self._asked(measure, subject, candidate)
                result = replace(wanted[place], items=items, versions=versions)
                done[place] = result
                if folder is not None:
                    ranks.run_on_main_first(functools.partial(folder.write, result))
            del network
            gc.collect()  # models are full of cycles, and two of them may not fit
        return [
            [one for one in done.values() if one is not None and one.task == measure.name]
            for measure in self.measures
        ]

    def _wanted(self) -> list[Result]:
        """Return all results without their items: measure by measure, of each candidate."""
        return [
            Result(
                measure.name, one.checkpoint, measure.settings, measure.items_hash, self.job.seed
            )
            for measure in self.measures
            for one in self.candidates
        ]

    def _loaded(self, candidate: Candidate, groups: ProcessGroups | None) -> Network:
        """Load a model into the layout of the job; the first one builds its process groups."""
        parallel = Parallel(**vars(self.job.parallel))
        runtime = self.job.runtime
        with refusals_named(checkpoint=candidate.place):
            place = str(candidate.place)
            return load_model(place, runtime, parallel=parallel, groups=groups).network

    def _asked(
        self, measure: Measure, subject: Subject, candidate: Candidate
    ) -> tuple[ItemResult, ...]:
        """Ask a loaded model; say how long it took."""
        start = time.perf_counter()
        items = measure.run(subject)
        _log.info(
            "%s of %s: %s in %.1f s",
            *(measure.name, candidate.label, counted(len(items), "item")),
            time.perf_counter() - start,
        )
        return tuple(items)


def in_training(
    job: TrainJob, phases: Sequence[PhaseSpan], data: RunData
) -> Callable[[Run], dict[str, float]]:
    """Return what asks the model of a run that trains, and names its metrics.

    Args:
        job: of the run; its tokenizer lies in its folder.
        phases: of the run, under whose layouts it is asked.
        data: of the run, open.

    Raises:
        UserError: on all processes, if what a task is made from is missing, or a task has answers
            that a layout cannot write.
    """
    is_packed = job.data.packing is not Packing.none
    reader = ranks.all_or_none(lambda: Reader.of(Path(job.run_dir), is_packed=is_packed))
    made = measures(
        job.evaluate, lambda: data.held_out.documents, reader.tokenizer,
        length=job.train.sequence_length,
    )  # fmt: skip
    for one in made:
        if isinstance(one, decoding.Decoding) or (isinstance(one, Questions) and one.has_written):
            _require_writing(one.name, phases)

    def ask(run: Run) -> dict[str, float]:
        subject = Subject(run.engine.network, reader)
        return {
            f"evaluation/{one.name}/{metric}": value
            for one in made
            for metric, value in overall(one.run(subject)).items()
        }

    return ask


def _require_writing(task: str, phases: Sequence[PhaseSpan]) -> None:
    """Refuse a task whose answers a layout cannot write, since it does not read token by token.

    Raises:
        UserError: with the setting.
    """
    for name, plan in ((phase.name, phase.job.parallel) for phase in phases):
        if plan.context > 1 or plan.fsdp:
            setting = "parallel.fsdp=true" if plan.fsdp else f"parallel.context={plan.context}"
            where = f"{setting} of phase {name}" if name else setting
            raise _refused(
                f"evaluate.tasks: {task} has answers that the model writes, which {where} does not "
                "let it do; leave it out, or evaluate checkpoints afterwards"
            )
