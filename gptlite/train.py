"""Training: the loop, and what surrounds it from an empty directory to the summary.

The state of a run is its step, its weights and the optimizer's moments; batches and masks are
functions of (seed, step), so nothing else has to be remembered for an exact resume.
"""

import logging
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptlite import auto, checkpoint, run_directory
from gptlite import plan as planning
from gptlite.checkpoint import load_weights, model_tensors
from gptlite.config import RunConfig
from gptlite.config_reader import dump, load_run
from gptlite.data import TokenFiles, batch_at
from gptlite.dropout import live_sites, planned_sites
from gptlite.errors import CheckpointError, ConfigError, DivergedError, Stopped
from gptlite.evaluate import byte_lengths, eval_rows, measure, nats_of, tensors
from gptlite.generate import Generation, encode_prompt
from gptlite.keys import key
from gptlite.metrics import Console, Meter, MetricsFile, clock
from gptlite.model import GPT
from gptlite.optim import Optimizer, lr_at
from gptlite.prepare import prepare
from gptlite.tokenizer import digest

TRAIN_SUBSET_ROWS = 256
"""Rows of training text on which the loss without dropout is measured, always the same."""

FREE_TO_CHANGE = (
    *("out_dir", "device", "log", "sample", "data.source", "data.sha256", "data.cache_dir"),
    *("train.max_steps", "train.epochs", "train.log_interval", "train.eval_interval"),
    *("train.eval_batches", "train.save_interval", "train.keep_last", "train.early_stop"),
    *("train.threads", "init_from"),
)
"""What a resumed run may change; the data are compared by content."""


class Update(NamedTuple):
    """What one update of the weights was."""

    step: int
    """Updates made so far, this one included."""
    loss: float
    """Mean nats per target with dropout on."""
    lr: float
    grad_norm: float
    targets: int


