"""The job `convert`: a Hugging Face folder into a checkpoint, a checkpoint into such a folder."""

import gc
import logging
from pathlib import Path

from hybrid_train.config.launcher import require_alone
from hybrid_train.hf.files import refusals_named
from hybrid_train.hf.read import import_folder
from hybrid_train.hf.tensors import Format
from hybrid_train.hf.write import export_checkpoint
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.convert import ConvertJob, WeightFormat

_log = logging.getLogger(__name__)


def run(job: ConvertJob) -> None:
    """Convert; nothing is left behind if it fails."""
    require_alone("convert")
    start_logging()
    gc.freeze()  # what was imported stays: among 100,000 small objects its sweeps take their time
    dtype = None if job.dtype is WeightFormat.keep else Format[job.dtype.name].value
    output = Path(job.output).absolute()
    if job.import_ is not None:
        source = Path(job.import_)
        with refusals_named(**{"import": source, "output": output}):
            done = import_folder(source, output, dtype)
    else:
        assert job.export is not None, "the checks ask for one of them"
        source = Path(job.export)
        with refusals_named(export=source, output=output):
            done = export_checkpoint(source, output, dtype, int(job.shard_gb * 1e9))
    _log.info("%s", done)
