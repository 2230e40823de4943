"""What is on a page, and the page as HTML: one file that opens offline and runs no script."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gptlite import __version__
from gptlite.report.figures import Group
from gptlite.report.header import Header
from gptlite.report.samples import Sample
from gptlite.report.verdict import Verdict
from gptlite.words import escape_controls


class Table(NamedTuple):
    caption: str
    head: list[str]
    rows: list[list[str]]
    about: str = ""
    """What its terms mean."""


class Tile(NamedTuple):
    """A headline number."""

    name: str
    value: str
    about: str = ""


class Page(NamedTuple):
    """What the template lays out; what is empty is left out."""

    title: str
    subtitle: str = ""
    header: Header | None = None
    tiles: list[Tile] = []
    verdict: Verdict | None = None
    groups: list[Group] = []
    tables: list[Table] = []
    samples: list[Sample] = []
    n_samples: int = 0
    """Written; more than there are on the page."""
    details: list[tuple[str, str]] = []
    hints: list[str] = []
    """What is to be kept in mind."""
    more: str = ""
    """What else could be measured."""
    notes: list[str] = []
    """What could not be read."""


@cache
def read_template() -> Any:
    """Once in a process: a run that trains makes many pages."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clean"] = lambda text: escape_controls(str(text), keep="\n\t")
    return environment.get_template("page.html")


def render(page: Page) -> str:
    shown = page._replace(
        groups=[(title, figures) for title, figures in page.groups if figures],
        tables=[table for table in page.tables if table.rows],
        details=[(title, text) for title, text in page.details if text],
    )
    return str(read_template().render(page=shown, version=__version__))
