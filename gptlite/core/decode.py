"""One new token through a whole block by block.c: in a small model calling torch takes longer than
computing. The judge is `model.Block`, which works wherever this does not.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from gptlite.core import loops
from gptlite.core.kernels import address, is_faster
from gptlite.core.masks import NAMES
from gptlite.core.model import GPT, Block, KVCache, Scene

ACTIVATIONS = {"gelu": 0, "relu2": 1, "swiglu": 2}
"""Of the MLP, as block.c numbers them."""


class Addresses(ctypes.Structure):
    """Of a block's weights and of its cache, as in block.c."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("qkv", "output", "up", "down"),
            *("qkv_bias", "output_bias", "up_bias", "down_bias"),
            *("norm_1", "norm_1_bias", "norm_2", "norm_2_bias", "q_norm", "k_norm"),
            *("keys", "values"),
        )
    )


class Sizes(ctypes.Structure):
    """Of a batch of new tokens, and what they see: `Scene` in block.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "C", "H", "G", "D", "F", "L")),
        *((name, ctypes.c_int64) for name in ("norm", "mlp")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("at", "cosine", "sine", "scratch")),
    )


class DecodingCache(KVCache):
    """A cache whose new tokens go through blocks by block.c; the weights must not move."""

    def __init__(self, model: GPT, batch_size: int) -> None:
        super().__init__(model, batch_size)
        self.model = model
        self.works: bool | None = None
        """Whether block.c can do it; known when the first token comes."""

    def decode(self, block: Block, x: Tensor, scene: Scene) -> Tensor | None:
        if x.shape[1] != 1 or block.training or torch.is_grad_enabled():
            return None
        if self.works is None:
            self.works = all(
                isinstance(each, Block) and self.suits(each, x) for each in self.model.blocks
            )
            if self.works:
                self.prepare(block)
        if not self.works:
            return None
        layer = block.attention.layer
        if layer == 0:
            self.look(x, scene)
        if layer not in self.blocks:
            self.blocks[layer] = addresses_of(block, self.keys[layer], self.values[layer])
        y = x.clone(memory_format=torch.contiguous_format)
        self.run(ctypes.byref(self.blocks[layer]), ctypes.byref(self.sizes), y.data_ptr())
        return y

    def suits(self, block: Block, x: Tensor) -> bool:
        """Whether block.c knows such a block, with nobody watching what happens inside it."""
        attention, mlp = block.attention, block.mlp
        weights = [m.weight for m in (attention.qkv, attention.output, mlp.up, mlp.down)]
        known = attention.kernel != "math" and mlp.activation in ACTIVATIONS
        alike = all(w.dtype == weights[0].dtype and w.is_contiguous() for w in weights)
        plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        short = self.keys[0].shape[2] <= loops.LONGEST_ROW
        hooked = any(module._forward_hooks for module in block.modules())
        return known and alike and plain and short and not hooked and is_faster(weights[0], x.dtype)

    def prepare(self, block: Block) -> None:
        B, G, L, D = self.keys[0].shape
        H, C, F = block.attention.n_head, block.norm_1.weight.numel(), block.mlp.down.in_features
        self.scratch = torch.empty(B * (2 * C + (H + 2 * G) * D + 2 * H * D + 3 * F))
        self.sizes = Sizes(
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
        self.blocks: dict[int, Addresses] = {}

    def look(self, x: Tensor, scene: Scene) -> None:
        """Tell block.c how many rows there are and where the new token of each stands."""
        self.sizes.B, self.sizes.at = len(x), self.at.data_ptr()
        if scene.rotation is not None:
            B, D = self.sizes.B, self.sizes.D
            # Kept, as block.c has their addresses only.
            self.turns = [x.expand(B, 1, 1, D // 2).contiguous() for x in scene.rotation]
            self.sizes.cosine, self.sizes.sine = (x.data_ptr() for x in self.turns)


def addresses_of(block: Block, keys: Tensor, values: Tensor) -> Addresses:
    attention, mlp = block.attention, block.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    matrices = (attention.qkv, attention.output, mlp.up, mlp.down)
    tensors: tuple[Any, ...] = (
        *(matrix.weight for matrix in matrices),
        *(matrix.bias for matrix in matrices),
        *(block.norm_1.weight, getattr(block.norm_1, "bias", None)),
        *(block.norm_2.weight, getattr(block.norm_2, "bias", None)),
        *(norm.weight if norm is not None else None for norm in (q_norm, k_norm)),
        *(keys, values),
    )
    return Addresses(*map(address, tensors))
