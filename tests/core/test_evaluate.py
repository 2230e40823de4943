"""Measurements against slow sums over the same tokens."""

import math

import numpy as np
import pytest
import torch
from conftest import EVERYWHERE, Workshop

from gptlite.core import evaluate
from gptlite.core.dropout import evaluating
from gptlite.core.evaluate import byte_lengths, measure
from gptlite.core.model import GPT
from gptlite.core.world import World
from gptlite.data.batches import IGNORED
from gptlite.errors import DataError, DivergedError


@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_losses_are_what_one_token_at_a_time_gives(
    workshop: Workshop, layout: str, kind: str
) -> None:
    text = workshop.text.read_text()
    workshop.text.write_text(text[:4000].replace("the", "thé"), encoding="utf-8")
    run = workshop.run(data={"layout": layout}, tokenizer={"kind": kind, "vocab_size": 300})
    files = workshop.files(data={"layout": layout}, tokenizer={"kind": kind, "vocab_size": 300})
    model = GPT(run.model, files.meta["vocab_size"], EVERYWHERE)
    rows = files.rows("val", 16)
    nats, text_nats, correct, n = 0.0, 0.0, 0, 0
    with evaluating(model), torch.no_grad():
        for batch in rows.sweep(1):
            length = batch.n_targets
            logits = model(torch.from_numpy(batch.inputs[:, :length]))[0].double()
            for t in range(length):
                target = int(batch.targets[0, t])
                loss = -logits[t].log_softmax(-1)[target].item()
                nats, n = nats + loss, n + 1
                text_nats += 0.0 if target == files.tokenizer.eot else loss
                correct += int(logits[t].argmax()) == target
    result = measure(model, rows.sweep(7), run, byte_lengths(files.tokenizer))
    assert (result.targets, result.correct) == (n, correct)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.text_nats == pytest.approx(text_nats, rel=1e-5)
    first = 0 if layout == "documents" else len(files.tokenizer.token_bytes(int(rows.tokens[0])))
    assert result.text_bytes == files.meta["splits"]["val"]["bytes"] - first
    report = result.report()
    assert report["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(text_nats / math.log(2) / result.text_bytes)


def test_a_uniform_model_loses_the_logarithm_of_its_vocabulary(workshop: Workshop) -> None:
    run, files = workshop.run(), workshop.files()
    model = GPT(run.model, files.meta["vocab_size"])
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    result = measure(model, files.rows("val", 16).sweep(9), run, byte_lengths(files.tokenizer))
    assert result.loss == pytest.approx(math.log(files.meta["vocab_size"]), rel=1e-6)
    assert result.report()["loss_standard_error"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_losses_do_not_depend_on_the_batch_size(workshop: Workshop, size: int) -> None:
    run, files = workshop.run(), workshop.files()
    model = GPT(run.model, files.meta["vocab_size"])
    lengths = byte_lengths(files.tokenizer)
    whole = measure(model, files.rows("val", 16).sweep(32), run, lengths)
    other = measure(model, files.rows("val", 16).sweep(size), run, lengths)
    assert other.targets == whole.targets
    assert other.nats == pytest.approx(whole.nats, rel=1e-6)


@pytest.mark.parametrize("masks", ["keyed", "native"])
def test_dropout_left_on_costs_and_is_gone_afterwards(workshop: Workshop, masks: str) -> None:
    run, files = workshop.run(), workshop.files()
    dropout = EVERYWHERE.model_copy(update={"masks": masks})
    model = GPT(run.model, files.meta["vocab_size"], dropout).train()
    lengths, rows = byte_lengths(files.tokenizer), files.rows("val", 16)
    off = measure(model, rows.sweep(16), run, lengths)
    on = measure(model, rows.sweep(16), run, lengths, dropout_active=True)
    torch.rand(3)  # whatever state the generator is in
    on_again = measure(model, rows.sweep(16), run, lengths, dropout_active=True)
    again = measure(model, rows.sweep(16), run, lengths)
    assert on.nats != off.nats
    assert on_again == on
    assert again == off


GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024}
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256}


