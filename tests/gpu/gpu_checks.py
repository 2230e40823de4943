"""The checks of gpu_check.py that ask whether a GPU computes what a CPU does, and repeats it."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_runs import (
    RECIPE,
    Failed,
    Place,
    Steps,
    count_graphs,
    describe_run,
    forget_graphs,
    make_trainer,
    relative_difference,
    resolve_run,
)
from torch import Tensor
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.config.dropout import SITES, SitePlan
from gptlite.config.run import RunConfig
from gptlite.core.device import native_precisions
from gptlite.core.dropout import Dropout
from gptlite.core.masks import MaskKeys, mask_keys, sample_keys
from gptlite.core.precision import HALF
from gptlite.runs import start
from gptlite.runs.checkpoint import folder_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLANS = (SitePlan(0.1), SitePlan(0.5), SitePlan(1 / 65536))


class Sample(NamedTuple):
    """What passes through a site, and the names of its masks."""

    x: Tensor
    keys: MaskKeys


def sample_of(site: str, dtype: torch.dtype, device: str, *, small: bool, padded: bool) -> Sample:
    """The same values whatever the device: drawn on the CPU."""
    B, T = (3, 9) if small else (16, 129)
    sizes = {"B": B, "H": 3, "T": T, "S": T, "D": 7 if small else 65, "C": 21 if small else 771}
    sizes["Z"] = sizes["C"]
    sizes["F"] = 4 * sizes["C"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn([sizes[letter] for letter in SITES[site].tensor], generator=generator)
    position, real = torch.arange(T)[None], None
    if padded:
        real = torch.arange(T)[None] >= torch.arange(B)[:, None] % (T // 2)  # on the left
        position = (real.long().cumsum(1) - 1).clamp(min=0)
        real = real.to(device)
    samples = sample_keys(1337, 7, np.arange(B)).to(device)
    keys = mask_keys(samples, position.to(device), real)
    return Sample(x.to(dtype).to(device).requires_grad_(), keys)


def run_site(module: Dropout, sample: Sample) -> list[Tensor]:
    """What comes out, and what goes back, on the CPU."""
    y = module(*sample)
    y.backward(torch.ones_like(y))
    assert sample.x.grad is not None
    return [y.detach().cpu(), sample.x.grad.cpu()]


def count_different(ours: list[Tensor], theirs: list[Tensor]) -> tuple[int, int]:
    """(values, values of which a bit differs)."""
    whole = {4: torch.int32, 2: torch.int16}  # -0.0 is not 0.0, and NaN is itself
    bits = [[x.contiguous().view(whole[x.itemsize]) for x in each] for each in (ours, theirs)]
    differ = sum(int((a != b).sum()) for a, b in zip(*bits, strict=True))
    return sum(x.numel() for x in ours), differ


def plans_of(site: str) -> Iterator[SitePlan]:
    yield from PLANS
    if SITES[site].by_feature:
        yield SitePlan(0.3, locked=True)
    if site == "layer":
        yield SitePlan(0.3, inverted=False)


def check_masks(place: Place) -> Steps:
    """Every site with every kind of mask: forward and backward, with and without padding."""
    yield ("site", "values", "of which a bit differs from the CPU's")
    total, wrong = 0, list[str]()
    for site in SITES:
        n, differ = 0, 0
        for plan in plans_of(site):
            modules = [Dropout(site, plan, n_head=3).train() for _ in range(2)]
            modules[1].to(place.device)
            for dtype in DTYPES:
                for padded in (False, True):
                    sizes = {"small": place.small, "padded": padded}
                    cpu = run_site(modules[0], sample_of(site, dtype, "cpu", **sizes))
                    own = run_site(modules[1], sample_of(site, dtype, place.device, **sizes))
                    here = count_different(cpu, own)
                    n, differ = n + here[0], differ + here[1]
        yield (site, f"{n:,}", f"{differ:,}")
        total, wrong = total + n, [*wrong, site] if differ else wrong
    if place.on_gpu and place.lacks_compiler() is None:
        n, differ = compare_compiled(place)
        yield ("all sites, compiled", f"{n:,}", f"{differ:,}")
        total, wrong = total + n, [*wrong, "compiled"] if differ else wrong
    if wrong:
        raise Failed(f"masks differ at: {', '.join(wrong)}")
    return f"{total:,} values equal those of the CPU bit for bit"


def compare_compiled(place: Place) -> tuple[int, int]:
    """All sites in one graph on the device, against the CPU without one."""
    forget_graphs()
    modules = {site: Dropout(site, SitePlan(0.3), n_head=3).train() for site in SITES}
    sizes = {"small": place.small, "padded": False}
    ours = {site: sample_of(site, torch.float32, "cpu", **sizes) for site in SITES}
    cpu = [x for site in SITES for x in run_site(modules[site], ours[site])]
    theirs = {site: sample_of(site, torch.float32, place.device, **sizes) for site in SITES}
    for module in modules.values():
        module.to(place.device)

    def everything(inputs: dict[str, Sample]) -> dict[str, Tensor]:
        return {site: modules[site](*sample) for site, sample in inputs.items()}

    outputs = torch.compile(everything)(theirs)
    torch.autograd.backward([y.sum() for y in outputs.values()])
    own = []
    for site in SITES:
        grad = theirs[site].x.grad
        assert grad is not None
        own += [outputs[site].detach().cpu(), grad.cpu()]
    assert count_graphs()[0] >= 1
    return count_different(cpu, own)


def learn_losses(place: Place, n: int, until: int, **top: Any) -> list[float]:
    """Losses of the first updates of n, of a small model; the same batches and masks each time."""
    shape = place.sizes({**RECIPE, "n_layer": 4, "n_head": 4, "n_embd": 256})
    train = {"max_steps": n, "batch_size": 32, "early_stop": "never"}
    dropout, optim = {"preset": "gpt2", "masks": "keyed"}, {"warmup_steps": n // 10}
    run = describe_run(place, model=shape, train=train, dropout=dropout, optim=optim, **top)
    return [update.loss for update in make_trainer(run).updates(until)]


def check_precision(place: Place) -> Steps:
    """float32 on the device against the CPU, then 16 bits against float32, by training."""
    n, few = (20, 3) if place.small else (200, 3)
    yield ("what", "updates", "loss", "relative difference")
    cpu = learn_losses(place._replace(device="cpu"), n, few, dtype="float32")
    single = learn_losses(place, n, n, dtype="float32")
    apart = max(relative_difference(a, b) for a, b in zip(cpu, single[:few], strict=True))
    yield ("float32, against the CPU", f"{few}", f"{single[few - 1]:.5f}", f"{apart:.1e}")
    if apart > 1e-3:
        raise Failed(f"float32 is {apart:.1e} away from the CPU after {few} updates")
    base, wrong = statistics.mean(single[-10:]), []
    yield ("float32", f"{n}", f"{base:.4f}", "")
    for dtype in HALF:
        if dtype not in native_precisions(torch.device(place.device)):
            yield (dtype, "", "", "skipped: no hardware for it")
            continue
        loss = statistics.mean(learn_losses(place, n, n, dtype=dtype)[-10:])
        yield (dtype, f"{n}", f"{loss:.4f}", f"{relative_difference(loss, base):.1e}")
        wrong += [dtype] if relative_difference(loss, base) > 0.02 else []
    if wrong:
        raise Failed(f"{', '.join(wrong)}: more than 2 % away from float32")
    return "float32 follows the CPU, 16 bits train as float32 does, to 2 % of the loss"


KINDS: dict[str, dict[str, Any]] = {
    "no dropout": {"dropout": {"preset": "none"}},
    "dropout, keyed masks": {"dropout": {"preset": "gpt2", "masks": "keyed"}},
    "dropout, auto": {"dropout": {"preset": "gpt2"}},
}


class Learned(NamedTuple):
    """What a run left: the losses of its updates, the sha256 of its weights and moments."""

    losses: list[float]
    digests: dict[str, str]


def learn(run: RunConfig, directory: Path, *, resume: bool = False) -> Learned:
    """Train by the product itself: checkpoints on the disk, read back by who resumes."""
    start.train(run, directory, resume=resume)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = run.train.max_steps
    assert steps is not None
    state = json.loads((directory / "checkpoints" / folder_name(steps) / "state.json").read_text())
    return Learned([row["train/loss"] for row in rows], state["files"])


def learn_thrice(run: RunConfig, folder: Path) -> list[Learned]:
    """The run, the run again, and the run in two halves."""
    n = run.train.max_steps
    assert n is not None
    shorter = run.train.model_copy(update={"max_steps": n // 2})
    straight, again = (learn(run, folder / name) for name in ("straight", "again"))
    learn(run.model_copy(update={"train": shorter}), folder / "halves")
    return [straight, again, learn(run, folder / "halves", resume=True)]


def check_resume(place: Place) -> Steps:
    """The same run twice, and once more in two halves, with weights compared by their sha256."""
    yield ("run", "attention", "dtype", "repeated", "resumed", "largest difference of a loss")
    exact, far = list[str](), list[str]()
    shape = place.sizes({**RECIPE, "n_layer": 4, "n_head": 4, "n_embd": 256})
    steps = {"max_steps": 6 if place.small else 40, "batch_size": 16, "early_stop": "never"}
    train = {**steps, "log_interval": 1, "eval_batches": 2}
    optim = {"schedule": "constant", "warmup_steps": 0}  # the same for half of the updates
    for number, (kind, top) in enumerate(KINDS.items()):
        run = resolve_run(describe_run(place, model=shape, optim=optim, train=train, **top))
        straight, *others = learn_thrice(run, place.folder / f"{place.name}-{number}")
        same = [straight == other for other in others]
        both = [loss for other in others for loss in other.losses]
        apart = max(
            relative_difference(a, b) for a, b in zip(straight.losses * 2, both, strict=True)
        )
        words = ["exact" if each else "differs" for each in same]
        yield (kind, run.attention, run.dtype, *words, f"{apart:.1e}")
        exact += [kind] if all(same) else []
        far += [kind] if apart > 0.01 else []
    if far:
        raise Failed(f"{', '.join(far)}: a loss is more than 1 % away; that is no rounding")
    if left := [kind for kind in KINDS if kind not in exact]:
        return f"not bit for bit: {'; '.join(left)}"
    return "every run is repeated and resumed bit for bit"


def check_deterministic(place: Place) -> Steps:
    """The same with torch's deterministic algorithms, where it has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    return (yield from check_resume(place))


def check_commands(place: Place) -> Steps:
    """The commands, one after the other, on a tiny run: whether each works on the device."""
    yield ("command", "exit code")
    run, sets = str(place.folder / "commands"), ["--set", f"device={place.device}"]
    sets += ["--set", f"data.cache_dir={place.folder}/cache"]
    wrong = list[str]()
    for words in (
        ["plan", "--config", "debug", "--audit", *sets],
        ["train", "--config", "debug", "--out-dir", run, *sets],
        ["train", "--resume", run],
        ["eval", "--run", run, "--suite", "loss" if place.small else "all", "--fast"],
        ["eval", "--run", run, "--dropout-active"],
        ["generate", "--run", run, "--prompt", "The", "--prompt", "A function", "--json"],
        ["export", "--run", run, "--out", f"{run}-hf"],
    ):
        result = CliRunner().invoke(app, words)
        yield (
            f"`gptlite {words[0]}{' --audit' if '--audit' in words else ''}`",
            f"{result.exit_code}",
        )
        if result.exit_code:
            print(result.output, result.exception, flush=True)
            wrong.append(words[0])
    if wrong:
        raise Failed(f"these commands fail: {', '.join(wrong)}")
    return "every command works"
