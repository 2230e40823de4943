"""The peer of the speed checks: a GPT and a loop as nanoGPT has them, of torch's own parts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

Ids = Any
"""An array of token ids."""


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP; dropout inside the fused kernel and after both outputs."""

    def __init__(self, width: int, n_head: int, rate: float) -> None:
        super().__init__()
        self.n_head, self.rate = n_head, rate
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.drop = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.n_head, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        rate = self.rate if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.drop(self.out(z.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_2(x)))))


class PlainGPT(nn.Module):
    """Learned positions, tied embedding, no biases."""

    def __init__(self, sizes: dict[str, Any], vocab_size: int, rate: float) -> None:
        super().__init__()
        width = sizes["n_embd"]
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(sizes["context_length"], width)
        self.drop = nn.Dropout(rate)
        blocks = (PlainBlock(width, sizes["n_head"], rate) for _ in range(sizes["n_layer"]))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.blocks(self.drop(self.tokens(ids) + self.positions(at))))
        logits = F.linear(x, self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_update(
    sizes: dict[str, Any],
    ids: Ids,
    vocab_size: int,
    *,
    batch_size: int,
    rate: float,
    device: str,
    dtype: str,
    compiled: bool,
) -> Callable[[], float]:
    """An update as nanoGPT makes it: random windows, autocast, clipping, fused AdamW."""
    torch.manual_seed(0)
    kind = torch.device(device).type
    model: Any = PlainGPT(sizes, vocab_size, rate).to(device).train()
    adamw = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    scaler = torch.amp.GradScaler(kind, enabled=dtype == "float16" and kind == "cuda")
    forward = torch.compile(model) if compiled else model
    half, random = getattr(torch, dtype), np.random.default_rng(0)
    T = sizes["context_length"]

    def window_batch() -> tuple[Tensor, Tensor]:
        starts = random.integers(0, len(ids) - T - 1, batch_size)
        rows = torch.from_numpy(np.stack([ids[i : i + T + 1] for i in starts]).astype(np.int64))
        rows = rows.to(device)
        return rows[:, :-1], rows[:, 1:]

    def update() -> float:
        with torch.autocast(kind, half, enabled=half != torch.float32):
            loss = forward(*window_batch())
        scaler.scale(loss).backward()
        scaler.unscale_(adamw)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(adamw)
        scaler.update()
        adamw.zero_grad(set_to_none=True)
        return float(loss.item())

    return update
