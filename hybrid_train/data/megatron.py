"""Gateway to megatron.core.datasets: write token files, read them, cut them into sequences."""

import contextlib
import hashlib
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import megatron.core
import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from torch import Tensor

from hybrid_train.config.problems import UserError

_FINGERPRINT_BYTES = 2**20  # of each end of an .idx; enough to tell corpora apart


@contextlib.contextmanager
def _no_rank_needed() -> Iterator[None]:
    """Silence a warning of 0.19.2's logging outside a distributed run: that it takes rank 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not determine rank", category=UserWarning)
        yield


def write_documents(
    prefix: str | Path, documents: Iterable[Sequence[int]], *, vocab_size: int
) -> int:
    """Write documents of token ids to PREFIX.bin and PREFIX.idx; return the number of tokens.

    Ids take two bytes if the vocabulary allows, else four. Each document must already end with
    the end-of-document token.
    """
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    total = 0
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
        total += len(document)
    builder.finalize(f"{prefix}.idx")
    return total


class Documents:
    """Read documents of a verified prefix, in the order in which they were written."""

    def __init__(self, prefix: str | Path) -> None:
        self._files = _open(str(prefix))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return np.array(self._files[index], dtype=np.int64)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens in each document."""
        return np.array(self._files.sequence_lengths)


class TokenSequences:
    """Shuffled sequences of token files, one epoch after the other.

    Sequence s belongs to epoch s // n, where n is the number of sequences of an epoch. Each epoch
    uses each token once (less a last part that fills no sequence) in an order drawn from the seed
    and its number. So the order does not depend on the length of the run, and a run can be
    extended. GPTDataset alone shuffles all epochs at once: its order changes with the number of
    samples asked for.

    The order is built by the main process in `prepare`, into the cache folder, and read there by
    the others. Several prefixes contribute in proportion to their sizes.

    Raises:
        UserError: if a prefix is shorter than one sequence.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        *,
        sequence_length: int,
        seed: int,
        end_of_document: int,
        cache: str | Path | None = None,
    ) -> None:
        self._prefixes = [str(Path(prefix).absolute()) for prefix in prefixes]
        self._files = [_open(prefix) for prefix in self._prefixes]
        self._sequence_length = sequence_length
        self._seed = seed
        self._tokenizer = _TokenizerFacts(end_of_document)
        folder = Path(cache) if cache else Path(self._prefixes[0]).parent / "index_cache"
        self._cache = folder / _fingerprint(self._prefixes, end_of_document)
        self._num_epochs = 0
        self.tokens_per_epoch = sum(
            int(f.sequence_lengths.sum(dtype=np.int64)) for f in self._files
        )
        self.sequences_per_epoch = sum(self._sequences_of(i) for i in range(len(self._files)))
        # An epoch keeps several files open, hence few at a time.
        self._epoch = lru_cache(maxsize=2)(self._open_epoch)

    def prepare(self, num_sequences: int, *, is_main: bool = True) -> None:
        """Make at least `num_sequences` available; the main process must return first.

        Raises:
            UserError: if the cache folder cannot be written or, elsewhere, cannot be read.
        """
        num_epochs = max(1, -(-num_sequences // self.sequences_per_epoch))
        try:
            for epoch in range(num_epochs if is_main else 0):
                self._write_epoch(epoch)
            self._epoch(num_epochs - 1)
        except OSError as error:
            raise UserError(
                f"cannot keep the order of the sequences in {self._cache}: {error}; "
                "set data.cache to a folder with free space that all processes can reach"
            ) from error
        self._num_epochs = num_epochs

    def __len__(self) -> int:
        return self._num_epochs * self.sequences_per_epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, within = divmod(index, self.sequences_per_epoch)
        if not 0 <= epoch < self._num_epochs:
            raise IndexError(f"sequence {index} of {len(self)}")
        sample: dict[str, Tensor] = self._epoch(epoch)[within]
        return sample

    def _sequences_of(self, number: int) -> int:
        tokens = int(self._files[number].sequence_lengths.sum(dtype=np.int64))
        count = (tokens - 1) // self._sequence_length  # one token more, for the last label
        if count < 1:
            raise UserError(
                f"{self._prefixes[number]}.bin holds {tokens} tokens, too few for one sequence of "
                f"{self._sequence_length} and its last label; shorten train.sequence_length or "
                "leave this prefix out"
            )
        return count

    def _folder_of(self, epoch: int) -> Path:
        return self._cache / f"length-{self._sequence_length}-seed-{self._seed}-epoch-{epoch}"

    def _write_epoch(self, epoch: int) -> None:
        """Write the order of an epoch whole or not at all; GPTDataset writes it file by file."""
        folder = self._folder_of(epoch)
        if folder.exists():
            return
        building = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        try:
            self._build_epoch(epoch, building)
            building.rename(folder)
        except OSError:
            if not folder.exists():  # else another run wrote the same in the meantime
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _open_epoch(self, epoch: int) -> GPTDataset | BlendedDataset:
        folder = self._folder_of(epoch)
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist in this process")
        return self._build_epoch(epoch, folder)

    @_no_rank_needed()
    def _build_epoch(self, epoch: int, folder: Path) -> GPTDataset | BlendedDataset:
        config = GPTDatasetConfig(
            random_seed=int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]),
            sequence_length=self._sequence_length,
            # Without a blend the config turns itself into a source of made-up tokens.
            blend_per_split=[(self._prefixes, None), None, None],
            path_to_cache=str(folder),
            tokenizer=self._tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        parts = [
            GPTDataset(
                files, name, np.arange(len(files), dtype=np.int32), None, Split.train, config
            )
            for files, name in zip(self._files, self._prefixes, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return BlendedDataset(parts, [len(part) for part in parts], None, config)


class _TokenizerFacts:
    """The little that GPTDataset asks of a tokenizer."""

    def __init__(self, end_of_document: int) -> None:
        self.eod = end_of_document
        self.vocab_size = None  # the type of the ids stands in the .idx
        self.unique_identifiers = {"eod": end_of_document}


def _open(prefix: str) -> IndexedDataset:
    with _no_rank_needed():
        return IndexedDataset(prefix)


def _fingerprint(prefixes: Sequence[str], end_of_document: int) -> str:
    """Name what the order depends on; GPTDataset's own key knows the paths, not the content."""
    digest = hashlib.sha256(f"{megatron.core.__version__} {end_of_document}".encode())
    for prefix in prefixes:
        path = Path(f"{prefix}.idx")
        sizes = (path.stat().st_size, Path(f"{prefix}.bin").stat().st_size)
        with path.open("rb") as file:
            digest.update(f"{prefix} {sizes} ".encode() + file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, sizes[0] - _FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]
