"""The weights of a model by name: taken out, and filled in."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gptlite.core.model import GPT
from gptlite.core.world import ALONE, World
from gptlite.errors import CheckpointError

FILES = ("model.safetensors", "optimizer.safetensors")
"""Where a checkpoint has the weights to be used, and what the optimizer remembers."""
RAW = "raw.safetensors"
"""The weights of the last update, where those to be used are an average."""


def model_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights by name; a tied output matrix is stored once."""
    tensors = model.state_dict()
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    return tensors


def fill(model: GPT, tensors: Mapping[str, Tensor], where: object, world: World = ALONE) -> None:
    """Give the model these weights, which only the first rank has.

    Raises CheckpointError naming what does not fit.
    """
    own = model_tensors(model)
    have, want = (
        {name: (tuple(t.shape), t.dtype) for name, t in each.items()} for each in (tensors, own)
    )
    if world.first and have != want:
        odd = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        few = ", ".join(odd[:5])
        for prefix in ("_orig_mod.", "module."):  # as other programs save a model inside another
            if all(name.startswith(prefix) for name in tensors):
                few += f"; every name begins with {prefix!r}: save the model inside the wrapper"
        raise CheckpointError(f"{where}: {len(odd)} weights do not fit this model: {few}")
    with torch.no_grad():
        for name, target in own.items():
            world.copy_into(target, tensors.get(name))
