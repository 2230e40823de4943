"""The processes that train one model, as each of them sees the others. Usually there is but one.

`World` is that one, and does nothing. Where torchrun has started several, `distributed.Ranks` has
the same methods; whoever calls them need not know which it is.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gptlite.config.run import RunConfig
    from gptlite.core.model import GPT

T = TypeVar("T")


class Engine:
    """A model in training; of several processes, how they come to the same gradients."""

    scale = 1.0
    """What the loss is multiplied by, so that gradients end as those of the whole batch."""

    def __init__(self, model: "GPT") -> None:
        self.model = model

    def __call__(self, *inputs: Any, **named: Any) -> "Tensor":
        """The model's own forward pass."""
        out: Tensor = self.model(*inputs, **named)
        return out

    def sync_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a part of a batch; ranks meet in the last one."""
        return nullcontext()

    def gather_weights(self) -> AbstractContextManager[None]:
        """Inside, the weights are all here: for what goes past the model's forward pass."""
        return nullcontext()


class World:
    """One process. `size` is how many there are, `rank` which of them this is."""

    def __init__(self, size: int = 1) -> None:
        self.rank, self.size = 0, size
        self.here = size
        """Ranks on this machine."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def broadcast(self, make: Callable[[], T]) -> T:
        """What the first rank makes, for all of them; JSON's kinds of values."""
        return make()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; JSON's kinds. None leaves before all came."""
        return [value]

    def largest(self, number: int) -> int:
        """Of the numbers of all ranks."""
        return number

    def sum(self, tensor: "Tensor") -> "Tensor":
        """Over all ranks, in place."""
        return tensor

    def make_in_turn(self, make: Callable[[], T]) -> T:
        """Made by one rank of each machine first, then by the others, who find it in the cache."""
        return make()

    def set_timeout(self, seconds: float) -> None:
        """All end if a rank shows no sign of life for so long."""

    def device(self, run: "RunConfig") -> "torch.device":
        import torch

        return torch.device(run.device)

    def engine(self, run: "RunConfig", model: "GPT") -> Engine:
        """Call it before the optimizer is made: it may replace the model's parameters."""
        return Engine(model)

    def full(self, tensor: "Tensor") -> "Tensor":
        """The whole of a tensor of which each rank may hold a part."""
        return tensor

    def copy_into(self, target: "Tensor", source: "Tensor | None") -> None:
        """Give a parameter or moment the value that the first rank has."""
        assert source is not None
        target.copy_(source)


ALONE = World()


def unlike_first(world: World, value: Any) -> str:
    """The ranks that have another value than the first one, in words; empty if none."""
    values = world.gather(value)
    return ", ".join(str(rank) for rank, other in enumerate(values) if other != values[0])
