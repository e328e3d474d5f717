"""How many tokens went to each expert lately.

Owns the forgetting: figures halve every HALF_LIFE_S, so that balance follows the load and not its history. Knows
nothing of slots or ranks.
"""

from collections.abc import Mapping, Sequence

HALF_LIFE_S = 30.0


class ExpertLoad:
    """Decaying counts of tokens by layer and expert."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[float]] = {}
        self._as_of_s = 0.0

    def add(self, counts: Mapping[int, Sequence[int]], now_s: float) -> None:
        """Counts of a rank since its last report; layers without tokens may be absent."""
        self._decay(now_s)
        for layer, tokens in counts.items():
            known = self._tokens.setdefault(layer, [0.0] * len(tokens))
            for expert, count in enumerate(tokens):
                known[expert] += count

    def tokens(self, now_s: float) -> dict[int, tuple[float, ...]]:
        """Layer -> tokens of each expert."""
        self._decay(now_s)
        return {layer: tuple(tokens) for layer, tokens in self._tokens.items()}

    def _decay(self, now_s: float) -> None:
        factor = 0.5 ** (max(0.0, now_s - self._as_of_s) / HALF_LIFE_S)
        self._as_of_s = now_s
        for tokens in self._tokens.values():
            tokens[:] = [count * factor for count in tokens]
