"""Text that grows token by token, and how it is shown."""

import sys
import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.style import Style

from hybrid_train.data.any_tokenizer import AnyTokenizer
from hybrid_train.schema.units import counted

_INCOMPLETE = "\ufffd"  # what the bytes of a character read like before its last one is there


class GrowingText:
    """The continuation of one prompt, given out in pieces that will not change any more.

    It is decoded together with its prompt: a tokenizer may write a token differently where a text
    begins.
    """

    def __init__(self, tokenizer: AnyTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._given = self._decode()

    def _decode(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special=True)

    def add(self, token: int | None) -> None:
        """Append a token; None appends nothing."""
        if token is not None:
            self._tokens.append(token)

    def fresh(self, *, last: bool = False) -> str:
        """Return what has come since the last call.

        Args:
            last: whether nothing follows; if not, the bytes of an unfinished character are held
                back.
        """
        text = self._decode()
        if not last and text.endswith(_INCOMPLETE):
            return ""
        piece = text[len(self._given) :]
        self._given = text
        return piece


def show(
    prompts: Sequence[str], texts: Sequence[GrowingText], steps: Iterable[Sequence[int | None]]
) -> None:
    """Write prompts with their continuations to stdout, and the speed to stderr.

    On a terminal prompts are bold, and a single text is written as it grows.

    Args:
        prompts: what the texts continue.
        texts: one for each prompt; they take the tokens.
        steps: a token, or None, for each prompt, as `decode.stream` yields them.
    """
    bold = Style(bold=Console().is_terminal)
    live = Console().is_terminal and len(texts) == 1
    if live:
        _put(bold.render(prompts[0]))
    start, count = time.perf_counter(), 0
    for step in steps:
        for text, token in zip(texts, step, strict=True):
            text.add(token)
            count += token is not None
        if live:
            _put(texts[0].fresh())
    seconds = time.perf_counter() - start
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
        if len(texts) > 1:
            _put(f"--- prompt {number} of {len(texts)} ---\n")
        _put(("" if live else bold.render(prompt)) + text.fresh(last=True) + "\n")
    sys.stderr.write(
        f"{counted(count, 'token')} in {seconds:.1f} s: {count / seconds:.0f} tokens/s\n"
    )


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
