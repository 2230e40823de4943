"""The best model of a text in so many minutes: `train --data` beside nanoGPT and a plain loop.

A part of bench.py. Each run is a line of docs/quality.jsonl; those that are there for this
processor are not made again, so the whole grid can be made in parts.
"""

import argparse
import datetime
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from bench_peers import describe_machine, hugging_face, row
from torch import Tensor

from gptlite.config.reader import validate
from gptlite.config.strict_yaml import Document
from gptlite.core.device import cpu_has_bfloat16
from gptlite.data.prepare import prepare
from gptlite.studies import comparison

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "quality.jsonl"
RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates that each peer may choose from, by the validation text, with the first seed."""
CPU = (
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0", "--log_interval=100"),
)
"""What nanoGPT's README gives for a CPU."""
NEARLY = 0.95
"""Of its time, with less of which nanoGPT trains once more, for longer."""
EVERY = 250
"""Updates between nanoGPT's evaluations, as its config has it."""
WARMUP = 0.05
"""Of the plain loop's time."""
OURS, NANOGPT, PLAIN = (
    "gptlite train --data",
    "nanoGPT train.py",
    "transformers GPT-2, a plain loop",
)
CHOSEN = ("tokenizer", "model", "train", "optim", "dropout")
"""Sections of a recipe that say nothing of this machine."""
Result = dict[str, Any]


