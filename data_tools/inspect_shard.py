"""Say what a pair of token files holds, and print one of its documents.

python data_tools/inspect_shard.py quickstart/vocab-4096/train --document 0
"""

import argparse
import sys

import numpy as np
from numpy.typing import NDArray

from hybrid_train.config.problems import UserError
from hybrid_train.config.units import show_tokens
from hybrid_train.data.indexed import verify
from hybrid_train.data.megatron import Documents
from hybrid_train.data.tokenizers import Tokenizer

_WIDTH = 50  # characters of the longest bar


def main() -> int:
    """Inspect the files that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", help="path without .bin or .idx")
    parser.add_argument("--tokenizer", help="Hugging Face tokenizer folder: check ids, show text")
    parser.add_argument("--document", type=int, help="number of a document to print")
    arguments = parser.parse_args()
    try:
        inspect(arguments.prefix, arguments.tokenizer, arguments.document)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def inspect(prefix: str, tokenizer_folder: str | None, number: int | None) -> None:
    """Print what the files hold.

    Raises:
        UserError: if they are broken, or have no document of this number.
    """
    tokenizer = Tokenizer.load(tokenizer_folder) if tokenizer_folder else None
    found = verify(prefix, tokenizer.vocab_size if tokenizer else None)
    documents = Documents(prefix)
    print(f"{prefix}: {found.tokens} tokens ({show_tokens(found.tokens)}) of {found.dtype}")
    print(f"{len(documents)} documents; tokens in each:")
    print("\n".join(histogram(documents.lengths)))
    if number is None:
        return
    if not 0 <= number < len(documents):
        raise UserError(
            f"{prefix} has no document {number}; they go from 0 to {len(documents) - 1}"
        )
    ids = documents[number].tolist()
    print(f"\ndocument {number}, {len(ids)} tokens:")
    print(tokenizer.decode(ids) if tokenizer else ids)


def histogram(lengths: NDArray[np.int32]) -> list[str]:
    """Draw how many documents have 1, 2-3, 4-7, ... tokens: one line for each power of two."""
    powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(powers)
    lines = []
    for power in range(int(powers.min()), len(counts)):
        low, high = 2**power, 2 ** (power + 1) - 1
        bar = "#" * int(np.ceil(_WIDTH * counts[power] / counts.max()))
        lines.append(f"  {low:>10} - {high:<10} {counts[power]:>9}  {bar}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
