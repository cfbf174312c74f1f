"""From the data section of a run to its batches."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from hybrid_train.config.problems import ConfigError, Problem
from hybrid_train.config.ramp import global_batch, run_length
from hybrid_train.config.schema.data import Data, Quickstart
from hybrid_train.config.schema.train import TrainJob
from hybrid_train.config.units import show_tokens
from hybrid_train.data.indexed import TokenFile, verify
from hybrid_train.data.loader import Loader, Validation
from hybrid_train.data.megatron import TokenSequences
from hybrid_train.data.quickstart import folder_of, prepare, read_manifest
from hybrid_train.data.tokenizers import Tokenizer
from hybrid_train.data.unigram import unigram_cross_entropy

# Validation has the same order in every run, so that runs with other seeds can be compared.
_VALIDATION_SEED = 0


@dataclass(frozen=True)
class DataBundle:
    """What a run reads from.

    Attributes:
        train: microbatches of this rank; `train.consumed_sequences` is the position to save.
        validation: iterate it once per validation; None if the run names no validation files.
        tokenizer: the tokenizer of the files.
        vocab_size: of the tokenizer; the model may pad it.
        sources: the token files themselves.
        description: one line for the log per fact.
    """

    train: Loader
    validation: Validation | None
    tokenizer: Tokenizer
    vocab_size: int
    sources: Data
    description: list[str]

    @cached_property
    def unigram_cross_entropy(self) -> float | None:
        """Validation loss of the train unigram distribution in nats per token; None without one.

        Counts tokens on first use: main process only.
        """
        if self.validation is None:
            return None
        return unigram_cross_entropy(self.sources.train, self.sources.validation, self.vocab_size)


def check_data(data: Data) -> None:
    """Refuse data that cannot be read, before anything is written; costs milliseconds.

    Raises:
        ConfigError: if the section names no train files or no tokenizer.
        UserError: if a file is missing, truncated or from another tokenizer.
    """
    if isinstance(data, Quickstart):
        if folder_of(data).exists():
            read_manifest(folder_of(data))
        return
    _open(data)


def build_data(
    job: TrainJob,
    *,
    data_rank: int,
    data_size: int,
    consumed_sequences: int,
    barrier: Callable[[], None],
    is_main: bool,
) -> DataBundle:
    """Open the data of a run at a position; every process calls it.

    Args:
        job: the run.
        data_rank: number of this rank among those that read different data.
        data_size: how many those are.
        consumed_sequences: where to start; what a checkpoint saved, else 0.
        barrier: waits for all processes.
        is_main: true in one process, which builds and writes what the others then read.

    Raises:
        ConfigError, UserError: as `check_data`, or if a folder cannot be written.
        ValueError: as `Loader`.
    """
    data = _quickstart(job.data, barrier, is_main) if isinstance(job.data, Quickstart) else job.data
    files = _open(data)
    train = _sequences(job, data, data.train, job.train.seed, files.tokenizer)
    held_out = None
    if data.validation:
        held_out = _sequences(job, data, data.validation, _VALIDATION_SEED, files.tokenizer)

    train_needed = run_length(job.train).sequences
    if not is_main:
        barrier()  # the main process writes the order of the sequences, the others read it
    train.prepare(train_needed, is_main=is_main)
    if held_out is not None:
        held_out.prepare(1, is_main=is_main)  # one epoch: no sequence counts twice
    if is_main:
        barrier()

    loader = Loader(
        train,
        microbatch=job.train.microbatch,
        global_batch=lambda consumed: global_batch(job.train, consumed * job.train.sequence_length),
        data_rank=data_rank,
        data_size=data_size,
        consumed_sequences=consumed_sequences,
    )
    validation = None
    if held_out is not None:
        validation = Validation(
            held_out,
            num_sequences=job.train.validation_batches * job.train.global_batch,
            microbatch=job.train.microbatch,
            data_rank=data_rank,
            data_size=data_size,
        )
    return DataBundle(
        train=loader,
        validation=validation,
        tokenizer=files.tokenizer,
        vocab_size=files.tokenizer.vocab_size,
        sources=data,
        description=_describe(job, files, train, validation),
    )


@dataclass(frozen=True)
class _Files:
    tokenizer: Tokenizer
    train: list[TokenFile]
    validation: list[TokenFile]


def _open(data: Data) -> _Files:
    problems = []
    if not data.train:
        problems.append(Problem("data.train", data.train, "must name at least one prefix"))
    if data.tokenizer is None:
        problems.append(Problem("data.tokenizer", None, "must name a Hugging Face folder"))
    if data.tokenizer is None or problems:
        raise ConfigError(problems)
    tokenizer = Tokenizer.load(data.tokenizer)
    return _Files(
        tokenizer,
        [verify(prefix, tokenizer.vocab_size) for prefix in data.train],
        [verify(prefix, tokenizer.vocab_size) for prefix in data.validation],
    )


def _quickstart(config: Quickstart, barrier: Callable[[], None], is_main: bool) -> Data:
    if is_main:
        prepare(config)
    barrier()
    return prepare(config)  # there by now, for every process


def _sequences(
    job: TrainJob, data: Data, prefixes: list[str], seed: int, tokenizer: Tokenizer
) -> TokenSequences:
    return TokenSequences(
        prefixes,
        sequence_length=job.train.sequence_length,
        seed=seed,
        end_of_document=tokenizer.end_of_document,
        cache=data.cache,
    )


def _describe(
    job: TrainJob, files: _Files, train: TokenSequences, validation: Validation | None
) -> list[str]:
    length, batch = job.train.sequence_length, job.train.global_batch
    epochs = run_length(job.train).sequences / train.sequences_per_epoch
    lines = [
        f"train data: {_size(files.train)}, vocabulary {files.tokenizer.vocab_size}; "
        f"this run makes {epochs:.2f} epochs of it"
    ]
    if validation is None:
        return [*lines, "validation data: none (data.validation is empty)"]
    used = validation.num_sequences
    line = f"validation data: {_size(files.validation)}; {show_tokens(used * length)} of them used"
    wanted = job.train.validation_batches * batch
    if used < wanted:
        line += (
            f", all it has: {used} of the {wanted} sequences of "
            f"train.validation_batches={job.train.validation_batches}"
        )
    return [*lines, line]


def _size(files: list[TokenFile]) -> str:
    total = sum(file.tokens for file in files)
    return f"{show_tokens(total)} tokens in {sum(file.documents for file in files)} documents"