class Text:
    """A text, cut once for all: nine tenths to train on, the tail to measure on."""

    def __init__(self, name: str, text: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.whole = text
        cut = int(len(text) * 0.9)  # where nanoGPT's prepare.py cuts
        folder.mkdir()
        self.train, self.val = folder / "train.txt", folder / "val.txt"
        self.train.write_text(text[:cut])
        self.val.write_text(text[cut:])


def gptlite(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CI": "true"}
    command = [sys.executable, "-m", "gptlite", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


def evaluate(run: Path, text: Text) -> float:
    """Bits per byte of the whole tail."""
    found = gptlite("eval", "--run", str(run), "--split", str(text.val), "--json").stdout
    return float(json.loads(found)["loss"]["bits_per_byte"])


class Trial(NamedTuple):
    """One run of someone's."""

    text: Text
    minutes: float
    seed: int
    lr: float
    """0: its own affair."""
    shape: Result
    """Sections of the recipe's config that a plain loop takes over."""
    nanogpt: Path
    folder: Path


def train_ours(trial: Trial) -> tuple[float, Result]:
    """The command, and nothing else."""
    text, folder = trial.text, trial.folder
    sets = [f"data.val_source={text.val}", f"data.cache_dir={folder / 'cache'}"]
    sets.append(f"seed={trial.seed}")
    args = ["train", "--data", str(text.train), "--minutes", f"{trial.minutes:g}"]
    args += ["--out-dir", str(folder / "run"), *(part for s in sets for part in ("--set", s))]
    began = time.perf_counter()
    gptlite(*args)
    took = round(time.perf_counter() - began, 1)
    made = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    recipe = {section: made[section] for section in CHOSEN}
    return evaluate(folder / "run", text), {"took": took, "recipe": recipe}


def train_nanogpt(trial: Trial) -> tuple[float, Result]:
    """Its own scripts; how many updates fit into the time is found by timing two short runs."""
    folder, lr = trial.folder, trial.lr
    checkout = Path(shutil.copytree(trial.nanogpt, folder / "nanoGPT"))
    data = checkout / "data" / "shakespeare_char"
    (data / "input.txt").write_text(trial.text.whole)
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    train = checkout / "train.py"  # it has no option for the seed
    train.write_text(train.read_text().replace("manual_seed(1337", f"manual_seed({trial.seed}"))

    def run(updates: int) -> float:
        args = [sys.executable, "train.py", "config/train_shakespeare_char.py", *CPU]
        args += [f"--max_iters={updates}", f"--lr_decay_iters={updates}"]
        args += [f"--learning_rate={lr}", f"--min_lr={lr / 10}"]
        began = time.perf_counter()
        subprocess.run(args, cwd=checkout, check=True, capture_output=True)
        return time.perf_counter() - began

    run(1)  # what is loaded for the first time takes longer
    short, long, limit = run(EVERY), run(5 * EVERY), 60 * trial.minutes
    updates = EVERY * max(1, round(4 * (limit - short) / (long - short) + 1))
    took = run(updates)
    if took < NEARLY * limit:
        updates = EVERY * math.ceil(updates / EVERY * limit / took)
        took = run(updates)
    checkpoint = checkout / "out-shakespeare-char" / "ckpt.pt"
    meta = ("--meta", str(data / "meta.pkl"), "--out", str(folder / "run"))
    gptlite("import", str(checkpoint), *meta)
    return evaluate(folder / "run", trial.text), {"took": round(took, 1), "updates": updates}


def train_plain(trial: Trial) -> tuple[float, Result]:
    """GPT-2 of transformers as people write the loop: AdamW, warm-up and a linear fall, dropout
    0.1, ten looks at the loss, the best kept. Tokenizer and size are those of gptlite's recipe."""
    text, began = trial.text, time.perf_counter() - LOADING
    data = {"source": str(text.train), "cache_dir": str(trial.folder / "cache")}
    run = validate(Document({**trial.shape, "data": data}))
    files, model = prepare(run), run.model.model_dump()
    train = torch.from_numpy(np.asarray(files.tokens("train")).astype("int64"))
    val = torch.tensor(files.tokenizer.encode(text.val.read_text()))
    torch.manual_seed(trial.seed)
    network = hugging_face(model, files.meta["vocab_size"], rate=0.1).train()
    adamw = torch.optim.AdamW(network.parameters(), lr=trial.lr, weight_decay=0.1)
    context, batch, n_bytes = model["context_length"], run.train.batch_size, text.val.stat().st_size
    best, looked = math.inf, 0
    while (done := (time.perf_counter() - began) / (60 * trial.minutes)) < 1:
        for group in adamw.param_groups:
            group["lr"] = trial.lr * min(done / WARMUP, (1 - done) / (1 - WARMUP))
        starts = torch.randint(0, len(train) - context, (batch,))
        ids = torch.stack([train[i : i + context] for i in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            loss = network(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if done * 10 >= looked + 1:
            looked = int(done * 10)
            best = min(best, measure_plain(network, val, context) / n_bytes)
    best = min(best, measure_plain(network, val, context) / n_bytes)
    return best, {"took": round(time.perf_counter() - began, 1)}


@torch.no_grad()
def measure_plain(network: Any, ids: Tensor, context: int) -> float:
    """Bits of a text in rows of a context's length, each token but the first predicted."""
    network.eval()
    total = 0.0
    for at in range(0, len(ids) - 1, 32 * context):
        part = ids[at : at + 32 * context + 1]
        rows = -(-(len(part) - 1) // context)
        padded = torch.full((rows * context + 1,), -100)
        padded[: len(part)] = part
        inputs = padded[:-1].clamp(min=0).view(rows, context)
        logits = network(inputs, use_cache=False).logits.flatten(0, 1)
        total += torch.nn.functional.cross_entropy(
            logits.float(), padded[1:], reduction="sum", ignore_index=-100
        ).item()
    network.train()
    return total / math.log(2)


LOADING = 3.0
"""Seconds that loading torch and transformers takes a plain script."""
WAYS = {OURS: train_ours, PLAIN: train_plain, NANOGPT: train_nanogpt}


def read_results() -> list[Result]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def best_rate(results: list[Result]) -> float:
    """The learning rate with the lowest loss."""
    return float(min(results, key=lambda result: float(result["bits_per_byte"]))["lr"])


def make_results(options: argparse.Namespace, texts: list[Text], folder: Path) -> list[Result]:
    """What is there already of this processor, and what of the grid is not."""
    machine = describe_machine()
    found = [result for result in read_results() if result["machine"] == machine]

    def at(text: Text, minutes: float, who: str, **more: Any) -> list[Result]:
        wanted = {"text": text.name, "minutes": minutes, "who": who, **more}
        return [r for r in found if all(r[key] == value for key, value in wanted.items())]

    def make(text: Text, minutes: float, who: str, seed: int, lr: float = 0.0) -> None:
        if at(text, minutes, who, seed=seed, lr=lr):
            return
        shape = {} if who == OURS else at(text, minutes, OURS, seed=1)[0]["recipe"]
        with tempfile.TemporaryDirectory(dir=folder) as name:
            trial = Trial(text, minutes, seed, lr, shape, options.nanogpt.resolve(), Path(name))
            value, more = WAYS[who](trial)
        key = {"text": text.name, "minutes": minutes, "who": who, "seed": seed, "lr": lr}
        about = {"date": str(datetime.date.today()), "machine": machine}
        found.append({**key, "bits_per_byte": round(value, 4), **more, **about})
        with RESULTS.open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")

    for minutes in options.minutes:
        for text in texts:
            make(text, minutes, OURS, 1)
            for who in (PLAIN, NANOGPT):
                for lr in RATES:
                    make(text, minutes, who, 1, lr)
        for seed in range(2, options.seeds + 1):
            for text in texts:
                make(text, minutes, OURS, seed)
                for who in (PLAIN, NANOGPT):
                    make(text, minutes, who, seed, best_rate(at(text, minutes, who, seed=1)))
    return found


def bench_quality(options: argparse.Namespace) -> Iterator[str]:
    """Bits per byte of the whole validation tail."""
    if options.nanogpt is None:
        sys.exit("quality: --nanogpt FOLDER, a checkout of github.com/karpathy/nanoGPT")
    whole = options.text.read_text()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        named = {
            "the-verdict, 20 kB": options.short.read_text(),
            "tinyshakespeare, 200 kB": whole[:200_000],
            "tinyshakespeare, 1.1 MB": whole,
        }
        texts = [
            Text(label, text, folder / str(i)) for i, (label, text) in enumerate(named.items())
        ]
        found = make_results(options, texts, folder)
    yield row(("text", "minutes", OURS, f"{NANOGPT}, lr", f"{PLAIN}, lr", "minus the better peer"))
    yield "|---|---:|---:|---:|---:|---:|"
    for text in named:
        for minutes in sorted({r["minutes"] for r in found}):
            here = [r for r in found if (r["text"], r["minutes"]) == (text, minutes)]
            if here:
                yield row((text, f"{minutes:g}", *cells(here)))


def cells(results: list[Result]) -> Iterator[str]:
    """Ours, each peer at the rate it chose, and the difference in pairs of one seed."""
    values: dict[str, dict[int, float]] = {}
    for who in (OURS, NANOGPT, PLAIN):
        of_who = [r for r in results if r["who"] == who]
        first = [r for r in of_who if r["seed"] == 1]
        lr = best_rate(first) if first else 0.0
        values[who] = {r["seed"]: r["bits_per_byte"] for r in of_who if r["lr"] == lr}
        numbers = list(values[who].values())
        spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
        chosen = f", {lr:g}" if lr else ""
        yield f"{statistics.mean(numbers):.3f}{spread}{chosen}" if numbers else "–"
    peers = [who for who in (NANOGPT, PLAIN) if values[who]]
    if not peers or not values[OURS]:
        yield "–"
        return
    better = min(peers, key=lambda who: statistics.mean(values[who].values()))
    seeds = sorted(values[OURS].keys() & values[better].keys())
    found = comparison.paired_difference(
        [values[OURS][s] for s in seeds], [values[better][s] for s in seeds]
    )
    if found["low"] is None:
        yield f"{found['difference']:+.3f}"
    else:
        yield f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