class Trainer:
    """Model, optimizer and step: all that an update changes."""

    def __init__(self, run: RunConfig, files: TokenFiles) -> None:
        self.run, self.files = run, files
        self.device = torch.device(run.device)
        self.rows = files.rows("train", run.model.context_length)
        self.max_steps = auto.planned_steps(run, self.rows.n_rows)
        rates = run.dropout.rates()
        vocab_size = files.meta["vocab_size"]
        self.model = GPT(run.model, vocab_size, rates, kernel=run.attention, seed=run.seed)
        self.model.to(self.device).train()
        self.planned = planned_sites(self.model, rates)
        if run.compile is True:
            self.model.compile()
        self.optimizer = Optimizer(self.model, run.optim)
        self.step = 0

    def updates(self, until: int) -> Iterator[Update]:
        """Make updates up to step `until`; the caller logs, evaluates and saves in between."""
        run = self.run
        while self.step < until:
            assert live_sites(self.model) == self.planned, "live dropout sites are not the planned"
            batch = batch_at(
                self.rows, seed=run.seed, step=self.step, batch_size=run.train.batch_size
            )
            loss = self.accumulate(batch)
            clip = run.optim.grad_clip or math.inf
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            loss_nats, grad_norm = loss.item(), norm.item()
            lr = lr_at(self.step, self.max_steps, run.optim)
            if not (math.isfinite(loss_nats) and math.isfinite(grad_norm)):
                raise DivergedError(
                    f"step {self.step + 1}: loss {loss_nats}, gradient norm {grad_norm}, "
                    f"learning rate {lr:.3g}; the weights are those of step {self.step}. "
                    "Try a lower optim.lr, more optim.warmup_steps or dtype float32"
                )
            self.optimizer.step(lr)
            self.optimizer.zero_grad()
            self.step += 1
            yield Update(self.step, loss_nats, lr, grad_norm, batch.n_targets)

    def accumulate(self, batch: Any) -> torch.Tensor:
        """Gradients of the mean nats per target of a whole update, part by part."""
        size, n_targets = self.run.train.micro_batch_size, batch.n_targets
        assert isinstance(size, int)
        total = torch.zeros((), device=self.device)
        for start in range(0, len(batch.inputs), size):
            inputs, targets, real = tensors(batch.part(start, start + size), self.device)
            torch.manual_seed(key(self.run.seed, "dropout", self.step, start) >> 1)
            with auto.precision(self.run):
                logits = self.model(inputs, real)
            loss = nats_of(logits, targets, "sum") / n_targets
            loss.backward()
            total += loss.detach()
        return total

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint stores, by file."""
        model, optimizer = model_tensors(self.model), self.optimizer.state_tensors()
        return dict(zip(checkpoint.FILES, (model, optimizer), strict=True))

    def restore(self, path: Path, step: int) -> None:
        """Go on from a verified checkpoint. Raises CheckpointError if it is of another model."""
        load_weights(self.model, path)
        state_file = path / checkpoint.FILES[1]
        if not state_file.is_file():
            raise CheckpointError(f"{path}: has no optimizer state; use init_from for weights only")
        try:
            self.optimizer.load_state_tensors(checkpoint.read_tensors(state_file))
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: {error.args[0]}") from None
        self.step = step


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

    def __init__(
        self, trainer: Trainer, directory: Path, run_id: str, saved: dict[str, Any] | None
    ) -> None:
        run = trainer.run
        self.trainer, self.directory, self.run, self.run_id = trainer, directory, run, run_id
        saved = saved or {}
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
        self.lengths = byte_lengths(trainer.files.tokenizer)
        self.verified = False

    def row(self, update: Update) -> dict[str, Any]:
        rates = {f"dropout/{s}": r for s, r in self.run.dropout.rates().items() if r > 0}
        return {
            "step": update.step,
            "tokens": self.meter.tokens,
            "epoch": update.step * self.run.train.batch_size / self.trainer.rows.n_rows,
            "elapsed_seconds": round(self.meter.elapsed_seconds, 3),
            "train/loss": update.loss,
            "lr": update.lr,
            "grad_norm": update.grad_norm,
            "tokens_per_second": self.meter.rate(),
            **rates,
        }

    def train(self, interrupts: Interrupts) -> str:
        """Run to the end, an early stop or a signal. Returns why it ended."""
        settings, trainer = self.run.train, self.trainer
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
            if update.step % settings.save_interval == 0 or interrupts.received:
                self.save()
            if interrupts.received:
                return "signal"
            if isinstance(settings.early_stop, int) and self.worse >= settings.early_stop:
                return "early_stop"
            self.meter.resume()
        return "max_steps"

    def evaluate(self, step: int) -> dict[str, float]:
        """Both losses without dropout; a new best validation loss is saved."""
        run, trainer = self.run, self.trainer
        rows = eval_rows(run, trainer.files.meta["vocab_size"])
        batches = run.train.eval_batches
        limit = None if batches == "all" else batches * run.train.batch_size
        val = trainer.files.rows("val", run.model.context_length).sweep(rows, limit)
        measured = measure(trainer.model, val, run, self.lengths)
        subset = trainer.rows.sweep(rows, TRAIN_SUBSET_ROWS)
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
            self.save()
            checkpoint.point(self.directory, "best", step)
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

    Raises UserError: ConfigError and DataError before anything is written, Stopped after a signal
    with the checkpoint saved.
    """
    logging.getLogger("torch").setLevel(logging.ERROR)
    stored = load_run([str(directory / "config.yaml")]) if resume else None
    files = prepare(run)
    rows = files.rows("train", run.model.context_length)
    files.rows("val", run.model.context_length)
    asked = run if stored is None else adopt(run, stored)
    resolved, reasons = auto.resolve(asked, vocab_size=files.meta["vocab_size"], n_rows=rows.n_rows)
    for prompt in run.sample.prompts:
        encode_prompt(files.tokenizer, prompt, run.data.layout == "documents")
    run_directory.create(directory)
    with run_directory.locked(directory), Interrupts().noticed() as interrupts:
        found = start_point(resolved, stored, directory, files)
        trainer = Trainer(resolved, files)
        if found is not None:
            trainer.restore(*found[:2])
        elif resolved.init_from is not None:
            load_weights(trainer.model, initial_weights(resolved.init_from))
        write_description(trainer, directory, reasons)
        saved = found[2] if found else None
        run_id = saved["run_id"] if saved else f"{key(dump(resolved), files.digest):016x}"
        session = Session(trainer, directory, run_id, saved)
        try:
            return work(session, reasons, interrupts)
        finally:
            session.close()


