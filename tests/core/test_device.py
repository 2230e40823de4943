"""No precision that a processor lacks, unless it is asked for by name; then its cost is told."""

import json
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import EVERYWHERE, RATES, Bench, Workshop
from ranks import together
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.core import device as devices
from gptlite.core.world import World
from gptlite.measure import suites
from gptlite.measure.suites import SUITES, Effort
from gptlite.planning import auto
from gptlite.planning.audit import audit
from gptlite.planning.plan import plan_run
from gptlite.report.page import study_page
from gptlite.runs import recipe, resume, start, trained
from gptlite.runs.origin import load_run
from gptlite.runs.trained import Trained, load_trained
from gptlite.studies import study
from gptlite.studies.table import table_lines

CPU = torch.device("cpu")
SMALL = Effort(64, 32, 32, (0, 0.5, 1), 2, (1, 2))


class NoHalves(TorchDispatchMode):
    """Fails at the first operation that reads or makes a bfloat16 tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.n_operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.n_operations += 1
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
                raise AssertionError(f"{function} in bfloat16")
        return out


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has no half precision."""
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(devices, "cpu_has_float16", lambda: False)


def having(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_the_watch_sees_what_is_in_bfloat16() -> None:
    """A gate that lets all through would be no gate: autocast, a cast, a backward pass, Muon."""
    x, weight = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)
    for work in (
        lambda: torch.autocast("cpu", torch.bfloat16)(torch.mm)(x, weight),
        lambda: x.bfloat16(),
        lambda: torch.empty(2, dtype=torch.bfloat16),
    ):
        with pytest.raises(AssertionError, match="in bfloat16"), NoHalves():
            work()


# Without the hardware nothing is in bfloat16


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_a_run_that_leaves_the_precision_open(
    workshop: Workshop, lacking: None, name: str, layout: str
) -> None:
    """Training with its evaluations, samples and checkpoints; then all that is asked of a run."""
    run = workshop.run(
        dtype="auto",
        data={"layout": layout},
        optim={"name": name},
        dropout=EVERYWHERE.model_dump(mode="json"),
        sample={"interval": 4},
    )
    directory = workshop.folder / "run"
    with NoHalves() as watch:
        start.train(run, directory)
    assert watch.n_operations > 1000
    assert load_run([str(directory / "config.yaml")]).dtype == "float32"


