"""The job `data index`: builds what a run needs to find its rows, before GPUs wait for it."""

import sys
import time

from hybrid_train.data.build import open_data
from hybrid_train.jobs.progress import TextProgress
from hybrid_train.planning.phases import lay_out
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.show import IndexJob


def run(job: IndexJob) -> None:
    """Build the indices, and print the table of sources and phases."""
    start_logging()
    start = time.perf_counter()
    with TextProgress(terminal=sys.stderr.isatty()) as shown:
        data = open_data(job, lay_out(job), barrier=lambda: None, is_main=True, report=shown.update)
    for line in data.description():
        print(line)  # noqa: T201  the result of the command
    kept = data.train.cache.folder_of(len(one) for one in data.train.documents.values())
    place = f"large ones are in {kept}" if kept else "none is large enough to be kept on disk"
    print(f"all indices ready after {time.perf_counter() - start:.1f} s; {place}")  # noqa: T201
