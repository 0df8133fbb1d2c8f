"""Token ids to text while they are being written: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextWriter:
    """Takes an answer's tokens one by one and gives its text piece by piece.

    The pieces joined are what decoding all tokens at once gives, cut before the first stop string. A
    character whose bytes are spread over tokens comes with the last of them, and what may yet turn
    out to be a stop string is held back until it is known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # a token's text depends on the one before it (a word's leading space), so text is read off
        # in windows that overlap: ids[:_read] are in `text`, and a window starts at _window
        self._window = self._read = 0
        self.given = 0
        """How many characters of `text` have been given out."""
        self.text = ""
        self.starts: list[int] = []
        """Where the text of each token begins."""
        self.stopped = False
        """Whether a stop string came up; `text` ends before it."""

    def push(self, token_id: int) -> str:
        """The text that this token settles; empty once stopped."""
        self._ids.append(token_id)
        self.starts.append(len(self.text))
        return self._take(final=False)

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._window : self._read])
        now = self._decode(self._ids[self._window :])
        if len(now) > len(before) and (final or not now.endswith(_UNFINISHED)):
            self.text += now[len(before) :]
            self._window, self._read = self._read, len(self._ids)
        settled = len(self.text) if final else len(self.text) - self._may_become_stop()
        found = [at for at in (self.text.find(stop, self.given) for stop in self._stop) if at >= 0]
        if found:
            settled = min(found)
            self.text, self.stopped = self.text[:settled], True
        piece = self.text[self.given : settled]
        self.given = max(self.given, settled)
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""

    def _may_become_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:n]):
                    longest = n
                    break
        return longest
