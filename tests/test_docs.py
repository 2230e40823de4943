"""Every command in the documentation is run as it stands there, on something small."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, Workshop, merged, prose
from test_nanogpt import saved, write_meta
from typer.testing import CliRunner

from gptlite.cli import options
from gptlite.cli.main import app
from gptlite.cli.options import EXAMPLES
from gptlite.config import reader
from gptlite.config.run import RunConfig
from gptlite.planning import budget
from gptlite.planning.budget import Rung
from gptlite.planning.rehearsal import Costs, EvaluationPace
from gptlite.runs import recipe
from gptlite.runs.demo import train_demo
from gptlite.runs.export import prepare_hf, save
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained
from gptlite.serve import server
from gptlite.studies import estimate

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "data/README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"(?:\$ )?((?:gptlite|torchrun --standalone|\./scripts/|scripts/|python scripts/)\S* ?.*)"
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash")
LAMBADA = "gptlite eval --run runs/NAME --suite lm-eval --tasks lambada_openai,arc_easy --limit 200"
SHARED = "gptlite study rates.yaml --storage postgresql+psycopg://USER@HOST:PORT/DATABASE"
LEAVES = {
    **{"gptlite config check --config run.yaml": 2, "gptlite import gpt2": 2},
    **{LAMBADA: 2, SHARED: 2},
}
"""Exit codes other than 0: a config with mistakes, what needs the Hub or another package, and an
address that is none."""


def commands(page: str) -> list[str]:
    """The lines of a page's blocks for the shell that are commands, without their remarks."""
    text = (ROOT / page).read_text()
    # Every block is matched, or the end of a marked one would be taken for another's beginning.
    lines = [
        line for kind, block in BLOCK.findall(text) if kind in SHELL for line in block.split("\n")
    ]
    found = [match[1] for line in lines if (match := COMMAND.fullmatch(line))]
    return [line.partition("  #")[0].strip() for line in found if line != "gptlite/"]


