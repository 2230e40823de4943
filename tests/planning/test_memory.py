"""What a run takes of memory, and how it is split to fit."""

from typing import Any

import pytest
import torch
from conftest import Workshop

from gptlite.config.run import RunConfig
from gptlite.core import loops
from gptlite.core.device import GIB
from gptlite.errors import ConfigError
from gptlite.planning import auto, memory
from gptlite.planning.memory import SLACK, fit_micro_batch, keep_freed, mask_bytes, training_bytes

CPU = torch.device("cpu")
V = 50


def budget(run: RunConfig, need: int) -> RunConfig:
    train = run.train.model_copy(update={"memory_gib": (need + 10) / GIB})
    return run.model_copy(update={"train": train})


def test_parts_of_a_batch_divide_it_and_fit(workshop: Workshop) -> None:
    run = workshop.run(train={"batch_size": 12}, attention="math")
    for most, size in ((100, 12), (12, 12), (11, 6), (5, 4), (1, 1)):
        fitted = fit_micro_batch(budget(run, training_bytes(run, V, most, recompute=False)), V, CPU)
        assert fitted[:2] == (size, False)


def test_recomputing_is_for_what_does_not_fit_otherwise(workshop: Workshop) -> None:
    model = {"n_layer": 16, "context_length": 64}
    run = workshop.run(train={"batch_size": 4}, model=model, attention="math")
    once, whole = training_bytes(run, V, 1, recompute=False), training_bytes(run, V, 4, True)
    assert fit_micro_batch(budget(run, once), V, CPU)[:2] == (1, False)
    assert fit_micro_batch(budget(run, training_bytes(run, V, 1, recompute=True)), V, CPU)[:2] == (
        1,
        True,
    )
    asked = workshop.run(
        train={"batch_size": 4, "micro_batch_size": 4}, model=model, attention="math"
    )
    assert fit_micro_batch(budget(asked, whole), V, CPU)[:2] == (4, True)
    asked = workshop.run(train={"batch_size": 4, "recompute": True}, model=model)
    assert fit_micro_batch(budget(asked, 100 * whole), V, CPU)[:2] == (4, True)


def test_without_a_budget_half_the_memory_is_used_and_all_of_it_in_need(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workshop.run()
    need = training_bytes(run, V, 8, recompute=False)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 2 * need + 10)
    assert fit_micro_batch(run, V, CPU)[:2] == (8, False)
    least = training_bytes(run, V, 1, recompute=True)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: least + 10)
    assert fit_micro_batch(run, V, CPU)[:2] == (1, True)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: least - 10)
    with pytest.raises(ConfigError, match=r"needs about .* GiB to train one sequence, cpu has"):
        fit_micro_batch(run, V, CPU)