@pytest.fixture
def in_half(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a machine that has bfloat16, on one that lacks it; its config leaves it open."""
    directory = workshop.folder / "run"
    run = workshop.run(
        dtype="auto",
        attention="math",
        optim={"name": "muon"},
        dropout=EVERYWHERE.model_dump(mode="json"),
        train={"max_steps": 4, "save_interval": 2},
    )
    config = workshop.folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    start.train(run.model_copy(update={"dtype": "bfloat16"}), directory)
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: False)
    return directory


NOTE = "dtype: bfloat16 -> float32: this CPU has no bfloat16 products"


def test_a_run_in_bfloat16_is_measured_in_float32(
    in_half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "FULL", SMALL)
    with NoHalves() as watch:
        found = call("eval", "--run", str(in_half), "--suite", "all", "--json")
        active = call("eval", "--run", str(in_half), "--dropout-active", "--json")
    assert watch.n_operations > 1000
    assert set(SUITES) <= set(json.loads(found.stdout))
    for result in (found, active):
        assert result.stderr.startswith(f"not as in training: {NOTE}\n")


def test_a_run_in_bfloat16_generates_in_float32(in_half: Path) -> None:
    run = ["generate", "--run", str(in_half), "--max-new-tokens", "4"]
    with NoHalves():
        told = [call(*run, "--prompt", "The", "--num-samples", "2").stderr]
        talk = CliRunner().invoke(app, [*run, "--interactive"], input="The\n\n")
    told.append(talk.stderr)
    assert talk.exit_code == 0
    assert told == [f"not as in training: {NOTE}\n"] * 2


@pytest.mark.filterwarnings("ignore")
def test_a_run_in_bfloat16_answers_the_harness_in_float32(in_half: Path) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    from gptlite.measure.lm_eval import HarnessModel

    harness = HarnessModel(load_trained(in_half, "best"))
    request = SimpleNamespace(args=("The", {"until": ["e"], "max_gen_toks": 3}))
    with NoHalves():
        ((score, _),) = harness.score([([1, 2], [3])])
        (answer,) = harness.generate_until([request])
    assert score < 0
    assert isinstance(answer, str)


@pytest.mark.parametrize("how", ["by its directory", "by its config"])
def test_a_run_in_bfloat16_goes_on_in_float32_and_says_so(
    workshop: Workshop, in_half: Path, how: str
) -> None:
    """Nobody has asked for bfloat16 by name now: the stored config says what `auto` chose."""
    of = ["--resume", str(in_half)]
    if how == "by its config":
        of = ["-c", str(workshop.folder / "tiny.yaml"), "--out-dir", str(in_half)]
        of += ["--resume", "auto"]
    with NoHalves() as watch:
        told = call("train", *of, "--set", "train.max_steps=6").stderr
    assert watch.n_operations > 1000
    assert "resumed at step 4 of 6" in told
    assert "not as when it was saved: dtype: bfloat16 -> float32; the last bits of results" in told
    assert load_run([str(in_half / "config.yaml")]).dtype == "float32"
    strictly = ["--strict-resume", "--set", "train.max_steps=8", "--set", "dtype=bfloat16"]
    assert "--resume: dtype: float32 -> bfloat16" in call("train", *of, *strictly, code=2).stderr


def test_a_plan_and_its_audit(workshop: Workshop, lacking: None) -> None:
    run = workshop.run(dtype="auto", dropout=EVERYWHERE.model_dump(mode="json"))
    with NoHalves() as watch:
        planned = plan_run(run)
        found = audit(planned.run, planned.model, planned.rows)
    assert watch.n_operations > 1000
    assert planned.run.dtype == "float32"
    assert planned.plan["auto"]["dtype"] == "float32: this CPU has no bfloat16 products"
    assert found["problems"] == []


def test_a_config_made_for_a_text(workshop: Workshop, lacking: None) -> None:
    """It times models, most of them with Muon."""
    with NoHalves() as watch:
        made = recipe.make_recipe([str(workshop.text)], 0.1, [f"data.cache_dir={workshop.folder}"])
    assert watch.n_operations > 1000
    assert made.run.dtype == "auto"


# By name it is done, and the cost is told

COST = r"bfloat16: asked for, though this CPU has no bfloat16: a matrix product takes [0-9.]+ times"


def test_what_is_asked_for_by_name_is_done_and_its_cost_is_told(
    workshop: Workshop, lacking: None
) -> None:
    run, directory = workshop.run(dtype="bfloat16"), workshop.folder / "run"
    summary = start.train(run, directory)
    assert summary["steps"] == 8
    log = (directory / "train.log").read_text().splitlines()
    (line,) = [line for line in log if "auto: dtype" in line]
    plan = json.loads((directory / "plan.json").read_text())
    assert line == f"auto: dtype = {plan['auto']['dtype']}"
    assert re.match(COST, plan["auto"]["dtype"])
    with pytest.raises(AssertionError, match="in bfloat16"), NoHalves():
        start.train(run, workshop.folder / "again")


def test_a_run_in_bfloat16_stays_so_where_that_is_asked_for_by_name(in_half: Path) -> None:
    by_name = ["--set", "dtype=bfloat16", "--set", "train.max_steps=6"]
    told = call("train", "--resume", str(in_half), *by_name, "--verbose").stderr
    assert "auto: dtype = bfloat16: asked for, though this CPU has no bfloat16: a matrix" in told
    assert "not as when it was saved" not in told
    assert load_run([str(in_half / "config.yaml")]).dtype == "bfloat16"


def test_the_cost_is_what_was_measured(monkeypatch: pytest.MonkeyPatch, lacking: None) -> None:
    times = iter([3.0, 2.0])
    monkeypatch.setattr(devices, "shortest", lambda run: next(times))
    devices.slowdown.cache_clear()
    told = devices.cost_of("bfloat16", CPU)
    devices.slowdown.cache_clear()
    assert told == (
        "this CPU has no bfloat16: a matrix product takes 1.5 times as long as in float32"
    )
    having(monkeypatch)
    assert devices.cost_of("bfloat16", CPU) is None
    assert devices.cost_of("float32", CPU) is None


# What a device has


@pytest.mark.parametrize(
    ("onednn", "avx512", "amx", "machine", "has"),
    [
        (True, True, False, "x86_64", True),
        (True, False, True, "x86_64", True),
        (True, False, False, "x86_64", False),
        (True, False, False, "AMD64", False),
        (True, False, False, "aarch64", True),
        (False, True, True, "x86_64", False),
        (False, False, False, "arm64", False),
    ],
)
def test_a_cpu_has_what_it_computes_itself(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512: bool, amx: bool, machine: str, has: bool
) -> None:
    """From AVX-512 on oneDNN says yes to what it emulates."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(devices.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert devices.cpu_has_bfloat16() is has
    assert devices.has_bfloat16(CPU) is has


class Gpus:
    """CUDA as torch tells of it; bfloat16 can be emulated on all of them."""

    def __init__(self, patch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
        self.capabilities, self.current = capabilities, 0
        patch.setattr(torch.version, "cuda", "12.8")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        patch.setattr(torch.cuda, "current_device", lambda: self.current)
        patch.setattr(torch.cuda, "_exchange_device", self.exchange)
        patch.setattr(torch.cuda, "_maybe_exchange_device", self.exchange)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        patch.setattr(torch.cuda, "get_device_capability", self.capability)
        patch.setattr(torch.cuda, "get_device_properties", self.properties)
        patch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)

    def exchange(self, index: int) -> int:
        before, self.current = self.current, self.current if index < 0 else index
        return before

    def capability(self, device: Any = None) -> tuple[int, int]:
        index = device if isinstance(device, int) else torch.device(device or "cuda").index
        return self.capabilities[self.current if index is None else index]

    def properties(self, device: Any = None) -> Any:
        major, minor = self.capability(device)
        return SimpleNamespace(major=major, minor=minor, total_memory=16 << 30)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        *(((6, 0), "float32"), ((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16")),
        *(((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((9, 0), "bfloat16")),
    ],
)
def test_a_gpu_computes_in_what_it_has_itself(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    """P100, GTX 10xx, V100, T4; A100, RTX 40xx, H100. torch emulates bfloat16 on the first four."""
    Gpus(monkeypatch, capability)
    assert torch.cuda.is_bf16_supported()
    resolved, reasons = auto.resolve_run(
        workshop.run(device="auto", dtype="auto"), vocab_size=50, n_rows=100
    )
    assert (resolved.device, resolved.dtype) == ("cuda", dtype)
    why = {
        "bfloat16": "this GPU has it",
        "float16": "this GPU has no bfloat16; the loss is scaled",
        "float32": "this GPU has no products of 16 bits",
    }
    assert reasons["dtype"] == f"{dtype}: {why[dtype]}"


def test_the_device_that_is_used_is_asked(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(monkeypatch, (7, 5), (8, 0), (6, 1))
    wanted = {"cuda:0": "float16", "cuda:1": "bfloat16", "cuda:2": "float32", "cuda": "float16"}
    for current in (0, 1):
        gpus.current = current
        wanted["cuda"] = ("float16", "bfloat16")[current]
        for device, dtype in wanted.items():
            run = workshop.run(device=device, dtype="auto")
            assert auto.resolve_run(run, vocab_size=50, n_rows=100)[0].dtype == dtype, device
            stored = run.model_copy(update={"dtype": "bfloat16"})
            kept, notes = devices.adapt(stored)
            assert (kept.dtype == "bfloat16") is (dtype == "bfloat16")
            assert bool(notes) is (dtype != "bfloat16")
        assert gpus.current == current


def test_a_gpu_that_lacks_what_is_asked_for_says_what_it_costs(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpus(monkeypatch, (7, 5), (6, 1))
    monkeypatch.setattr(devices, "slowdown", lambda name, device: 8.0)
    for device, name, told in (
        ("cuda:0", "bfloat16", True),
        ("cuda:0", "float16", False),
        ("cuda:1", "float16", True),
        ("cuda:1", "float32", False),
    ):
        run = workshop.run(device=device, dtype=name)
        resolved, reasons = auto.resolve_run(run, vocab_size=50, n_rows=100)
        assert resolved.dtype == name
        cost = f"{name}: asked for, though this GPU has no {name}: a matrix product takes 8.0 times"
        assert reasons.get("dtype", "").startswith(cost) is told


def test_a_run_of_a_gpu_in_float16_is_used_on_a_cpu(workshop: Workshop, lacking: None) -> None:
    run = workshop.run(device="cuda", dtype="float16")
    kept, notes = devices.adapt(run)
    assert (kept.device, kept.dtype) == ("cpu", "float32")
    assert notes == [
        "device: cuda -> cpu: not available here",
        "dtype: float16 -> float32: this CPU has no float16 products",
    ]


# Ranks and studies


class Unlike(World):
    """The first of two ranks; the other one has this to say."""

    def __init__(self, other: Any) -> None:
        super().__init__(2)
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_ranks_take_what_all_of_them_have(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    having(monkeypatch)
    run = workshop.run(dtype="auto", attention="math")
    faster = {("math", "float32"): 1.0, ("math", "bfloat16"): 0.1}
    monkeypatch.setattr(auto, "time_blocks", lambda run, ways: {w: faster[w] for w in ways})
    for other, dtype in ((["bfloat16", "float32"], "bfloat16"), (["float32"], "float32")):
        world = Unlike(other)
        own = devices.shared_precisions(run, world)
        sizes = {"vocab_size": 50, "n_rows": 100}
        assert auto.resolve_run(run, **sizes, world=world, own=own)[0].dtype == dtype
        stored = run.model_copy(update={"dtype": "bfloat16"})
        assert devices.adapt(stored, own)[0].dtype == dtype
        reasons = auto.resolve_run(stored, **sizes, world=world, own=own)[1]
        told = "bfloat16: asked for, though another rank has no bfloat16 products"
        assert reasons.get("dtype") == (told if dtype == "float32" else None)


def test_ranks_measure_in_what_all_of_them_have(workshop: Workshop) -> None:
    run = workshop.run(dtype="bfloat16")
    one = Trained(run, *([None] * 5), problems=[], notes=[])  # type: ignore[call-arg]
    assert trained.agree_on_precision(one, Unlike("bfloat16")) is one
    unlike = trained.agree_on_precision(one, Unlike("float32"))
    assert unlike.run.dtype == "float32"
    assert unlike.notes == ["dtype: bfloat16 -> float32: another rank has no bfloat16 products"]
    adapted = trained.agree_on_precision(unlike, Unlike("bfloat16"))
    assert (adapted.run.dtype, adapted.notes) == ("float32", unlike.notes)


def on_unlike_machines(run: Any, directory: Path, resuming: bool, world: World) -> Any:
    """The second rank's machine lacks bfloat16."""
    devices.cpu_has_bfloat16 = lambda: world.first  # type: ignore[assignment]  # in a process
    config, took = str(directory / "config.yaml"), []
    if resuming:
        took.append(trained.load_on_all_ranks(directory, "last", world).run.dtype)
    with nullcontext() if world.first else NoHalves():
        start.train(run, directory, resume=resuming, world=world)
    return [*took, load_run([config]).dtype]


def test_ranks_on_unlike_machines_train_and_measure_in_float32(workshop: Workshop) -> None:
    """Anew, and where a run that began in bfloat16 is measured and goes on."""
    few = {"train": {"max_steps": 2}, "optim": {"warmup_steps": 0, "schedule": "constant"}}
    run = workshop.run(dtype="auto", attention="math", **few)
    directory, ranks = workshop.folder / "run", workshop.folder / "ranks"
    work = partial(on_unlike_machines, run, directory, False)
    assert together(2, work, ranks) == [["float32"]] * 2
    stored = workshop.folder / "stored"
    start.train(run.model_copy(update={"dtype": "bfloat16"}), stored)
    longer = run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 4})})
    work = partial(on_unlike_machines, longer, stored, True)
    assert together(2, work, ranks) == [["float32"] * 2] * 2


def test_a_machine_that_lacks_the_precision_of_a_study_says_what_it_took(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine has bfloat16 and chooses it for all; the second one takes a run."""
    base = yaml.safe_load(bench.base.read_text())
    bench.base.write_text(yaml.safe_dump({**base, "dtype": "auto", "attention": "math"}))
    monkeypatch.setattr(auto, "BF16_GAIN", 0.0)
    begun: list[str] = []
    whole, begin = study.train_job, start.train

    def elsewhere(*args: Any) -> None:
        monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: not begun)
        with NoHalves() if begun else nullcontext():
            whole(*args)

    def noting(run: Any, directory: Path, **rest: Any) -> Any:
        begun.append(run.dtype)
        return begin(run, directory, **rest)

    monkeypatch.setattr(study, "train_job", elsewhere)
    monkeypatch.setattr(start, "train", noting)
    found = bench.run(**RATES, evaluate=[], seeds=[1])
    assert begun == ["bfloat16", "float32"]
    assert [run["dtype"] for run in found["runs"]] == ["bfloat16", "float32"]
    note = "not all runs were trained in one precision (1 in bfloat16, 1 in float32); study.json"
    assert any(line.startswith(f"note: {note}") for line in table_lines(found))
    assert any(line.startswith(note) for line in study_page(bench.out).notes)


def test_a_study_in_one_precision_or_about_precisions_has_no_note(bench: Bench) -> None:
    found = bench.run(**RATES, evaluate=[], seeds=[1])
    assert found["notes"] == []
    assert {run["dtype"] for run in found["runs"]} == {"float32"}
    asked = bench.run(axes={"dtype": ["float32", "bfloat16"]}, evaluate=[], seeds=[1])
    assert [run["dtype"] for run in asked["runs"]] == ["float32", "bfloat16"]
    assert asked["notes"] == []


def test_what_changes_with_the_precision_is_in_the_fingerprint(workshop: Workshop) -> None:
    run = workshop.run(dtype="bfloat16")
    before = resume.fingerprint(run, 1)
    after = run.model_copy(update={"dtype": "float32"})
    assert "dtype: bfloat16 -> float32" in resume.changed_surroundings(after, before, 1)
