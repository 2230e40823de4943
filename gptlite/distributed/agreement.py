"""What the first rank decides, for all: described as JSON there, and made of that on every rank.

One process does the same with itself, so what cannot be described shows without torchrun. No torch.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import TypeAdapter

from gptlite.core.world import World

T = TypeVar("T")


def agree(world: World, kind: Any, decide: Callable[[], T]) -> T:
    """All ranks call it; only the first one decides. `kind` is the type of what it decides."""
    described: TypeAdapter[T] = TypeAdapter(kind)
    shared = world.broadcast(lambda: described.dump_python(decide(), mode="json"))
    return described.validate_python(shared)