@pytest.mark.parametrize("attention", ["auto", "math"])
def test_a_context_that_cannot_fit_is_refused_before_a_kernel_is_tried(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """There is a weight of attention for each pair of positions, in every head."""

    def time_blocks(run: RunConfig, ways: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
        raise AssertionError(f"would allocate: {ways}")

    monkeypatch.setattr(auto, "time_blocks", time_blocks)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 8 * GIB)
    run = workshop.run(
        attention=attention,
        dtype="auto",
        model={"context_length": 200_000},
        dropout={"preset": "gpt2"},
    )
    told = r"^model\.context_length: 200000 needs about .* GiB to train one sequence, cpu has 8;"
    with pytest.raises(ConfigError, match=told):
        auto.pick_kernels(run, CPU)


def test_a_kernel_that_keeps_no_weights_is_left_for_a_long_context(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 8 * GIB)
    run = workshop.run(model={"context_length": 200_000}, dropout={"preset": "none"})
    assert memory.fitting_kernels(run, ["math", "sdpa"], CPU) == ["sdpa"]
    short = workshop.run(dropout={"preset": "none"})
    assert memory.fitting_kernels(short, ["math", "sdpa"], CPU) == ["math", "sdpa"]


def test_a_budget_too_small_is_said(workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match=r"one sequence, train.memory_gib has 1e-05; lower"):
        fit_micro_batch(workshop.run(train={"memory_gib": 1e-5}), V, CPU)


def test_what_is_kept_grows_as_theory_says(workshop: Workshop) -> None:
    """Linear in rows and width; squares of the context only in attention that keeps weights."""

    def activations(kernel: str, rows: int = 8, **model: int) -> int:
        run = workshop.run(attention=kernel, model=model, dropout={"preset": "none"})
        return training_bytes(run, V, rows, False) - training_bytes(run, V, 0, False)

    for kernel in ("math", "fused", "sdpa"):
        assert activations(kernel, 16) == pytest.approx(2 * activations(kernel, 8), rel=1e-4)
    assert activations("sdpa", context_length=64) == pytest.approx(
        4 * activations("sdpa", context_length=16), rel=1e-4
    )
    assert activations("fused", context_length=64) > 4 * activations("fused", context_length=16)
    assert activations("math") > activations("fused") > activations("sdpa")


def test_all_logits_of_a_large_vocabulary_are_counted_only_where_a_graph_makes_them(
    workshop: Workshop,
) -> None:
    run, vocab_size = workshop.run(), 100_000
    compiled = run.model_copy(update={"compile": True})
    logits = 1000 * run.model.context_length * vocab_size

    def added(run: RunConfig) -> int:
        few, many = (training_bytes(run, vocab_size, n, recompute=True) for n in (1000, 2000))
        return many - few

    assert added(run) < logits
    # In float32 with the gradient, and rounded to 16 bits.
    assert added(compiled) - added(run) == pytest.approx((4 + 4 + 2) * SLACK * logits, rel=0.01)


def test_a_compiled_loss_that_does_not_fit_says_what_else_there_is(workshop: Workshop) -> None:
    run = workshop.run(compile=True, train={"memory_gib": 1.0})
    with pytest.raises(ConfigError, match="micro_batch_size, or set compile: false"):
        fit_micro_batch(run, 10**7, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_masks_are_kept_where_nothing_draws_them_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """On a GPU, and without a C compiler; attention weights only outside of fused kernels."""
    monkeypatch.setattr(loops, "library", lambda: object())
    sites = {"attention_weights": 0.1, "mlp_activation": 0.1, "mlp_output": 0.1}
    run = workshop.run(
        dtype=dtype, attention="math", dropout={"preset": "none", "sites": sites, "masks": "keyed"}
    )
    model = run.model
    width = model.mlp_width + model.n_embd
    weights = model.n_head * model.context_length
    assert mask_bytes(run) == 0
    on_gpu = run.model_copy(update={"device": "cuda"})
    assert mask_bytes(on_gpu) == 4 * (width + weights)
    assert mask_bytes(on_gpu.model_copy(update={"attention": "sdpa"})) == 4 * width
    assert mask_bytes(on_gpu.model_copy(update={"compile": True})) == 0
    monkeypatch.setattr(loops, "library", lambda: None)
    assert mask_bytes(run) == 4 * (width + weights)
    native = run.dropout.model_copy(update={"masks": "native"})
    size = 4 if dtype == "float32" else 2
    assert mask_bytes(run.model_copy(update={"dropout": native})) == size * (width + weights)


def test_both_dtypes_of_16_bits_take_the_same(workshop: Workshop) -> None:
    sizes = [
        training_bytes(workshop.run(dtype=dtype), V, 8, recompute=False)
        for dtype in ("float32", "bfloat16", "float16")
    ]
    assert sizes[0] > sizes[1] == sizes[2]


class Libc:
    """A C library that takes thresholds up to a size."""

    def __init__(self, largest: int) -> None:
        self.largest, self.set = largest, {}

    def mallopt(self, name: int, size: int) -> int:
        if name == memory.M_MMAP_THRESHOLD and size > self.largest:
            return 0
        self.set[name] = size
        return 1


@pytest.mark.parametrize(
    ("largest", "mapped"),
    [(1 << 31, 1 << 30), (1 << 25, 1 << 25), (1 << 19, None)],
    ids=["glibc 2.35", "glibc 2.34", "32 bit"],
)
def test_freed_memory_is_kept_as_far_as_glibc_lets(
    monkeypatch: pytest.MonkeyPatch, largest: int, mapped: int | None
) -> None:
    """The trim threshold alone would have every block over 128 KiB mapped anew."""
    libc = Libc(largest)
    monkeypatch.setattr("ctypes.CDLL", lambda name: libc)
    keep_freed()
    both = {memory.M_MMAP_THRESHOLD: mapped, memory.M_TRIM_THRESHOLD: 1 << 30}
    assert libc.set == ({} if mapped is None else both)


@pytest.mark.parametrize("error", [OSError, TypeError, None])
def test_another_c_library_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    """musl and macOS have no mallopt, Windows has no library by the name of None."""

    def load(name: None) -> Any:
        if error is not None:
            raise error
        return object()

    monkeypatch.setattr("ctypes.CDLL", load)
    keep_freed()
