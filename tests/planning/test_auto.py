"""What `auto` chooses, that it says why, and that it can be overridden."""

import re
from pathlib import Path

import pytest
import torch
from conftest import Workshop

from gptlite.config.dropout import DropoutConfig
from gptlite.config.run import RunConfig
from gptlite.core import device as devices
from gptlite.core import loops
from gptlite.errors import ConfigError
from gptlite.planning import auto
from gptlite.planning.plan import plan_run
from gptlite.runs.start import train


def resolve(run: RunConfig, n_rows: int = 100) -> tuple[RunConfig, dict[str, str]]:
    return auto.resolve_run(run, vocab_size=50, n_rows=n_rows)


def test_every_auto_is_replaced_and_explained(workshop: Workshop) -> None:
    run = workshop.run(
        device="auto", dtype="auto", train={"threads": "auto"}, dropout={"rate": "auto"}
    )
    resolved, reasons = resolve(run, n_rows=4)
    assert set(reasons) == {
        *("device", "dtype", "compile", "attention", "dropout.rate", "dropout.masks"),
        *("train.threads", "train.micro_batch_size", "train.early_stop", "train.recompute"),
    }
    values = [resolved.device, resolved.dtype, resolved.compile, resolved.attention]
    values += [getattr(resolved.train, k) for k in ("threads", "micro_batch_size", "early_stop")]
    assert "auto" not in values
    assert resolved.dropout.rate == 0.1  # 8 updates of 8 rows are 16 epochs of 4
    again, nothing = resolve(resolved, n_rows=4)
    assert again == resolved
    assert set(nothing) == {"dropout.masks"}  # says how, which is no choice that is stored


def test_what_is_named_is_kept(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)
    named = {"micro_batch_size": 2, "early_stop": 3, "threads": 1, "recompute": False}
    run = workshop.run(
        attention="math", compile=False, dtype="bfloat16", train=named, dropout={"masks": "keyed"}
    )
    resolved, reasons = resolve(run)
    assert resolved == run
    assert reasons == {}


Times = dict[tuple[str, str], float]


def timed(monkeypatch: pytest.MonkeyPatch, times: Times) -> list[tuple[str, str]]:
    """A machine that needs this long for a block; returns what it was asked to time."""
    asked: list[tuple[str, str]] = []

    def seconds(run: RunConfig, ways: list[tuple[str, str]]) -> Times:
        asked.extend(ways)
        return {way: times[way] for way in ways}

    monkeypatch.setattr(auto, "time_blocks", seconds)
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(loops, "library", lambda: object())
    monkeypatch.setattr(loops, "has_threads", lambda: True)
    return asked


@pytest.mark.parametrize(
    ("sdpa", "gain", "chosen"),
    [
        (2.0, 2.0, ("fused", "bfloat16")),
        (2.0, 1.05, ("fused", "float32")),
        (0.5, 3.0, ("sdpa", "bfloat16")),
        (0.5, 0.4, ("sdpa", "float32")),
    ],
)
def test_the_fastest_attention_and_precision_are_taken(
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    sdpa: float,
    gain: float,
    chosen: tuple[str, str],
) -> None:
    times = {("fused", "float32"): 1.0, ("sdpa", "float32"): sdpa}
    times |= {(kernel, "bfloat16"): time / gain for (kernel, _), time in times.items()}
    asked = timed(monkeypatch, times)
    resolved, reasons = resolve(workshop.run(dtype="auto", dropout={"preset": "none"}))
    assert (resolved.attention, resolved.dtype) == chosen
    assert set(asked) == set(times)
    assert f"a block timed {gain:.2f}x as fast in bfloat16" in reasons["dtype"]
    assert reasons["attention"].startswith(f"{chosen[0]}: fastest of fused ")


def test_only_what_is_open_is_timed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {("math", "float32"): 1.0, ("math", "bfloat16"): 0.1}
    asked = timed(monkeypatch, times)
    assert resolve(workshop.run(attention="math", dtype="auto"))[0].dtype == "bfloat16"
    assert set(asked) == set(times)
    asked.clear()
    drops = workshop.run(dtype="float32", dropout={"preset": "gpt2", "rate": 0.1})
    assert resolve(drops)[0].attention == "fused"
    assert (
        resolve(workshop.run(attention="sdpa", dtype="float32", dropout={"preset": "none"}))[1].get(
            "attention"
        )
        is None
    )
    assert not asked


