"""How large a model and how many updates fit into the time of a whole command.

Before updates are counted, everything else is taken off: what has passed since the command began,
the looks at the loss, checkpoints, the sample, the page. It is measured, or follows from what was.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tqdm import tqdm

from gptlite.config.run import RunConfig
from gptlite.config.strict_yaml import Document
from gptlite.data.token_files import TokenFiles
from gptlite.planning import auto
from gptlite.planning.plan import flops_per_token
from gptlite.planning.rehearsal import Costs, make_idle_trainer, time_updates
from gptlite.terminal import wants_bar

TOKENS_PER_PARAMETER = 1.2
"""That a model sees at least: at 1.6 and 2.9 a larger one was better in the same time, at 0.4 and
below a smaller one, about 1 now one and now the other."""
TEXT_PER_PARAMETER = 0.04
"""Different ones of them: at 0.05 a larger model was still better, at 0.03 and 0.015 it was not."""
MOST_EPOCHS = 60
"""More gain nothing: of 11,000 tokens 170 were worse, of 40,000 tokens 60 no better than 20."""
FEWEST_STEPS = 20
LOOKS = 10
"""Evaluations of a run."""
MOST_EVALUATING = 0.1
"""Share of the time for the looks; where all validation text would take more, a part is taken."""
MOST_FOR_PAGES = 0.03
"""Share of the time for the page that is made again while the run trains."""
LEAST_GROWTH = 0.4
"""From one rung to the next the time of an update grows at least by so much of what its FLOPs grow
by: docs/benchmarks.md, Growth."""
RUNG_SHARE, CLIMB_SHARE = 0.005, 0.1
"""Of the time, for timing a rung (a fifth of a second to one second), and after which no other rung
is tried, as where other programs keep the machine busy."""
ENDING = 0.4
"""What the page and leaving take, beside what loading took: measured 0.3 to 0.5."""


class Budget:
    """The time of a whole command, from its start until the process is gone."""

    def __init__(
        self, minutes: float, began: float | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`began` is when the command began, on this clock; None: now."""
        self.clock = clock
        self.minutes, self.seconds = minutes, 60 * minutes
        self.began = clock() if began is None else began
        self.loading = clock() - self.began
        """Seconds until now, in which libraries were loaded."""

    @property
    def ending(self) -> float:
        """Seconds for the page and for leaving, which cannot be tried before."""
        return self.loading * ENDING

    def seconds_left(self) -> float:
        """Seconds from now until the page."""
        return self.seconds - (self.clock() - self.began) - self.ending


class Rung(NamedTuple):
    """A model of a ladder, and how long its updates take on this text and machine."""

    size: tuple[int, int, int]
    """n_layer, n_embd, context_length."""
    run: RunConfig
    n_parameters: int
    flops: float
    """Of an update."""
    tokens: int
    """Of an update."""
    n_rows: int
    """Of an epoch."""
    text_tokens: int
    """Of all the training text."""
    seconds: float = 0.0
    """Of an update; 0 as long as it is not known."""

    def sees_enough(self, seconds: float) -> bool:
        """Whether it passes over enough text in this time, and there is enough."""
        seen = seconds / self.seconds * self.tokens
        there = self.text_tokens >= TEXT_PER_PARAMETER * self.n_parameters
        return there and seen >= TOKENS_PER_PARAMETER * self.n_parameters

    @property
    def most_steps(self) -> int:
        """Updates after which more bring nothing."""
        return max(FEWEST_STEPS, math.ceil(MOST_EPOCHS * self.n_rows / self.run.train.batch_size))


def make_rung(size: tuple[int, int, int], run: RunConfig, files: TokenFiles) -> Rung:
    """A rung by arithmetic, not timed yet."""
    vocab_size, context = files.meta["vocab_size"], run.model.context_length
    tokens = run.train.batch_size * context
    return Rung(
        size=size,
        run=run,
        n_parameters=run.model.n_parameters(vocab_size),
        flops=float(flops_per_token(run, vocab_size) * tokens),
        tokens=tokens,
        n_rows=files.rows("train", context).n_rows,
        text_tokens=files.n_tokens("train"),
    )


def time_rung(rung: Rung, files: TokenFiles, seconds: float) -> Rung:
    """The rung with the time of its updates, timed for so long."""
    vocab_size = files.meta["vocab_size"]
    resolved, _ = auto.resolve_run(rung.run, vocab_size=vocab_size, n_rows=rung.n_rows)
    pace = time_updates(make_idle_trainer(resolved, files), seconds)
    return rung._replace(seconds=pace.seconds)


