"""Build the quickstart corpus, its tokenizer and its token files without training.

python data_tools/build_quickstart.py --folder quickstart --vocab-size 4096
"""

import argparse
import sys
from pathlib import Path

from hybrid_train.data.quickstart import folder_of, prepare, read_manifest
from hybrid_train.jobs.text_progress import TextProgress
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.problems import ConfigError, UserError, collect
from hybrid_train.schema.units import show_tokens


def main() -> int:
    """Build, or find what is there, and say how much it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="where it goes")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the tokenizer")
    parser.add_argument(
        "--source", type=Path, help="folder of Python files; default: the standard library"
    )
    arguments = parser.parse_args()
    config = Quickstart(folder=arguments.folder, vocab_size=arguments.vocab_size)
    try:
        if problems := list(collect(config)):
            raise ConfigError(problems)
        start_logging()
        with TextProgress(terminal=sys.stderr.isatty()) as shown:
            prepare(config, arguments.source, shown.update)
        found = read_manifest(folder_of(config))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder_of(config)}: vocabulary {found.vocab_size}, source of Python {found.python}")
    for name, files, tokens in (
        ("train", found.train_files, found.train_tokens),
        ("validation", found.validation_files, found.validation_tokens),
    ):
        print(f"  {name}: {show_tokens(tokens)} tokens in {files} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
