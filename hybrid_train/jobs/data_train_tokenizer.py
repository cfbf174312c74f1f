"""The job `data train_tokenizer`: a byte-level BPE tokenizer from text."""

import logging
import os
import shutil
from pathlib import Path

from hybrid_train.data.prepare.sampling import Sample
from hybrid_train.data.prepare.sources import find_sources
from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.listed import listed, listed_paths
from hybrid_train.schema.prepare import TrainTokenizerJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_bytes

_log = logging.getLogger(__name__)


def run(job: TrainTokenizerJob) -> None:
    """Train on a sample and write the folder, whole or not at all.

    Raises:
        UserError: if the folder exists or cannot be written, or the sample holds no text.
    """
    start_logging()
    output = Path(job.output)
    if os.path.lexists(output):
        raise UserError(f"{output} exists; choose another output=, or remove it")
    sources = find_sources(listed_paths(job.input), job.format, job.suffixes)
    partial = _begin(output)
    try:
        sample = Sample(sources, job.text_key, job.block_kb * 1024, job.sample_share, job.seed)
        tokenizer = _trained(job, sample)
        tokenizer.save(partial)
        partial.rename(output)
    except OSError as error:
        raise _cannot_write(output, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it is gone if all went well
    _log.info(
        "%s: vocabulary %d of %d asked for, from %s, %s of text",
        output, tokenizer.vocab_size, job.vocab_size, counted(sample.documents, "document"),
        show_bytes(sample.characters),
    )  # fmt: skip


def _begin(output: Path) -> Path:
    """Make the folder that becomes the output: now, since training may take hours."""
    partial = output.with_name(f"{output.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(output, error) from error
    return partial


def _cannot_write(output: Path, error: OSError) -> UserError:
    return UserError(f"output={output} cannot be written: {error.strerror or error}")


def _trained(job: TrainTokenizerJob, sample: Sample) -> Tokenizer:
    tokenizer = train_byte_level_bpe(sample, job.vocab_size, listed(job.special_tokens))
    if not sample.documents:
        raise UserError(
            f"no document in the sample of {counted(len(sample.sources), 'source')}, "
            f"{counted(sample.bad, 'bad line')}; check input=, text_key= and sample_share="
        )
    if sample.bad:
        _log.warning("left out, since they hold no document: %s", counted(sample.bad, "line"))
    return tokenizer
