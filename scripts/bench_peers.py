"""What the benchmarks share: the peer, its update, and gptlite's own with or without its loops."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.utils import clip_grad_norm_

from gptlite import loops
from gptlite.train import Trainer

NANOGPTS = ("embedding", "attention_weights", "attention_output", "mlp_output")
DROPOUT = {"preset": "none", "sites": dict.fromkeys(NANOGPTS, 0.2)}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024}


def hugging_face(model: dict[str, int], vocab_size: int, rate: float = 0.2) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {key: model[key] for key in ("n_layer", "n_head", "n_embd")}
    more: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rate)
    more |= {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, n_positions=model["context_length"], **sizes, **more)
    )


def hugging_face_update(
    shape: dict[str, Any], dtype: str, vocab_size: int = 65
) -> Callable[[], None]:
    """An update as people write it: forward, backward, clipping, AdamW."""
    model = hugging_face(shape["model"], vocab_size).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    sizes = shape["train"]["batch_size"], shape["model"]["context_length"]
    ids = torch.randint(0, vocab_size, sizes)

    def update() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        loss.item()

    return update


def updates(made: Trainer) -> Callable[[], Any]:
    return partial(next, made.updates(made.max_steps))


def without_loops(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same on torch alone."""

    def plain() -> Any:
        with mock.patch.object(loops, "library", return_value=None):
            return run()

    return plain