def test_timing_a_block_touches_no_generator(workshop: Workshop) -> None:
    state = torch.get_rng_state()
    run = workshop.run(dropout={"preset": "gpt2"}, model={"position": "rope", "n_kv_head": 1})
    ways = [(kernel, dtype) for kernel in ("math", "sdpa") for dtype in ("float32", "bfloat16")]
    run = run.model_copy(update={"dropout": DropoutConfig(preset="none")})
    seconds = auto.time_blocks(run, ways)
    assert list(seconds) == ways
    assert all(0 < s < 10 for s in seconds.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_fused_attention_needs_a_compiler_and_a_cpu(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "library", lambda: None)
    with pytest.raises(ConfigError, match="attention: fused needs a CPU and a C compiler"):
        resolve(workshop.run(attention="fused"))
    assert resolve(workshop.run())[0].attention in ("math", "sdpa")


def test_early_stopping_is_for_runs_over_the_same_text(workshop: Workshop) -> None:
    run = workshop.run()  # 8 updates of 8 rows
    assert resolve(run, n_rows=100)[0].train.early_stop == "never"
    assert resolve(run, n_rows=20)[0].train.early_stop == 10


def test_epochs_become_updates(workshop: Workshop) -> None:
    run = workshop.run(train={"max_steps": None, "epochs": 2.5})
    assert run.planned_steps(16) == 5
    assert run.planned_steps(1) == 1


@pytest.mark.parametrize("device", ["cuda:99", "cuda"])
def test_a_device_that_is_not_there_is_said(workshop: Workshop, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        ConfigError, match=rf"device: '{device}' not available \(\d+ CUDA devices\)"
    ):
        resolve(workshop.run(device=device))
    run = workshop.run(device=device, dtype="bfloat16")
    usable, notes = devices.adapt(run)
    assert notes[0] == f"device: {device} -> cpu: not available here"
    assert usable.device == "cpu"


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a GPU, Triton, a C compiler and Python's headers; returns their folder."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(auto, "find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("gpu_machine")
def test_compiled_dropout_is_refused_where_it_is_wrong(workshop: Workshop) -> None:
    """pytorch issue 198333: on CUDA compiled torch dropout can repeat a mask across channels."""
    cuda, native = torch.device("cuda"), {"preset": "gpt2", "masks": "native"}
    with pytest.raises(ConfigError, match="compile: true with native dropout on CUDA is refused"):
        auto.pick_compile(workshop.run(dropout=native, compile=True), cuda, 10_000)
    assert not auto.pick_compile(workshop.run(dropout=native), cuda, 10_000)[0]
    for keyed in ({"preset": "none"}, {"preset": "gpt2", "masks": "keyed"}):
        run = workshop.run(dropout=keyed)
        assert auto.pick_compile(run, cuda, 10_000)[0]
        assert not auto.pick_compile(run, cuda, 10)[0]
        assert not auto.pick_compile(run, torch.device("cpu"), 10_000)[0]


@pytest.mark.parametrize(
    ("epochs", "rate"),
    [(0.5, 0.0), (8.0, 0.0), (13.0, 0.0), (14.0, 0.1), (70.0, 0.1), (80.0, 0.2)],
)
def test_an_automatic_rate_follows_the_planned_epochs(
    workshop: Workshop, epochs: float, rate: float
) -> None:
    run = workshop.run(dropout={"rate": "auto"}, train={"max_steps": None, "epochs": epochs})
    resolved, reasons = resolve(run, n_rows=800)
    assert resolved.dropout.rates()["embedding"] == rate
    assert reasons["dropout.rate"].startswith(f"{rate:g}: {epochs:g} epochs: ")


@pytest.mark.parametrize("compiler", [True, False])
def test_attention_is_what_the_rates_allow(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, compiler: bool
) -> None:
    """No kernel of torch's takes keyed masks, and none on a CPU drops weights at all."""
    monkeypatch.setattr(loops, "library", lambda: object() if compiler else None)
    monkeypatch.setattr(loops, "has_threads", lambda: compiler)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    drops, none = workshop.run(dropout={"preset": "gpt2"}), workshop.run(dropout={"preset": "none"})
    keyed = workshop.run(dropout={"preset": "gpt2", "masks": "keyed"})
    kernels = [
        auto.usable_kernels(run, device)[0]
        for run in (drops, keyed, none)
        for device in (cpu, cuda)
    ]
    own = "fused" if compiler else "math"
    assert kernels == [[own], ["sdpa"], [own], ["math"], [own, "sdpa"], ["sdpa"]]
    assert drops.dropout.native_sites("sdpa") == ("attention_weights",)
    assert drops.dropout.native_sites("math") == drops.dropout.native_sites("fused") == ()


def test_a_fused_kernel_that_cannot_drop_is_refused_when_the_device_is_known(
    workshop: Workshop,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = workshop.run(device="auto", attention="sdpa", dropout={"masks": "native"})
    with pytest.raises(ConfigError, match="attention: sdpa: no fused kernel has dropout on cpu"):
        resolve(run)


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("lacks", "needs"),
    [
        ("triton", "the package triton"),
        ("capability", r"a GPU of compute capability 7\.0"),
        ("compiler", r"a C compiler \(gcc or clang, or CC\)"),
        ("headers", r"Python's headers \(.*Python\.h"),
    ],
)
def test_compiling_for_a_gpu_is_refused_or_left_out_before_anything_is_trained(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, gpu_machine: Path, lacks: str, needs: str
) -> None:
    """Triton finds out at the first update; `auto` does without, `true` is told in one line."""
    run = workshop.run(dropout={"preset": "none"})
    asked = run.model_copy(update={"compile": True})
    assert auto.pick_compile(run, CUDA, 10_000) == (
        True,
        "true: CUDA and a run long enough to repay it",
    )
    assert auto.pick_compile(asked, CUDA, 10)[0]
    if lacks == "triton":
        monkeypatch.setattr(auto, "find_spec", lambda name: None)
    elif lacks == "capability":
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (6, 1))
    elif lacks == "compiler":
        monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++" if "+" in name else None)
    else:
        (gpu_machine / "Python.h").unlink()
    compiled, why = auto.pick_compile(run, CUDA, 10_000)
    assert not compiled
    assert re.match(f"false: needs {needs}", why), why
    with pytest.raises(ConfigError, match=f"compile: true needs {needs}.*; set false") as refused:
        auto.pick_compile(asked, CUDA, 10_000)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("gpu_machine")
