"""What surrounds the loop of a run that has begun, up to the summary.

Evaluating, sampling, saving and logging happen between updates and change none of them.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptlite.config.reader import dump
from gptlite.config.run import RunConfig
from gptlite.core.evaluate import TRAIN_SUBSET_ROWS, byte_lengths, eval_rows, measure
from gptlite.core.generate import Generation
from gptlite.core.optim import WSD_DECAY
from gptlite.core.train import MOST_SKIPPED, SKIP_WINDOW, Trainer, Update
from gptlite.data.batches import Batch
from gptlite.data.token_files import TokenFiles
from gptlite.data.tokenizers import digest
from gptlite.errors import DivergedError, Stopped, add_step_to_errors
from gptlite.keys import key
from gptlite.planning.header import MOST_LINES, detail_lines, header_lines, note_lines
from gptlite.runs import checkpoint
from gptlite.runs.checkpoint import Best, Checkpoint, RunState
from gptlite.runs.interrupts import Interrupted, Interrupts
from gptlite.runs.metrics import Meter, null_nonfinite
from gptlite.runs.records import NoRecords, Records
from gptlite.runs.resume import fingerprint, resumed_lines
from gptlite.runs.sinks import RunInfo
from gptlite.runs.viewer import NOBODY, Pages, Viewer, next_lines
from gptlite.terminal import format_duration
from gptlite.words import count

Watch = Callable[[int, int, float], None]
"""Is told step, last step and validation loss of each evaluation; what it raises ends the run."""


def watch_nothing(step: int, max_steps: int, val_loss: float) -> None:
    pass


def unseen_tokens(run: RunConfig, files: TokenFiles) -> tuple[int, ...]:
    """Tokens that the model cannot have learned; of one from elsewhere this text does not say."""
    return files.unseen_tokens if run.init_from is None else ()


class Session:
    """One stay of a run in its directory: metrics, evaluations, samples and checkpoints.

    Every rank has one, and all do the same at the same moments.
    """

    def __init__(
        self,
        trainer: Trainer,
        files: TokenFiles,
        directory: Path,
        saved: RunState | None,
        interrupts: Interrupts,
        *,
        watch: Watch = watch_nothing,
        teachers: dict[str, str] | None = None,
        viewer: Viewer = NOBODY,
    ) -> None:
        run = trainer.run
        self.run = run
        self.trainer = trainer
        self.world = trainer.world
        self.files = files
        self.directory = directory
        self.interrupts = interrupts
        self.watch = watch
        self.run_id = f"{key(dump(run), files.digest):016x}"
        self.best: Best | None = None
        self.val_loss: float | None = None
        self.worse = 0
        self.pending: dict[str, Any] | None = None
        self.meter = Meter()
        self.saved_step = trainer.step
        if saved is not None:
            self.run_id = saved.run_id
            self.best = saved.best
            self.val_loss = saved.val_loss
            self.worse = saved.evaluations_without_gain
            self.pending = saved.pending
            self.meter.tokens = saved.tokens
            self.meter.elapsed_seconds = saved.elapsed_seconds
        known = trainer.step
        if self.pending is not None:  # what was cut short there is done again, and saved
            known -= 1
            self.saved_step = -1
        self.records = NoRecords()
        if self.world.first:
            info = RunInfo(run, directory, self.run_id, known)
            self.records = Records(info, trainer.max_steps, trainer.step, viewer.verbose)
        self.val_rows = files.rows("val", run.model.context_length)
        self.lengths = byte_lengths(files.tokenizer, files.meta["splits"]["val"])
        self.verified = False
        self.sampled_step: int | None = None
        self.viewer = viewer
        self.pages = Pages(
            viewer.add_report if self.world.first else None,
            directory,
            self.records.say,
            time.perf_counter,
        )
        self.teachers, self.unseen = teachers or {}, unseen_tokens(run, files)
        self.began = time.perf_counter()
        self.wall_before = 0.0 if saved is None else saved.wall_seconds
        self.follow_up_seconds = 0.0
        """The longest that an evaluation with all that belongs to it took."""

    def wall_seconds(self) -> float:
        """Of the run so far, evaluations and checkpoints included."""
        return self.wall_before + time.perf_counter() - self.began

    def make_row(self, update: Update) -> dict[str, Any]:
        """What is known of an update before anything is evaluated."""
        return {
            "step": update.step,
            "tokens": self.meter.tokens,
            "epoch": update.step * self.run.train.batch_size / self.trainer.rows.n_rows,
            "elapsed_seconds": round(self.meter.elapsed_seconds, 3),
            "train/loss": update.loss,
            "lr": update.lr,
            "grad_norm": update.grad_norm,
            "tokens_per_second": self.meter.rate(),
            **update.loss_scaling,
            **{f"dropout/{site}": rate for site, rate in update.dropout_rates.items()},
        }

    def introduce(self, plan: dict[str, Any], found: Checkpoint | None, resume: bool) -> None:
        """Say what will happen."""
        run, viewer, say, note = self.run, self.viewer, self.records.say, self.records.note
        lines = header_lines(run, plan, str(self.directory), viewer.seconds, viewer.promise)
        self.records.say_head(lines, note_lines(run, plan), MOST_LINES)
        for line in detail_lines(run, plan):
            note(line)
        if planned := self.trainer.planned:
            note(f"dropout: {len(planned)} sites live ({sum(planned.values())} modules)")
        if found is not None:
            for line in resumed_lines(self.trainer, found, self.directory):
                say(line)
        elif resume:
            say("nothing had been saved yet: begun again")

    def work(self) -> dict[str, Any]:
        """Train, and say where everything is. Raises Stopped after a signal, DivergedError."""
        trainer, say = self.trainer, self.records.say
        try:
            ended = self.train()
            summary = self.finish(ended)
        except Interrupted:
            if self.saved_step != trainer.step or self.pending is not None:
                self.save()
            raise Stopped(
                self.interrupts.received,
                f"stopped at step {trainer.step}, saved; go on with: "
                f"gptlite train --resume {self.directory}",
            ) from None
        except DivergedError as error:
            raise self.explain_divergence(error) from None
        if ended == "early_stop":
            say(f"stopped early: no better validation loss in {self.worse} evaluations")
        result = self.describe_end()  # before the page, whose time is not the run's
        self.records.close()
        self.pages.finish()
        if self.viewer.add_report is not None:
            for line in next_lines(self.directory):
                say(line)
        self.records.say_folded(result)
        return summary

    def describe_end(self) -> str:
        """The result in a line."""
        best, took = self.best, format_duration(self.wall_seconds())
        assert best is not None
        per_byte = best.val_bits_per_byte
        bits = "" if per_byte is None else f" ({per_byte:.3f} bits per byte)"
        return (
            f"done: {count(self.trainer.step, 'update')} in {took}, best validation loss "
            f"{best.val_loss:.4f} nats{bits} at step {best.step}"
        )

    def train(self) -> str:
        """Run to the end or an early stop; says which. Raises Interrupted after a signal."""
        trainer = self.trainer
        if self.pending is not None:
            self.follow_up(self.pending)
        if self.stops_early:
            return "early_stop"
        self.meter.resume()
        for update in trainer.updates():
            self.meter.count(update.targets)
            self.records.advance()
            if trainer.skipped[-1:] == [update.step]:
                self.tell_skipped(update)
            if self.is_due(update.step):
                self.meter.pause()
                before = time.perf_counter()
                self.follow_up(self.make_row(update))
                took = time.perf_counter() - before
                self.follow_up_seconds = max(self.follow_up_seconds, took)
            self.interrupts.poll()
            self.plan_end()
            if self.stops_early:
                return "early_stop"
            self.meter.resume()
        return "max_steps"

    def plan_end(self) -> None:
        """Let the run end in time, once so much of `train.max_minutes` is over that the tail of its
        schedule fills the rest. The first rank's clock decides."""
        minutes, trainer = self.run.train.max_minutes, self.trainer
        if minutes is None or trainer.tail_from is not None or trainer.step == trainer.max_steps:
            return
        spent, last = self.wall_seconds(), 0
        left = 60 * minutes - self.follow_up_seconds - spent  # the last evaluation, and the sample
        updates = max(1, int(left * trainer.step / spent))
        foreseen = min(trainer.step + updates, trainer.max_steps)
        self.records.set_total(foreseen)  # what is shown as left
        if left <= WSD_DECAY * (left + spent):
            last = foreseen
        if last := self.world.largest(last if self.world.first else 0):
            trainer.end_at(last)
            self.records.set_total(last)
            self.records.say(f"time: ends at step {last}, to be done in {minutes:g} minutes")

    def evaluates_at(self, step: int) -> bool:
        return step == self.trainer.max_steps or step % self.run.train.eval_interval == 0

    def samples_at(self, step: int) -> bool:
        return self.run.sample.interval > 0 and step % self.run.sample.interval == 0

    def is_due(self, step: int) -> bool:
        """Whether anything happens between this update and the next."""
        train = self.run.train
        regular = step % train.log_interval == 0 or step % train.save_interval == 0
        return regular or self.evaluates_at(step) or self.samples_at(step)

    def follow_up(self, row: dict[str, Any]) -> None:
        """What is due after an update: its evaluation, its row, a sample, a checkpoint.

        A signal may end it early (Interrupted): then `pending` is saved, and done on resuming.
        """
        train, step = self.run.train, row["step"]
        self.pending = row
        if self.evaluates_at(step) and "val/loss" not in row:
            row |= self.evaluate(step)
        if self.evaluates_at(step) or step % train.log_interval == 0:
            self.records.write_row(step, row, self.val_loss)
        if self.samples_at(step):
            self.sample()
        self.pending = None
        is_best = self.best is not None and self.best.step == step
        # After the row is written: a run killed in a save must find it when it resumes.
        if is_best or step % train.save_interval == 0:
            self.save()
        if self.evaluates_at(step):
            if step < self.trainer.max_steps:  # at the end it is made with all that belongs to it
                self.pages.refresh(self.wall_seconds(), self.viewer.seconds or 0.0)
            self.watch(step, self.trainer.max_steps, row["val/loss"])

    @property
    def stops_early(self) -> bool:
        patience = self.run.train.early_stop
        return isinstance(patience, int) and self.worse >= patience

    def evaluate(self, step: int) -> dict[str, float]:
        """Both losses without dropout; a validation loss that is the best so far is remembered."""
        run, trainer = self.run, self.trainer
        rows = eval_rows(run, self.files.meta["vocab_size"], self.world)
        batches = run.train.eval_batches
        limit = None if batches == "all" else batches * run.train.batch_size
        val, subset = self.val_rows.sweep(rows, limit), trainer.rows.sweep(rows, TRAIN_SUBSET_ROWS)
        with self.interrupts.raise_at_once(), add_step_to_errors(step), trainer.evaluated():
            measured, train = (
                measure(trainer.model, self.poll_batches(each), run, self.lengths, world=self.world)
                for each in (val, subset)
            )
        if not self.verified:
            self.records.say("evaluation: dropout: off (verified)")
            self.verified = True
        self.val_loss = measured.loss
        self.worse += 1
        bits = measured.bits_per_byte if measured.text_bytes else None
        if self.best is None or measured.loss < self.best.val_loss:
            self.best = Best(step=step, val_loss=measured.loss, val_bits_per_byte=bits)
            self.worse = 0
        return {
            "train/loss_dropout_off": train.loss,
            "val/loss": measured.loss,
            "val/bits_per_byte": measured.bits_per_byte,
        }

    def poll_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, until a signal has come to any rank."""
        for batch in batches:
            self.interrupts.poll()
            yield batch

    def save(self) -> None:
        """A checkpoint of now; older ones go. Raises StorageError, DivergedError if not finite."""
        trainer = self.trainer
        self.meter.pause()
        state = RunState(
            step=trainer.step,
            run_id=self.run_id,
            tokens=self.meter.tokens,
            elapsed_seconds=self.meter.elapsed_seconds,
            best=self.best,
            val_loss=self.val_loss,
            evaluations_without_gain=self.worse,
            skipped=trainer.skipped,
            trained_length=trainer.trained_length,
            loss_scale=trainer.scaler.state(),
            tail=None if trainer.tail_from is None else (trainer.tail_from, trainer.max_steps),
            wall_seconds=self.wall_seconds(),
            teachers=self.teachers,
            pending=None if self.pending is None else null_nonfinite(self.pending),
            data_digest=self.files.digest,
            tokenizer_sha256=digest(self.files.tokenizer),
            config=self.run.model_dump(mode="json"),
            environment=fingerprint(self.run, self.world.size),
        )
        self.records.sync()
        checkpoint.save(self.directory, trainer.tensors(), state, self.world)
        self.saved_step = trainer.step
        self.records.keep_checkpoints(trainer.step, None if self.best is None else self.best.step)

    def sample(self) -> None:
        """Continue the configured prompts; the text goes to samples/ and is shown."""
        run, trainer = self.run, self.trainer
        documents = run.data.layout == "documents"
        with (
            self.interrupts.raise_at_once(),
            add_step_to_errors(trainer.step),
            trainer.evaluated(),
            trainer.engine.gather_weights(),
        ):
            generation = Generation(
                trainer.model,
                self.files.tokenizer,
                run.sample.prompts,
                run.sample,
                seed=run.seed,
                num_samples=8 if documents else 1,
                documents=documents,
                context=trainer.trained_length,
                unseen=self.unseen,
            )
            text = "\n".join(result["prompt"] + result["text"] for result in generation.results())
        self.records.write_sample(trainer.step, text)
        self.sampled_step = trainer.step

    def tell_skipped(self, update: Update) -> None:
        self.records.say(
            f"step {update.step}: loss {update.loss}, gradient norm {update.grad_norm}; skipped "
            f"({len(self.trainer.skipped)} of at most {MOST_SKIPPED} in {SKIP_WINDOW} updates)"
        )

    def explain_divergence(self, error: DivergedError) -> DivergedError:
        """The error with what is left: the weights before it are saved if they are finite."""
        trainer = self.trainer
        if trainer.step > self.saved_step:
            with suppress(DivergedError):  # then the update before had done it
                self.save()
        saved = checkpoint.folders(self.directory)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved before"
        return DivergedError(
            f"{error}; {last}; try a lower optim.lr (now {self.run.optim.lr:g}), more "
            "optim.warmup_steps, dtype float32, or train.on_nonfinite: skip"
        )

    def finish(self, ended: str) -> dict[str, Any]:
        """The last checkpoint and sample, and the summary."""
        trainer = self.trainer
        if self.best is None:  # resumed where nothing was left to do, and never evaluated
            self.evaluate(trainer.step)
        if self.saved_step != trainer.step:
            self.save()
        if self.sampled_step != trainer.step:
            self.sample()
        summary = {
            "ended": ended,
            "steps": trainer.step,
            "tokens": self.meter.tokens,
            "epochs": trainer.step * self.run.train.batch_size / trainer.rows.n_rows,
            "elapsed_seconds": self.meter.elapsed_seconds,
            "val_loss": self.val_loss,
            "best": self.best.model_dump() if self.best else None,
        }
        self.records.write_summary(summary)
        return summary
