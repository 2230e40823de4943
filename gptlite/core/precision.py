"""The precision of matrix products, and the scaled loss that float16 needs: its smallest number is
6e-8, and most gradients of a GPT are smaller.

The scale is torch's (`torch.amp.GradScaler`). An update whose gradients pass float16's largest
number, 65504, overflows: it leaves the weights alone and halves the scale. After 2000 without an
overflow the scale is doubled. So now and then one overflows in any good run. In all other
precisions nothing is scaled.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gptlite.config.run import RunConfig
from gptlite.config.section import Section

FIRST_SCALE = 2.0**16
LEAST_SCALE = 1.0
"""An overflow with this scale is not the scale's: the gradients themselves are too large."""
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions of 16 bits, by their name in a config."""


def precision(run: RunConfig) -> AbstractContextManager[Any]:
    """Where matrix products take the precision that the resolved run names."""
    if run.dtype not in HALF:
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, HALF[run.dtype])


class Scale(Section):
    """What a checkpoint keeps of it."""

    scale: float = Field(gt=0)
    growth_tracker: int = Field(ge=0)
    """Updates since the scale last changed."""
    overflows: int = Field(ge=0)
    """Updates of the run that overflowed."""


class LossScaler:
    """Multiplies the loss and divides the gradients, where the run is in float16."""

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.enabled = dtype == "float16"
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=FIRST_SCALE, enabled=self.enabled
        )
        self.overflows = 0
        self.stored: Scale | None = None
        """That of a checkpoint; in another precision it is handed on as it is."""

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Divide the gradients, which are all there now."""
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)

    def take_overflow(self, loss_nats: float) -> bool:
        """Count an update whose gradients are not finite, if that is due to the scale."""
        overflowed = (
            self.enabled and math.isfinite(loss_nats) and self.scaler.get_scale() > LEAST_SCALE
        )
        self.overflows += overflowed
        return overflowed

    def update(self) -> dict[str, float]:
        """Have the scale of the next update. Returns what a row of metrics says of this one."""
        if not self.enabled:
            return {}
        row = {"loss_scale": self.scaler.get_scale(), "overflows": self.overflows}
        self.scaler.update()
        return row

    def state(self) -> Scale | None:
        if not self.enabled:
            return self.stored
        now = self.scaler.state_dict()
        return Scale(
            scale=now["scale"], growth_tracker=now["_growth_tracker"], overflows=self.overflows
        )

    def restore(self, stored: Scale | None) -> None:
        """Go on with the scale of a checkpoint, if there was one."""
        self.stored = stored
        if stored is None:
            return
        self.overflows = stored.overflows
        if self.enabled:
            now = {"scale": stored.scale, "_growth_tracker": stored.growth_tracker}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **now})
