"""The text of an answer as it grows: tokens in, text out that will not change; stop strings."""

from collections.abc import Sequence

from hybrid_train.data.any_tokenizer import FolderTokenizer

_INCOMPLETE = "\ufffd"  # what the bytes of a character read like before its last one is there
_LONGEST_HELD = 3  # bytes of a character of which one is missing
_KEPT, _MOST = 8, 24  # tokens that are decoded again with a new one: as few as, and up to


class GrowingText:
    """The continuation of one prompt, given out in pieces that will not change any more.

    The pieces together are what the tokenizer makes of prompt and answer, without what it makes of
    the prompt: a tokenizer may write a token differently where a text begins. Each token costs the
    same, however long the text is, since the last tokens alone are decoded again. What is written
    for a token depends on bytes of the same character, and on whether a text begins there; so the
    tokens that are kept have some text in front of what is not yet given.
    """

    def __init__(
        self, tokenizer: FolderTokenizer, prompt: Sequence[int], *, skip_special: bool = True
    ) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._tokens = list(prompt)
        text = self._decode(self._tokens)
        self._given = len(text) - _held(text)  # characters
        self._forget(text)

    def add(self, token: int) -> tuple[str, str]:
        """Append a token.

        Returns:
            What has come since the last call and will stay; and what ends the text if nothing
            follows, such as bytes of a character that is not whole.
        """
        self._tokens.append(token)
        text = self._decode(self._tokens)
        settled = max(self._given, self._settled(text))
        piece, rest = text[self._given : settled], text[settled:]
        self._given = settled
        if len(self._tokens) > _MOST:
            self._forget(text)
        return piece, rest

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special=self._skip_special)

    def _settled(self, text: str) -> int:
        """Count the characters of the kept tokens that no token to come can change."""
        whole = len(self._tokens)
        while whole and self._tokenizer.is_joined_byte(self._tokens[whole - 1]):
            whole -= 1
        if whole < len(self._tokens):
            return len(self._decode(self._tokens[:whole]))
        return len(text) - _held(text)

    def _forget(self, text: str) -> None:
        """Keep the last tokens alone, with some text in front of what is not given yet."""
        waiting = len(text) - self._given
        for kept in range(_KEPT, len(self._tokens), _KEPT):
            tokens = self._tokens[-kept:]
            length = len(self._decode(tokens))
            if length > waiting and not self._tokenizer.is_joined_byte(tokens[0]):
                self._tokens, self._given = tokens, length - waiting
                return


def _held(text: str) -> int:
    """Count the characters at the end of a text that may be bytes of one that is not whole."""
    return min(_LONGEST_HELD, len(text) - len(text.rstrip(_INCOMPLETE)))


class AnswerText:
    """The text of an answer up to a stop string, of which no part is ever given out.

    Stops are looked for in the text, not in tokens, as if it came character by character: of
    several the one that is complete first counts, and of those the longest. So the text does not
    depend on how it was cut into tokens.
    """

    def __init__(
        self,
        tokenizer: FolderTokenizer,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
    ) -> None:
        """Begin the text of an answer.

        Args:
            tokenizer: makes text of tokens.
            prompt: tokens that the answer follows.
            stops: texts, none of them empty, each of which ends the answer.
            include_stop: whether the text has the stop that ended it.
        """
        self._growing = GrowingText(tokenizer, prompt)
        self._stops, self._include_stop = tuple(stops), include_stop
        self._held = ""  # may be the begin of a stop
        self._rest = ""  # what ends the text if nothing follows
        self._given: list[str] = []
        self._shown = 0  # of the pieces that were given
        self._is_over = False

    def take(self, token: int) -> bool:
        """Take the next token; return whether a stop ends the answer with it."""
        piece, self._rest = self._growing.add(token)
        if self._is_over:
            return True
        self._held += piece
        if found := self._stop_in(self._held + self._rest):
            begin, end = found
            text = (self._held + self._rest)[: end if self._include_stop else begin]
            self._is_over, self._held, self._rest = True, "", ""
            self._given.append(text)
            return True
        kept = self._begun(self._held)
        self._given.append(self._held[: len(self._held) - kept])
        self._held = self._held[len(self._held) - kept :]
        return False

    def _stop_in(self, text: str) -> tuple[int, int] | None:
        """Return begin and end of the stop that is complete first."""
        begins = [(text.find(stop), stop) for stop in self._stops]
        found = [(begin + len(stop), begin) for begin, stop in begins if begin >= 0]
        return min(found)[::-1] if found else None

    def _begun(self, text: str) -> int:
        """Count the characters at the end of a text that a stop may begin with."""
        longest = max(map(len, self._stops), default=0) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0

    def close(self) -> None:
        """Give out what was held back: nothing follows."""
        if not self._is_over:
            self._given.append(self._held + self._rest)
            self._is_over = True

    def fresh(self) -> str:
        """Return what has come since the last call."""
        text = "".join(self._given[self._shown :])
        self._shown = len(self._given)
        return text

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._given)
