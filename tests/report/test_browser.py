"""Pages in a real browser: on a phone and on a desk, in light and dark, nothing is out of reach."""

from pathlib import Path
from typing import Any

import pytest
from pages import make_sources

from gptlite.report import page as report

PHONE, DESK = 390, 1400
SOURCES = [["run"], ["plain"], ["run", "bytes"], ["study"]]
OUT_OF_REACH = """
return [...document.querySelectorAll("body *")].filter((node) => {
  if (node.closest("svg") && node.localName !== "text") return false;
  if (node.closest(".tips, .preview")) return false;
  const box = node.getBoundingClientRect();
  if (!box.width || !box.height) return false;
  return box.left < -1 || box.right > innerWidth + 1 ||
    (node.localName !== "pre" && node.scrollWidth > node.clientWidth + 1 &&
      getComputedStyle(node).overflowX !== "visible");
}).map((node) => node.localName + "." + node.className + ": " + node.textContent.slice(0, 60))
"""
"""Nodes that are beside the window, or that show a part of what they hold."""
DRAWINGS = """
return [...document.querySelectorAll("figure svg")].map((svg) => {
  const box = svg.getBoundingClientRect();
  return [box.width, box.height, box.right];
}).filter(([width]) => width)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("browser"))


def open_page(browser: Any, path: Path, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(path.as_uri())


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_out_of_reach(
    folder: Path, browser: Any, sources: list[str], width: int
) -> None:
    path = folder / f"{'-'.join(sources)}.html"
    report.write_page([folder / name for name in sources], path)
    papers = set()
    for scheme in ("light", "dark"):
        open_page(browser, path, width, scheme)
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(OUT_OF_REACH) == []
        drawings = browser.execute_script(DRAWINGS)
        assert drawings
        for wide, high, right in drawings:
            assert min(wide, high) > 50
            assert right <= width
        assert browser.execute_script("return performance.getEntriesByType('resource')") == []
        papers.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_place_says_its_values_under_the_pointer(folder: Path, browser: Any, width: int) -> None:
    from selenium.webdriver import ActionChains

    path = folder / "pointed.html"
    report.write_page([folder / "run"], path)
    open_page(browser, path, width, "light")
    tip = next(
        tip
        for tip in browser.find_elements("css selector", "figure.hero .tip")
        if tip.find_element("css selector", "rect").is_displayed()
        and "validation" in tip.get_attribute("textContent")
    )
    said = tip.find_element("css selector", "g")
    visibility = "return getComputedStyle(arguments[0]).visibility"
    assert browser.execute_script(visibility, said) == "hidden"
    place = tip.find_element("css selector", "rect")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)
    ActionChains(browser).move_to_element(place).perform()
    assert browser.execute_script(visibility, said) == "visible"
    box = browser.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.left, b.right]", said
    )
    assert box[0] >= 0
    assert box[1] <= width


def test_a_finger_shows_the_values(folder: Path, browser: Any) -> None:
    """A tap moves the focus, and what has it is shown."""
    path = folder / "tapped.html"
    report.write_page([folder / "run"], path)
    open_page(browser, path, PHONE, "dark")
    browser.execute_script("document.querySelector('figure.hero .narrow .tip').focus()")
    said = browser.find_element("css selector", "figure.hero .narrow .tip > g")
    visibility = "return getComputedStyle(arguments[0]).visibility"
    assert browser.execute_script(visibility, said) == "visible"
