"""Writes a checkpoint in threads beside training: first every process its part, then the whole."""

import pickle
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from hybrid_train.checkpoint import checksums
from hybrid_train.megatron.checkpoints import Writer, mark_as_megatrons
from hybrid_train.runtime import ranks


class InThread:
    """Work that a thread of this process does."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._do, args=(work,), name="checkpoint")
        self._thread.start()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised by `result`
            self.failure = error
            _let_go(error)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for its end."""
        self._thread.join()

    def result(self) -> None:
        """Wait for its end; raise what it raised."""
        self.wait()
        if self.failure is not None:
            raise self.failure


@dataclass
class Part:
    """What came of the part of one process."""

    results: bytes = b""  # torch's description of what was written, pickled beside training
    sums: dict[str, checksums.Sum] = field(default_factory=dict)  # of the files, by name
    failure: str = ""
    errno: int | None = None  # of the operating system, if the failure came from there


class Writing:
    """A checkpoint that a thread of this process writes, with those of the other processes.

    Args:
        folder: where to.
        writer: torch's writer, with what this process writes.
        metadata: of the whole checkpoint; on the first process.
    """

    def __init__(self, folder: Path, writer: Writer, metadata: Metadata | None) -> None:
        self._folder, self._writer, self._metadata = folder, writer, metadata
        self._results = b""
        self._sums: dict[str, checksums.Sum] = {}
        self.sums: dict[str, checksums.Sum] = {}  # of all processes, once described
        self._thread = InThread(self._write)

    def _write(self) -> None:
        """Write what is in host memory already: a thread has its own current CUDA device."""
        results: list[Any] = []
        for number, bucket in enumerate(self._writer.write_buckets or ()):
            _, outcome = self._writer.write_preloaded_data(
                [self._writer.transforms], number, bucket, None, None, use_fsync=True
            )
            if isinstance(outcome, Exception):
                raise outcome
            results += outcome
            self._sums[bucket[1]] = checksums.of_file(self._folder / bucket[1])
        self._writer.write_buckets = None  # and with it the copy in host memory
        self._results = pickle.dumps(results)

    @property
    def is_done(self) -> bool:
        """Whether this process has written its part."""
        return self._thread.is_done

    def wait(self) -> None:
        """Wait for this process alone."""
        self._thread.wait()

    def collect(self) -> list[Part]:
        """Wait for all processes; return on the first what they wrote; every process calls this.

        Raises:
            OSError: on the first process, with its number, if the system of any refused to write.
            RuntimeError: on the first process, if anything else failed.
            UserError: on the others, with the same words.
        """
        self.wait()
        error = self._thread.failure
        part = Part(self._results, self._sums)
        if error is not None:
            part = Part(failure=f"{type(error).__name__}: {error}", errno=_errno(error))
        parts: list[Any] | None = [None] * dist.get_world_size() if ranks.is_main() else None
        dist.gather_object(part, parts)
        ranks.main_first(lambda: _require_all(parts or []))
        return parts or []

    def describe(self, parts: list[Part]) -> None:
        """Write the description of the whole; the first process does, in whichever thread."""
        assert self._metadata is not None, "the first process has it"
        results = [pickle.loads(part.results) for part in parts]
        self._writer.finish(self._metadata, results)
        mark_as_megatrons(self._folder)
        self.sums = {name: one for part in parts for name, one in part.sums.items()}


def _require_all(parts: list[Part]) -> None:
    failed = [(rank, part) for rank, part in enumerate(parts) if part.failure]
    if failed:
        words = ", ".join(f"{part.failure} (rank {rank})" for rank, part in failed)
        numbers = [part.errno for _, part in failed if part.errno is not None]
        raise OSError(numbers[0], words) if numbers else RuntimeError(words)


def _errno(error: BaseException | None) -> int | None:
    """Find the number of the system's error that led to this one: torch's writer covers it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _let_go(error: BaseException | None) -> None:
    """Free what failed: torch 2.11 crashes where garbage collection frees a zip file cut short."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
