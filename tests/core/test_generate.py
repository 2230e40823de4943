"""Sampling links, one by one; batches, caches and streams against the slow and obvious."""

import math

import numpy as np
import pytest
import torch
from conftest import only
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import loud

from gptlite.config.run import ModelConfig, SampleConfig
from gptlite.core.dropout import live_sites
from gptlite.core.generate import (
    Generation,
    TextStream,
    continuations,
    encode_prompt,
    halve,
)
from gptlite.core.model import GPT
from gptlite.core.sampling import (
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    probabilities,
)
from gptlite.data.tokenizers import ByteTokenizer, CharTokenizer
from gptlite.errors import ConfigError, DivergedError

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
NOTHING_SEEN = torch.zeros(1, 4, dtype=torch.bool)
LETTERS = CharTokenizer("abcdefgh \n", eot=True, unknown="error")


def options(**changes: object) -> SampleConfig:
    return SampleConfig.model_validate({"max_new_tokens": 12, "temperature": 1.0, **changes})


def model(**changes: object) -> GPT:
    torch.manual_seed(0)
    base = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 16, **changes}
    return loud(GPT(ModelConfig.model_validate(base), LETTERS.vocab_size, kernel="sdpa"))


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero().flatten().tolist()


def test_each_link_keeps_what_it_says() -> None:
    assert kept(keep_top_k(LOGITS, 2)) == [0, 1]
    assert kept(keep_top_k(LOGITS, 99)) == [0, 1, 2, 3]
    first = LOGITS.softmax(-1)[0, 0].item()
    assert kept(keep_top_p(LOGITS, first - 0.01)) == [0]
    assert kept(keep_top_p(LOGITS, first + 0.01)) == [0, 1]
    assert kept(keep_top_p(LOGITS, 1.0)) == [0, 1, 2, 3]
    assert kept(keep_min_p(LOGITS, math.exp(-1) - 0.01)) == [0, 1]
    assert kept(keep_min_p(LOGITS, 1.0)) == [0]
    seen = torch.tensor([[True, False, False, True]])
    assert penalise(LOGITS, seen, 2.0).tolist() == [[1.0, 1.0, 0.0, -2.0]]


def test_links_come_in_their_order() -> None:
    """The penalty before the temperature, and both before what is kept."""
    seen = torch.tensor([[True, False, False, False]])
    probability = probabilities(LOGITS, seen, options(repetition_penalty=4.0, top_k=1))
    assert probability.argmax() == 1


def test_temperature_zero_is_greedy_and_ignores_the_seed() -> None:
    greedy = probabilities(LOGITS, NOTHING_SEEN, options(temperature=0.0))
    assert greedy.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    texts = {run(seed, temperature=0.0) for seed in range(3)}
    assert len(texts) == 1
    assert run(0, top_k=1) in texts


def run(seed: int, **changes: object) -> str:
    generation = Generation(model(), LETTERS, ["abc"], options(**changes), seed=seed)
    return str(generation.results()[0]["text"])


def test_draws_follow_the_probabilities() -> None:
    probability = torch.tensor([[0.5, 0.0, 0.2, 0.3]])
    chance = torch.arange(1000, dtype=torch.float64) / 1000
    counts = draw(probability.expand(1000, 4), chance).bincount(minlength=4)
    assert (counts - torch.tensor([500, 0, 200, 300])).abs().max() <= 1  # float32 rounds the edges
    assert counts[1] == 0
    assert draw(probability, torch.tensor([0.9999999], dtype=torch.float64)) == 3
    never_the_first = torch.tensor([[0.0, 1.0]])
    assert draw(never_the_first, torch.zeros(1, dtype=torch.float64)) == 1


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ragged_batch_writes_what_each_prompt_writes_alone(
    position: str, temperature: float
) -> None:
    """Also past the end of the context, where the text is read anew."""
    gpt, chosen = model(position=position), options(temperature=temperature, max_new_tokens=40)
    prompts = ["a", "abcdefgh", "hh ab", "", "abcdefgh" * 4]
    together = Generation(gpt, LETTERS, prompts, chosen, seed=3, num_samples=2).results()
    alone = [
        result
        for prompt in prompts
        for result in Generation(gpt, LETTERS, [prompt], chosen, seed=3, num_samples=2).results()
    ]
    assert together == alone
    if temperature:
        assert together[0]["text"] != together[1]["text"]


