"""One training run: batches from a corpus, AdamW, a cosine, and a state that can be put down and taken up again.

Owns the recipe. Knows nothing of where the corpus comes from, or of files other than its own state. Everything that a
step depends on is in the state or follows from the seed and the step's number, so a resumed run goes the same way.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.checkpoint.config import ModelConfig
from benchmarks.demo_model.corpus import Rows
from benchmarks.demo_model.model import Output, Weights, forward, initial_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a run is told; two runs of one recipe on one kind of device give the same model, but for rounding."""

    num_steps: int
    batch_rows: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    final_share: float = 0.01  # of the learning rate, at the end
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient: float = 1.0
    balance: float = 0.001  # weight of the load-balancing loss at the beginning
    balanced_share: float = 0.5  # of the run, after which that weight is 0: experts may specialise as the data does
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Means over a step's batch, on the device until they are read."""

    loss: Tensor
    balance: Tensor
    tokens_ME: Tensor


class Run:
    """Weights and optimizer of a run. The state is on `device`; `step` advances it."""

    def __init__(
        self, config: ModelConfig, recipe: Recipe, rows: Rows, device: torch.device, *, compiles: bool
    ) -> None:
        self.config = config
        self.recipe = recipe
        self.next_step = 0
        self._device = device
        self.weights: Weights = {
            name: weight.to(device).requires_grad_() for name, weight in initial_weights(config, recipe.seed).items()
        }
        decayed = [weight for weight in self.weights.values() if weight.dim() > 1]
        kept = [weight for weight in self.weights.values() if weight.dim() == 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )
        self._loss = torch.compile(self._eager_loss) if compiles else self._eager_loss
        self._ids_NL, self._positions_NL, self._is_target_NL = (
            torch.from_numpy(array.astype(kind)).to(device)
            for array, kind in ((rows.ids_NL, "int16"), (rows.positions_NL, "int16"), (rows.is_target_NL, "bool"))
        )

    @property
    def is_over(self) -> bool:
        return self.next_step >= self.recipe.num_steps

    def step(self) -> StepReport:
        """One batch forth and back, and the weights a little better."""
        rows_B = self._batch(self.next_step)
        ids_BL, positions_BL = self._ids_NL[rows_B].long(), self._positions_NL[rows_B].long()
        loss, output = self._loss(ids_BL, positions_BL, self._is_target_NL[rows_B])
        self._optimizer.zero_grad(set_to_none=True)
        (loss + self.balance(self.next_step) * output.balance).backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.recipe.max_gradient)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(self.next_step)
        self._optimizer.step()
        self.next_step += 1
        return StepReport(loss=loss.detach(), balance=output.balance.detach(), tokens_ME=output.tokens_ME)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        recipe = self.recipe
        if step < recipe.warmup_steps:
            return recipe.learning_rate * (step + 1) / recipe.warmup_steps
        share = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
        return recipe.learning_rate * (
            recipe.final_share + (1 - recipe.final_share) * (1 + math.cos(math.pi * share)) / 2
        )

    def balance(self, step: int) -> float:
        """Weight of the load-balancing loss: falls linearly to nothing."""
        return self.recipe.balance * max(0.0, 1 - step / (self.recipe.balanced_share * self.recipe.num_steps))

    @torch.no_grad()
    def best_ids(self, ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
        """The likeliest next token of every position, in the weights' own precision."""
        output = forward(self.weights, self.config, ids_BL.to(self._device), positions_BL.to(self._device))
        return output.logits_BLV.argmax(dim=-1)

    def save(self, file: Path) -> None:
        """Writes the state beside `file`, then puts it in its place."""
        recipe = {f.name: getattr(self.recipe, f.name) for f in fields(Recipe)}
        state = {
            "next_step": self.next_step,
            "recipe": recipe,
            "weights": self.weights,
            "optimizer": self._optimizer.state_dict(),
        }
        unfinished = file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.rename(file)

    def load(self, file: Path) -> None:
        """Takes up a state that `save` wrote. Raises ValueError if it is another recipe's."""
        state = torch.load(file, map_location=self._device, weights_only=True)
        if Recipe(**state["recipe"]) != self.recipe:
            raise ValueError(f"{file} is of another recipe: {state['recipe']}")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.next_step = int(state["next_step"])

    def _batch(self, step: int) -> Tensor:
        """Which rows a step learns from: all rows once in a random order, then again in another."""
        num_rows, batch_rows = len(self._ids_NL), self.recipe.batch_rows
        steps_of_epoch = num_rows // batch_rows
        epoch, place = divmod(step, steps_of_epoch)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1000 + epoch)
        order_N = torch.randperm(num_rows, generator=generator)
        return order_N[place * batch_rows : (place + 1) * batch_rows].to(self._device)

    def _eager_loss(self, ids_BL: Tensor, positions_BL: Tensor, is_target_BL: Tensor) -> tuple[Tensor, Output]:
        """Mean cross entropy of the targets, in bfloat16 products over float32 weights on a GPU."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            output = forward(self.weights, self.config, ids_BL, positions_BL)
        losses_BL = F.cross_entropy(
            output.logits_BLV[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten(), reduction="none"
        )
        counted_BL = is_target_BL[:, 1:].flatten().float()
        return (losses_BL * counted_BL).sum() / counted_BL.sum(), output
