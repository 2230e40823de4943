"""Every dropout site of a run: what is planned there, what it costs, and what one real batch drops.

What a site drops is counted in the tensors that pass through its module, not in the masks that were
meant for it; so what is found is what training does.
"""

import math
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptlite.config.dropout import RATES, SITES
from gptlite.config.run import RunConfig
from gptlite.core.dropout import Dropout, dropouts, evaluating, set_strength, strength_at
from gptlite.core.loss import mean_nats
from gptlite.core.masks import cut_of, mask_keys, sample_keys
from gptlite.core.model import GPT, Attention, to_device
from gptlite.core.precision import HALF, LossScaler, precision
from gptlite.data.batches import Layout, batch_at
from gptlite.errors import DivergedError
from gptlite.planning.regularisation import advise_decay, pick_rate

STANDARD_ERRORS = 4
"""Further than this from its rate, a site is off."""
ENOUGH_DROPPED = 20
"""Expected number of dropped units that is worth a verdict; more masks are drawn until then."""
MOST_PASSES = 16


def site_plan(run: RunConfig, model: GPT, n_rows: int) -> list[dict[str, Any]]:
    """One entry per site: its modules, shapes, rates over the run, and who draws its masks.

    `n_rows` is the number of rows in an epoch.
    """
    n_steps, part = run.planned_steps(n_rows), run.train.micro_batch_size
    assert isinstance(part, int)
    moments = {"start": 0, "middle": n_steps // 2, "end": n_steps - 1}
    strength = {m: strength_at(at, n_steps, run.dropout.schedule) for m, at in moments.items()}
    native, entries = run.dropout.native_sites(run.attention), []
    for site, planned in run.dropout.plan().items():
        names = [n for n, m in model.named_modules() if isinstance(m, Dropout) and m.site == site]
        shape = tensor_shape(run, SITES[site].tensor, part)
        by = ("native" if site in native else "keyed") if planned.rate else "-"
        fused = site in run.dropout.fused_sites(run.attention)
        entries.append(
            {
                "site": site,
                "module": re.sub(r"\.\d+\.", ".*.", names[0]) if names else "",
                "modules": len(names),
                "rate": planned.rate,
                "rates": {m: planned.rate * share for m, share in strength.items()},
                "by_layer": [planned.rate_in(i, run.model.n_layer) for i in range(len(names))],
                "profile": planned.profile,
                "scale": "inverted" if planned.inverted else "none",
                "shape": shape,
                "mask": tensor_shape(run, mask_letters(site, planned.locked), part),
                "elements_per_update": math.prod(shape) * len(names) * run.train.batch_size // part,
                "masks": "native, inside the fused kernel" if fused else by,
            }
        )
    return entries


def advice(run: RunConfig, epochs: float, text_tokens: float) -> Iterator[str]:
    """What is known of these rates and this decay; docs/dropout.md has the sources."""
    live = {site: rate for site, rate in run.dropout.rates().items() if rate > 0}
    rate, why = pick_rate(epochs)
    if live and not rate:
        yield f"dropout in {why} (rate 0)"
    if not live and rate:
        yield f"no dropout in {why} (rate {rate:g})"
    high = [f"{site} {value:g}" for site, value in live.items() if value >= 0.5]
    if high:
        yield f"half and more is much to drop: {', '.join(high)}"
    optim = run.optim
    if told := advise_decay(optim.name, optim.lr, optim.weight_decay, text_tokens):
        yield told


def mask_letters(site: str, locked: bool) -> str:
    return SITES[site].locked if locked else SITES[site].mask


def tensor_shape(run: RunConfig, letters: str, part: int) -> list[int]:
    """A shape in numbers, for `part` sequences of full length."""
    model = run.model
    length = {"T": model.context_length, "S": model.context_length}
    width = {"C": model.n_embd, "D": model.head_width, "F": model.mlp_width}
    heads = {"H": model.n_head, "Z": model.n_head * model.head_width}
    return [{"B": part, "1": 1, **heads, **length, **width}[s] for s in letters]


def site_seconds(run: RunConfig, model: GPT, entry: dict[str, Any]) -> float:
    """Measured: forward and backward of a site alone, times its modules and parts of a batch."""
    found = [m for m in dropouts(model) if m.site == entry["site"] and m.rate > 0]
    if not found or entry["masks"].startswith("native, inside"):
        return 0.0
    device, (part, *_) = torch.device(run.device), entry["shape"]
    keys = mask_keys(
        sample_keys(run.seed, 0, np.arange(part)).to(device),
        torch.arange(run.model.context_length, device=device)[None],
        None,
    )
    wide = entry["site"] in ("token", "embedding", "layer", "final")
    dtype = torch.float32 if wide else HALF.get(run.dtype, torch.float32)
    times = []
    with torch.random.fork_rng():
        x = torch.randn(entry["shape"], device=device, dtype=dtype, requires_grad=True)
        module = found[-1].to(device).train()
        for _ in range(7):
            began = time.perf_counter()
            y = module(x, keys)
            torch.autograd.grad(y, x, y.detach())
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    calls = len(found) * (2 if entry["site"] == "layer" else 1)  # once per branch
    return statistics.median(times) * calls * run.train.batch_size / part


@dataclass
class DropCounts:
    """What passed through the modules of one site."""

    units: int = 0
    """Draws that could be told: of values that were not zero before."""
    dropped: int = 0
    expected: float = 0.0
    variance: float = 0.0

    def add(self, module: Dropout, units: int, dropped: int) -> None:
        rate = cut_of(module.p) / RATES
        self.units, self.dropped = self.units + units, self.dropped + dropped
        self.expected += units * rate
        self.variance += units * rate * (1 - rate)

    @property
    def rate(self) -> float:
        return self.dropped / self.units if self.units else 0.0

    @property
    def errors_off(self) -> float:
        """Distance of what dropped from what should have, in standard errors."""
        gap = self.dropped - self.expected
        return gap / math.sqrt(self.variance) if self.variance else math.copysign(math.inf, gap)


def count_dropped(module: Dropout, x: Tensor, y: Tensor, real: Tensor | None) -> tuple[int, int]:
    """How many draws of a module can be told from what went in and came out, and how many drop."""
    alive = x != 0
    if real is not None and module.kind.tensor.startswith("BT"):
        alive &= real[..., None]
    elif real is not None:
        alive &= real[:, None, :, None]
    fallen = alive & (y == 0)
    letters = mask_letters(module.site, module.plan.locked)
    if shared := [i for i, letter in enumerate(letters) if letter == "1"]:
        fallen = (fallen == alive).all(dim=shared)
        alive = alive.any(dim=shared)
        fallen &= alive
    return int(alive.sum()), int(fallen.sum())


@contextmanager
def watch(model: nn.Module, real: Tensor | None, seen: dict[str, DropCounts]) -> Iterator[None]:
    """Count inside what every module drops; the second call of a layer's module has its mask."""
    called: set[Dropout] = set()

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, Dropout)
        if module not in called:
            called.add(module)
            seen[module.site].add(module, *count_dropped(module, inputs[0], output, real))

    hooks = [module.register_forward_hook(look) for module in dropouts(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def audit(run: RunConfig, model: GPT, rows: Layout) -> dict[str, Any]:
    """What one real batch drops at full rates, in training and in evaluation, and all problems.

    A site has a problem if it is dead, drops in evaluation, or is off its rate by more than
    STANDARD_ERRORS. Changes the model's gradients and rates.
    """
    for module in model.modules():
        if isinstance(module, Attention) and module.kernel == "fused":
            module.kernel = "math"  # draws the same masks where they can be seen
    batch = batch_at(rows, seed=run.seed, step=0, batch_size=run.train.batch_size)
    assert isinstance(run.train.micro_batch_size, int)
    batch, device = batch.part(0, run.train.micro_batch_size), torch.device(run.device)
    model.to(device).train()
    inputs, targets, real = to_device(batch, device)

    def logits(step: int = 0) -> Tensor:
        torch.manual_seed(step)  # for native masks; keyed ones have no generator
        samples = sample_keys(run.seed, step, np.arange(len(inputs))).to(device)
        with precision(run):
            return model(inputs, real, samples=samples)

    training, evaluation = ({site: DropCounts() for site in SITES} for _ in range(2))
    rates = run.dropout.rates()
    with torch.random.fork_rng():
        with torch.no_grad():
            for step in range(MOST_PASSES):
                with watch(model, real, training):
                    logits(step)
                if all(s.expected >= ENOUGH_DROPPED for site, s in training.items() if rates[site]):
                    break
            with evaluating(model), watch(model, real, evaluation):
                quiet, again = logits(0), logits(1)
        if not quiet.isfinite().all():
            raise DivergedError("audit: the model's logits are not finite")
        scaler = LossScaler(run.dtype, device)
        zero = {"dropout_on": zero_gradient_share(model, scaler, logits(), targets)}
        set_strength(model, 0.0)
        off = logits()
        zero["dropout_off"] = zero_gradient_share(model, scaler, off, targets)
    norm = torch.linalg.vector_norm  # that of a tensor warns on Apple's GPUs
    distance = norm(off.detach() - quiet) / norm(quiet)
    fused = run.dropout.fused_sites(run.attention)
    sites = [
        judge_site(site, training[site], evaluation[site], rates[site], site in fused)
        for site in SITES
    ]
    problems = [f"dropout.sites.{s['site']}: {s['problem']}" for s in sites if s["problem"]]
    if not torch.equal(quiet, again):
        problems.append("dropout: two passes of evaluation differ; something drops there")
    if distance > 1e-2:
        problems.append("dropout: with every site at rate 0 training differs from evaluation")
    return {"sites": sites, "zero_gradient_share": zero, "problems": problems}


def zero_gradient_share(model: GPT, scaler: LossScaler, logits: Tensor, targets: Tensor) -> float:
    """Share of the parameters whose gradient is exactly zero."""
    model.zero_grad(set_to_none=True)
    scaler.scale(mean_nats(logits, targets)).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    zeros = sum(int((gradient == 0).sum()) for gradient in gradients)
    return zeros / sum(gradient.numel() for gradient in gradients)


def judge_site(
    site: str, training: DropCounts, evaluation: DropCounts, rate: float, inside: bool
) -> dict[str, Any]:
    """What was found at a site, and what is wrong with it, if anything."""
    problem = ""
    if rate and not inside:
        if not training.units:
            problem = f"dead: rate {rate:g} reaches nothing"
        elif not training.dropped and training.errors_off < -STANDARD_ERRORS:
            problem = f"dead: none of {training.units:,} dropped at rate {rate:g}"
        elif abs(training.errors_off) > STANDARD_ERRORS:
            problem = (
                f"off: dropped {training.rate:.5f} of {training.units:,} at rate {rate:g}, "
                f"{training.errors_off:+.1f} standard errors"
            )
    elif training.dropped:
        problem = f"drops {training.rate:.5f} in training at rate 0"
    if evaluation.dropped:
        problem = f"leaks: drops {evaluation.rate:.5f} in evaluation"
    return {
        "site": site,
        "rate": rate,
        "training": None if inside else training.rate,
        "units": training.units,
        "standard_errors_off": training.errors_off if training.variance else 0.0,
        "evaluation": evaluation.rate,
        "problem": problem,
    }


def audit_lines(found: dict[str, Any]) -> list[str]:
    """The audit for people."""
    lines = [
        f"{'dropout site':18} {'rate':>8} {'training':>10} {'of units':>12} {'off by':>9} eval"
    ]
    for site in found["sites"]:
        if site["training"] is None:
            lines.append(f"{site['site']:18} {site['rate']:8g} inside a fused kernel: not visible")
        elif site["rate"] or site["problem"]:
            lines.append(
                f"{site['site']:18} {site['rate']:8g} {site['training']:10.5f} "
                f"{site['units']:12,} {site['standard_errors_off']:+6.1f} SE {site['evaluation']:g}"
            )
    zero = found["zero_gradient_share"]
    lines.append(
        f"parameters with a gradient of exactly 0: {zero['dropout_on']:.4%} with dropout, "
        f"{zero['dropout_off']:.4%} without"
    )
    return lines
