"""What a run wrote, on its page: in order, with losses, prompts apart only where it is certain."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop

from gptlite.report import page as report
from gptlite.report.samples import PER_PROMPT, split_sample
from gptlite.runs.results import SAMPLES, spread
from gptlite.runs.start import train

PROMPTS = ["ROMEO:", "JULIET:"]
CONFIG = "sample:\n  prompts: {prompts}\ndata:\n  layout: {layout}\n"
NASTY = "</pre><script>alert(1)</script>\x1b[31m"


def write_run(
    folder: Path,
    samples: dict[int, str],
    losses: dict[int, float | None],
    prompts: list[str] | str = "",
    layout: str = "stream",
) -> Path:
    (folder / "samples").mkdir()
    for step, text in samples.items():
        (folder / "samples" / f"step-{step:08d}.txt").write_text(text)
    rows = [json.dumps({"step": step, "val/loss": loss}) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    (folder / "config.yaml").write_text(
        CONFIG.format(prompts=json.dumps(prompts or [""]), layout=layout)
    )
    return folder


def blocks(folder: Path) -> list[dict[str, Any]]:
    """The samples on the page of a run."""
    html = report.render(report.page_of([folder]))
    return [
        {
            "open": bool(attributes),
            "step": re.findall(r"<h3>(.*?)</h3>", block),
            "loss": re.findall(r'<span class="soft">(.*?)</span>', block),
            "heads": re.findall(r"<h4>(.*?)</h4>", block),
            "texts": re.findall(r"<pre>(.*?)</pre>", block, re.DOTALL),
        }
        for attributes, block in re.findall(
            r'<details class="sample"( open)?>(.*?)</details>', html, re.DOTALL
        )
    ]


def test_samples_are_in_order_with_the_loss_of_their_time(tmp_path: Path) -> None:
    texts = {100_000_000: "last", 5: "none yet", 20: "third", 10: "second"}
    losses = {8: 4.8371, 16: None, 20: 4.25, 30: 4.0}
    found = blocks(write_run(tmp_path, texts, losses))
    assert [block["step"] for block in found] == [
        ["step 5"],
        ["step 10"],
        ["step 20"],
        ["step 100,000,000"],
    ]
    assert [block["loss"] for block in found] == [
        [""],
        ["validation loss 4.84 nats at step 8"],
        ["validation loss 4.25 nats"],
        ["validation loss 4.00 nats at step 30"],
    ]
    assert [block["texts"] for block in found] == [["none yet"], ["second"], ["third"], ["last"]]
    assert all(block["open"] for block in found)


def test_many_samples_are_spread_over_the_run(tmp_path: Path) -> None:
    found = blocks(write_run(tmp_path, {step: f"text {step}" for step in range(100)}, {}))
    steps = [int(block["step"][0].removeprefix("step ")) for block in found]
    assert steps == spread(100, SAMPLES)
    assert [block["open"] for block in found] == [True, *[False] * (SAMPLES - 2), True]
    assert steps[0] == 0
    assert steps[-1] == 99
    html = report.render(report.page_of([tmp_path]))
    assert f"{SAMPLES} of 100 samples" in html


def test_prompts_are_shown_beside_each_other(tmp_path: Path) -> None:
    text = "ROMEO: O\nmy love\nJULIET: Away!\n"
    (block,) = blocks(write_run(tmp_path, {1: text}, {}, PROMPTS))
    assert block["heads"] == ["From “ROMEO:”", "From “JULIET:”"]
    assert block["texts"] == ["ROMEO: O\nmy love", "JULIET: Away!"]


def test_samples_and_prompts_are_escaped(tmp_path: Path) -> None:
    prompts = ["<b>a</b>", "<i>b</i>"]
    texts = {1: NASTY, 2: f"{prompts[0]}{NASTY}\n{prompts[1]}{NASTY}\n"}
    first, last = blocks(write_run(tmp_path, texts, {}, prompts))
    assert first["heads"] == []
    assert last["heads"] == ["From “&lt;b&gt;a&lt;/b&gt;”", "From “&lt;i&gt;b&lt;/i&gt;”"]
    html = report.render(report.page_of([tmp_path]))
    assert "<script" not in html
    assert "<b>a" not in html
    assert "\x1b" not in html
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in html


@pytest.mark.parametrize(
    ("text", "prompts", "parts"),
    [
        ("a 1\nb 2", ["a", "b"], ["a 1", "b 2"]),
        ("a 1\nb\nb 2", ["a", "b"], None),  # the first b may be the model's
        ("a 1\nc 2", ["a", "b"], None),
        ("x 1\nb 2", ["a", "b"], None),
        ("a 1\nb 2", ["a", "b", "b"], None),
        ("1\n2", ["", ""], ["1", "2"]),
        ("1\n2\n3", ["", ""], None),
        ("1\n2\na 3", ["", "a"], ["1\n2", "a 3"]),
        ("a\nb\nb", ["a\nb", "b"], ["a\nb", "b"]),  # the first is in the prompt
        ("", ["", ""], None),
        ("a 1\nb 2", ["a"], None),
        ("a 1\nb 2", [], None),
    ],
)
def test_prompts_are_told_apart_only_where_it_is_certain(
    text: str, prompts: list[str], parts: list[str] | None
) -> None:
    found = split_sample(text + "\n", prompts, 1)
    assert [part for _, part in found] == (parts or [text])
    assert all(name for name, _ in found) == bool(parts)


def test_a_prompt_is_named_in_a_line() -> None:
    names = [name for name, _ in split_sample("1\na\nb2\n", ["", "a\nb"], 1)]
    assert names == ["From nothing", "From “a⏎b”"]


def test_documents_are_grouped_by_their_prompt() -> None:
    lines = [f"{prompt}{n}" for prompt in ("a", "b") for n in range(PER_PROMPT)]
    first, second = split_sample("\n".join(lines) + "\n", ["a", "b"], PER_PROMPT)
    assert first == ("From “a”", "\n".join(lines[:PER_PROMPT]))
    assert second == ("From “b”", "\n".join(lines[PER_PROMPT:]))


def test_the_samples_of_a_run_are_told_apart_by_their_prompts(workshop: Workshop) -> None:
    """As the run itself writes them: several of each where rows are documents."""
    prompts = ["with his", "they be"]
    for layout, times in (("stream", 1), ("documents", PER_PROMPT)):
        run = workshop.run(data={"layout": layout}, sample={"prompts": prompts})
        directory = workshop.folder / layout
        train(run, directory)
        (block,) = blocks(directory)
        lines = (directory / "samples" / "step-00000008.txt").read_text().splitlines()
        if layout == "documents":  # whose texts have no ends of lines
            assert len(lines) == len(prompts) * times
        assert block["heads"] == ["From “with his”", "From “they be”"]
        assert "\n".join(block["texts"]) == "\n".join(lines)


def test_samples_stay_where_the_config_is_damaged(tmp_path: Path) -> None:
    run = write_run(tmp_path, {1: "a\nb"}, {})
    (run / "config.yaml").write_text("sample: 3")
    (block,) = blocks(run)
    assert block["texts"] == ["a\nb"]
