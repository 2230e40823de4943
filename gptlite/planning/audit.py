"""Every dropout site of a run: what is planned there, what it costs, and what one real batch drops.

What a site drops is counted in the tensors that pass through its module, not in the masks that were
meant for it; so what is found is what training does.
"""

import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
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
from gptlite.planning.regularisation import Scale, advise_decay, pick_rate

STANDARD_ERRORS = 4
"""Further than this from its rate, a site is off."""
ENOUGH_DROPPED = 20
"""Expected number of dropped units that is worth a verdict; more masks are drawn until then. A
layer is judged by itself where it has as many."""
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


def advice(run: RunConfig, plan: dict[str, Any]) -> Iterator[str]:
    """What is known of these rates and this decay; docs/dropout.md has the sources."""
    live = {site: rate for site, rate in run.dropout.rates().items() if rate > 0}
    rate, why = pick_rate(plan["epochs"])
    if bool(live) != bool(rate):
        yield f"dropout is {'on' if live else 'off'}: the rule says rate {rate:g} for {why}"
    high = [f"{site} {value:g}" for site, value in live.items() if value >= 0.5]
    if high:
        yield f"half and more is much to drop: {', '.join(high)}"
    optim = run.optim
    updates = plan["rows_per_epoch"] / run.train.batch_size
    scale = Scale(plan["train_tokens"], updates, run.model.n_embd)
    if told := advise_decay(optim.name, optim.lr, optim.weight_decay, scale):
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


def planned_rates(run: RunConfig, model: GPT) -> dict[Dropout, float]:
    """The full rate that the config plans for each module: that of its site in its layer."""
    plan, layers = run.dropout.plan(), Counter[str]()
    rates = {}
    for module in dropouts(model):
        rates[module] = plan[module.site].rate_in(layers[module.site], run.model.n_layer)
        layers[module.site] += 1
    return rates


@dataclass
class DropCounts:
    """What passed through a module, or through all modules of a site."""

    units: int = 0
    """Draws that could be told: of values that were not zero before."""
    dropped: int = 0
    expected: float = 0.0
    variance: float = 0.0

    def add(self, units: int, dropped: int, planned: float) -> None:
        rate = cut_of(planned) / RATES
        self.units, self.dropped = self.units + units, self.dropped + dropped
        self.expected += units * rate
        self.variance += units * rate * (1 - rate)

    @property
    def rate(self) -> float:
        return self.dropped / self.units if self.units else 0.0

    @property
    def planned(self) -> float:
        """The rate expected of these units, which are of several layers."""
        return self.expected / self.units if self.units else 0.0

    @property
    def errors_off(self) -> float:
        """Distance of what dropped from what should have, in standard errors."""
        gap = self.dropped - self.expected
        if self.variance:
            return gap / math.sqrt(self.variance)
        return math.copysign(math.inf, gap) if gap else 0.0


def add_up(counts: Iterable[DropCounts]) -> DropCounts:
    each = list(counts)
    return DropCounts(
        units=sum(one.units for one in each),
        dropped=sum(one.dropped for one in each),
        expected=sum(one.expected for one in each),
        variance=sum(one.variance for one in each),
    )


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


Seen = dict[Dropout, DropCounts]


@contextmanager
def watch(
    model: nn.Module, real: Tensor | None, rates: dict[Dropout, float], seen: Seen
) -> Iterator[None]:
    """Count inside what every module drops; the second call of a layer's module has its mask."""
    called: set[Dropout] = set()

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, Dropout)
        if module not in called:
            called.add(module)
            units, dropped = count_dropped(module, inputs[0], output, real)
            seen.setdefault(module, DropCounts()).add(units, dropped, rates[module])

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

    training: Seen = {}
    evaluation: Seen = {}
    planned = planned_rates(run, model)
    live = [site for site, rate in run.dropout.rates().items() if rate]
    with torch.random.fork_rng():
        with torch.no_grad():
            for step in range(MOST_PASSES):
                with watch(model, real, planned, training):
                    logits(step)
                drops = (add_up(layers_of(training, site)).expected for site in live)
                if all(expected >= ENOUGH_DROPPED for expected in drops):
                    break
            with evaluating(model), watch(model, real, planned, evaluation):
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
    sites = []
    for site, rate in run.dropout.rates().items():
        before, after = layers_of(training, site), add_up(layers_of(evaluation, site))
        sites.append(judge_site(site, before, after, rate, inside=site in fused))
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


