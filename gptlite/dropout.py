"""Dropout at named sites: the one module that owns a rate, and the proof of when it acts.

Fused kernels ask the module for its rate, so a rate is stored once. Masks come from torch's
generator here; the caller seeds it per (seed, step), so evaluation in between moves nothing.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from gptlite.errors import ConfigError


class Dropout(nn.Dropout):
    """Dropout at one named site; tools that look for nn.Dropout find it."""

    def __init__(self, site: str, rate: float) -> None:
        super().__init__(p=rate)
        self.site = site

    @property
    def live(self) -> bool:
        return self.training and self.p > 0

    @property
    def rate_now(self) -> float:
        """What a kernel that drops by itself must use: torch's kernels do not know of eval()."""
        return self.p if self.training else 0.0

    def extra_repr(self) -> str:
        return f"{self.site}, p={self.p}"


def dropouts(model: nn.Module) -> list[Dropout]:
    return [module for module in model.modules() if isinstance(module, Dropout)]


def live_sites(model: nn.Module) -> dict[str, int]:
    """Number of modules that drop right now, per site."""
    return dict(Counter(module.site for module in dropouts(model) if module.live))


def planned_sites(model: nn.Module, rates: Mapping[str, float]) -> dict[str, int]:
    """Number of modules per site that has a rate.

    Raises ConfigError for a rate that reaches no module: it would be a silent no-op.
    """
    found = Counter(module.site for module in dropouts(model) if module.p == rates[module.site])
    planned = {site: found[site] for site, rate in rates.items() if rate > 0}
    dead = [site for site, count in planned.items() if not count]
    if dead:
        raise ConfigError(*(f"dropout.sites.{s}: rate {rates[s]} reaches no module" for s in dead))
    return planned


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
