"""What the tests of export share: models of every shape, tokenizers of every kind, odd texts."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import Workshop, merged, prose, state_at

from gptlite import storage
from gptlite.config.reader import dump
from gptlite.core.model import GPT
from gptlite.core.weights import FILES, model_tensors
from gptlite.data import tokenizers
from gptlite.data.tokenizers import (
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    train_bpe,
)
from gptlite.runs import checkpoint
from gptlite.runs.directory import create_directory
from gptlite.runs.trained import Trained

LLAMA = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
RECIPE = {
    **{"position": "rope", "norm": "rmsnorm", "mlp": "relu2", "bias": False, "qk_norm": True},
}
OWN_SIZES = {"head_dim": 12, "intermediate_size": 40, "norm_eps": 1e-3, "rope_theta": 500.0}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "untied": {"tie_embeddings": False},
    "without biases": {"bias": False},
    "exact gelu": {"mlp": "gelu_exact"},
    "relu2": {"mlp": "relu2"},
    "llama": {**LLAMA, "bias": False},
    "llama, untied": {**LLAMA, "bias": False, "tie_embeddings": False},
    "llama, grouped keys": {**LLAMA, "bias": False, "n_kv_head": 1},
    "llama with biases": {**LLAMA, "n_kv_head": 2},
    "llama of its own sizes": {**LLAMA, "bias": False, **OWN_SIZES},
    "qwen3": {**LLAMA, "bias": False, "qk_norm": True, "n_kv_head": 2, **OWN_SIZES},
    "qwen3, untied": {**LLAMA, "bias": False, "qk_norm": True, "tie_embeddings": False},
    "apertus": RECIPE,
    "apertus of its own sizes, untied": {**RECIPE, **OWN_SIZES, "tie_embeddings": False},
    "apertus, gelu": {**RECIPE, "mlp": "gelu", "n_kv_head": 1},
    "arcee": {**RECIPE, "qk_norm": False, **OWN_SIZES},
    "arcee with biases": {**RECIPE, "qk_norm": False, "bias": True, "mlp": "gelu_exact"},
    "starcoder2": {"position": "rope", "n_kv_head": 2, **OWN_SIZES},
    "starcoder2 without biases": {"position": "rope", "bias": False, "mlp": "relu2"},
    "starcoder2, gelu": {"position": "rope", "n_kv_head": 2, "rope_theta": 500.0},
    "starcoder2, gelu without biases": {"position": "rope", "bias": False},
    "starcoder2, untied": {"position": "rope", "mlp": "gelu_exact", "tie_embeddings": False},
}


def make_run(workshop: Workshop, name: str = "run", **sections: Any) -> Path:
    """A run directory whose weights are random, biases and norms too."""
    run = workshop.run(**merged({"attention": "math"}, sections))
    files = workshop.files(**sections)
    model = GPT.of_run(run, files.meta["vocab_size"])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    directory = workshop.folder / name
    create_directory(directory)
    text = files.tokenizer
    state = state_at(
        *(3,), tokenizer_sha256=tokenizers.digest(text), config=run.model_dump(mode="json")
    )
    checkpoint.save(directory, {FILES[0]: model_tensors(model)}, state)
    checkpoint.write_pointer(directory, "best", 3)
    saved = storage.seal(text.to_json())
    storage.write_text(directory / "tokenizer" / "tokenizer.json", saved)
    storage.write_text(directory / "config.yaml", dump(run))
    return directory


def some_ids(trained: Trained, rows: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(0)
    size = (rows, trained.run.model.context_length)
    return torch.from_numpy(rng.integers(0, trained.tokenizer.vocab_size, size))


REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = rf"{SUFFIXES}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{SUFFIXES}|\p{{N}}|{REST}"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""How cl100k_base splits words."""
LEARNED = train_bpe([prose() + "12345 " * 300], 400)
WHOLE = {**LEARNED.ranks, b" xyz": LEARNED.eot}
"""With a word that no merges make: tiktoken finds it whole."""
CHARACTERS = "".join(sorted({*prose(), *"0123 é漢\n\t"}))
ASCII = "".join(c for c in CHARACTERS if c.isascii()) + "\\"
OURS: dict[str, Tokenizer] = {
    "byte": ByteTokenizer(eot=True),
    "byte, one document": ByteTokenizer(eot=False),
    "char of ASCII": CharTokenizer(ASCII, eot=False, unknown="skip"),
    "char, skip": CharTokenizer(CHARACTERS, eot=True, unknown="skip"),
    "char, replace": CharTokenizer(CHARACTERS, eot=False, unknown="replace"),
    "char with the sign of replacement": CharTokenizer(
        CHARACTERS + "\ufffd", eot=True, unknown="replace"
    ),
    "bpe": LEARNED,
    "bpe, a whole word": BPETokenizer("bpe", "x", GPT2_PATTERN, WHOLE, LEARNED.eot + 1),
    "bpe, Llama 3's words": BPETokenizer("bpe", "x", LLAMA3, WHOLE, LEARNED.eot + 1),
    "bpe, Qwen's words": BPETokenizer("bpe", "x", QWEN2, LEARNED.ranks, LEARNED.eot),
    "bpe, cl100k's words": BPETokenizer("bpe", "x", CL100K, LEARNED.ranks, LEARNED.eot),
}


def strange_texts(n: int) -> list[str]:
    """Letters, spaces of all kinds, what patterns treat by itself, and any character there is."""
    rng = random.Random(0)
    letters = [chr(point) for point in range(33, 127)]
    spaces = [*" \t\n\r\x0b\x1c\x85\xa0\u2028\u3000", "  ", "\r\n", " \n"]
    odd = ["'s", "'LL", "'\u017f", "\u00b2", "\u0663", "12345", "\u6f22", "\U0001f600", "\ufffd"]
    anything = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    pools = [letters, letters, spaces, odd, anything]
    lengths = [rng.randrange(40) for _ in range(n)]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(size)) for size in lengths]
