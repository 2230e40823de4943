"""Dropout at named sites: the module that owns a rate, how rates move, and proof of when it acts.

What a site drops is one multiplication by a mask of `masks.py`. Fused kernels that drop by
themselves ask the module for its rate, so a rate is stored once.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlite.config.dropout import SITES, DropoutConfig, DropoutSchedule, SitePlan
from gptlite.core.masks import Mask, MaskKeys, cut_of, drop, to_int64
from gptlite.errors import ConfigError
from gptlite.keys import key


class Dropout(nn.Dropout):
    """Dropout at one named site of one layer; tools that look for nn.Dropout find it.

    `rate` is the full rate; `p` the rate now, which a schedule moves. Compiled graphs read it from
    a tensor, so that moving it compiles nothing anew.
    """

    salts: Tensor
    """(H,) for a site with heads, else (1,); of site, layer and head."""
    cut: Tensor
    """() of 2**16, how many values of a draw drop now."""

    def __init__(
        self,
        site: str,
        plan: SitePlan,
        layer: int = 0,
        n_layer: int = 1,
        *,
        n_head: int = 1,
        native: bool = False,
    ) -> None:
        super().__init__(p=plan.rate_in(layer, n_layer))
        self.site, self.kind, self.plan, self.rate = site, SITES[site], plan, self.p
        self.native = native
        """Whether torch's generator draws the masks."""
        self.by_position = "T" in self.kind.mask and not plan.locked
        heads = range(n_head if "H" in self.kind.mask else 1)
        salts = torch.tensor([to_int64(key("site", site, layer, head)) for head in heads])
        self.register_buffer("salts", salts, persistent=False)

    @property
    def p(self) -> float:
        return self._p

    @p.setter
    def p(self, rate: float) -> None:
        self._p = rate
        if "cut" in self._buffers:
            self.cut.fill_(cut_of(rate))
        else:
            self.register_buffer("cut", torch.tensor(cut_of(rate)), persistent=False)

    @property
    def live(self) -> bool:
        """Whether it drops in a forward pass now."""
        return self.training and cut_of(self.p) > 0

    @property
    def acts(self) -> bool:
        """Whether there is anything to do; unlike `live` the same at every moment of a schedule."""
        return self.training and self.rate > 0

    @property
    def rate_now(self) -> float:
        """What a kernel that drops by itself must use: torch's kernels do not know of eval()."""
        return self.p if self.training else 0.0

    def forward(
        self, x: Tensor, keys: MaskKeys | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x with some of it dropped; `dtype` is what whoever reads it would convert it to."""
        if not self.acts:
            return x
        if self.native:
            return self.native_drop(x)
        mask = self.mask(keys)
        assert keys is not None
        if self.kind.by_feature and keys.real is None:
            return drop(x, mask, dtype)
        if not self.kind.by_feature:
            sizes = (n if s in "BHT" else 1 for n, s in zip(x.shape, self.kind.mask, strict=True))
            y = self.multiply(x, drop(torch.ones(*sizes, device=x.device), mask))
        elif self.kind.mask == "BHTS" and keys.position is not None:
            at = keys.position[:, None, None, :].expand(x.shape)  # from the first real token
            ones = torch.ones(x.shape, device=x.device)
            y = self.multiply(x, drop(ones, mask).gather(-1, at))
        else:
            y = drop(x, mask, dtype)
        if keys.real is not None and self.kind.mask.startswith("BT"):
            y = torch.where(keys.real[..., None], y, x)  # padding is left as it is
        return y

    def mask(self, keys: MaskKeys | None) -> Mask:
        """What decides which values drop now."""
        assert keys is not None, f"{self.site}: training with dropout needs sample keys"
        cut = self.cut if torch.compiler.is_compiling() else cut_of(self._p)
        return Mask(keys.token if self.by_position else keys.sample, self.salts, cut)

    def native_drop(self, x: Tensor) -> Tensor:
        """The same site with torch's own generator."""
        shape = self.kind.locked if self.plan.locked else self.kind.mask
        if x.ndim == len(shape) and "1" not in shape:
            return F.dropout(x, self.p)
        sizes = [1 if s == "1" else n for s, n in zip(shape, x.shape, strict=True)]
        ones = torch.ones(sizes, device=x.device)
        return self.multiply(x, F.dropout(ones, self.p))

    def multiply(self, x: Tensor, mask: Tensor) -> Tensor:
        """x times a mask in float32, in which the scale is exact, in the precision of x."""
        return (x * (mask if self.plan.inverted else (mask != 0).to(mask.dtype))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.site}, p={self.p:g}"


SiteMaker = Callable[..., Dropout]
"""site name, layer (0 for what is in no layer) → its module."""


def site_maker(dropout: DropoutConfig, n_layer: int, n_head: int, kernel: str) -> SiteMaker:
    """Makes the modules of a network as planned."""
    plan, native = dropout.plan(), dropout.native_sites(kernel)

    def make(site: str, layer: int = 0) -> Dropout:
        sizes = {"n_layer": n_layer, "n_head": n_head}
        return Dropout(site, plan[site], layer, **sizes, native=site in native)

    return make


def dropouts(model: nn.Module) -> list[Dropout]:
    return [module for module in model.modules() if isinstance(module, Dropout)]


def live_sites(model: nn.Module) -> dict[str, int]:
    """Number of modules that drop right now, per site."""
    return dict(Counter(module.site for module in dropouts(model) if module.live))


def planned_sites(model: nn.Module, strength: float = 1.0) -> dict[str, int]:
    """Number of modules per site that should drop at this strength of the schedule."""
    return dict(Counter(m.site for m in dropouts(model) if cut_of(m.rate * strength) > 0))


def check_every_rate_acts(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Raises ConfigError for a rate that reaches no module: it would be a silent no-op."""
    found = planned_sites(model)
    dead = [site for site, rate in rates.items() if rate > 0 and site not in found]
    if dead:
        raise ConfigError(*(f"dropout.sites.{s}: rate {rates[s]} reaches no module" for s in dead))


def strength_at(step: int, max_steps: int, schedule: DropoutSchedule) -> float:
    """By what the full rates are multiplied in update `step`, counted from 0; a pure function."""
    done, until = step / max_steps, schedule.until
    if schedule.mode == "late":
        inside = done >= until
        rise = (done - until) / (1 - until) if until < 1 else 0.0
    else:
        inside = schedule.mode == "standard" or done < until
        rise = min(1.0, done / until)
        rise = 1 - rise if schedule.mode == "early" else rise
    if not inside:
        return 0.0
    if schedule.shape == "constant":
        return 1.0
    return rise if schedule.shape == "linear" else (1 - math.cos(math.pi * rise)) / 2


def set_strength(model: nn.Module, strength: float) -> None:
    """Move every rate to this share of its full rate."""
    for module in dropouts(model):
        module.p = module.rate * strength


@contextmanager
def evaluating(model: nn.Module, *, dropout_active: bool = False) -> Iterator[None]:
    """Dropout off inside; afterwards every module is in the mode it was in before.

    `dropout_active` keeps it on, to show what forgetting eval() costs.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(dropout_active)
    try:
        assert dropout_active or not live_sites(model), "dropout is live in evaluation"
        yield
    finally:
        for module, mode in modes:
            module.training = mode
