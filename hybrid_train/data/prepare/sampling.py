"""A sample of the texts of many files, block by block, so that a file need not be read whole."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybrid_train.data.prepare.blocks import source_blocks
from hybrid_train.data.prepare.documents import read_documents
from hybrid_train.data.prepare.sources import Source


@dataclass
class Sample:
    """Texts of drawn blocks, once through; counts what it has yielded.

    Attributes:
        sources: in their order.
        key: of the text.
        block_bytes: size of a block.
        share: probability of each block.
        seed: of the draw, which depends on nothing else.
    """

    sources: Sequence[Source]
    key: str
    block_bytes: int
    share: float
    seed: int
    documents: int = 0
    characters: int = 0
    bad: int = 0

    def __iter__(self) -> Iterator[str]:
        draw = random.Random(self.seed)
        for index, source in enumerate(self.sources):
            for block in source_blocks(source, index, self.key, self.block_bytes):
                if draw.random() >= self.share:
                    continue
                found = read_documents(source, block, self.key)
                self.bad += len(found.bad)
                for text in found.texts:
                    self.documents += 1
                    self.characters += len(text)
                    yield text
