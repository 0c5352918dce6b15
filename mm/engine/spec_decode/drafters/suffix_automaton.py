"""A suffix automaton: all substrings of a growing list of tokens, in time linear in its length.

The on-line construction of Blumer et al. (1985). A state stands for all substrings that end at the same positions. Its
suffix link leads to the longest suffix that also ends at other positions. So the link of the newest state is the
longest end of the text that occurred before.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_MARKED = 16
"""Number of suffixes per token whose latest end is updated. A text like "1 1 1 1" has as many as it has tokens."""


class SuffixAutomaton:
    """The substrings of the tokens so far.

    Attributes:
        tokens: The text.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._first_end = [-1]
        self._last_end = [-1]
        self._newest = 0
        for token in tokens:
            self.append(token)

    @property
    def num_states(self) -> int:
        return len(self._next)

    def append(self, token: int) -> None:
        """Append a token, in about 2 us."""
        self._mark()
        following, link, length = self._next, self._link, self._length
        state, new = self._newest, self._add({}, self._length[self._newest] + 1, len(self.tokens), len(self.tokens))
        self.tokens.append(token)
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        if state >= 0:
            target = following[state][token]
            if length[target] > length[state] + 1:
                target = self._split(state, token, target)
            link[new] = target
        else:
            link[new] = 0
        self._newest = new

    def _add(self, following: dict[int, int], length: int, first_end: int, last_end: int) -> int:
        self._next.append(following)
        self._link.append(-1)
        self._length.append(length)
        self._first_end.append(first_end)
        self._last_end.append(last_end)
        return len(self._next) - 1

    def _split(self, state: int, token: int, target: int) -> int:
        """A copy of `target` for its substrings that now also end at the newest token."""
        copy = self._add(
            dict(self._next[target]), self._length[state] + 1, self._first_end[target], self._last_end[target]
        )
        self._link[copy], self._link[target] = self._link[target], copy
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = copy
            state = self._link[state]
        return copy

    def _mark(self) -> None:
        """Set the latest end of the suffixes that occurred before to the newest token."""
        state, end = self._link[self._newest], len(self.tokens) - 1
        for _ in range(MAX_MARKED):
            if state <= 0:
                return
            self._last_end[state] = end
            state = self._link[state]

    # ── matches of the end of the text ───────────────────────────────────────────────────────────────────────────────

    @property
    def matched(self) -> int:
        """Length of the longest end of the text that occurred before."""
        return self._length[max(self._link[self._newest], 0)]

    def earlier_end(self, longest: int | None = None, *, latest: bool = False) -> int:
        """Index of the last token of an earlier occurrence of the text's end; -1 without one.

        Args:
            longest: Most tokens of the end that is searched for; None takes the longest that occurred before.
            latest: The last earlier occurrence instead of the first. A short end may get an earlier occurrence than its
                last, since `MAX_MARKED` limits how many are updated.
        """
        state = max(self._link[self._newest], 0)
        while longest is not None and self._length[max(self._link[state], 0)] >= longest:
            state = self._link[state]
        return (self._last_end if latest else self._first_end)[state]

    # ── matching another text ─────────────────────────────────────────────────────────────────────────────────────────

    def follow(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """The state and the number of matched tokens of another text after one more token.

        The state stays valid while this automaton grows.

        Args:
            state, matched: Of the text before `token`; (0, 0) at its start.
        """
        while state and matched <= self._length[self._link[state]]:
            state = self._link[state]  # the state was split since
        while state and token not in self._next[state]:
            state = self._link[state]
            matched = self._length[state]
        if token not in self._next[state]:
            return 0, 0
        return self._next[state][token], matched + 1

    def last_end(self, state: int) -> int:
        """Index of the last token of the latest known occurrence of a state's substrings."""
        return self._last_end[state]
