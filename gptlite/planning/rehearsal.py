"""What the parts of a run cost on this machine, measured by doing a little of each.

A Trainer that is made for it works at a learning rate of 0, so weights stay as they are; torch's
generators are left as they were, and what is written is deleted again.
"""

import math
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from gptlite import storage
from gptlite.config.dropout import DropoutSchedule
from gptlite.config.run import RunConfig
from gptlite.core.evaluate import TRAIN_SUBSET_ROWS, byte_lengths, eval_rows, measure
from gptlite.core.generate import Generation
from gptlite.core.train import Trainer
from gptlite.core.world import ALONE, World
from gptlite.data.token_files import TokenFiles
from gptlite.data.tokenizers import Tokenizer
from gptlite.planning import auto
from gptlite.planning.memory import keep_freed

LONGEST = 4.0
"""Seconds that an update may take to be timed as a whole, or the batches of an evaluation."""
FEW_ROWS = 4
"""Sequences that are timed first, and alone of what takes longer."""
BATCHES = 4
"""Of an evaluation that is timed: in a whole one the check of the first batch counts little."""
FEWEST = 3
"""Times that count of what is timed for long: a single one may be any time on a busy machine."""
FORWARD = 1 / 3
"""Of the time of an update, for the sequences of an evaluation: it only goes forward."""
ENDLESS = 1 << 62


class Pace(NamedTuple):
    seconds: float
    """Of a whole update."""
    n_rows: int
    """Sequences of it that were timed."""


