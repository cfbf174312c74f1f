"""The job `importance`: reads rows with a trained model, and writes down what in it mattered."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_train.anatomy.layers import layers, main_layers
from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.compression import ranking
from hybrid_train.compression.cut_rules import together_problems
from hybrid_train.compression.plain_scores import random_scores, weight_scores
from hybrid_train.compression.ranking import Header, Ranking
from hybrid_train.config import frozen
from hybrid_train.config.commands import command, setting
from hybrid_train.config.rules_of_model import rows_take_one_list
from hybrid_train.data.record import record_of
from hybrid_train.data.run_data import RunData, open_data
from hybrid_train.hf.write import open_checkpoint
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.planning.phases import PhaseSpan, lay_out
from hybrid_train.runtime import ranks
from hybrid_train.runtime.start import process
from hybrid_train.schema import model as sections
from hybrid_train.schema.data import Data, Quickstart, Source, Split, named_sources
from hybrid_train.schema.extension import built_from
from hybrid_train.schema.importance import ExpertMetric, ImportanceJob, ScoreSource
from hybrid_train.schema.model import Model
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.train import BatchRamp, TrainJob
from hybrid_train.schema.units import counted

if TYPE_CHECKING:
    from hybrid_train.training.network import Network

_LINE_S = 30.0  # between lines of progress
_log = logging.getLogger(__name__)


def run(job: ImportanceJob) -> None:
    """Write the ranking of a model.

    Raises:
        UserError: if there are fewer rows than asked for, or a score is not finite.
    """
    with process(job.runtime, job.seed):
        from hybrid_train.jobs.fetched_checkpoint import folder_of
        from hybrid_train.megatron.data_parallel import destroy_groups

        try:
            found = layout.locate(folder_of(job.checkpoint, "checkpoint"))
            made = _made_of_rows(job, found) if job.reads_rows else _made_of_no_rows(job, found)
            folder = Path(job.output)

            def write() -> None:
                folder.mkdir(parents=True, exist_ok=True)
                ranking.write(made, folder)

            ranks.run_on_main_first(write)
            if ranks.is_main():
                _show(job, made, frozen.load(found.run_dir).model)
        finally:
            destroy_groups()


def _made_of_rows(job: ImportanceJob, found: layout.Found) -> Ranking:
    reads = rows_job(job, frozen.load(found.run_dir), found.run_dir)
    data, phase = _open(reads)
    header = replace(
        _header(job, found), rows=job.rows, sequence_length=reads.train.sequence_length,
        over_tokens=job.over_tokens.value, over_rows=job.over_rows.value, data=record_of(data),
    )  # fmt: skip
    return Ranking(header, _scores(job, found, data, phase))


def _made_of_no_rows(job: ImportanceJob, found: layout.Found) -> Ranking:
    """Return what scores are held against; every process makes the same."""
    parent = open_checkpoint(found.path)
    if job.scores is ScoreSource.random:
        return Ranking(_header(job, found), random_scores(parent.model, job.seed))
    rows = padded_vocab_size(parent.vocab_size, parent.model.vocab_multiple)
    with StoredTensors(found.path) as stored:
        return Ranking(_header(job, found), weight_scores(parent.model, stored, rows))


def rows_job(job: ImportanceJob, parent: TrainJob, run_dir: Path) -> TrainJob:
    """Return a run that reads the rows: the last phase of the parent, with the length and the seed.

    Args:
        job: what is asked for.
        parent: the run that is scored.
        run_dir: its folder.

    Raises:
        UserError: if the run has no data, and the job names none.
    """
    last = lay_out(parent)[-1].job if parent.train.phases else parent
    length, data = job.sequence_length or last.train.sequence_length, last.data
    if job.files:
        sources = {Path(one).name: Source(train=[one]) for one in job.files}
        tokenizer = str(run_dir / layout.TOKENIZER)
        data = Data(sources=sources, tokenizer=tokenizer, packing=last.data.packing)
    elif not isinstance(data, Quickstart) and not any(
        one.has(Split.train) for one in named_sources(data).values()
    ):
        raise _refused(
            f"{run_dir} has no train data, as an imported run has none: name token files of its "
            "tokenizer, files=[PREFIX]"
        )
    train = replace(
        last.train, tokens=str(job.rows * length), sequence_length=length,
        microbatch=job.microbatch, global_batch=1, batch_ramp=BatchRamp(), phases=[],
        seed=job.seed,
    )  # fmt: skip
    return replace(last, data=data, train=train)


def _open(reads: TrainJob) -> tuple[RunData, PhaseSpan]:
    """Open the rows; every process calls this.

    Raises:
        UserError: if some would be read twice.
    """
    (phase,) = lay_out(reads)
    data = open_data(
        reads.data, [phase], built_from(reads.row_transforms), barrier=ranks.barrier,
        is_main=ranks.is_main(),
    )  # fmt: skip
    (plan,) = data.plans
    for rows, draw in zip(plan.rows, plan.draws, strict=True):
        there = rows.first_epoch()
        if draw.rows > there:
            most = phase.length.sequences * there // draw.rows
            length = reads.train.sequence_length
            raise _refused(
                f"rows = {phase.length.sequences}: source {draw.source} has {there:,} rows of "
                f"{length} tokens for the {draw.rows:,} that are its share, and a row that is read "
                f"twice says nothing new; take rows={most}, a shorter sequence_length, or other "
                "files=[PREFIX]"
            )
    return data, phase


def _refused(text: str) -> UserError:
    error = UserError(text)
    error.on_all_ranks = True  # every process reads the same files
    return error


def _require_runnable(job: ImportanceJob, reads: TrainJob, model: Model) -> None:
    """Refuse what the layout or the model cannot do.

    Raises:
        ConfigError: on all processes.
    """
    problems, plan = [*together_problems(parse(model.pattern), job.together)], job.parallel
    unit = (2 * plan.context if plan.context > 1 else 1) * plan.tensor
    length = reads.train.sequence_length
    if length % unit:
        rule = f"must be a multiple of {unit}, by which parallel.context and tensor cut a row"
        problems.append(Problem("sequence_length", length, rule, max(unit, length // unit * unit)))
    problems += [replace(one, path="sequence_length") for one in rows_take_one_list(reads, 1)]
    few = [
        one for one in layers(model)
        if one.letter == sections.Moe.letter and one.sizes.experts <= one.sizes.top_k
    ]  # fmt: skip
    if few and job.experts is ExpertMetric.without:
        rule = f"must be output: without one of {few[0].sizes.experts} experts a token has too few"
        problems.append(Problem("experts", job.experts.value, rule, ExpertMetric.output.value))
    if problems:
        error = ConfigError(problems)
        error.on_all_ranks = True
        raise error


def _scores(
    job: ImportanceJob, found: layout.Found, data: RunData, phase: PhaseSpan
) -> dict[str, Any]:
    """Return the scores of everything; every process calls this."""
    from hybrid_train.compression.activations import Activations
    from hybrid_train.compression.passes import Passes
    from hybrid_train.compression.removal import LayerRemoval
    from hybrid_train.jobs.networks import load_model

    _require_runnable(job, phase.job, frozen.load(found.run_dir).model)
    parallel = Parallel(**vars(job.parallel))
    loaded = load_model(str(found.path), job.runtime, parallel=parallel)
    network, model = loaded.network, loaded.job.model
    passes = Passes(network, data.rows(phase), job.microbatch)
    heard = Activations(network, model, job)
    started = said = time.monotonic()
    done = 0
    with heard.listening():
        for batches in passes.groups(job.rows):
            passes.run(
                batches, lambda outputs, _: (outputs.hidden,), with_mtp=True, seeing=heard.see
            )
            heard.close()
            done += len(batches) * job.microbatch * network.groups.dp.size()
            now = time.monotonic()
            if now - said > _LINE_S and done < job.rows:
                said, left = now, (now - started) / done * (job.rows - done)
                _log.info("%d of %d rows, about %.0f s left", done, job.rows, left)
    accuracy = _accuracy(job, found, network)
    removal = LayerRemoval(passes, model, job.rows_without, accuracy, job.together)
    without = removal.scores(job.removals, iterative=job.iterative, blocks=job.blocks)
    return {name: one.numpy() for name, one in (heard.collect() | without).items()}


def _accuracy(
    job: ImportanceJob, found: layout.Found, network: "Network"
) -> Callable[[], float] | None:
    """Return what measures the accuracy of the network on the task; None where none is asked."""
    if not job.task_names:
        return None
    from hybrid_train.evaluation.results import overall
    from hybrid_train.evaluation.runner import Subject
    from hybrid_train.jobs.measurement import Candidate, measures_of_run

    candidate = Candidate.of(str(found.path), "checkpoint")
    (measure,) = measures_of_run(job, candidate)
    subject = Subject(network, candidate.reader, None, found.run_dir)
    return lambda: overall(measure.run(subject))["accuracy"]


def _header(job: ImportanceJob, found: layout.Found) -> Header:
    return Header(
        run=str(found.run_dir), step=found.step, checksum=layout.digest_of(found.path),
        scores=job.scores.value, seed=job.seed,
    )  # fmt: skip


def _show(job: ImportanceJob, made: Ranking, model: Model) -> None:
    """Print how much each layer mattered, and what comes next."""
    header, page = made.header, console()
    metrics = [name for name in made.scores if name.startswith(ranking.LAYERS)]
    rows = [
        [
            f"{one.number}", one.letter,
            *(f"{made.scores[name][one.number - 1]:.4g}" for name in metrics),
        ]
        for one in main_layers(model)
    ]  # fmt: skip
    if metrics:
        heads = ["layer", "kind", *(name.removeprefix(ranking.LAYERS) for name in metrics)]
        show_numbers(page, rows, heads, words=2)
    sets = counted(len(made.scores), "set")
    read = f"{header.rows:,} rows of {header.sequence_length:,} tokens"
    by = read if job.reads_rows else header.scores
    page.print(f"{sets} of scores, by {by}, are in {job.output}")
    asked = (setting("checkpoint", job.checkpoint), setting("ranking", job.output))
    page.print("\nNext:")
    words = command("prune", *asked, "output=FOLDER", "share=0.6")
    page.print(f"  {words}", soft_wrap=True)
