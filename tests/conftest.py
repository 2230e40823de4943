"""What several tests need: one torch thread, text made on the spot, runs from plain values."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from gptlite.config.dropout import SITES, DropoutConfig
from gptlite.config.reader import validate
from gptlite.config.run import RunConfig
from gptlite.config.strict_yaml import Document
from gptlite.core.train import Trainer
from gptlite.core.world import ALONE, World
from gptlite.data.prepare import prepare
from gptlite.data.token_files import TokenFiles
from gptlite.runs.checkpoint import RunState
from gptlite.studies import study

for name, examples in (("short", 300), ("long", 20_000)):
    settings.register_profile(
        *(name,),
        **{"max_examples": examples, "derandomize": True, "database": None, "deadline": None},
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("short")  # `--hypothesis-profile=long` takes the other

# A shell that starts the tests in the background has Ctrl-C ignored, here and in every child.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = "the of and to a in is it you that he was for on are with as his they be at one have this"

# torch 2.13 takes a graph that it compiled with AVX2 out of its cache where there is AVX-512, and
# writes past the end of tensors.
GRAPHS = f"torchinductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / GRAPHS))

TINY: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "tokenizer": {"kind": "char"},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 16},
    "optim": {"warmup_steps": 2},
    "train": {"max_steps": 8, "batch_size": 8, "eval_interval": 4, "threads": 1, "log_interval": 1},
    "sample": {"max_new_tokens": 8},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("CI", "true")


def prose(n_words: int = 3000, seed: int = 0) -> str:
    """Words in sentences and lines, the same at every call."""
    rng = np.random.default_rng(seed)
    words = rng.choice(WORDS.split(), n_words).tolist()
    lines = [" ".join(words[i : i + 12]).capitalize() + "." for i in range(0, n_words, 12)]
    return "\n".join(lines) + "\n"


def only(*sites: str, rate: float = 0.5, **more: Any) -> DropoutConfig:
    """Dropout at these sites alone; `more` are further keys of each site, or of the section."""
    of_section = {key: more.pop(key) for key in ("masks", "schedule") if key in more}
    chosen = {site: {"rate": rate, **more} for site in sites}
    return DropoutConfig.model_validate({"preset": "none", "sites": chosen, **of_section})


EVERYWHERE = only(*SITES, rate=0.3)


def state_at(step: int, **over: Any) -> RunState:
    """What a checkpoint of a run that has done nothing yet would say."""
    plain: dict[str, Any] = {
        **{"run_id": "é", "tokens": 0, "elapsed_seconds": 0.0, "best": None, "val_loss": None},
        **{"evaluations_without_gain": 0, "skipped": [], "pending": None, "data_digest": ""},
        **{"tokenizer_sha256": "", "config": {}, "environment": {}, "step": step},
    }
    return RunState.model_validate({**plain, **over})


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


class Workshop:
    """Makes runs in a folder of its own, with one text to train on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "text.txt"
        self.text.write_text(prose(), encoding="utf-8")

    def run(self, **sections: Any) -> RunConfig:
        """TINY with these sections laid over it."""
        data = {"source": str(self.text), "cache_dir": str(self.folder / "cache")}
        return validate(Document(merged(merged(TINY, {"data": data}), sections)))

    def files(self, **sections: Any) -> TokenFiles:
        return prepare(self.run(**sections))


def trainer_on(run: RunConfig, files: TokenFiles, world: World = ALONE) -> Trainer:
    rows = files.rows("train", run.model.context_length)
    return Trainer(run, rows, files.meta["vocab_size"], world)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


RATES = {"axes": {"dropout.rate": [0, 0.3]}}
"""The axis of a small study."""


class Bench:
    """A folder with a base config and a study over it."""

    def __init__(self, workshop: Workshop) -> None:
        self.folder = workshop.folder
        data = {"source": str(workshop.text), "cache_dir": str(self.folder / "cache")}
        self.base = self.folder / "base.yaml"
        self.base.write_text(yaml.safe_dump(merged(TINY, {"data": data})))
        self.out = self.folder / "out"

    def write(self, **keys: Any) -> Path:
        path = self.folder / "tiny.yaml"
        plain = {"base": str(self.base), "seeds": [1, 2], **keys}
        path.write_text(yaml.safe_dump(plain, sort_keys=False))
        return path

    def run(self, **keys: Any) -> dict[str, Any]:
        return study.run_study(self.write(**keys), self.out, 1, None)

    def summaries(self) -> dict[str, int]:
        """When each run was finished, by its directory."""
        found = self.out.glob("runs/*/summary.json")
        return {path.parent.name: path.stat().st_mtime_ns for path in found}


@pytest.fixture
def bench(workshop: Workshop) -> Bench:
    return Bench(workshop)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that keeps what its console says."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *("hide-scrollbars", "disable-dev-shm-usage"),
    ):
        options.add_argument(f"--{flag}")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()