@pytest.fixture
def desk(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of, where shipped configs are tiny."""
    folder = workshop.folder
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny = merged(TINY, {"data": {"source": "my.txt"}})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    (folder / "my.txt").write_text(prose())
    (folder / "run.yaml").write_text("model: {n_layer: 2.5}\n")
    study = {"base": "tiny.yaml", "axes": {"dropout.rate": [0, 0.3]}, "seeds": [1, 2]}
    (folder / "rates.yaml").write_text(yaml.safe_dump(study))
    for name in ("quickstart", "NAME", "names", "a", "b", "c"):
        train(workshop.run(), folder / "runs" / name)
    (folder / "out").mkdir()
    saved(folder / "out", vocab_size=10, bias=False)
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    write_meta(folder / "data" / "shakespeare_char" / "meta.pkl")
    find = reader.find
    shipped = {path.stem for path in (ROOT / "configs").glob("*.yaml")}

    def small(name: str) -> Path:
        return folder / "tiny.yaml" if name in shipped else find(name)

    def time_rung(rung: Rung, *_: Any) -> Rung:
        return rung._replace(seconds=10.0)

    def rehearse(*_: Any) -> Costs:
        return Costs(0.0, 10.0, EvaluationPace(0.0, 64), 0.0, 0.0)

    monkeypatch.setattr(reader, "find", small)
    monkeypatch.setattr(server, "serve_app", lambda app, host, port, said: said(port))
    monkeypatch.setattr(recipe, "LADDER", ((1, 32, 16),))
    monkeypatch.setattr(budget, "time_rung", time_rung)
    monkeypatch.setattr(recipe, "rehearse", rehearse)
    monkeypatch.setattr(estimate, "SECONDS", 0.0)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_run(desk: Path, page: str) -> None:
    for line in commands(page):
        words = shlex.split(line)
        if words[0] == "gptlite":
            result = CliRunner().invoke(app, words[1:])
            expected = LEAVES.get(line, 0)
            assert result.exit_code == expected, f"{line}: {result.output} {result.exception}"
        elif words[0] == "torchrun":
            own = ["tiny.yaml" if word == "quickstart" else word for word in words[1:]]
            launch = [sys.executable, "-m", "torch.distributed.run", *own]
            launch += ["--out-dir", "ranks"] if "train" in own else []
            subprocess.run(launch, check=True, cwd=desk, capture_output=True, timeout=120)
            made = "ranks/summary.json" if "train" in own else "runs/NAME/eval/loss-val-*.json"
            assert list(desk.glob(made)), line
        elif words[0] == "python":
            script = [sys.executable, str(ROOT / words[1]), "--help"]
            assert subprocess.run(script, capture_output=True).returncode == 0, line
        else:
            assert (ROOT / words[0]).stat().st_mode & 0o100, line


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_examples_of_a_command_run_and_its_help_shows_them(desk: Path, command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"]).output
    for line in EXAMPLES[command]:
        assert f"  {line}\n" in shown
    if command == "import":
        save(prepare_hf(load_trained(desk / "runs" / "names", "best")), desk / "names-hf")
    if command in ("eval", "generate", "report", "serve"):
        train(workshop_run(desk), desk / "runs" / "faster")
    for line in EXAMPLES[command]:
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == LEAVES.get(line, 0), f"{line}: {result.output}"


def workshop_run(folder: Path) -> RunConfig:
    return Workshop(folder).run()


def test_names_are_completed(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.complete_configs("qu") == ["quickstart"]
    assert {"run.yaml", "rates.yaml"} <= set(options.complete_configs(""))
    assert options.complete_configs(f"{desk}/r") == [f"{desk}/rates.yaml", f"{desk}/run.yaml"]
    assert options.complete_runs("runs/q") == ["runs/quickstart"]
    assert "dropout.sites.head=" in options.complete_keys("dropout.sites.h")
    monkeypatch.setenv("_GPTLITE_COMPLETE", "complete_bash")
    for words, found in (("gptlite tr", "train"), ("gptlite train --config qui", "quickstart")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        result = CliRunner().invoke(app, [], prog_name="gptlite")
        assert result.stdout.split() == [found], result.output


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors_of(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = {anchor_of(line.lstrip("#")) for line in text.splitlines() if line.startswith("#")}
    return headings | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{page}: {link}"


INSTALLS = re.compile(r"\b(?:pip3? install|pipx install|uvx?(?: pip| tool)? (?:install|add))\b(.*)")


def read_install_lines() -> Iterator[tuple[str, str]]:
    """Every line of documents, scripts and code that installs something, with its file."""
    folders = ("", "docs", "data", "scripts", "configs")
    paths = [p for folder in folders for p in (ROOT / folder).iterdir() if p.is_file()]
    for path in [*paths, *(ROOT / "gptlite").rglob("*.py"), *(ROOT / "gptlite").rglob("*.html")]:
        if path.suffix in (".svg", ".png", ".jsonl"):
            continue
        for line in path.read_text().splitlines():
            if found := INSTALLS.search(line):
                yield str(path.relative_to(ROOT)), found[1].partition("  #")[0]


def foreign_names(line: str) -> list[str]:
    """What of a line pip would take from PyPI under the name gptlite, with or without extras."""
    words = re.findall(r"[^\s'\"`(),;]+", line)
    return [word for word in words if re.fullmatch(r"gptlite(\[.*\]?)?([=<>~!@].*)?", word)]


@pytest.mark.parametrize(
    ("line", "n_found"),
    [
        (" 'gptlite[study]'", 1),
        (" gptlite==0.1", 1),
        (" -U gptlite` and go", 1),
        (" -c constraints.txt -e '.[study]'", 0),
        (" dist/gptlite-0.1.0-py3-none-any.whl", 0),
    ],
)
def test_a_line_that_installs_another_project_is_found(line: str, n_found: int) -> None:
    assert len(foreign_names(line)) == n_found


def test_every_line_installs_from_here() -> None:
    """gptlite on PyPI is another project's."""
    lines = list(read_install_lines())
    assert len(lines) > 5
    assert not [(path, line) for path, line in lines if foreign_names(line)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [match for _, line in lines for match in re.findall(r"\.\[([a-z,]+)\]", line)]
    assert {"study,serve", "data", "serve", "eval", "gguf"} <= set(named)
    assert {extra for name in named for extra in name.split(",")} <= set(extras)


def test_hints_to_install_come_from_one_place() -> None:
    files = (ROOT / "gptlite").rglob("*.py")
    assert [path.name for path in files if "pip install" in path.read_text()] == ["errors.py"]


def test_there_are_commands_to_run() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 12
    assert "gptlite eval --run runs/NAME --suite all --fast" in commands("docs/measuring.md")


def python_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs_from_top_to_bottom(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks one after the other, on the models that its first commands train."""
    train_demo(desk / "runs", lambda _: None, steps=3)
    (desk / "tutorial.py").write_text("\n".join(python_blocks("docs/tutorial.md")))
    runpy.run_path(str(desk / "tutorial.py"))
    shown = capsys.readouterr().out
    assert "same update, same mask: True  next update: False" in shown
    assert "eval:               True" in shown
    page = (ROOT / "docs/tutorial.md").read_text()
    assert "```text\n```" not in page, "scripts/make_tutorial.py writes what is printed"
    for name in re.findall(r"\(tutorial/(\S+)\.svg\)", page):
        assert (ROOT / "docs" / "tutorial" / f"{name}.svg").is_file()


@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
def test_what_was_exported_is_loaded_as_the_page_says(desk: Path) -> None:
    save(prepare_hf(load_trained(desk / "runs" / "names", "best")), desk / "names-hf")
    (block,) = python_blocks("docs/interchange.md")
    (desk / "load.py").write_text(block)
    loaded = runpy.run_path(str(desk / "load.py"))
    ids = loaded["tokenizer"]("The of", return_tensors="pt")
    assert loaded["model"](**ids).logits.isfinite().all()


def test_the_notebook_runs_from_top_to_bottom(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks one after the other, as in a notebook; the last lines are values."""
    blocks = python_blocks("docs/notebook.md")
    assert len(blocks) > 6
    short = "\n".join(blocks).replace('"max_steps": 500, "eval_interval": 100', '"max_steps": 12')
    (desk / "notebook.py").write_text(short)
    runpy.run_path(str(desk / "notebook.py"))
    shown = capsys.readouterr().out
    assert "True False" in shown
    assert "temperature: must be" in shown
