"""The thinking budget: how long a model may think before the end of its thoughts is forced.

The rule of the model cards: from the budget on, the end comes at the next newline, and after a
grace at once (NVIDIA-NeMo/Nemotron, tools/budget).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_train.data.any_tokenizer import FolderTokenizer
from hybrid_train.generation.text import GrowingText

_MOST_BLANKS = 8  # tokens of white space that may follow the opening marker


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long thinking may be.

    Attributes:
        tokens: of the thinking part, after which a newline ends it.
        grace: more tokens, after which it ends without a newline.
        opened: text that opens the thinking part.
        closed: text that closes it.
        end: tokens that are forced, `closed` among them.
    """

    tokens: int
    grace: int
    opened: str
    closed: str
    end: Sequence[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest thinking part with its forced end."""
        return self.tokens + self.grace + len(self.end)


class ThinkingWatcher:
    """Watches the thinking part of one answer; without one it does nothing."""

    def __init__(
        self, tokenizer: FolderTokenizer, budget: Budget, blanks: Sequence[int] | None
    ) -> None:
        """Begin an answer.

        Args:
            tokenizer: makes text of tokens, to find newlines and markers in.
            budget: how long it may think.
            blanks: tokens of the prompt behind its open marker, as `blanks_of` finds them.
        """
        self._tokenizer, self._budget = tokenizer, budget
        self._is_open = blanks is not None
        self._blanks = list(blanks or ())
        self._tokens: list[int] = []  # of the thinking part
        self._left: list[int] = []  # of the forced end
        self._text = GrowingText(tokenizer, self._blanks, skip_special=False)
        self._last = ""  # of the text, as much as the closing marker has

    def forced(self) -> int | None:
        """Return the token of the end that must come next, if it is due."""
        if self._is_open and not self._left and self._is_due():
            self._left = list(self._budget.end[self._begun() :])
        return self._left[0] if self._is_open and self._left else None

    def take(self, token: int) -> None:
        """Take the next token of the answer."""
        if not self._is_open:
            return
        self._tokens.append(token)
        if self._left:
            del self._left[0]
            self._is_open = bool(self._left)
            return
        piece, rest = self._text.add(token)  # the marker is a token, or several, or parts of some
        self._last += piece
        self._is_open = self._budget.closed not in self._last + rest
        self._last = self._last[-len(self._budget.closed) :]

    def _is_due(self) -> bool:
        count = len(self._tokens)
        if count >= self._budget.tokens + self._budget.grace:
            return True
        last = [*self._blanks, *self._tokens][-1:]
        return count >= self._budget.tokens and "\n" in self._tokenizer.decode(last)

    def _begun(self) -> int:
        """Count the tokens of the end that are there already."""
        so_far, end = [*self._blanks, *self._tokens], list(self._budget.end)
        for count in range(min(len(so_far), len(end) - 1), 0, -1):
            if so_far[-count:] == end[:count]:
                return count
        return 0


def blanks_of(
    tokenizer: FolderTokenizer, prompt: Sequence[int], opened: str
) -> Sequence[int] | None:
    """Return the tokens of white space behind the marker that opens thinking; None: it is not open.

    Args:
        tokenizer: makes text of tokens.
        prompt: token ids.
        opened: the marker that a prompt must end with, but for white space.
    """
    blanks = 0
    while blanks < min(_MOST_BLANKS, len(prompt)):
        if tokenizer.decode([prompt[-1 - blanks]]).strip():
            break
        blanks += 1
    before = prompt[: len(prompt) - blanks][-len(opened.encode()) - 1 :]
    is_open = tokenizer.decode(before).rstrip().endswith(opened)
    return prompt[len(prompt) - blanks :] if is_open else None
