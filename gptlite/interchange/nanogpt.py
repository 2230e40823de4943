"""What nanoGPT leaves behind ↔ a run: its `ckpt.pt` and `meta.pkl`, read without unpickling.

Its linear layers have GPT-2's names, not transposed; its activation is the exact GELU; its
vocabulary may be padded with tokens that no text has, which are left out.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from gptlite.data.tokenizers import CharTokenizer, Tokenizer, load_pretrained
from gptlite.errors import CheckpointError, ConfigError
from gptlite.interchange import torch_file

GPT2_VOCABULARIES = (50257, 50304)
DEFAULTS = {
    **{"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    **{"bias": True, "dropout": 0.0},
}
"""What its GPTConfig assumes."""


def read_checkpoint(
    path: Path, meta: Path | None
) -> tuple[dict[str, Any], int, Tokenizer, dict[str, Tensor]]:
    """Sections of the run, size of the vocabulary, tokenizer, and weights under their names.

    Raises CheckpointError, ConfigError.
    """
    saved = torch_file.read_torch_file(path)
    try:
        arguments, tensors = {**DEFAULTS, **saved["model_args"]}, saved["model"]
        model = {
            **{name: arguments[name] for name in ("n_layer", "n_head", "n_embd", "bias")},
            "context_length": arguments["block_size"],
            "mlp": "gelu_exact",
        }
        vocab_size, rate = int(arguments["vocab_size"]), float(arguments["dropout"])
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError("weights that are no tensors")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of nanoGPT ({error!r:.100})") from None
    sections = {"model": model, "dropout": {"preset": "nanogpt", "rate": rate}}
    return sections, vocab_size, find_tokenizer(path, vocab_size, meta), tensors


def find_tokenizer(path: Path, vocab_size: int, meta: Path | None) -> Tokenizer:
    """The characters of a meta.pkl, or GPT-2's vocabulary where the size is its."""
    beside = path.with_name("meta.pkl")
    if meta is None and vocab_size in GPT2_VOCABULARIES:
        return load_pretrained("gpt2")
    if meta is None and not beside.is_file():
        raise ConfigError(
            f"{path}: the tokenizer of {vocab_size} tokens is not in it; give the meta.pkl that "
            "nanoGPT's prepare.py wrote: --meta data/NAME/meta.pkl"
        )
    made = read_characters(meta or beside)
    if made.vocab_size != vocab_size:
        raise ConfigError(
            f"{meta or beside}: has {made.vocab_size} characters, but {path} a vocabulary of "
            f"{vocab_size}; give the meta.pkl of the data that it was trained on: --meta"
        )
    return made


def read_characters(path: Path) -> CharTokenizer:
    """The tokenizer of a meta.pkl."""
    try:
        itos = torch_file.read_pickle(path)["itos"]
        letters = [itos[number] for number in range(len(itos))]
        if any(len(letter) != 1 for letter in letters):
            raise ValueError("not one character for each id")
        saved = {"characters": "".join(letters), "eot": False, "unknown": "error"}
        return CharTokenizer.from_json(saved)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a meta.pkl of nanoGPT ({error!r:.100})") from None
