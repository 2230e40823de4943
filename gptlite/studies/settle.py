"""How all runs of a study compute, so that they differ by nothing else than their points.

On a CPU a clock chooses the precision and the attention of a run. It could say otherwise for the
next one, so a study asks it once: two runs of one seed that round differently end apart.
"""

from functools import partial

from gptlite.config.run import RunConfig
from gptlite.runs.origin import given_tokenizer
from gptlite.studies.config import Study
from gptlite.studies.queue import Queue


def share_cores(run: RunConfig, threads: int) -> RunConfig:
    """With the threads of one of several workers, unless the run says how many."""
    if run.train.threads != "auto":
        return run
    return run.model_copy(update={"train": run.train.model_copy(update={"threads": threads})})


def settle(queue: Queue, run: RunConfig) -> RunConfig:
    """With the precision of all runs, except on a machine that has no hardware for that: it
    computes in float32, and the record says so. Then with the attention of all that can use it."""
    from gptlite.core import device

    if run.dtype == "auto":
        dtype = queue.settle_once("dtype", partial(fastest, queue.study, run, "dtype"))
        settled = run.model_copy(update={"dtype": dtype})
        run = run.model_copy(update={"dtype": device.adapt(settled)[0].dtype})
    if run.attention == "auto" and len(kernels := usable_kernels(run)) > 1:
        name = f"attention, {' or '.join(kernels)}"
        kernel = queue.settle_once(name, partial(fastest, queue.study, run, "attention"))
        run = run.model_copy(update={"attention": kernel})
    return run


def usable_kernels(run: RunConfig) -> list[str]:
    import torch

    from gptlite.core import device
    from gptlite.planning import auto

    return auto.usable_kernels(run, torch.device(device.pick_device(run.device)[0]))[0]


def fastest(study: Study, run: RunConfig, key: str) -> str:
    """The `dtype` or `attention` with which this machine makes the largest updates of the study
    that may choose as this run may: they are waited for, and a small model says nothing of them."""
    from gptlite.data.prepare import prepare
    from gptlite.planning import auto

    kernels = usable_kernels(run)
    alike = [
        other.model_copy(update={"dtype": run.dtype})
        for other in study.first_runs()
        if getattr(other, key) == "auto" and (key == "dtype" or usable_kernels(other) == kernels)
    ]
    largest = share_cores(max([run, *alike], key=work_of_update), int(run.train.threads))
    files = prepare(largest, given_tokenizer(largest))
    n_rows = files.rows("train", largest.model.context_length).n_rows
    chosen, _ = auto.resolve_run(largest, vocab_size=files.meta["vocab_size"], n_rows=n_rows)
    return str(getattr(chosen, key))


def work_of_update(run: RunConfig) -> int:
    """In proportion to its FLOPs: tokens times parameters."""
    return run.train.batch_size * run.model.context_length * run.model.n_parameters(0)
