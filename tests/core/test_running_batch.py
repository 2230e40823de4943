"""A row of a running batch is what it would be alone, whoever joins and leaves meanwhile."""

import random

import pytest
import torch
from test_decode import OPTIONS, make_model

from gptlite.config.run import SampleConfig
from gptlite.core import loops, running_batch
from gptlite.core.ensemble import Ensemble
from gptlite.core.generate import halve
from gptlite.core.model import GPT
from gptlite.core.running_batch import RunningBatch
from gptlite.errors import DivergedError

needs_loops = pytest.mark.skipif(loops.library() is None, reason="no C compiler here")
Text = tuple[list[int], list[torch.Tensor]]


def choose(**changes: object) -> SampleConfig:
    return SampleConfig.model_validate({"temperature": 1.0, **changes})


CHOICES = [
    choose(),
    choose(top_k=5),
    choose(temperature=0),
    choose(repetition_penalty=1.5, top_p=0.9),
]


def write_alone(
    model: GPT | Ensemble, prompt: list[int], name: int, options: SampleConfig, n: int
) -> Text:
    """Ids and logits of n new tokens in a batch of its own."""
    batch, logits = RunningBatch(model, 1), []
    (row,) = batch.join(prompt, [name], options)
    for _ in range(n):
        _, found = batch.step()
        logits.append(found[0])
    return row.ids, logits


def write_in_company(
    model: GPT | Ensemble, jobs: list[tuple[list[int], int, SampleConfig, int]], chunks: int | None
) -> list[Text]:
    """The same of jobs that come one after the other, some of them together, and go when done."""
    batch, order = RunningBatch(model, len(jobs)), random.Random(0)
    waiting, running, done = list(enumerate(jobs)), {}, {}
    while waiting or running:
        for _ in range(order.randint(0, 3)):
            if waiting:
                at, (prompt, name, options, n) = waiting.pop(0)
                (row,) = batch.join(prompt, [name], options)
                running[row] = at, n, []
        for row, logits in zip(*batch.step(chunks), strict=True):
            at, n, found = running[row]
            found.append(logits.clone())
            if len(found) == n:
                batch.leave(row)
                del running[row]
                done[at] = row.ids, found
    assert not batch.rows
    assert not batch.readings
    return [done[at] for at in range(len(jobs))]


def make_jobs(n: int, most_tokens: int = 40) -> list[tuple[list[int], int, SampleConfig, int]]:
    order = random.Random(1)
    return [
        (
            [order.randrange(30) for _ in range(order.randint(1, 30))],
            at,
            CHOICES[at % len(CHOICES)],
            order.randint(1, most_tokens),
        )
        for at in range(n)
    ]


@needs_loops
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("number", [0, 4, 8])
def test_a_row_is_bit_for_bit_what_it_is_alone(
    monkeypatch: pytest.MonkeyPatch, number: int, half: bool
) -> None:
    """More rows than the loops take at once, prompts past the context, in chunks between steps."""
    monkeypatch.setattr(running_batch, "CHUNK", 7)
    model, jobs = make_model(OPTIONS[number]), make_jobs(40)
    if half:
        halve(model)
    for job, (ids, logits) in zip(jobs, write_in_company(model, jobs, chunks=1), strict=True):
        alone, expected = write_alone(model, *job)
        assert ids == alone
        assert torch.equal(torch.stack(logits), torch.stack(expected))


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_without_loops_it_is_so_to_rounding(kernel: str) -> None:
    model, jobs = make_model(OPTIONS[4], kernel=kernel), make_jobs(6, most_tokens=12)
    for job, (_, logits) in zip(jobs, write_in_company(model, jobs, chunks=2), strict=True):
        _, expected = write_alone(model, *job)
        torch.testing.assert_close(logits[0], expected[0], rtol=1e-4, atol=1e-4)


@needs_loops
def test_an_ensemble_runs_as_one_model_does() -> None:
    members = [make_model(OPTIONS[0]), make_model(OPTIONS[4])]
    ensemble, jobs = Ensemble(members), make_jobs(5)
    for job, (ids, _) in zip(jobs, write_in_company(ensemble, jobs, chunks=1), strict=True):
        assert ids == write_alone(ensemble, *job)[0]


def test_samples_of_one_prompt_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make_model(OPTIONS[0]), list(range(20))
    n_read = []
    monkeypatch.setattr(
        model,
        "features",
        lambda ids, **more: n_read.append(ids) or GPT.features(model, ids, **more),
    )
    batch = RunningBatch(model, 3)
    rows = batch.join(prompt, [1, 2, 3], choose())
    batch.step()
    assert [tuple(ids.shape) for ids in n_read] == [(1, 19), (3, 1)]
    monkeypatch.undo()
    for name, row in enumerate(rows, 1):
        assert row.ids == write_alone(model, prompt, name, choose(), 1)[0]


def test_a_prompt_is_read_in_chunks_while_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_batch, "CHUNK", 5)
    model = make_model(OPTIONS[1])
    batch = RunningBatch(model, 2)
    (first,) = batch.join([1, 2], [1], choose())
    (second,) = batch.join(list(range(18)), [2], choose())
    seen = []
    for _ in range(7):
        rows, _ = batch.step(1)
        seen.append([row is second for row in rows])
    assert seen[:4] == [[False]] * 4
    assert seen[5] == [False, True]
    slow = torch.tensor([second.ids[:18]])
    expected = model(slow)[0, -1]
    _, logits = write_alone(model, second.ids[:18], 2, choose(), 1)
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    assert first.n_new == 7


def test_who_leaves_while_being_read_is_gone() -> None:
    batch = RunningBatch(make_model(OPTIONS[0]), 3)
    first, second = batch.join([1, 2, 3], [1, 2], choose())
    (third,) = batch.join([4], [3], choose())
    batch.leave(first)
    batch.leave(third)
    rows, _ = batch.step()
    assert rows == [second]


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = make_model(OPTIONS[0])
    model.norm.weight.data[:] = torch.nan
    batch = RunningBatch(model, 1)
    batch.join([1], [1], choose())
    with pytest.raises(DivergedError, match="not finite"):
        batch.step()
