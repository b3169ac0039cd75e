"""Trains cortex-tiny by the clock: `python -m cortex.bundled.recipe.train --minutes 88`."""

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import click
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Qwen3_5ForCausalLM

from cortex.bundled.recipe import data, export, render
from cortex.bundled.recipe.batches import Feed, copy_share, tensors
from cortex.bundled.recipe.model import make_config, make_model, use_fast_rule
from cortex.bundled.recipe.optim import make_optimizers
from cortex.bundled.recipe.rates import exact_rates, summary
from cortex.bundled.recipe.tokenizer import save_tokenizer, train_tokenizer


def corpus(seed: int) -> Iterator[str]:
    """Yield the texts the tokenizer learns from; plain chat counts twice as much as tools."""
    template = render.load_template()
    for idx in range(6000):
        drawn = data.dialogue(seed, idx)
        yield render.render(template, drawn.messages, drawn.tools)
    for idx in range(6000, 18000):
        drawn = data.dialogue(seed, idx)
        if drawn.kind not in ("call", "result", "echo", "recall", "wrong_tools"):
            yield render.render(template, drawn.messages)


def rate(progress: float, step: int) -> float:
    """Return the learning rate as a share of its peak: warm-up, plateau, linear decay."""
    warm = min(1.0, (step + 1) / 40)
    return warm * min(1.0, max(0.02, (1 - progress) / 0.3))


class Average:
    """A running mean of the weights: what is exported and measured on the way."""

    def __init__(self, model: Qwen3_5ForCausalLM) -> None:
        self.weights = {name: w.detach().clone() for name, w in model.state_dict().items()}

    @torch.no_grad()
    def add(self, model: Qwen3_5ForCausalLM, keep: float) -> None:
        """Move towards the model's weights."""
        for name, weight in model.state_dict().items():
            self.weights[name].lerp_(weight, 1 - keep)


class Log:
    """The loss curve: one line per twenty steps."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._rows = file, csv.writer(file)
        self._rows.writerow(["step", "minutes", "tokens", "loss", "rate", "copy_share"])

    def add(self, run: "Run", minutes: float, share: float, copies: float) -> None:
        """Write where the run is."""
        row = [f"{minutes:.2f}", run.tokens, f"{run.recent(20):.4f}", f"{share:.3f}"]
        self._rows.writerow([run.step, *row, f"{copies:.2f}"])
        self._file.flush()


@dataclass
class Run:
    """Counters of a training."""

    step: int = 0
    tokens: int = 0
    own_tokens: int = 0
    losses: list[float] = field(default_factory=list)

    def recent(self, number: int) -> float:
        """Return the mean loss of the last steps, over the model's own tokens."""
        last = self.losses[-number:]
        return sum(last) / len(last)


class Trainer:
    """Owns the model, its optimizers and the running mean."""

    def __init__(
        self, model: Qwen3_5ForCausalLM, feed: Feed, muon_lr: float, adam_lr: float
    ) -> None:
        self.model, self._feed = model, feed
        self._device = next(model.parameters()).device
        self._optimizers = make_optimizers(model, muon_lr, adam_lr)
        self._mean = Average(model)
        self.run = Run()

    def step(self, progress: float) -> float:
        """Learn from one batch; return the share of the peak rate that it took."""
        run, batch = self.run, self._feed.batch(progress)
        ids, after, weights = tensors(batch, self._device)
        logits = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        each = functional.cross_entropy(logits, after.flatten(), reduction="none")
        loss = (each * weights.flatten()).sum() / weights.sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        share = rate(progress, run.step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if run.step % 4 == 0:
            self._mean.add(self.model, min(0.95, run.step / (run.step + 40)))
        own = (weights == 1).flatten()
        run.losses.append(float(each.detach()[own].mean()))
        run.step += 1
        run.tokens += sum(len(tokens) for tokens, _ in batch)
        run.own_tokens += int(own.sum())
        return share

    def averaged(self, into: Qwen3_5ForCausalLM) -> Qwen3_5ForCausalLM:
        """Copy the mean weights into another model and return it."""
        into.load_state_dict(self._mean.weights)
        return into


@click.command()
@click.option("--minutes", default=88.0, help="Wall-clock budget; the schedule follows it.")
@click.option("--seed", default=1, help="Seed of the weights and of the data.")
@click.option("--batch-tokens", default=3072, help="Tokens in a batch, padding included.")
@click.option("--muon-lr", default=0.02)
@click.option("--adam-lr", default=0.003)
@click.option("--device", "device_name", default="cpu")
@click.option("--vocab-size", default=1536)
@click.option("--work", type=click.Path(path_type=Path), default=Path("tiny-train"))
@click.option("--out", type=click.Path(path_type=Path), default=render.MODEL_DIR)
@click.option("--export-minutes", default=12.0, help="How often the model folder is renewed.")
def main(
    minutes: float,
    seed: int,
    batch_tokens: int,
    muon_lr: float,
    adam_lr: float,
    device_name: str,
    vocab_size: int,
    work: Path,
    out: Path,
    export_minutes: float,
) -> None:
    """Train the tokenizer and the model, and leave them in the model folder."""
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(1)
    save_tokenizer(train_tokenizer(corpus(seed), vocab_size), out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    encoder = render.Encoder(tokenizer, render.load_template())
    pad_id = tokenizer.get_vocab()["<|endoftext|>"]
    model = make_model(make_config(vocab_size, encoder.end, pad_id), seed, device)
    spare = make_model(model.config, seed, device)
    use_fast_rule()
    trainer = Trainer(model, Feed(encoder, seed, batch_tokens), muon_lr, adam_lr)
    run = trainer.run
    click.echo(f"{sum(weight.numel() for weight in model.parameters())} parameters")

    start_s = time.monotonic()
    # The first weights come after five minutes, so that others can load the folder.
    shown_s, exported_s = 0.0, 60.0 * (5 - export_minutes)
    with (work / "loss.csv").open("w", newline="") as file:
        log = Log(file)
        while (elapsed_s := time.monotonic() - start_s) < minutes * 60:
            progress = elapsed_s / (minutes * 60)
            share = trainer.step(progress)
            if run.step % 20 == 0:
                log.add(run, elapsed_s / 60, share, copy_share(progress))
            if elapsed_s - shown_s > 240:
                shown_s = elapsed_s
                rates = exact_rates(trainer.averaged(spare), encoder, seed + 1000, 300, device)
                click.echo(
                    f"{elapsed_s / 60:.1f} min, step {run.step}, {run.tokens} tokens, "
                    f"{run.tokens / elapsed_s:.0f}/s, loss {run.recent(50):.3f}: {summary(rates)}"
                )
            if elapsed_s - exported_s > export_minutes * 60:
                exported_s = elapsed_s
                export.export(trainer.averaged(spare), out)

    raw = exact_rates(model, encoder, seed + 2000, 400, device)
    averaged = exact_rates(trainer.averaged(spare), encoder, seed + 2000, 400, device)
    click.echo(f"last weights: {summary(raw)}\naveraged: {summary(averaged)}")
    better = sum(good for good, _ in averaged.values()) > sum(good for good, _ in raw.values())
    export.export(spare if better else model, out)
    click.echo(f"done: {run.step} steps, {run.tokens} tokens, {run.own_tokens} the model's own")


if __name__ == "__main__":
    main()