def climb(rungs: Iterable[Rung], files: TokenFiles, budget: Budget) -> Rung:
    """The largest rung that still sees enough text in the time that is left, or else the first.

    One that would not even at the best pace to be hoped for is not timed.
    """
    began, best = budget.clock(), None
    timing = clamp(0.2, RUNG_SHARE * budget.seconds, 1.0)
    hidden = not wants_bar("auto", sys.stderr)
    for rung in tqdm(rungs, "timing models", leave=False, disable=hidden, file=sys.stderr):
        if best is None:
            best = time_rung(rung, files, timing)
            continue
        if rung.run == best.run:  # the model is asked for, whatever the ladder says
            best = rung._replace(seconds=best.seconds)
            continue
        enough = budget.seconds_left() * (1 - MOST_EVALUATING)
        hoped = best.seconds * LEAST_GROWTH * rung.flops / best.flops
        late = budget.clock() - began > CLIMB_SHARE * budget.seconds
        if late or not rung._replace(seconds=hoped).sees_enough(enough):
            break
        timed = time_rung(rung, files, timing)
        if not timed.sees_enough(enough):
            break
        best = timed
    assert best is not None
    return best


def clamp(low: float, value: float, high: float) -> float:
    return max(low, min(value, high))


class Fit(NamedTuple):
    """What of a run fits into the time."""

    steps: int
    why: str = ""
    eval_batches: int | None = None
    """None: all of the validation text."""
    evaluating: float = 0.0
    """Share of the time of training."""
    seconds: float = 0.0
    """That the whole command is expected to take."""


def guess_fit(rung: Rung, budget: Budget) -> Fit:
    """About how many updates fit, from what was timed on the way up."""
    steps = int(budget.seconds_left() * (1 - MOST_EVALUATING) / rung.seconds)
    return Fit(int(clamp(FEWEST_STEPS, steps, rung.most_steps)))


def fit_run(costs: Costs, rung: Rung, n_val: int, budget: Budget, asked: Document) -> Fit:
    """How much of a run fits into what is left; a whole look takes `n_val` sequences.

    Values of train that are `asked` for are not chosen, but what they cost is counted.
    """
    train, sample = rung.run.train, rung.run.sample
    seconds = budget.seconds_left()
    batches = None
    if not is_asked(asked, "eval_batches"):
        batches = choose_eval_batches(costs, rung, n_val, seconds)
    look = costs.evaluation.seconds_for(
        batches * train.batch_size if batches else n_val, rung.n_rows
    )
    each = costs.update + costs.save / train.save_interval
    if sample.interval:
        each += costs.sample / sample.interval
    pages = min(MOST_FOR_PAGES * seconds, LOOKS * budget.ending)
    rest = seconds - pages - costs.begin - costs.sample
    if is_asked(asked, "eval_interval"):
        each += (look + costs.save) / train.eval_interval
    else:
        rest -= LOOKS * (look + costs.save)
    steps, why = int(rest / each), f"what fits into {budget.minutes:g} minutes"
    if is_asked(asked, "max_steps") or is_asked(asked, "epochs"):
        steps, why = rung.run.planned_steps(rung.n_rows), "asked for"
    elif steps < FEWEST_STEPS:
        steps, why = FEWEST_STEPS, f"the fewest: {budget.minutes:g} minutes are too short"
    elif steps > rung.most_steps:
        why = f"{MOST_EPOCHS} passes over the text: more bring nothing, though there is more time"
        steps = rung.most_steps
    why += f"; timed at {1e3 * costs.update:.3g} ms each, optimizer included"
    whole = budget.seconds - rest + steps * each
    return Fit(steps, why, batches, LOOKS * look / (LOOKS * look + steps * each), whole)


def is_asked(asked: Document, key: str) -> bool:
    return asked.value(("train", key)) is not None


def choose_eval_batches(costs: Costs, rung: Rung, n_val: int, seconds: float) -> int | None:
    """Batches of a look for which there is time; None: all of the validation text."""
    pace, most = costs.evaluation, MOST_EVALUATING * seconds / LOOKS
    if pace.seconds_for(n_val, rung.n_rows) <= most:
        return None
    rows = (most - pace.seconds_for(0, rung.n_rows)) / pace.seconds * pace.n_rows
    batches = max(2, int(rows / rung.run.train.batch_size))
    return batches if batches * rung.run.train.batch_size < n_val else None
