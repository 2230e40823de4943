"""The loss in parts is the loss, in value and gradient; recomputing changes nothing at all."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Workshop
from torch import Tensor

from gptlite.config.run import ModelConfig
from gptlite.core import loops, loss
from gptlite.core.loss import total_nats
from gptlite.core.masks import sample_keys
from gptlite.core.model import GPT
from gptlite.data.batches import IGNORED
from tests.conftest import EVERYWHERE, only

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 12}


def example(V: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, 16, generator=generator).requires_grad_()
    weight = torch.randn(V, 16, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (3, 11), generator=generator)
    targets[0, :4] = targets[2, -1] = IGNORED
    return x, weight, targets


@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)],
)
def test_parts_sum_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    results = []
    for part_bytes in (1 << 30, 4 * 40 * rows):
        monkeypatch.setattr(loss, "PART_BYTES", part_bytes)
        x, weight, targets = example()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total = total_nats(x, weight, targets)
        results.append((total, *torch.autograd.grad(total / 7, (x, weight))))
    for whole, parts in zip(*results, strict=True):
        assert parts.dtype == torch.float32
        torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)


def test_the_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "PART_BYTES", 4 * 40 * 5)
    shapes: list[int] = []
    largest = torch.Tensor.amax

    def seen(logits: Tensor, dim: int, keepdim: bool) -> Tensor:
        shapes.append(len(logits))
        return largest(logits, dim, keepdim)

    monkeypatch.setattr(torch.Tensor, "amax", seen)
    total_nats(*example())
    assert shapes == [5] * 6 + [3]


def test_parts_hold_large_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = example()
    results = []
    for part_bytes in (1 << 30, 4 * 40 * 5):
        monkeypatch.setattr(loss, "PART_BYTES", part_bytes)
        total = total_nats(1e4 * x, weight, targets)  # exp overflows from 88 on
        results.append((total, *torch.autograd.grad(total, (x, weight))))
    for whole, parts in zip(*results, strict=True):
        assert parts.isfinite().all()
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("rows", [1 << 8, 1 << 12])
def test_sums_of_many_tokens_hold_in_float16(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """The sum of the losses is beyond 65504, and so is a gradient over all tokens; the loss is
    scaled only afterwards, so that no smaller scale would help."""
    V, n = 8, 1 << 15
    monkeypatch.setattr(loss, "PART_BYTES", 4 * V * rows)
    targets = torch.zeros(1, n, dtype=torch.long)
    results = []
    for half in (False, True):
        x = torch.full((1, n, 4), 30.0, requires_grad=True)
        weight = (0.001 * torch.arange(V)[:, None]).expand(V, 4).clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=half):
            total = total_nats(x, weight, targets)
        gradients = torch.autograd.grad(total * 1024 / n, (x, weight))
        results.append((total.detach(), *(gradient * n / 1024 for gradient in gradients)))
    assert min(results[0][0], results[0][2].abs().max()) > 65504
    for whole, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, whole, rtol=2e-3, atol=2e-3)


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "PART_BYTES", 1)
    x, weight, targets = example()
    with torch.no_grad():
        total = total_nats(x, weight, targets)
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert float(total) == pytest.approx(float(expected.detach()) * 28, rel=1e-5)


def test_a_batch_without_targets_costs_nothing_and_teaches_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "PART_BYTES", 1)
    x, weight, targets = example()
    total = total_nats(x, weight, torch.full_like(targets, IGNORED))
    assert float(total.detach()) == 0
    assert all(not g.any() for g in torch.autograd.grad(total, (x, weight)))


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("kernel", ["math", "fused"])
@pytest.mark.parametrize(
    "dropout",
    [EVERYWHERE, only("embedding", "mlp_output", masks="native")],
    ids=["keyed", "native"],
)
def test_recomputing_gives_the_same_gradients_bit_for_bit(
    kernel: str, dropout: object, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks drawn from a shared generator it would not (OLMo-core PR 828). Without compiled
    loops, as on GPUs, masks are kept for the backward pass."""
    if not compiler:
        monkeypatch.setattr(loops, "library", lambda: None)
    ids = torch.randint(0, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    samples, gradients = sample_keys(0, 3, torch.arange(3).numpy()), []
    for recompute in (False, True):
        options = {"kernel": kernel, "seed": 1, "recompute": recompute}
        model = GPT(ModelConfig(**SIZES), 30, dropout, **options).train()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model(ids, samples=samples, targets=ids).backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)


def test_recomputing_keeps_less(workshop: Workshop) -> None:
    kept: list[int] = []

    def count(x: Tensor) -> Tensor:
        kept[-1] += x.numel()
        return x

    for recompute in (False, True):
        model = GPT(ModelConfig(**SIZES), 30, only("mlp_output"), recompute=recompute).train()
        kept.append(0)
        ids = torch.zeros(4, 12, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(ids, samples=sample_keys(0, 0, torch.arange(4).numpy()), targets=ids)
    assert kept[1] < kept[0] / 3