def test_the_compiler_that_the_user_names_is_the_one_that_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Triton takes it: one program, and no other if that one is not there."""
    assert auto.missing_to_compile(CUDA) is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "C compiler" in str(auto.missing_to_compile(CUDA))
    monkeypatch.setenv("CC", "gcc -m64")
    assert "C compiler" in str(auto.missing_to_compile(CUDA))


def test_compiling_for_the_cpu_needs_a_compiler(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        resolve(workshop.run(compile=True))


def test_a_compiled_loss_is_counted_when_parts_are_chosen(workshop: Workshop) -> None:
    """With all logits of its eight sequences at once it would need twice of what there is."""
    sizes = {"vocab_size": 100_000, "n_rows": 100}
    run = workshop.run(train={"memory_gib": 0.6}, dropout={"preset": "none"})
    compiled = run.model_copy(update={"compile": True})
    assert auto.resolve_run(run, **sizes)[0].train.micro_batch_size == 8
    if auto.missing_to_compile(torch.device("cpu")) is None:
        parts = auto.resolve_run(compiled, **sizes)[0].train.micro_batch_size
        assert isinstance(parts, int)
        assert parts < 8


def test_epochs_shorter_than_the_warm_up_are_refused_as_steps_are(workshop: Workshop) -> None:
    """It would be known only from how far the learning rate came: a tenth of the way."""
    run = workshop.run(train={"max_steps": None, "epochs": 0.1}, optim={"warmup_steps": 100})
    refusal = r"optim.warmup_steps: 100 is not below the \d+ updates that train.epochs 0.1 makes"
    for refused in (lambda: train(run, workshop.folder / "run"), lambda: plan_run(run)):
        with pytest.raises(ConfigError, match=refusal):
            refused()
    assert not (workshop.folder / "run").exists()
    auto.check_warmup(workshop.run(train={"max_steps": None, "epochs": 4}), 100)