def test_cached_generation_is_the_slow_one() -> None:
    """The slow one reads the whole text again for every token."""
    gpt, prompt = model(context_length=64), LETTERS.encode("abc ab")
    fast = [t[0] for t in continuations(gpt, [prompt], [1], options(temperature=0.0))]
    slow = list(prompt)
    for _ in fast:
        with torch.no_grad():
            slow.append(int(gpt(torch.tensor([slow]))[0, -1].argmax()))
    assert fast == slow[len(prompt) :]


def test_generation_ends_at_the_end_of_text_token() -> None:
    gpt = model()
    with torch.no_grad():
        gpt.norm.bias.fill_(10.0)
        gpt.token_embedding.weight[LETTERS.eot] = 1.0
        gpt.token_embedding.weight[: LETTERS.eot] = -1.0
    result = Generation(gpt, LETTERS, ["ab"], options(temperature=0.0), seed=0).results()[0]
    assert (result["text"], result["finished"], result["tokens"]) == ("", "eot", 1)


def test_generation_leaves_the_mode_and_the_generators_as_they_were() -> None:
    gpt = GPT(model().config, LETTERS.vocab_size, only("mlp_output")).train()
    state = torch.get_rng_state()
    for _ in continuations(gpt, [[1, 2]], [0], options()):
        assert live_sites(gpt) == {"mlp_output": 2}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stops", [["lo w"], ["xyz", "o wor"], ["d!"], ["h"]])
def test_a_stream_ends_before_a_stop_string_and_shows_nothing_of_it(stops: list[str]) -> None:
    text = "hello world! more"
    stream, shown = TextStream(ByteTokenizer(eot=False), stops), []
    for byte in text.encode():
        shown.append(stream.feed(byte))
    first = min(text.find(stop) for stop in stops if stop in text)
    assert "".join(shown) == text[:first]
    assert stream.finished == "stop"


def test_a_stream_shows_no_half_character() -> None:
    stream = TextStream(ByteTokenizer(eot=False), [])
    shown = [stream.feed(byte) for byte in "aé€😀".encode()]
    assert shown == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    stream.feed(0xE2)
    assert stream.end("length") == "\ufffd"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_a_stream_shows_all_text_up_to_the_stop(text: str, stops: list[str]) -> None:
    raw = text.encode("utf-8", errors="replace")
    stream = TextStream(ByteTokenizer(eot=False), stops)
    shown = "".join(stream.feed(byte) for byte in raw) + stream.end("length")
    plain = raw.decode()
    if any(stop in plain for stop in stops):
        assert stream.finished == "stop"
        assert plain.startswith(shown)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == plain


def test_an_unknown_prompt_character_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"prompt: character 'Z' at position 3"):
        encode_prompt(LETTERS, "abZ", documents=False)


def test_prompts_begin_where_documents_begin() -> None:
    eot = LETTERS.eot
    assert encode_prompt(LETTERS, "a", documents=True) == [eot, 0]
    assert encode_prompt(LETTERS, "a", documents=False) == [0]
    assert encode_prompt(LETTERS, "", documents=False) == [eot]
    bare = CharTokenizer("a\n", eot=False, unknown="error")
    assert bare.decode(encode_prompt(bare, "", documents=False)) == "\n"


def test_what_the_training_text_never_had_is_never_drawn() -> None:
    unseen = torch.tensor([False, True, False, True])
    found = probabilities(LOGITS, NOTHING_SEEN, options(), unseen)
    assert found[0, unseen].tolist() == [0, 0]
    assert found.sum() == pytest.approx(1)
    likeliest = torch.tensor([True, False, False, False])
    greedy = options(temperature=0)
    assert probabilities(LOGITS, NOTHING_SEEN, greedy, likeliest).tolist() == [[0, 1, 0, 0]]
    never = [LETTERS.ids[c] for c in "bdfh"]
    many = options(max_new_tokens=200)
    steps = continuations(model(), [[0], [2]], [1, 2], many, unseen=never)
    assert not {token for step in steps for token in step}.intersection(never)


def test_an_empty_prompt_begins_with_what_the_training_text_had() -> None:
    eot, line = LETTERS.eot, LETTERS.ids["\n"]
    assert encode_prompt(LETTERS, "", False, unseen=[eot]) == [line]
    assert encode_prompt(LETTERS, "", False, unseen=[eot, line, 0]) == [1]
    assert encode_prompt(LETTERS, "a", False, unseen=[0]) == [0]  # as it was asked for
    ((_, text),) = [
        (result["finished"], result["text"])
        for result in Generation(
            model(), LETTERS, [""], options(max_new_tokens=99), seed=1, unseen=[eot, 0, 1]
        ).results()
    ]
    assert len(text) == 99
    assert not set(text) & set("ab")


