"""What the router counts. Plain numbers, read by whoever publishes them (`deployment.py`).

Owns the counting only. Written by the router's thread, read by another: single values, so that no lock is needed.
"""

from collections import Counter

from actors.router.scheduler import Load
from actors.types import StepResult


class RouterMetrics:
    """Totals since the start, and the latest load."""

    def __init__(self) -> None:
        self.steps = 0
        self.step_tokens = 0
        self.generated_tokens = 0
        self.answers = 0  # of attention ranks to steps
        self.step_seconds = 0.0  # in all answers
        self.expert_tokens: Counter[tuple[int, int]] = Counter()  # (layer, expert) -> tokens routed to it
        self.load: Load | None = None
        self.epoch = 0
        self.serving = False
        self.epochs_lost = 0
        self.requests_given_up = 0  # since epochs ended with them
        self.slow_ranks = 0  # that were to be replaced
        self.changes_done = 0
        self.changes_failed = 0
        self.ranks: dict[str, int] = {}  # by role
        self.ranks_wanted: dict[str, int] = {}

    def step_launched(self, num_tokens: int) -> None:
        self.steps += 1
        self.step_tokens += num_tokens

    def step_completed(self, result: StepResult) -> None:
        self.answers += 1
        self.generated_tokens += len(result.tokens)
        self.step_seconds += result.elapsed_us / 1e6
        for layer, counts in result.expert_tokens.items():
            for expert, tokens in enumerate(counts):
                if tokens:
                    self.expert_tokens[layer, expert] += tokens

    def set_load(self, load: Load, epoch: int, serving: bool) -> None:
        self.load, self.epoch, self.serving = load, epoch, serving
