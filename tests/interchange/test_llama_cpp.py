"""What is exported as GGUF is the same model in llama.cpp: same text, same ids, and little lost by
rounding. Needs llama-cpp-python, which takes long to build: `scripts/test-extras gguf`."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop, prose
from exports import OURS, RECIPE, SHAPES, make_run, some_ids, strange_texts
from test_gguf import HELD

from gptlite.config.run import ModelConfig
from gptlite.core.generate import Generation
from gptlite.core.model import GPT
from gptlite.core.weights import model_tensors
from gptlite.data.tokenizers import CharTokenizer, load_pretrained
from gptlite.errors import ConfigError
from gptlite.interchange import gguf_file, gguf_tokenizer
from gptlite.runs.export import prepare_gguf, save
from gptlite.runs.start import train
from gptlite.runs.trained import Trained, load_trained

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
FLOAT32 = 0
"""Of its cache, which is float16 unless asked."""


def opened(path: Path, context: int, **options: Any) -> Any:
    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        logits_all=True,
        verbose=False,
        n_threads=1,
        **{"type_k": FLOAT32, "type_v": FLOAT32, "flash_attn": False, **options},
    )


def loaded(trained: Trained, folder: Path, type_: str = "f32") -> Any:
    save(prepare_gguf(trained, type_, "mine"), folder)
    return opened(folder / "model.gguf", trained.run.model.context_length)


def logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.parametrize("shape", HELD)
def test_two_hundred_greedy_tokens_are_the_same(workshop: Workshop, shape: str) -> None:
    model = {"context_length": 256, "n_head": 4} | SHAPES[shape]
    trained = load_trained(make_run(workshop, model=model), "best")
    there = loaded(trained, workshop.folder / "gguf")
    ids = some_ids(trained, 1)
    with torch.no_grad():
        ours = trained.model(ids)[0].numpy()
    # It looks the tanh of GELU up in a table of float16.
    most = 1e-2 if trained.run.model.mlp == "gelu" else 2e-5
    assert abs(logits(there, ids[0].tolist()) - ours).max() <= most
    prompt = "The of and"
    greedy = trained.run.sample.model_copy(update={"temperature": 0.0, "max_new_tokens": 200})
    (result,) = Generation(trained.model, trained.tokenizer, [prompt], greedy, seed=0).results()
    start = trained.tokenizer.encode(prompt)
    assert there.tokenize(prompt.encode(), add_bos=False) == start
    whole = trained.tokenizer.encode(prompt + result["text"])
    assert len(whole) == len(start) + 200
    scores = logits(there, whole[:-1])[len(start) - 1 :]
    chosen = scores[np.arange(200), whole[len(start) :]]
    assert (scores.max(axis=1) - chosen).max() <= (2 * most if most > 1e-3 else 0)


TOKENIZERS = {**OURS, "gpt2": None}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_equal_on_ten_thousand_texts(tmp_path: Path, name: str) -> None:
    try:
        tokenizer = TOKENIZERS[name] or load_pretrained("gpt2")
        vocabulary = gguf_tokenizer.make_vocabulary(tokenizer)
    except ConfigError as error:
        pytest.skip(str(error))
    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=32)
    gguf_file.write(
        tmp_path / "model.gguf",
        model=model,
        tensors=gguf_file.make_tensors(model, model_tensors(GPT(model, tokenizer.vocab_size))),
        type_="f32",
        fields={
            f"tokenizer.ggml.{field}": value
            for field, value in gguf_tokenizer.vocabulary_fields(vocabulary, None).items()
        },
    )
    there = opened(tmp_path / "model.gguf", 32, vocab_only=True)
    assert there.token_eos() == (vocabulary.ends or [-1])[0]
    texts = [*strange_texts(10_000), "12345", "1234567", "xyz xyz"]
    for text in map(known_to(tokenizer), texts):
        ids = there.tokenize(text.encode(), add_bos=False, special=False)
        assert (text, ids) == (text, tokenizer.encode(text))
        assert there.detokenize(ids).decode() == text


def known_to(tokenizer: Any) -> Any:
    """Keeps the characters of a vocabulary of them, else those that its tables of Unicode have."""
    if isinstance(tokenizer, CharTokenizer):
        return lambda text: "".join(c for c in text if c in tokenizer.ids)
    return lambda text: "".join(c for c in text if unicodedata.category(c) != "Cn")


def test_eight_bits_cost_less_than_a_hundredth_of_the_perplexity(workshop: Workshop) -> None:
    model = {**RECIPE, "n_embd": 64, "n_head": 4, "context_length": 64}
    run = workshop.run(
        model=model, train={"max_steps": 150, "batch_size": 16}, tokenizer={"kind": "byte"}
    )
    train(run, workshop.folder / "run")
    trained = load_trained(workshop.folder / "run", "best")
    ids = trained.tokenizer.encode(prose(400))[-64 * 20 :]
    perplexity = {
        type_: perplexity_of(loaded(trained, workshop.folder / type_, type_), ids)
        for type_ in ("f32", "q8_0", "f16", "bf16")
    }
    assert perplexity["f32"] < 20, "nothing was learned"
    for type_, value in perplexity.items():
        assert abs(value / perplexity["f32"] - 1) < 0.01, type_


def perplexity_of(model: Any, ids: list[int]) -> float:
    losses = []
    for start in range(0, len(ids) - 63, 64):
        row = torch.tensor(ids[start : start + 64])
        scores = torch.from_numpy(logits(model, row.tolist()))
        losses.append(torch.nn.functional.cross_entropy(scores[:-1], row[1:]))
    return float(torch.stack(losses).mean().exp())
