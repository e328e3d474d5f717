"""Finding stop texts in text that arrives in pieces.

Owns the matching and what must be held back because a stop text may have begun. Linear in the text, whatever the
number of stop texts. Knows nothing of tokens.

Generation ends at the first character that completes a stop text; where several end there, the longest counts. So the
cut does not depend on how the text was cut into pieces: what would have followed that character is never looked at.

Source: Aho, Corasick, "Efficient string matching", Communications of the ACM 18 (6), 1975.
"""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class StopFinder:
    """Takes text piece by piece and gives back what is safe to send."""

    def __init__(self, stop_texts: Sequence[str]) -> None:
        self._automaton = _build_automaton(tuple(stop_texts))
        self._state = 0
        self._held = ""  # the last characters seen, as far as they may begin a stop text
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that no stop text can reach any more. Once `stopped`, nothing follows."""
        if self.stopped:
            return ""
        if self._automaton.is_empty:
            return text
        automaton, state = self._automaton, self._state
        for position, char in enumerate(text, start=1):
            state = automaton.next_state(state, char)
            match_chars = automaton.match_chars[state]
            if match_chars:
                self.stopped = True
                seen = self._held + text[:position]
                self._held = ""
                return seen[: len(seen) - match_chars]
        seen = self._held + text
        num_safe = len(seen) - automaton.depth[state]
        self._state, self._held = state, seen[num_safe:]
        return seen[:num_safe]

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """A trie of the stop texts; each state's failure is the state of its longest proper suffix in the trie.

    `depth[state]` is how many of the last characters the state stands for, `match_chars[state]` the length of the
    longest stop text that ends there, 0 for none.
    """

    def __init__(self, stop_texts: Sequence[str]) -> None:
        self._edges: list[dict[str, int]] = [{}]
        self._failure = [0]
        self.depth = [0]
        self.match_chars = [0]
        for stop_text in stop_texts:
            self._insert(stop_text)
        self._link()

    @property
    def is_empty(self) -> bool:
        return len(self.depth) == 1

    def next_state(self, state: int, char: str) -> int:
        edges = self._edges
        while state and char not in edges[state]:
            state = self._failure[state]
        return edges[state].get(char, 0)

    def _insert(self, stop_text: str) -> None:
        state = 0
        for char in stop_text:
            if char not in self._edges[state]:
                self._edges[state][char] = len(self._edges)
                self._edges.append({})
                self._failure.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match_chars.append(0)
            state = self._edges[state][char]
        self.match_chars[state] = len(stop_text)

    def _link(self) -> None:
        """Breadth first: failures are shorter, so they are known before they are needed."""
        waiting = deque(self._edges[0].values())
        while waiting:
            state = waiting.popleft()
            for char, child in self._edges[state].items():
                failure = self.next_state(self._failure[state], char)
                self._failure[child] = failure
                self.match_chars[child] = self.match_chars[child] or self.match_chars[failure]
                waiting.append(child)


@lru_cache(maxsize=8)  # the answers of one request look for the same texts; an automaton never changes
def _build_automaton(stop_texts: tuple[str, ...]) -> _Automaton:
    return _Automaton(stop_texts)