def layers_of(seen: Seen, site: str) -> list[DropCounts]:
    """What was counted at a site, layer by layer."""
    return [counts for module, counts in seen.items() if module.site == site]


def judge_site(
    site: str, layers: list[DropCounts], evaluation: DropCounts, rate: float, *, inside: bool
) -> dict[str, Any]:
    """What was found at a site, and what is wrong with it, if anything."""
    training, problem = add_up(layers), ""
    if rate and not inside:
        problem = off_its_rate(training, layers, rate)
    elif training.dropped:
        problem = f"drops {training.rate:.5f} in training at rate 0"
    if evaluation.dropped:
        problem = f"leaks: drops {evaluation.rate:.5f} in evaluation"
    return {
        "site": site,
        "rate": rate,
        "planned": None if inside else training.planned,
        "training": None if inside else training.rate,
        "units": training.units,
        "standard_errors_off": training.errors_off if training.variance else 0.0,
        "evaluation": evaluation.rate,
        "problem": problem,
    }


def off_its_rate(training: DropCounts, layers: list[DropCounts], rate: float) -> str:
    """What is wrong with a site in training, judged as a whole and layer by layer."""
    if not training.units:
        return f"dead: rate {rate:g} reaches nothing"
    if not training.dropped and training.errors_off < -STANDARD_ERRORS:
        return f"dead: none of {training.units:,} dropped at rate {rate:g}"
    found = [("", training, float(STANDARD_ERRORS))]
    # The furthest of many layers is further off by chance than a single one.
    bound = math.sqrt(STANDARD_ERRORS**2 + 2 * math.log(len(layers)))
    found += [(f" in layer {i}", one, bound) for i, one in enumerate(layers) if len(layers) > 1]
    for where, counts, most in found:
        judged = counts is training or not 0 < counts.expected < ENOUGH_DROPPED
        if judged and abs(counts.errors_off) > most:
            return (
                f"off{where}: dropped {counts.rate:.5f} of {counts.units:,} at rate "
                f"{counts.planned:.4g}, {counts.errors_off:+.1f} standard errors"
            )
    return ""


def audit_lines(found: dict[str, Any]) -> list[str]:
    """The audit for people."""
    live = [site for site in found["sites"] if site["rate"] or site["problem"]]
    lines = ["audit: what drops of one batch, at full rates"]
    if live:
        lines.append(
            f"{'dropout site':18} {'planned':>8} {'dropped':>8} {'of values':>13} {'off by':>9}"
            "  in evaluation"
        )
    for site in live:
        if site["training"] is None:
            lines.append(
                f"{site['site']:18} {site['rate']:8.4g}  inside a fused kernel: not visible"
            )
            continue
        lines.append(
            f"{site['site']:18} {site['planned']:8.4g} {site['training']:8.5f} {site['units']:13,} "
            f"{site['standard_errors_off']:+6.1f} SE  {site['evaluation']:g}"
        )
    zero = found["zero_gradient_share"]
    lines.append(
        f"parameters with a gradient of exactly 0: {zero['dropout_on']:.4%} with dropout, "
        f"{zero['dropout_off']:.4%} without"
    )
    return [*lines, verdict(found, [site for site in live if site["rate"]])]


def verdict(found: dict[str, Any], live: list[dict[str, Any]]) -> str:
    good = sum(site["training"] is not None and not site["problem"] for site in live)
    count = f"{good} of {len(live)} sites drop as planned"
    if found["problems"]:
        return f"failed: {count}"
    hidden = len(live) - good
    seen = f" ({hidden} inside a fused kernel, not visible)" if hidden else ""
    return f"passed: {count}{seen}, none in evaluation" if live else "passed: no site drops"
