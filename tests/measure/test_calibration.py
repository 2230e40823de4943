"""Calibration of guesses whose truth is known, and averages over dropout against slow sums."""

import copy

import numpy as np
import pytest
import torch
from conftest import EVERYWHERE, Workshop

from gptlite.core.evaluate import byte_lengths, measure
from gptlite.core.masks import sample_keys
from gptlite.core.model import GPT
from gptlite.measure import calibration
from gptlite.measure.calibration import BINS, Guesses, bin_predictions, guesses, mc_dropout


def drawn(n: int, honest: float, seed: int = 1) -> Guesses:
    """n guesses that are right with `honest` times the confidence they claim."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.1, 1, n)
    correct = (rng.uniform(size=n) < honest * confidence).astype(float)
    return Guesses(np.arange(n) // 100, confidence, correct, (1 - confidence) ** 2)


def plug_in(found: Guesses) -> float:
    """The usual estimate, which is above 0 by chance alone."""
    count, confidence, correct = bin_predictions(found, np.linspace(0, 1, BINS + 1)).sum(0)
    return float(np.abs(confidence - correct).sum() / count.sum())


def test_who_means_what_he_says_has_no_error() -> None:
    """On average, and the interval knows it; the estimate never lies outside."""
    many = [drawn(2_000, 1.0, seed) for seed in range(200)]
    usual = np.mean([plug_in(found) for found in many])
    for name in ("ece", "adaptive_ece"):
        errors = [calibration.calibration(found)[name] for found in many]
        assert all(error["low"] <= error["value"] <= error["high"] for error in errors)
        assert abs(np.mean([error["value"] for error in errors])) < usual / 10
        assert np.mean([error["low"] <= 0 <= error["high"] for error in errors]) >= 0.93
    sure = calibration.calibration(drawn(200_000, 1.0))
    assert abs(sure["ece"]["value"]) < 0.005
    assert sure["confidence"] == pytest.approx(sure["accuracy"], abs=0.005)


def test_of_one_row_no_error_is_known() -> None:
    one = drawn(50, 0.5)
    error = calibration.calibration(one)["ece"]
    assert (error["value"], error["reason"]) == (None, "the text has only one row")


def test_who_boasts_has_the_error_of_his_boast() -> None:
    found = calibration.calibration(drawn(50_000, 0.6))
    for name in ("ece", "adaptive_ece"):
        assert found[name]["value"] == pytest.approx(0.4 * 0.55, abs=0.01)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    for point in found["reliability"]:
        assert point["accuracy"] == pytest.approx(0.6 * point["confidence"], abs=0.05)
    assert sum(point["count"] for point in found["reliability"]) == 50_000


def test_bins_by_hand() -> None:
    """Two guesses share the bin up to 1/15, of which one is right; one more is sure and right. In
    another row it is the same."""
    rows = np.array([0, 0, 0, 1, 1, 1])
    confidence, correct = np.array([0.02, 0.06, 1.0] * 2), np.array([0.0, 1, 1] * 2)
    found = calibration.calibration(Guesses(rows, confidence, correct, np.ones(6)))
    assert found["ece"]["value"] == pytest.approx(abs(0.08 - 1) / 3)
    assert found["reliability"] == [
        {"confidence": pytest.approx(0.04), "accuracy": 0.5, "count": 4},
        {"confidence": 1.0, "accuracy": 1.0, "count": 2},
    ]


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_guesses_are_those_of_one_token_at_a_time(workshop: Workshop, layout: str) -> None:
    run, files = (f(data={"layout": layout}) for f in (workshop.run, workshop.files))
    model = GPT(run.model, files.meta["vocab_size"], EVERYWHERE)
    rows = files.rows("val", 16)
    expected = []
    for number, batch in enumerate(rows.sweep(1)):
        with torch.no_grad():
            p = model.eval()(torch.from_numpy(batch.inputs))[0].softmax(-1)
        for t in np.flatnonzero(batch.targets[0] >= 0):
            came = torch.zeros(p.shape[1])
            came[batch.targets[0, t]] = 1
            right = float(p[t].argmax() == batch.targets[0, t])
            expected.append((number, p[t].max(), right, (p[t] - came).square().sum()))
    found = np.stack(guesses(model, rows.sweep(7), run), 1)
    assert found == pytest.approx(np.array(expected, dtype=float), abs=1e-5)


def test_averaged_passes_are_what_summing_them_gives(workshop: Workshop) -> None:
    run, files = workshop.run(), workshop.files()
    model = GPT(run.model, files.meta["vocab_size"], EVERYWHERE).train()
    before = copy.deepcopy(model.state_dict())
    batches = list(files.rows("val", 16).sweep(5, 10))
    found = mc_dropout(model, batches, run, (1, 2, 4))
    mean, nats, rows = [], {}, 0
    for batch in batches:
        keys = np.arange(rows, rows := rows + len(batch.inputs))
        with torch.no_grad():
            passes = [
                model(torch.from_numpy(batch.inputs), samples=sample_keys(run.seed, i, keys))
                for i in range(4)
            ]
        p = torch.stack(passes).softmax(-1).double()
        targets = torch.from_numpy(batch.targets)
        for n in (1, 2, 4):
            chosen = p[:n].mean(0).gather(-1, targets[..., None])[..., 0]
            nats[n] = nats.get(n, 0) - float(chosen.log().sum())
        mean.append(p.mean(0))
    total = sum(batch.targets.size for batch in batches)
    assert found["loss"] == pytest.approx([nats[n] / total for n in (1, 2, 4)], rel=1e-5)
    p = torch.cat(mean)
    assert found["predictive_entropy"]["value"] == pytest.approx(
        float(-(p * p.log()).sum(-1).mean()), rel=1e-5
    )
    assert 0 < found["mutual_information"]["value"] < found["predictive_entropy"]["value"]
    plain = measure(model, batches, run, byte_lengths(files.tokenizer))
    assert found["deterministic_loss"]["value"] == pytest.approx(plain.loss, rel=1e-6)
    gain = found["averaged_minus_deterministic"]["value"]
    assert gain == pytest.approx(found["loss"][-1] - plain.loss, abs=1e-6)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_dropout_every_pass_is_the_same(workshop: Workshop) -> None:
    run, files = workshop.run(), workshop.files()
    model = GPT(run.model, files.meta["vocab_size"])
    found = mc_dropout(model, list(files.rows("val", 16).sweep(5, 5)), run, (1, 3))
    assert found["mutual_information"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["averaged_minus_deterministic"]["value"] == pytest.approx(0, abs=1e-6)
