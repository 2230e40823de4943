"""The loop: one update after the other, nothing else.

The state of a run is its step, its weights and the optimizer's moments; batches and masks are
functions of (seed, step), so nothing else has to be remembered for an exact resume.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gptlite.config.run import RunConfig
from gptlite.core.average import Average
from gptlite.core.dropout import (
    check_every_rate_acts,
    live_sites,
    planned_sites,
    set_strength,
    strength_at,
)
from gptlite.core.loss import Lesson
from gptlite.core.masks import sample_keys
from gptlite.core.model import GPT, to_device
from gptlite.core.optim import Optimizer, lr_at, weight_decay_at
from gptlite.core.precision import LossScaler, Scale, precision
from gptlite.core.weights import FILES, RAW, fill, model_tensors
from gptlite.core.world import ALONE, World
from gptlite.data.batches import Batch, Layout, batch_at
from gptlite.errors import CheckpointError, DivergedError
from gptlite.keys import key

MOST_SKIPPED, SKIP_WINDOW = 10, 1000
"""Updates that `train.on_nonfinite: skip` may skip, in so many."""


Teacher = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Inputs and which of them are real → logits (B, T, V) to learn from."""


class Update(NamedTuple):
    """What one update of the weights was."""

    step: int
    """Updates made so far, this one included."""
    loss: float
    """Mean nats per target with dropout on."""
    lr: float
    grad_norm: float
    targets: int
    dropout_rates: dict[str, float]
    """Of every site that ever drops, in this update."""
    loss_scaling: dict[str, float]
    """In float16: `loss_scale`, and `overflows` of the run so far."""


class Progress(NamedTuple):
    """What a run remembers besides tensors."""

    step: int
    skipped: Sequence[int]
    loss_scale: Scale | None
    trained_length: int | None
    tail: tuple[int, int] | None = None
    """Of `Trainer.end_at`: the update that it was called before, and the last one."""


