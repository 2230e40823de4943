"""Optimizers and learning-rate schedules. Every parameter belongs to exactly one group.

State is saved under the parameters' names, so it does not depend on their order.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptlite.config.run import OptimConfig
from gptlite.core.world import ALONE, World

WSD_DECAY = 0.2
"""Share of the run over which schedule wsd falls."""


def lr_at(step: int, max_steps: int, optim: OptimConfig, tail_from: int | None = None) -> float:
    """The learning rate of update `step`, counted from 0; a pure function, so resuming is exact.

    `tail_from` is the update with which schedule wsd begins to fall, where a clock has decided it.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    done = (step - optim.warmup_steps) / max(1, max_steps - 1 - optim.warmup_steps)
    done = min(1.0, done)
    if optim.schedule == "constant":
        return optim.lr
    if tail_from is not None:
        done = max(0.0, (step + 1 - tail_from) / (max_steps - tail_from))
    elif optim.schedule == "wsd":
        done = max(0.0, done - (1 - WSD_DECAY)) / WSD_DECAY
    if optim.schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return optim.lr + (optim.min_lr - optim.lr) * done


def weight_decay_at(
    step: int, max_steps: int, optim: OptimConfig, tail_from: int | None = None
) -> float:
    """The weight decay of update `step`, counted from 0, which the learning rate still multiplies:
    AdamW and Muon take lr * weight_decay of each weight away (Loshchilov and Hutter 2019)."""
    if optim.weight_decay_schedule == "with_lr":
        return optim.weight_decay * lr_at(step, max_steps, optim, tail_from) / optim.lr
    if optim.weight_decay_schedule == "linear":
        return optim.weight_decay * (1 - min(1.0, step / max(1, max_steps - 1)))
    return optim.weight_decay


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """matrices of the blocks, tables (embeddings and output), vectors (biases and norms)."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "tables": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            groups["vectors"].append(parameter)
        else:
            groups["matrices" if name.startswith("blocks.") else "tables"].append(parameter)
    return groups


def adamw(
    groups: dict[str, list[nn.Parameter]], optim: OptimConfig, dtype: torch.dtype
) -> Iterable[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019), fused."""
    decayed = {"params": groups["matrices"] + groups["tables"], "weight_decay": optim.weight_decay}
    plain = {"params": groups["vectors"], "weight_decay": 0.0}
    both = [group for group in (decayed, plain) if group["params"]]
    return [torch.optim.AdamW(both, lr=optim.lr, betas=optim.betas, fused=True)]


def muon(
    groups: dict[str, list[nn.Parameter]], optim: OptimConfig, dtype: torch.dtype
) -> Iterable[torch.optim.Optimizer]:
    """Muon for matrices, scaled so that AdamW's learning rate fits it (Liu et al., 2502.16982)."""
    matrices = Muon(
        groups["matrices"],
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    matrices.dtype = dtype
    return [matrices, *adamw({**groups, "matrices": []}, optim, dtype)]


class Muon(torch.optim.Muon):
    """torch's, with all matrices of one shape orthogonalised together: half the time if small."""

    dtype = torch.float32
    """Of the products; bfloat16 does as well where the device has it (kellerjordan.github.io)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                update = orthogonal(
                    self.momentum(parameters, group["momentum"]), self.dtype
                ).float()
                lr = group["lr"]
                for parameter, direction in zip(parameters, update, strict=True):
                    parameter.mul_(1 - lr * group["weight_decay"])
                    parameter.add_(direction, alpha=-lr * 0.2 * math.sqrt(max(shape)))

    def momentum(self, parameters: list[Tensor], momentum: float) -> Tensor:
        """Nesterov's, (number, rows, columns)."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        kept = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        for buffer, gradient in zip(kept, gradients, strict=True):
            buffer.lerp_(gradient, 1 - momentum)
        return torch.stack(gradients).lerp(torch.stack(kept), momentum)


def orthogonal(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, rows, columns) → the nearest matrices with singular values near 1, in `dtype`.

    Five Newton-Schulz steps of Jordan's quintic (kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT.to(dtype) if tall else x.to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


OPTIMIZERS: dict[str, Callable[..., Iterable[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "muon": muon,
}


STATE_KEYS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum_buffer",),
}
"""What each optimizer remembers per parameter."""


class Optimizer:
    """The optimizers of a run, used as one."""

    def __init__(
        self, model: nn.Module, optim: OptimConfig, dtype: torch.dtype = torch.float32
    ) -> None:
        """`dtype` is that of an optimizer's own matrix products."""
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        self.parts = list(OPTIMIZERS[optim.name](split_parameters(model), optim, dtype))
        for group in (group for part in self.parts for group in part.param_groups):
            group["decays"] = group["weight_decay"] > 0
        grouped = [p for part in self.parts for group in part.param_groups for p in group["params"]]
        assert len(grouped) == len(set(grouped)) == len(self.names), "a parameter without a group"

    def step(self, lr: float, weight_decay: float | None = None) -> None:
        """`weight_decay` of this update, for all that decays; None: that of the config."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
                if weight_decay is not None and group["decays"]:
                    group["weight_decay"] = weight_decay
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """`parameter name:state name` → tensor."""
        return {
            f"{self.names[parameter]}:{key}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def expected_state(self) -> dict[str, tuple[torch.optim.Optimizer, Tensor, str, Any]]:
        """What `state_tensors` has after an update: name → where it is, (shape, dtype)."""
        return {
            f"{self.names[parameter]}:{key}": (
                *(part, parameter, key),
                (() if key == "step" else tuple(parameter.shape), torch.float32),
            )
            for part in self.parts
            for group in part.param_groups
            for parameter in group["params"]
            for key in STATE_KEYS[type(part)]
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor], world: World = ALONE) -> None:
        """Take back `state_tensors`, which only the first rank has.

        Raises ValueError if they are of another model.
        """
        expected = self.expected_state()
        have = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        want = {name: shape for name, (*_, shape) in expected.items()}
        if world.first and have != want:
            odd = sorted(n for n in have.keys() | want.keys() if have.get(n) != want.get(n))
            raise ValueError(f"{len(odd)} optimizer tensors do not fit: {', '.join(odd[:5])}")
        for name, (part, parameter, key, (shape, _)) in expected.items():
            # Fused AdamW wants its step beside the parameter; the rest is split as that is.
            step = torch.zeros(shape, device=parameter.device)
            value = step if key == "step" else torch.zeros_like(parameter)
            world.copy_into(value, tensors.get(name))
            part.state[parameter][key] = value
