"""What the documentation says is not there, not measured or not tried, held against what is there.

Each such sentence is listed here with a check of the code or the results that is true as long as
the sentence is. So a new one fails until somebody says how it is known, and an old one fails as
soon as what it misses has arrived.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from test_docs import BLOCK, PAGES, ROOT

from gptlite.config.wording import all_keys

ABSENT = re.compile(
    r"\bnot (?:\w+ ){0,2}(?:measured|run|tried|tested|swept)\b"
    r"|\b(?:nothing|nobody|no [^.;|]{,90}) (?:has|have|was|were) (?:been )?(?:measured|run|tried)\b"
    r"|\buntested\b|\bdo(?:es)? not exist\b|\byet\b|\bnot (?:at hand|offered)\b"
    r"|\b(?:in|by|are) one process(?=[.,;:])",
    re.IGNORECASE,
)
GENERATED = re.compile(r"<!-- (.+?) -->\n(.*?)<!-- end of \1 -->", re.DOTALL)
MEASURED_ON = re.compile(r"^`[^`]+`, \d{4}-\d\d-\d\d, .*$", re.MULTILINE)
"""Above a table that a script has written: the command, the date and the machine."""


def no_gpu() -> bool:
    """Whether scripts/gpu_check has filled no region of its page."""
    regions = dict(GENERATED.findall((ROOT / "docs/gpu.md").read_text()))
    return {regions[name].strip() for name in regions.keys() - {"summary"}} == {"Not measured."}


def no_machine(pattern: str) -> bool:
    """Whether no table is said to come from a machine like that."""
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    origins = [origin for page in pages for origin in MEASURED_ON.findall(page)]
    assert origins
    return not any(re.search(pattern, origin) for origin in origins)


def no_key(pattern: str) -> bool:
    return not any(re.search(pattern, key) for key in all_keys())


def no_word(pattern: str, *places: str) -> bool:
    """Whether it is in none of these files and folders, but for this file."""
    paths = {path for place in places for path in (ROOT / place, *(ROOT / place).rglob("*"))}
    files = [path for path in paths - {Path(__file__)} if path.is_file() and path.suffix != ".pyc"]
    assert files
    return not any(re.search(pattern, path.read_text(errors="replace")) for path in files)


def has(module: str, words: str) -> bool:
    return words in (ROOT / "gptlite" / module).read_text()


STUDIES, RESULTS = "configs/studies", "docs/dropout-study"
CLAIMS: dict[str, dict[str, Callable[[], bool] | None]] = {
    "README.md": {
        "not run: needs a GPU |": no_gpu,
        "not run: needs GPUs": no_gpu,
        "no instruction tuning, no LoRA": lambda: no_key("lora|adapter|instruct|reward"),
        "not been measured * Apple and ARM": lambda: no_machine("Apple|ARM|aarch64"),
        "only been tested on a stand-in": lambda: no_machine("Apple"),
        "a processor that really has AVX2": lambda: no_machine(r"bench\.py (?!quality).* AVX2, "),
    },
    "docs/benchmarks.md": {
        "20 minutes and two more seeds have not been run": lambda: no_word(
            '"minutes": (?!1.0,)|"seed": (?!1,)', "docs/quality.jsonl"
        ),
        "On an AMD processor it has not been measured": lambda: no_machine(
            "(generate|loops|serve) .*(2026-12|202[7-9]).* AMD"
        ),
    },
    "docs/dropout.md": {
        "(not offered) | everything": lambda: has("config/dropout.py", '["element", "locked"]'),
        "Not offered: one locked mask": lambda: no_key("connect|curriculum|r_drop|average_masks"),
        "not swept granularities": lambda: no_word(
            r"granularity|dropout\.schedule|profile", STUDIES
        ),
        "is below val, yet the gap": None,
    },
    "docs/dropout-study.md": {
        "nobody has measured it": None,  # before: it is what P11 predicts
        "how much has not been measured": lambda: no_word(
            r"max_steps=([7-9]\d\d|\d{4})", f"{RESULTS}/annealed.jsonl"
        ),
        "has not been swept": lambda: no_word(r"data\.source", STUDIES),
        "with AdamW were not tried": lambda: no_word(r"name: adamw(?!, optim\.lr: 2e-3)", STUDIES),
    },
    "docs/interchange.md": {
        "LM Studio were not tried": lambda: no_word("(?i)ollama|lm.studio", "tests", "scripts"),
    },
    "docs/research.md": {"not done yet": None},
    "docs/studies.md": {"if nobody has yet": None},
    "docs/results.md": {
        "needs a GPU and was not run": no_gpu,
        "not run: needs a GPU": no_gpu,
        "Not measured: anything on a GPU": no_gpu,
    },
    "docs/scale.md": {
        "in one process, you need nothing": None,
        "text in one process, missing": None,
        "No GPU has been tried": no_gpu,
        "commands, run in one process": lambda: has("cli/main.py", 'not in ("train", "eval")'),
        "not at hand, so this has not been tried": lambda: no_word("sbatch", "tests", "scripts"),
        "true` because it has not been tested": lambda: has("planning/auto.py", "fsdp is not test"),
        "learned by one process": lambda: has("data/bpe.py", "(vocabulary,) = workers.run_jobs"),
        "layout have not been tried": lambda: no_machine(r"\b(?!2\b)\d+ threads"),
    },
    "docs/serve.md": {
        "in one process. It has no embeddings": lambda: no_word(
            "/v1/(?!models|completions|chat)|workers", "gptlite/serve/app.py"
        ),
        "serving on one has not been measured": no_gpu,
    },
}
"""Page → words of a claim → whether it holds; None: such words in another sense."""


@pytest.mark.parametrize("page", PAGES)
def test_what_is_said_to_be_absent_is_listed(page: str) -> None:
    """But for examples, and what scripts write."""
    text = GENERATED.sub("", BLOCK.sub("", (ROOT / page).read_text()))
    text = " ".join(text.replace("**", "").split())
    gone = [claim for claim in CLAIMS.get(page, {}) if claim not in text]
    assert not gone, "no longer on the page: strike them from CLAIMS"
    for claim in CLAIMS.get(page, {}):
        text = text.replace(claim, "")
    new = [text[max(0, found.start() - 60) : found.end() + 30] for found in ABSENT.finditer(text)]
    assert not new, "say in CLAIMS how this is known"


@pytest.mark.parametrize(
    ("page", "claim"), [(page, claim) for page, claims in CLAIMS.items() for claim in claims]
)
def test_what_is_said_to_be_absent_is(page: str, claim: str) -> None:
    check = CLAIMS[page][claim]
    assert check is None or check(), "it is there now: change the sentence"