def adopt(run: RunConfig, stored: RunConfig) -> RunConfig:
    """`auto` in a resumed run means what it meant when the run began."""
    top = {
        k: getattr(stored, k)
        for k in run.model_fields_set | set(type(run).model_fields)
        if getattr(run, k) == "auto"
    }
    inner = {
        k: getattr(stored.train, k)
        for k in type(run.train).model_fields
        if getattr(run.train, k) == "auto"
    }
    return run.model_copy(update={**top, "train": run.train.model_copy(update=inner)})


def start_point(
    run: RunConfig, stored: RunConfig | None, directory: Path, files: TokenFiles
) -> tuple[Path, int, dict[str, Any]] | None:
    """Where a resumed run goes on: checkpoint, step and saved state."""
    if stored is None:
        return None
    changes = list(differences(stored, run))
    found = checkpoint.newest_valid(directory)
    if found is None:
        return None
    path, state, problems = found
    if state["data_digest"] != files.digest:
        changes.append("data: the text is not the one this run was trained on")
    if changes:
        raise ConfigError(
            *(f"--resume: {change}" for change in changes),
            "--resume: these decide what a run is; start a new one with another --out-dir",
        )
    for problem in problems:
        logging.getLogger("gptlite").warning("%s; going on from %s", problem, path.name)
    return path, state["step"], state


def differences(old: RunConfig, new: RunConfig) -> Iterator[str]:
    """`key: old -> new` for every value that may not change within a run."""

    def walk(a: Any, b: Any, at: str) -> Iterator[str]:
        if at in FREE_TO_CHANGE or a == b:
            return
        if isinstance(a, dict):
            for name in a:
                yield from walk(a[name], b[name], f"{at}.{name}" if at else name)
        else:
            yield f"{at}: {a} -> {b}"

    return walk(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def initial_weights(source: str) -> Path:
    path = Path(source)
    if run_directory.has_run(path):
        path = checkpoint.chosen(path, "best")
    checkpoint.read_state(path)
    return path


def write_description(trainer: Trainer, directory: Path, reasons: dict[str, str]) -> None:
    """config.yaml, env.json, plan.json and the tokenizer: what the run is."""
    files = trainer.files
    description = planning.make_plan(trainer.run, trainer.model, files, trainer.rows, reasons)
    run_directory.write_text(directory / "config.yaml", dump(trainer.run))
    run_directory.write_json(directory / "env.json", run_directory.environment())
    run_directory.write_json(directory / "plan.json", description)
    run_directory.write_json(directory / "tokenizer" / "tokenizer.json", files.tokenizer.to_json())


def work(session: Session, reasons: dict[str, str], interrupts: Interrupts) -> dict[str, Any]:
    """Say what will happen, train, and say where everything is."""
    trainer, directory, say = session.trainer, session.directory, session.console.say
    plan = planning.make_plan(trainer.run, trainer.model, trainer.files, trainer.rows, reasons)
    for line in planning.summary_lines(trainer.run, plan):
        say(line)
    if trainer.planned:
        modules = sum(trainer.planned.values())
        say(f"dropout: {len(trainer.planned)} sites live ({modules} modules)")
    if trainer.step:
        say(f"resumed at step {trainer.step} of {trainer.max_steps}")
    ended = session.train(interrupts)
    if ended == "signal":
        raise Stopped(
            interrupts.received,
            f"stopped at step {trainer.step}, saved; go on with: "
            f"gptlite train --resume {directory}",
        )
    summary = session.finish(ended)
    best, took = summary["best"], clock(summary["elapsed_seconds"])
    say(
        f"done: {trainer.step} updates in {took}, best validation loss {best['val_loss']:.4f} nats "
        f"({best['val_bits_per_byte']:.3f} bits per byte) at step {best['step']}"
    )
    say(f"everything is in {directory}")
    return summary
