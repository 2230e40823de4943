"""One text without some units: by the numbers of `Subject`, and by the text that is generated."""

import re
from typing import Any

import pytest
import torch
from conftest import Workshop

from gptlite.config.reader import lay_sample_options
from gptlite.core.generate import Generation
from gptlite.core.model import GPT
from gptlite.errors import ConfigError
from gptlite.measure import without
from gptlite.measure.units import Subject, n_units
from gptlite.measure.without import as_batch, measure_without
from gptlite.runs.start import train
from gptlite.runs.trained import Trained, load_trained

TEXT = "the of and"
ATTENTION = ["math", "fused"]


@pytest.fixture(params=ATTENTION)
def trained(workshop: Workshop, request: pytest.FixtureRequest) -> Trained:
    """Of weights so large that every unit matters."""
    run = workshop.run(attention=request.param, train={"max_steps": 4})
    train(run, workshop.folder / "run")
    loaded = load_trained(workshop.folder / "run", "best")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return loaded


def state(model: GPT) -> list[Any]:
    hooks = [len(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    return [hooks, modes, [tensor.clone() for tensor in model.state_dict().values()]]


def written(trained: Trained, model: GPT, seed: int, **options: Any) -> str:
    generation = Generation(
        *(model, trained.tokenizer, [TEXT]),
        lay_sample_options(trained.run.sample, options),
        **{"seed": seed, "context": trained.context_length, "unseen": trained.unseen},
    )
    return "".join(piece.text for piece in generation.pieces())


def test_without_nothing_it_is_the_model_bit_for_bit(trained: Trained) -> None:
    found = measure_without(trained, TEXT, seed=5, max_new_tokens=30, temperature=1.2)
    assert found["loss"] == found["loss_whole"]
    assert found["text"] == found["text_whole"]
    alone = written(trained, trained.model, 5, max_new_tokens=30, temperature=1.2)
    assert found["text_whole"] == alone
    assert found["tokens"] == len(TEXT) - 1


@pytest.mark.parametrize("fill", ["mean", "zero"])
@pytest.mark.parametrize(
    ("kind", "units", "removed"),
    [
        ("head", {"heads": [(1, 0), (0, 1)]}, [2, 1]),
        ("neuron", {"neurons": [(0, 5), (1, 17)]}, [5, 128 + 17]),
        ("layer", {"layers": [1]}, [1]),
    ],
)
def test_the_loss_without_one_kind_is_that_of_subject(
    trained: Trained, kind: str, units: dict[str, Any], removed: list[int], fill: str
) -> None:
    ids = trained.tokenizer.encode(TEXT)
    subject = Subject(trained.model, trained.run, as_batch(ids))
    mask = torch.zeros(1, n_units(trained.model, kind), dtype=torch.bool)
    mask[0, removed] = True
    fills = subject.means(kind) if fill == "mean" else None
    nats = float(subject.row_nats(kind, mask, fills).sum())
    found = measure_without(trained, TEXT, fill=fill, max_new_tokens=1, **units)
    assert found["loss"] == nats / (len(ids) - 1)
    assert found["loss"] != found["loss_whole"] == subject.loss


def test_kinds_go_together(trained: Trained) -> None:
    """With every head and every neuron at zero nothing is left but biases, as without layers."""
    with torch.no_grad():
        for block in trained.model.blocks:
            block.attention.output.bias.zero_()
            block.mlp.down.bias.zero_()
    every = {
        "heads": [(layer, head) for layer in (0, 1) for head in (0, 1)],
        "neurons": [(layer, neuron) for layer in (0, 1) for neuron in range(128)],
    }
    parts = measure_without(trained, TEXT, **every, fill="zero", max_new_tokens=30)
    whole = measure_without(trained, TEXT, layers=[0, 1], fill="zero", max_new_tokens=30)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert parts["text"] == whole["text"] != parts["text_whole"] == whole["text_whole"]
    heads = measure_without(trained, TEXT, heads=every["heads"], fill="zero", max_new_tokens=1)
    assert abs(heads["loss"] - parts["loss"]) > 1e-3


@pytest.mark.parametrize("layer", [0, 1])
def test_the_continuation_is_that_of_weights_without_the_unit(trained: Trained, layer: int) -> None:
    """Also of a unit of the last layer alone, and in the one token at a time of a cache."""
    found = measure_without(
        trained, TEXT, heads=[(layer, 1)], neurons=[(layer, 3)], fill="zero", max_new_tokens=40
    )
    with torch.no_grad():
        block = trained.model.blocks[layer]
        block.attention.output.weight[:, 16:] = 0
        block.mlp.down.weight[:, 3] = 0
    assert found["text"] == written(trained, trained.model, 1337, max_new_tokens=40)
    assert found["text"] != found["text_whole"]


def test_the_model_is_left_as_it_was_also_by_an_error(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.model.train()
    before = state(trained.model)
    units: dict[str, Any] = {"heads": [(0, 1)], "neurons": [(1, 2)], "layers": [1]}
    first = measure_without(trained, TEXT, **units)

    def fail(*_: Any) -> str:
        raise RuntimeError("no text")

    with monkeypatch.context() as patched:
        patched.setattr(without, "continue_text", fail)
        with pytest.raises(RuntimeError, match="no text"):
            measure_without(trained, TEXT, **units)
    assert measure_without(trained, TEXT, **units) == first
    after = state(trained.model)
    assert before[:2] == after[:2]
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))


def test_documents_begin_with_their_token_and_bfloat16_is_halved(workshop: Workshop) -> None:
    run = workshop.run(
        data={"layout": "documents"}, tokenizer={"kind": "byte"}, train={"max_steps": 4}
    )
    train(run, workshop.folder / "run")
    of = load_trained(workshop.folder / "run", "best")
    bfloat16 = run.model_copy(update={"dtype": "bfloat16"})
    halved = Trained(**{**of.__dict__, "run": bfloat16})
    for each in (of, halved):
        found = measure_without(each, "the", heads=[(1, 1)], max_new_tokens=4)
        assert found["tokens"] == 3
        assert found["loss"] > 0
    assert of.model.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"heads": [(0, 2)]}, "heads: [0, 2]: the model has layers 0 to 1 of heads 0 to 1"),
        ({"neurons": [(2, 0)]}, "neurons: [2, 0]: the model has layers 0 to 1 of neurons 0 to 127"),
        ({"layers": [-1]}, "layers: -1: the model has layers 0 to 1"),
        ({"fill": "noise"}, "fill: noise: give mean or zero"),
        ({"text": ""}, "text: 0 tokens; give 2 to 16"),
        ({"text": "a"}, "text: 1 token; give 2 to 16"),
        ({"text": "a" * 17}, "text: 17 tokens; give 2 to 16"),
        ({"text": "Ж"}, "text: character 'Ж' at position 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
    ],
)
def test_what_there_is_not_is_named(workshop: Workshop, asked: dict[str, Any], told: str) -> None:
    train(workshop.run(train={"max_steps": 4}), workshop.folder / "run")
    of = load_trained(workshop.folder / "run", "best")
    with pytest.raises(ConfigError, match=re.escape(told)):
        measure_without(of, **{"text": TEXT, **asked})
