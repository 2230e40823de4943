"""Several models as one: what their mean is, alone and in generation."""

import math

import pytest
import torch

from gptlite.config.run import ModelConfig, SampleConfig
from gptlite.core.ensemble import MEANS, Ensemble, Mean, combine
from gptlite.core.generate import continuations
from gptlite.core.model import GPT

SIZES = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=12)


def make_models(n: int, kernel: str = "math") -> list[GPT]:
    models = [GPT(SIZES, 30, seed=seed, kernel=kernel).eval() for seed in range(n)]
    for model in models:  # as far apart as trained ones
        for parameter in model.parameters():
            parameter.data *= 5
    return models


def some_ids() -> torch.Tensor:
    return torch.randint(0, 30, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mean", MEANS)
def test_an_ensemble_of_one_is_the_model_bit_for_bit(mean: Mean) -> None:
    (model,) = make_models(1)
    with torch.no_grad():
        assert torch.equal(Ensemble([model], mean)(some_ids()), model(some_ids()))


def test_the_means_are_those_of_logits_and_of_probabilities() -> None:
    models = make_models(3)
    with torch.no_grad():
        each = torch.stack([model(some_ids()) for model in models])
        of_logits = Ensemble(models, "logits")(some_ids())
        of_chances = Ensemble(models, "probabilities")(some_ids())
    torch.testing.assert_close(of_logits, each.mean(0))
    torch.testing.assert_close(of_chances.softmax(-1), each.softmax(-1).mean(0))
    assert of_chances.exp().sum(-1).allclose(torch.tensor(1.0))


def test_a_token_that_two_models_give_half_each_is_as_likely_as_that() -> None:
    """By hand: of 0.9 and 0.1 either mean is 0.5; of 0.9 and 0.5 one is 0.7, the other 0.75."""
    logits = [torch.tensor([[math.log(0.9), math.log(0.1)]])]
    logits.append(logits[0].flip(-1))
    for mean in MEANS:
        torch.testing.assert_close(combine(logits, mean).softmax(-1), torch.tensor([[0.5, 0.5]]))
    skewed = [torch.tensor([[math.log(0.9), math.log(0.1)]]), torch.zeros(1, 2)]
    by_chances = combine(skewed, "probabilities").softmax(-1)
    torch.testing.assert_close(by_chances, torch.tensor([[0.7, 0.3]]))
    by_logits = combine(skewed, "logits").softmax(-1)
    torch.testing.assert_close(by_logits, torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize("kernel", ["math", "fused"])
@pytest.mark.parametrize("mean", MEANS)
def test_it_generates_what_its_whole_forward_passes_say(mean: Mean, kernel: str) -> None:
    ensemble = Ensemble(make_models(3, kernel), mean)
    options = SampleConfig(max_new_tokens=6, temperature=0)
    found = [tokens[0] for tokens in continuations(ensemble, [[1, 2, 3]], [0], options)]
    ids = [1, 2, 3]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(ensemble(torch.tensor([ids]))[0, -1].argmax()))
    assert found == ids[3:]
    alone = make_models(1, kernel)[0]
    both = [
        list(
            continuations(model, [[1, 2, 3]], [0], options.model_copy(update={"temperature": 1.0}))
        )
        for model in (alone, Ensemble([alone], mean))
    ]
    assert both[0] == both[1]
