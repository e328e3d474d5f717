"""Trains the demonstration model: `python -m benchmarks.demo_model.train --out DIRECTORY`, on a GPU in some minutes.

Owns the order of things: corpus, steps, looks at held-out questions, the log. Run again with the same DIRECTORY it goes
on where it stopped. What it writes there: state.pt, log.jsonl and, at the end, model.safetensors.
"""

import json
import os
import time
from pathlib import Path

import click
import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig, read_model_config
from benchmarks.demo_model.corpus import Rows, make_corpus
from benchmarks.demo_model.heldout import HeldOut
from benchmarks.demo_model.shape import DIRECTORY, TRAINED_TOKENS
from benchmarks.demo_model.tokens import Encoder
from benchmarks.demo_model.training import Recipe, Run, StepReport
from benchmarks.demo_model.weights_file import write_weights

_LOG_STEPS = 20


class Log:
    """log.jsonl: a line for every _LOG_STEPS steps, and one for every look at held-out questions."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._began_s = time.monotonic()
        self._losses: list[Tensor] = []
        self._tokens_ME: Tensor | float = 0.0  # since the last look

    def add(self, step: int, report: StepReport, learning_rate: float) -> None:
        self._losses.append(report.loss)
        self._tokens_ME = self._tokens_ME + report.tokens_ME
        if step % _LOG_STEPS == 0:
            loss, balance = torch.stack(self._losses).mean().item(), report.balance.item()
            self._write(step=step, loss=round(loss, 5), balance=round(balance, 4), learning_rate=learning_rate)
            self._losses.clear()

    def add_look(self, step: int, scores: dict[str, float]) -> None:
        """Scores by family and split, and each layer's share of tokens by expert since the last look."""
        assert isinstance(self._tokens_ME, Tensor), "a step has been added"
        shares_ME = self._tokens_ME / self._tokens_ME[0].sum()
        self._tokens_ME = 0.0
        self._write(
            step=step,
            scores={label: round(share, 4) for label, share in scores.items()},
            expert_shares=[[round(share, 4) for share in row] for row in shares_ME.tolist()],
        )
        click.echo(", ".join(f"{label} {share:.3f}" for label, share in sorted(scores.items())))

    def _write(self, **values: object) -> None:
        elapsed_s = round(time.monotonic() - self._began_s, 1)
        with self._file.open("a") as stream:
            stream.write(json.dumps({"elapsed_s": elapsed_s, **values}) + "\n")
        if "loss" in values:
            click.echo(
                f"{elapsed_s:7.1f} s  step {values['step']}  loss {values['loss']:.4f}  balance {values['balance']:.3f}"
            )


def train(run: Run, held_out: HeldOut, directory: Path, *, look_steps: int, save_s: float = 60.0) -> None:
    """Runs to the end, looking at held-out questions now and then."""
    log, saved_s = Log(directory / "log.jsonl"), time.monotonic()
    while not run.is_over:
        rate = run.learning_rate(run.next_step)
        log.add(run.next_step + 1, run.step(), rate)
        if run.next_step % look_steps == 0 or run.is_over:
            log.add_look(run.next_step, held_out.score(run.best_ids))
        if time.monotonic() - saved_s > save_s or run.is_over:
            run.save(directory / "state.pt")
            saved_s = time.monotonic()


def _corpus(file: Path, num_rows: int, config: ModelConfig, seed: int, processes: int) -> Rows:
    """The corpus of `file`, which is made if need be."""
    if not file.exists():
        began_s = time.monotonic()
        rows = make_corpus(
            num_rows, seed=seed, length=TRAINED_TOKENS, directory=DIRECTORY, pad_id=config.pad_token_id,
            processes=processes,
        )  # fmt: skip
        rows.save(file)
        tokens, targets = (rows.ids_NL != config.pad_token_id).sum(), rows.is_target_NL.sum()
        click.echo(f"{len(rows.ids_NL)} rows, {tokens} tokens, {targets} targets in {time.monotonic() - began_s:.0f} s")
    return Rows.load(file)


@click.command()
@click.option("--out", "directory", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--steps", type=int, default=4500, show_default=True)
@click.option("--rows", type=int, default=163_840, show_default=True, help="Of the corpus, of 2,048 tokens each.")
@click.option("--batch-rows", type=int, default=32, show_default=True)
@click.option("--learning-rate", type=float, default=2e-3, show_default=True)
@click.option("--look-steps", type=int, default=1000, show_default=True, help="Between looks at held-out questions.")
@click.option("--questions", type=int, default=100, show_default=True, help="Held-out ones of each family and split.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--compile/--no-compile", "compiles", default=torch.cuda.is_available(), help="With torch.compile.")
@click.option("--processes", type=int, default=os.cpu_count(), show_default=True, help="That make the corpus.")
def main(
    directory: Path, steps: int, rows: int, batch_rows: int, learning_rate: float, look_steps: int, questions: int,
    seed: int, compiles: bool, processes: int,
) -> None:  # fmt: skip
    """Train the demonstration model."""
    directory.mkdir(parents=True, exist_ok=True)
    config = read_model_config(DIRECTORY)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = _corpus(directory / f"corpus-{rows}-{seed}.npz", rows, config, seed, processes)
    recipe = Recipe(num_steps=steps, batch_rows=batch_rows, learning_rate=learning_rate, seed=seed)
    run = Run(config, recipe, corpus, device, compiles=compiles)
    if (directory / "state.pt").exists():
        run.load(directory / "state.pt")
        click.echo(f"going on after step {run.next_step}")
    held_out = HeldOut.make(Encoder.load(), TRAINED_TOKENS, config.pad_token_id, questions)
    train(run, held_out, directory, look_steps=look_steps)
    num_bytes = write_weights(directory, run.weights)
    click.echo(f"{sum(w.numel() for w in run.weights.values()):,} parameters, {num_bytes:,} bytes")


if __name__ == "__main__":
    main()
