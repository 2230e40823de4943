"""Networks whose answers are known because they were built by hand."""

import numpy as np
import torch

from gptlite.config.run import ModelConfig
from gptlite.core.model import GPT
from gptlite.data.batches import Batch

CRITICAL = 5


def alternating(rows: int = 8, length: int = 16) -> Batch:
    """0 1 0 1 ..., half of the rows starting with each."""
    ids = (np.arange(length + 1) + np.arange(rows)[:, None]) % 2
    return Batch(ids[:, :-1], ids[:, 1:], None)


@torch.no_grad()
def one_critical_neuron() -> GPT:
    """Predicts 1 after 0 and 0 after 1, and all that tells them apart is neuron CRITICAL.

    Feature 0 says which token it is. The neuron fires at token 0 and writes to feature 1 that 1
    comes next; the bias alone says that 0 does.
    """
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=16, tie_embeddings=False)
    model = GPT(config, 2).eval()
    for parameter in model.parameters():
        parameter.zero_()
    block = model.blocks[0]
    for norm in (block.norm_1, block.norm_2, model.norm):
        norm.weight.fill_(1.0)
    model.token_embedding.weight[0, 0], model.token_embedding.weight[1, 0] = 1.0, -1.0
    block.mlp.up.weight[CRITICAL, 0] = 10.0
    block.mlp.down.weight[1, CRITICAL] = 1.0
    block.mlp.down.bias[1] = -3.0
    model.head.weight[0, 1], model.head.weight[1, 1] = -2.0, 2.0
    return model