class Trainer:
    """Model, optimizer and step: all that an update changes.

    Of several ranks each computes its rows of every batch; their gradients are added up.
    """

    def __init__(
        self,
        run: RunConfig,
        rows: Layout,
        vocab_size: int,
        world: World = ALONE,
        teacher: Teacher | None = None,
    ) -> None:
        """`teacher` is what the run learns from besides the text, on its device."""
        self.run, self.rows, self.world = run, rows, world
        self.device, self.teacher = world.device(run), teacher
        each = run.train.batch_size // world.size
        self.own = slice(each * world.rank, each * (world.rank + 1))
        """The rows of a batch that this rank computes."""
        self.max_steps = run.planned_steps(self.rows.n_rows)
        self.trained_length = run.model.reached(self.rows.length)
        self.model = GPT.of_run(run, vocab_size)
        self.model.to(self.device).train()
        self.rates = {site: rate for site, rate in run.dropout.rates().items() if rate > 0}
        check_every_rate_acts(self.model, self.rates)
        self.planned = planned_sites(self.model)
        self.native = bool(run.dropout.native_sites(run.attention))
        if run.compile is True:
            self.model.compile()
        self.engine = world.engine(run, self.model)
        half = torch.bfloat16 if run.dtype == "bfloat16" else torch.float32
        self.optimizer = Optimizer(self.model, run.optim, half)
        self.average: Average | None = None
        if run.train.average == "ema":
            self.average = Average(self.model, run.half_life(self.max_steps))
        self.scaler = LossScaler(run.dtype, self.device)
        self.parameters = list(self.model.parameters())
        self.step, self.strength = 0, 1.0
        self.tail_from: int | None = None
        """The update with which the learning rate begins to fall, where a clock has decided it."""
        self.skipped: list[int] = []
        """The latest updates that were not finite and left the weights alone."""

    def end_at(self, step: int) -> None:
        """Let the run end there: schedule wsd falls from the next update on."""
        self.tail_from, self.max_steps = self.step, step

    def updates(self, until: int | None = None) -> Iterator[Update]:
        """Make updates up to step `until`, or the last one; the caller logs, evaluates and saves in
        between."""
        run = self.run
        while self.step < (self.max_steps if until is None else until):
            strength = self.schedule_dropout()
            batch = batch_at(
                self.rows, seed=run.seed, step=self.step, batch_size=run.train.batch_size
            )
            loss = self.accumulate(batch)
            self.scaler.unscale(self.optimizer.parts)
            norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            loss_nats, grad_norm = loss.item(), self.world.full(norm).item()
            lr = lr_at(self.step, self.max_steps, run.optim, self.tail_from)
            decay = weight_decay_at(self.step, self.max_steps, run.optim, self.tail_from)
            if math.isfinite(loss_nats) and math.isfinite(grad_norm):
                if run.optim.grad_clip and grad_norm > run.optim.grad_clip:
                    clip_grads_with_norm_(self.parameters, run.optim.grad_clip, norm)
                self.optimizer.step(lr, decay)
            elif not self.scaler.take_overflow(loss_nats):
                self.skip(f"loss {loss_nats}, gradient norm {grad_norm}, learning rate {lr:.3g}")
            scaling = self.scaler.update()
            self.optimizer.zero_grad()
            self.step += 1
            if self.average is not None:
                self.average.update(self.step)
            rates = {site: rate * strength for site, rate in self.rates.items()}
            yield Update(self.step, loss_nats, lr, grad_norm, batch.n_targets, rates, scaling)

    def skip(self, what: str) -> None:
        """Leave the weights alone in this update. Raises DivergedError if that is not wanted, or
        was so too often."""
        self.skipped = [step for step in self.skipped if step > self.step + 1 - SKIP_WINDOW]
        often = len(self.skipped) == MOST_SKIPPED
        if self.run.train.on_nonfinite == "stop" or often:
            earlier = f", after {MOST_SKIPPED} skipped in {SKIP_WINDOW} updates" if often else ""
            raise DivergedError(f"step {self.step + 1}: {what}{earlier}")
        self.skipped.append(self.step + 1)

    def schedule_dropout(self) -> float:
        """Set the rates of the coming update; returns their share of the full rates."""
        strength = strength_at(self.step, self.max_steps, self.run.dropout.schedule)
        if strength != self.strength:
            set_strength(self.model, strength)
            self.planned = planned_sites(self.model, strength)
            self.strength = strength
        assert live_sites(self.model) == self.planned, "live dropout sites are not the planned"
        return strength

    def accumulate(self, batch: Batch) -> torch.Tensor:
        """Gradients of the mean nats per target of a whole update, part by part."""
        size, n_targets, stop = self.run.train.micro_batch_size, batch.n_targets, self.own.stop
        assert isinstance(size, int)
        total = torch.zeros((), device=self.device)
        for start in range(self.own.start, stop, size):
            rows = np.arange(start, min(start + size, stop))
            inputs, targets, real = to_device(batch.part(start, rows[-1] + 1), self.device)
            samples = sample_keys(self.run.seed, self.step, rows).to(self.device)
            if self.native:
                torch.manual_seed(key(self.run.seed, "dropout", self.step, start) >> 1)
            with self.engine.sync_gradients(last=start + size >= stop):
                with precision(self.run):
                    lesson = self.ask_teacher(inputs, real)
                    nats = self.engine(
                        inputs, real, samples=samples, targets=targets, lesson=lesson
                    )
                loss = nats / n_targets
                self.scaler.scale(loss * self.engine.scale).backward()
            total += loss.detach()
        return self.world.sum(total)

    @torch.no_grad()
    def ask_teacher(self, inputs: torch.Tensor, real: torch.Tensor | None) -> Lesson | None:
        """What the teachers say of these inputs, once for the whole update."""
        if self.teacher is None:
            return None
        distill = self.run.distill
        logits = self.teacher(inputs, real).float() / distill.temperature
        return Lesson(logits.log_softmax(-1), distill.weight, distill.temperature)

    def note_trained_positions(self, reached: int | None) -> None:
        """Count positions as trained that the weights to start from have been trained for."""
        if self.trained_length is not None:
            self.trained_length = reached and max(reached, self.trained_length)

    def evaluated(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are evaluated: the averaged ones, if there are."""
        return nullcontext() if self.average is None else self.average.in_model()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Weights that are evaluated, moments, and the weights of the last update where those are
        others, by the file of a checkpoint that has them."""
        model, optimizer = model_tensors(self.model), self.optimizer.state_tensors()
        if self.average is None:
            return dict(zip(FILES, (model, optimizer), strict=True))
        return {**dict(zip(FILES, (self.average.tensors, optimizer), strict=True)), RAW: model}

    def restore(
        self,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        progress: Progress,
        where: object,
    ) -> None:
        """Go on from the `tensors` of a checkpoint, which only the first rank needs to have.

        Raises CheckpointError that names `where` if they are of another model.
        """
        moments = tensors[FILES[1]]
        fill(self.model, tensors[FILES[0]], where, self.world)
        if self.average is not None:
            self.average.begin()
            fill(self.model, tensors[RAW], where, self.world)
        self.step, self.skipped = progress.step, list(progress.skipped)
        self.trained_length = progress.trained_length or self.trained_length
        if progress.tail is not None:
            self.tail_from, self.max_steps = progress.tail
        self.scaler.restore(progress.loss_scale)
        left_alone = len(self.skipped) + self.scaler.overflows
        try:
            # There are none before a first update of the weights.
            if self.world.largest(bool(moments) or self.step > left_alone):
                self.optimizer.load_state_tensors(moments, self.world)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