class EvaluationPace(NamedTuple):
    seconds: float
    """Of a batch."""
    n_rows: int
    """Sequences in it."""

    def seconds_for(self, n_val: int, n_train: int) -> float:
        """Seconds for both losses of a session, of so many sequences; of each, the first batch is
        computed twice, to see that nothing random is live."""
        counts = n_val, min(n_train, TRAIN_SUBSET_ROWS)
        return self.seconds * sum(-(-count // self.n_rows) + 1 for count in counts)


class Costs(NamedTuple):
    """What a run does, each in seconds."""

    begin: float
    """To choose what is `auto` and to make the model, and what the first update takes longer."""
    update: float
    evaluation: EvaluationPace
    save: float
    sample: float


def make_idle_trainer(run: RunConfig, files: TokenFiles, world: World = ALONE) -> Trainer:
    """A Trainer of a resolved run whose updates cost what those of training do, and change nothing.

    Dropout is at its full rates, whatever its schedule begins with.
    """
    keep_freed()  # as in training: small updates are several percent faster with it
    still = run.optim.model_copy(update={"lr": 0.0, "min_lr": 0.0})
    full = run.dropout.model_copy(update={"schedule": DropoutSchedule()})
    with keep_generators(torch.device(run.device)):
        run = run.model_copy(update={"optim": still, "dropout": full})
        rows = files.rows("train", run.model.context_length)
        return Trainer(run, rows, files.meta["vocab_size"], world)


def keep_generators(device: torch.device) -> AbstractContextManager[None]:
    """Inside, what torch draws at random leaves no trace."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def time_updates(trainer: Trainer, seconds: float = 1.0) -> Pace:
    """Batch, forward, backward, clipping and optimizer, as training does them, for so long.

    Of an update that takes longer than LONGEST only a few sequences are timed, and the
    optimizer by itself: it works once an update, of however many sequences that is.
    """
    whole, size = trainer.own, trainer.run.train.micro_batch_size
    assert isinstance(size, int)
    n_rows = whole.stop - whole.start
    few = min(n_rows, size, FEW_ROWS)
    update = partial(next, trainer.updates(ENDLESS))
    with keep_generators(trainer.device):
        trainer.own = slice(whole.start, whole.start + few)
        part = typical_seconds(update, 0.0)
        trainer.own = whole
        if part * n_rows / few <= LONGEST:
            return Pace(typical_seconds(update, seconds), n_rows)
        step = typical_seconds(partial(step_optimizer, trainer), 0.0)
    return Pace(step + max(0.0, part - step) * n_rows / few, few)


def step_optimizer(trainer: Trainer) -> None:
    """With gradients of 0: how long it takes does not depend on their values."""
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step(0.0)
    trainer.optimizer.zero_grad()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def time_evaluation(trainer: Trainer, files: TokenFiles, seconds: float = 0.5) -> EvaluationPace:
    """The model measured on a few batches of its text, for so long; where that would take long, as
    with updates, on a few sequences."""
    run = trainer.run
    n_rows, lengths = eval_rows(run, files.meta["vocab_size"]), byte_lengths(files.tokenizer)

    def per_pass(rows: int, count: int, seconds: float) -> float:
        batches = list(trainer.rows.sweep(rows, count * rows))
        evaluate = partial(measure, trainer.model, batches, run, lengths)
        return typical_seconds(evaluate, seconds) / (len(batches) + 1)

    few = min(n_rows, FEW_ROWS)
    whole = per_pass(few, 1, 0.0) * n_rows / few
    if whole * (BATCHES + 1) <= LONGEST:
        whole = per_pass(n_rows, BATCHES, seconds)
    return EvaluationPace(whole, n_rows)


def count_evaluated(run: RunConfig, files: TokenFiles) -> int:
    """Sequences of the validation split that an evaluation of the run takes."""
    rows, batches = files.rows("val", run.model.context_length), run.train.eval_batches
    return rows.n_swept if batches == "all" else min(rows.n_swept, batches * run.train.batch_size)


def time_save(trainer: Trainer) -> float:
    """As much as a checkpoint holds, written, synced and digested beside the token files."""
    cache = Path(trainer.run.data.cache_dir)
    work = storage.temporary_path(
        (cache if cache.is_dir() else Path(tempfile.gettempdir())) / "save"
    )

    def save() -> None:
        storage.disk.make_folder(work)
        for name, tensors in trainer.tensors().items():
            storage.disk.fill(work / name, partial(save_file, tensors))
            storage.disk.sync(work / name)
            storage.file_digest(work / name)
        for name in ("state.json", "best", "last"):
            storage.write_text(work / name, "")
        storage.remove(work)

    try:
        return typical_seconds(save, 0.0)
    finally:
        storage.discard(work)


def time_sample(trainer: Trainer, text: Tokenizer) -> float:
    """The run's own sample, as long as it may become: an untrained model often ends it early."""
    run, documents = trainer.run, trainer.run.data.layout == "documents"
    generation = Generation(
        trainer.model,
        text,
        run.sample.prompts,
        run.sample,
        seed=run.seed,
        num_samples=8 if documents else 1,
        documents=documents,
    )
    began = perf_counter()
    longest = max(result["tokens"] for result in generation.results())
    return (perf_counter() - began) * run.sample.max_new_tokens / longest


def rehearse(run: RunConfig, files: TokenFiles, seconds: float) -> Costs:
    """What this run costs; its updates are timed for about so many seconds."""
    began = perf_counter()
    n_rows = files.rows("train", run.model.context_length).n_rows
    resolved, _ = auto.resolve_run(run, vocab_size=files.meta["vocab_size"], n_rows=n_rows)
    trainer = make_idle_trainer(resolved, files)
    with keep_generators(trainer.device):
        next(trainer.updates(ENDLESS))
        begin = perf_counter() - began
        update = time_updates(trainer, seconds).seconds
        return Costs(
            begin=max(0.0, begin - update),
            update=update,
            evaluation=time_evaluation(trainer, files),
            save=time_save(trainer),
            sample=time_sample(trainer, files.tokenizer),
        )


def foresee(run: RunConfig, files: TokenFiles, world: World, steps: int) -> float | None:
    """About how many seconds so many updates of a resolved run take, with their evaluations; None
    where a model by itself does not tell. It is timed for a hundredth of that, a second at most.

    Nothing is compiled for it: that takes longer.
    """
    if run.distill.teachers or (world.size > 1 and run.distributed.engine == "fsdp"):
        return None
    alone = World(world.size)
    trainer = make_idle_trainer(run.model_copy(update={"compile": False}), files, alone)
    seconds = time_updates(trainer, 0.0).seconds
    longer = min(1.0, steps * seconds / 100)
    if longer > seconds:
        seconds = time_updates(trainer, longer).seconds
    n_rows = count_evaluated(run, files) + min(trainer.rows.n_rows, TRAIN_SUBSET_ROWS)
    evaluation = FORWARD * seconds * n_rows / run.train.batch_size
    whole = steps * seconds + math.ceil(steps / run.train.eval_interval) * evaluation
    return min(whole, 60 * (run.train.max_minutes or math.inf))


def typical_seconds(act: Callable[[], object], seconds: float) -> float:
    """Median of what `act` takes, over about so many seconds and at least FEWEST times; of no
    seconds, what it takes once. Its first time does not count."""
    act()
    times: list[float] = []
    fewest = FEWEST if seconds else 1
    while len(times) < fewest or sum(times) < seconds:
        began = perf_counter()
        act()
        times.append(perf_counter() - began)
    return statistics.median(times)
