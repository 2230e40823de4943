"""One new token through a whole block by block.c: in a small model calling torch takes longer than
computing. The judge is `model.Block`, which works wherever this does not.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gptlite.core import loops
from gptlite.core.kernels import address, wins
from gptlite.core.masks import NAMES

ACTIVATIONS = {"gelu": 0, "relu2": 1, "swiglu": 2}
"""Of the MLP, as block.c numbers them."""


class Decoder:
    """The blocks of one model with one cache, as block.c reads them; weights must not move."""

    def __init__(self, cache: Any, block: Any) -> None:
        B, G, L, D = cache.keys[0].shape
        H, C, F = block.attention.n_head, block.norm_1.weight.numel(), block.mlp.down.in_features
        self.scratch = torch.empty(B * (2 * C + (H + 2 * G) * D + 2 * H * D + 3 * F))
        self.scene = loops.Scene(
            B,
            C,
            H,
            G,
            D,
            F,
            L,
            norm=int(isinstance(block.norm_1, nn.RMSNorm)),
            mlp=ACTIVATIONS[block.mlp.activation],
            epsilon=block.norm_1.eps,
            scratch=self.scratch.data_ptr(),
        )
        self.run = loops.function(f"block_{NAMES[block.mlp.up.weight.dtype]}")
        self.blocks: dict[int, loops.Block] = {}
        self.held: list[Tensor] = []
        """What the scene has addresses of."""

    def look(self, scene: Any, cache: Any) -> None:
        """Tell where the new token stands and what it may see."""
        self.scene.at, self.held = cache.length, []
        self.scene.real = None if scene.visible is None else cache.real.data_ptr()
        if scene.rotation is not None:
            B, D = self.scene.B, self.scene.D
            self.held = [x.expand(B, 1, 1, D // 2).contiguous() for x in scene.rotation]
            self.scene.cosine, self.scene.sine = (x.data_ptr() for x in self.held)

    def step(self, block: Any, x: Tensor, layer: int, cache: Any) -> Tensor:
        if layer not in self.blocks:
            self.blocks[layer] = describe(block, cache.keys[layer], cache.values[layer])
        y = x.clone(memory_format=torch.contiguous_format)
        self.run(self.blocks[layer], self.scene, y.data_ptr())
        return y


def describe(block: Any, keys: Tensor, values: Tensor) -> loops.Block:
    """Where the weights of a block are."""
    attention, mlp = block.attention, block.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    matrices = (attention.qkv, attention.output, mlp.up, mlp.down)
    tensors = (
        *(matrix.weight for matrix in matrices),
        *(matrix.bias for matrix in matrices),
        *(block.norm_1.weight, getattr(block.norm_1, "bias", None)),
        *(block.norm_2.weight, getattr(block.norm_2, "bias", None)),
        *(norm.weight if norm is not None else None for norm in (q_norm, k_norm)),
        *(keys, values),
    )
    return loops.Block(*map(address, tensors))


def takes(block: Any, x: Tensor, cache: Any) -> bool:
    """Whether `decode` takes x (B, 1, C) through a block now, where nothing drops or is watched."""
    if x.shape[1] != 1 or block.training or torch.is_grad_enabled() or cache.length == 0:
        return False
    if cache.decoder is None:
        cache.decoder = decoder(block, x, cache)
    return cache.decoder is not False


def decoder(block: Any, x: Tensor, cache: Any) -> Decoder | bool:
    """What decodes with this cache; False where the plain way has to."""
    attention, mlp = block.attention, block.mlp
    weights = [m.weight for m in (attention.qkv, attention.output, mlp.up, mlp.down)]
    known = attention.kernel != "math" and mlp.activation in ACTIVATIONS
    alike = all(w.dtype == weights[0].dtype and w.is_contiguous() for w in weights)
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    short = cache.keys[0].shape[2] <= loops.LONGEST_ROW
    hooked = any(module._forward_hooks for module in block.modules())
    if known and alike and plain and short and not hooked and wins(weights[0], x.dtype):
        return Decoder(cache, block)
    return False


def decode(block: Any, x: Tensor, scene: Any, cache: Any) -> Tensor:
    """(B, 1, C) → (B, 1, C); keys and values of the new token go into the cache."""
    if block.attention.layer == 0:
        cache.decoder.look(scene, cache)
    out: Tensor = cache.decoder.step(block, x, block.attention.layer, cache)
    return out