@pytest.mark.parametrize(
    ("device", "gib", "model", "vocab_size", "attention", "rows"),
    [
        ("cpu", 80, SMALL, 65, "sdpa", 64),
        ("cpu", 80, GPT2, 50257, "sdpa", 1),
        ("cuda", 80, SMALL, 65, "sdpa", 512),
        ("cuda", 80, GPT2, 50257, "sdpa", 5),  # of 196 MiB of logits each
        ("cuda", 8, GPT2, 50257, "sdpa", 1),
        ("cuda", 80, GPT2, 65, "math", 21),  # of 48 MiB of attention weights each
        ("cuda:1", 80, GPT2, 65, "sdpa", 85),
        ("cuda", 1, GPT2, 10**6, "sdpa", 1),
        ("mps", 16, SMALL, 65, "sdpa", 341),
    ],
)
def test_a_gpu_is_given_many_rows_at_a_time_but_a_share_of_its_memory(
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    gib: int,
    model: dict[str, int],
    vocab_size: int,
    attention: str,
    rows: int,
) -> None:
    monkeypatch.setattr(evaluate, "memory_bytes", lambda device: gib << 30)
    run = workshop.run(device=device, model=model, attention=attention, dropout={"preset": "none"})
    assert evaluate.eval_rows(run, vocab_size) == rows
    budget = run.train.model_copy(update={"memory_gib": gib / 4})
    fewer = evaluate.eval_rows(run.model_copy(update={"train": budget}), vocab_size)
    assert fewer == rows if device == "cpu" else fewer <= rows


def test_ranks_on_unlike_gpus_take_as_many_rows_at_a_time(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches are dealt to the ranks by their number, so all must cut them alike."""

    class Two(World):
        def largest(self, number: int) -> int:
            return max(number, -3)  # the other one has memory for three

    monkeypatch.setattr(evaluate, "memory_bytes", lambda device: 80 << 30)
    run = workshop.run(device="cuda", model=GPT2, attention="sdpa", dropout={"preset": "none"})
    assert evaluate.eval_rows(run, 50257, Two(2)) == 3


def test_something_random_in_evaluation_is_noticed(workshop: Workshop) -> None:
    run, files = workshop.run(), workshop.files()
    model = GPT(run.model, files.meta["vocab_size"])
    model.norm.register_forward_hook(lambda module, args, out: out + torch.rand(1))
    with pytest.raises(AssertionError, match="not repeatable"):
        measure(model, files.rows("val", 16).sweep(16), run, byte_lengths(files.tokenizer))


def test_no_target_is_said(workshop: Workshop) -> None:
    run, files = workshop.run(), workshop.files()
    model = GPT(run.model, files.meta["vocab_size"])
    with pytest.raises(DataError, match="no target"):
        measure(model, [], run, byte_lengths(files.tokenizer))


def test_positions_add_up_to_the_loss(workshop: Workshop) -> None:
    run, files = workshop.run(), workshop.files()
    model = GPT(run.model, files.meta["vocab_size"])
    (whole,) = files.rows("val", 16).sweep(10_000)
    result = measure(model, [whole], run, byte_lengths(files.tokenizer))
    counts = (whole.targets != IGNORED).sum(0)
    places = [place for place in result.loss_by_position if place is not None]
    assert sum(places * counts) == pytest.approx(result.nats, rel=1e-6)
    first = measure(
        *(
            model,
            [whole.part(0, 1)._replace(targets=whole.targets[:1, :1], inputs=whole.inputs[:1, :1])],
        ),
        *(run, byte_lengths(files.tokenizer)),
    )
    assert first.loss_by_position[0] is not None
    assert first.loss_by_position[1:] == [None] * 15


def test_a_model_that_gives_nan_has_diverged(workshop: Workshop) -> None:
    """NaN is not equal to itself, so two passes differ; that is no sign of something random."""
    run, files = workshop.run(), workshop.files()
    model, lengths = GPT(run.model, files.meta["vocab_size"]), byte_lengths(files.tokenizer)
    rows = files.rows("val", 16)
    with torch.no_grad():
        model.norm.weight.fill_(1e38)
        model.norm.bias.fill_(-1e38)
    for active in (False, True):
        with pytest.raises(DivergedError, match="evaluation loss (nan|inf)"):
            measure(model, rows.sweep(7), run, lengths, dropout_active=active)


def test_one_row_says_nothing_of_how_rows_differ(workshop: Workshop) -> None:
    run, files = workshop.run(), workshop.files()
    model, lengths = GPT(run.model, files.meta["vocab_size"]), byte_lengths(files.tokenizer)
    batches = list(files.rows("val", 16).sweep(1, 6))
    one = measure(model, batches[:1], run, lengths)
    assert math.isnan(one.report()["loss_standard_error"])
    losses = [measure(model, [batch], run, lengths).loss for batch in batches]
    error = measure(model, batches, run, lengths).report()["loss_standard_error"]
    assert error == pytest.approx(np.std(losses, ddof=1) / math.sqrt(6), rel=1e-4)
