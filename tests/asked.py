"""A tiny model that can be asked tasks: text, a tokenizer that was trained on it, a network."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_train.data.documents import Joined
from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.schema.parallel import Parallel
from tests.tiny import EVERY_KIND, tiny_job

TEXTS = (
    "def add(a, b):\n    return a + b\n",
    "naïve café: 3 €\n",
    "x = [1, 2, 3]\nfor one in x:\n    print(one)\n" * 3,
    "\n",
    "# größer als ßß\nimport os\n",
)


@cache
def tokenizer() -> Tokenizer:
    """Bytes, a few merges, and the end of a document as token 0."""
    return train_byte_level_bpe(TEXTS, 290)


@cache
def coarse_tokenizer() -> Tokenizer:
    """Another one, of more merges."""
    return train_byte_level_bpe([*TEXTS, *TEXTS], 310)


class Texts:
    """Texts as documents in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.name = "memory"
        self._ids = [[*tokenizer().encode(one), tokenizer().end_of_document] for one in texts]
        self.lengths = np.array([len(one) for one in self._ids], dtype=np.int32)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        return np.array(self._ids[document][start:stop], dtype=np.int64)

    def fingerprint(self) -> str:
        return "memory"


def sources() -> dict[str, Joined]:
    """Two sources of held-out text."""
    return {"code": Joined("code", [Texts(TEXTS[:3])]), "rest": Joined("rest", [Texts(TEXTS[3:])])}


def subject(
    groups: Any, *, coarse: bool = False, is_packed: bool = False, parallel: Parallel | None = None
) -> Any:
    """A model with weights that are large enough that every layer is felt."""
    from hybrid_train.evaluation.reader import Reader
    from hybrid_train.evaluation.runner import Subject
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model

    reads = coarse_tokenizer() if coarse else tokenizer()
    pattern = "MEM*|M-/*E/*E" if parallel and parallel.pipeline > 1 else EVERY_KIND
    job = tiny_job(pattern, parallel=parallel or Parallel())
    built = build_model(job, groups, reads.vocab_size, on_gpu=False)
    network = build_engine(job, built, groups, torch.device("cpu")).network
    for chunk in network.chunks:
        for name, weight in chunk.named_parameters():
            if weight.dim() == 2 and "conv" not in name:
                weight.data.mul_(2)
    ends = frozenset([reads.end_of_document])
    return Subject(network, Reader(reads, begins=False, ends=ends, is_packed=is_packed))


def log_probs(subject: Any, ids: Sequence[int]) -> Tensor:
    """Of every token behind every beginning of a text, from whole logits, [tokens, V], float64."""
    with subject.network.evaluating():
        logits = subject.network.chunks[0].module(torch.tensor([list(ids)])).logits()[0]
    vocabulary = logits[:, : subject.network.vocab_size].double()
    return vocabulary.log_softmax(-1)
