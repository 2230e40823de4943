"""`gptlite train`: what surrounds the loop, from an empty directory to the summary.

Evaluating, sampling, saving and logging happen between updates and change none of them.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gptlite import auto, checkpoint, run_directory
from gptlite import plan as planning
from gptlite.checkpoint import load_weights
from gptlite.config import RunConfig
from gptlite.config_reader import dump, load_run
from gptlite.errors import ConfigError, Stopped
from gptlite.evaluate import byte_lengths, eval_rows, measure
from gptlite.generate import Generation, encode_prompt
from gptlite.keys import key
from gptlite.memory import keep_freed
from gptlite.metrics import Console, Meter, MetricsFile, clock
from gptlite.prepare import prepare
from gptlite.resume import adopt, initial_weights, start_point
from gptlite.tokenizer import digest
from gptlite.train import Trainer, Update

TRAIN_SUBSET_ROWS = 256
"""Rows of training text on which the loss without dropout is measured, always the same."""


class Interrupts:
    """SIGTERM and the first Ctrl-C are noted and acted on between updates; a second leaves."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    @contextmanager
    def noticed(self) -> Iterator["Interrupts"]:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in before:
                signal.signal(number, self)
        except ValueError:  # not the main thread: the caller owns the signals
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Session:
    """One stay of a run in its directory: metrics, evaluations, samples and checkpoints."""

    def __init__(self, trainer: Trainer, directory: Path, saved: dict[str, Any]) -> None:
        run = trainer.run
        self.trainer, self.directory, self.run = trainer, directory, run
        self.run_id = saved.get("run_id", f"{key(dump(run), trainer.files.digest):016x}")
        self.best: dict[str, Any] | None = saved.get("best")
        self.val_loss: float | None = saved.get("val_loss")
        self.worse = saved.get("evaluations_without_gain", 0)
        self.meter = Meter()
        self.meter.tokens = saved.get("tokens", 0)
        self.meter.elapsed_seconds = saved.get("elapsed_seconds", 0.0)
        self.saved_step = trainer.step
        self.metrics = MetricsFile(directory / "metrics.jsonl", trainer.step)
        self.console = Console(
            directory / "train.log", run.log.progress, trainer.max_steps, trainer.step
        )
        self.val_rows = trainer.files.rows("val", run.model.context_length)
        self.lengths = byte_lengths(trainer.files.tokenizer)
        self.verified = False

    def row(self, update: Update) -> dict[str, Any]:
        return {
            "step": update.step,
            "tokens": self.meter.tokens,
            "epoch": update.step * self.run.train.batch_size / self.trainer.rows.n_rows,
            "elapsed_seconds": round(self.meter.elapsed_seconds, 3),
            "train/loss": update.loss,
            "lr": update.lr,
            "grad_norm": update.grad_norm,
            "tokens_per_second": self.meter.rate(),
            **{f"dropout/{site}": rate for site, rate in update.dropout_rates.items()},
        }

    def introduce(self, plan: dict[str, Any], problems: Sequence[str]) -> None:
        """Say what will happen."""
        trainer, say = self.trainer, self.console.say
        for line in planning.summary_lines(self.run, plan):
            say(line)
        if trainer.planned:
            modules = sum(trainer.planned.values())
            say(f"dropout: {len(trainer.planned)} sites live ({modules} modules)")
        for problem in problems:
            say(f"{problem}; passed over")
        if trainer.step:
            say(f"resumed at step {trainer.step} of {trainer.max_steps}")

    def work(self, interrupts: Interrupts) -> dict[str, Any]:
        """Train, and say where everything is. Raises Stopped after a signal."""
        trainer, say = self.trainer, self.console.say
        ended = self.train(interrupts)
        if ended == "signal":
            raise Stopped(
                interrupts.received,
                f"stopped at step {trainer.step}, saved; go on with: "
                f"gptlite train --resume {self.directory}",
            )
        summary = self.finish(ended)
        best, took = summary["best"], clock(summary["elapsed_seconds"])
        if ended == "early_stop":
            say(f"stopped early: no better validation loss in {self.worse} evaluations")
        say(
            f"done: {trainer.step} updates in {took}, best validation loss {best['val_loss']:.4f} "
            f"nats ({best['val_bits_per_byte']:.3f} bits per byte) at step {best['step']}"
        )
        say(f"everything is in {self.directory}")
        return summary

    def train(self, interrupts: Interrupts) -> str:
        """Run to the end, an early stop or a signal. Returns why it ended."""
        settings, trainer = self.run.train, self.trainer
        if self.stops_early:
            return "early_stop"
        self.meter.resume()
        for update in trainer.updates(trainer.max_steps):
            self.meter.count(update.targets)
            self.console.advance()
            last = update.step == trainer.max_steps
            evaluates = last or update.step % settings.eval_interval == 0
            if evaluates or update.step % settings.log_interval == 0:
                self.meter.pause()
                row = self.row(update)
                if evaluates:
                    row |= self.evaluate(update.step)
                self.metrics.write(row)
                self.console.progress(update.step, row, self.val_loss)
            if self.run.sample.interval and update.step % self.run.sample.interval == 0:
                self.meter.pause()
                self.sample()
            # After the row is written: a run killed in a save must find it when it resumes.
            due = self.is_best(update.step) or update.step % settings.save_interval == 0
            if due or interrupts.received:
                self.save()
            if interrupts.received:
                return "signal"
            if self.stops_early:
                return "early_stop"
            self.meter.resume()
        return "max_steps"

    def is_best(self, step: int) -> bool:
        return self.best is not None and self.best["step"] == step

    @property
    def stops_early(self) -> bool:
        patience = self.run.train.early_stop
        return isinstance(patience, int) and self.worse >= patience

    def evaluate(self, step: int) -> dict[str, float]:
        """Both losses without dropout; a validation loss that is the best so far is remembered."""
        run, trainer = self.run, self.trainer
        rows = eval_rows(run, trainer.files.meta["vocab_size"])
        batches = run.train.eval_batches
        limit = None if batches == "all" else batches * run.train.batch_size
        val, subset = self.val_rows.sweep(rows, limit), trainer.rows.sweep(rows, TRAIN_SUBSET_ROWS)
        measured = measure(trainer.model, val, run, self.lengths)
        train = measure(trainer.model, subset, run, self.lengths)
        if not self.verified:
            self.console.say("evaluation: dropout: off (verified)")
            self.verified = True
        self.val_loss = measured.loss
        self.worse += 1
        if self.best is None or measured.loss < self.best["val_loss"]:
            self.best = {"step": step, "val_loss": measured.loss}
            self.best |= {"val_bits_per_byte": measured.bits_per_byte}
            self.worse = 0
        return {
            "train/loss_dropout_off": train.loss,
            "val/loss": measured.loss,
            "val/bits_per_byte": measured.bits_per_byte,
        }

    def save(self) -> None:
        trainer = self.trainer
        self.meter.pause()
        self.saved_step = trainer.step
        state = {
            "run_id": self.run_id,
            "tokens": self.meter.tokens,
            "elapsed_seconds": self.meter.elapsed_seconds,
            "best": self.best,
            "val_loss": self.val_loss,
            "evaluations_without_gain": self.worse,
            "data_digest": trainer.files.digest,
            "tokenizer_sha256": digest(trainer.files.tokenizer),
            "config": self.run.model_dump(mode="json"),
            "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        }
        checkpoint.save(self.directory, trainer.step, trainer.tensors(), state)
        checkpoint.point(self.directory, "last", trainer.step)
        if self.is_best(trainer.step):
            checkpoint.point(self.directory, "best", trainer.step)
        checkpoint.prune(self.directory, self.run.train.keep_last)

    def sample(self) -> str:
        """Continue the configured prompts; the text goes to samples/ and is returned."""
        run, trainer = self.run, self.trainer
        documents = run.data.layout == "documents"
        generation = Generation(
            trainer.model,
            trainer.files.tokenizer,
            run.sample.prompts,
            run.sample,
            seed=run.seed,
            num_samples=8 if documents else 1,
            documents=documents,
        )
        text = "\n".join(result["prompt"] + result["text"] for result in generation.results())
        path = self.directory / "samples" / f"step-{trainer.step:08d}.txt"
        run_directory.write_text(path, text + "\n")
        return text

    def finish(self, ended: str) -> dict[str, Any]:
        """The last checkpoint and sample, and the summary."""
        trainer = self.trainer
        if self.best is None:  # resumed where nothing was left to do, and never evaluated
            self.evaluate(trainer.step)
        if self.saved_step != trainer.step:
            self.save()
        text = self.sample()
        summary = {
            "ended": ended,
            "steps": trainer.step,
            "tokens": self.meter.tokens,
            "epochs": trainer.step * self.run.train.batch_size / trainer.rows.n_rows,
            "elapsed_seconds": self.meter.elapsed_seconds,
            "val_loss": self.val_loss,
            "best": self.best,
        }
        run_directory.write_json(self.directory / "summary.json", summary)
        self.console.say(f"sample at step {trainer.step}:\n{text}")
        return summary

    def close(self) -> None:
        self.metrics.close()
        self.console.close()


def train(run: RunConfig, directory: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a run in its directory; returns the summary.

    Raises ConfigError and DataError before anything is written, Stopped after a signal, with the
    checkpoint saved.
    """
    stored = load_run([str(directory / "config.yaml")]) if resume else None
    files = prepare(run)
    n_rows = files.rows("train", run.model.context_length).n_rows
    files.tokens("val")  # too little text for validation is better known before training
    for prompt in run.sample.prompts:
        documents = run.data.layout == "documents"
        encode_prompt(files.tokenizer, prompt, documents, place=f"sample.prompts: {prompt!r}")
    weights = None if run.init_from is None or resume else initial_weights(run.init_from)
    asked = run if stored is None else adopt(run, stored)
    resolved, reasons = auto.resolve(asked, vocab_size=files.meta["vocab_size"], n_rows=n_rows)
    keep_freed()
    run_directory.create(directory)
    with run_directory.locked(directory), Interrupts().noticed() as interrupts:
        if stored is None and run_directory.has_run(directory):
            raise ConfigError(f"out_dir: {directory} contains a run; give another --out-dir")
        start = start_point(resolved, stored, directory, files)
        trainer = Trainer(resolved, files)
        if start.path is not None:
            trainer.restore(start.path, start.state["step"])
        elif weights is not None:
            load_weights(trainer.model, weights)
        plan = planning.make_plan(resolved, trainer.model, files, trainer.rows, reasons)
        write_description(trainer, directory, plan)
        session = Session(trainer, directory, start.state)
        try:
            session.introduce(plan, start.problems)
            return session.work(interrupts)
        finally:
            session.close()


def write_description(trainer: Trainer, directory: Path, plan: dict[str, Any]) -> None:
    """config.yaml, env.json, plan.json and the tokenizer: what the run is."""
    tokenizer = trainer.files.tokenizer.to_json()
    run_directory.write_json(directory / "env.json", run_directory.environment())
    run_directory.write_json(directory / "plan.json", plan)
    run_directory.write_json(directory / "tokenizer" / "tokenizer.json", tokenizer)
    run_directory.write_text(directory / "config.yaml", dump(trainer.run))