def test_draws_are_even() -> None:
    from gptlite.keys import uniform

    numbers = uniform(5, np.arange(100_000))
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 5000).max() < 5 * math.sqrt(5000)


def test_halved_matrices_leave_the_rest_alone() -> None:
    gpt = model()
    before = {name: parameter.clone() for name, parameter in gpt.named_parameters()}
    halve(gpt)
    for name, parameter in gpt.named_parameters():
        matrix = parameter.ndim == 2 and "position" not in name
        expected = before[name].bfloat16() if matrix else before[name]
        assert parameter.dtype == expected.dtype
        assert torch.equal(parameter, expected)
    assert gpt.head.weight is gpt.token_embedding.weight
    prompts = [LETTERS.encode("abc"), LETTERS.encode("a")]
    together = [*zip(*continuations(gpt, prompts, [1, 2], options()), strict=True)]
    for prompt, name, tokens in zip(prompts, (1, 2), together, strict=True):
        alone = [*continuations(gpt, [prompt], [name], options())]
        assert [token for (token,) in alone] == [*tokens]


def settings_of_top_p() -> list[tuple[torch.Tensor, float]]:
    """Random distributions, flat and steep, and bounds."""
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(3000):
        width = int(rng.integers(2, 60))
        logits = rng.standard_normal((1, width)) * rng.choice([0.1, 1.0, 5.0])
        cases.append((torch.tensor(logits, dtype=torch.float32), float(rng.uniform(0.01, 0.999))))
    return cases


def slowly_kept(logits: torch.Tensor, p: float) -> list[int] | None:
    """What top-p keeps, token by token in float64; None if a sum is p to a few digits."""
    probability = logits[0].double().softmax(-1)
    total, chosen = 0.0, []
    for token in probability.argsort(descending=True).tolist():
        chosen.append(token)
        total += float(probability[token])
        if abs(total - p) < 1e-5:
            return None
        if total >= p:
            return sorted(chosen)
    raise AssertionError


def test_top_p_keeps_what_the_slow_sum_keeps() -> None:
    judged = [(slowly_kept(*case), kept(keep_top_p(*case))) for case in settings_of_top_p()]
    clear = [(slow, fast) for slow, fast in judged if slow is not None]
    assert len(clear) > 2900
    assert all(slow == fast for slow, fast in clear)


def test_top_p_keeps_what_hugging_face_keeps() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for logits, p in settings_of_top_p():
        if slowly_kept(logits, p) is not None:
            theirs = transformers.TopPLogitsWarper(p)(None, logits)
            assert kept(keep_top_p(logits, p)) == kept(theirs)


@pytest.mark.parametrize(
    ("shares", "p", "n"),
    [
        ((0.5, 0.3, 0.1, 0.1), 0.8, 2),
        ((0.5, 0.3, 0.1, 0.1), 0.9, 3),
        ((0.5, 0.3, 0.1, 0.1), 0.5, 1),
        ((0.1,) * 10, 0.7, 7),
        ((0.7, 0.2, 0.1), 1e-12, 1),
        ((1 - 1e-9, 5e-10, 5e-10), 1.0, 3),
    ],
)
def test_a_bound_that_is_just_reached_is_reached(
    shares: tuple[float, ...], p: float, n: int
) -> None:
    logits = torch.tensor([shares], dtype=torch.float64).log().float()
    assert len(kept(keep_top_p(logits, p))) == n
    quotient = shares[n - 1] / shares[0]
    assert len(kept(keep_min_p(logits, quotient))) >= n


def test_positions_that_were_not_trained_are_not_used() -> None:
    """Text goes on past them from what is trained; without a bound their numbers would be met."""
    gpt = model()
    with torch.no_grad():
        gpt.position_embedding.weight[6:] = torch.nan
    prompts = ["abc", "abcdefgh", ""]
    bounded = Generation(gpt, LETTERS, prompts, options(max_new_tokens=20), seed=0, context=6)
    assert all(result["tokens"] for result in bounded.results())
    with pytest.raises(DivergedError, match="logits are not finite"):
        Generation(gpt, LETTERS, prompts, options(max_new_tokens=20), seed=0).results()
