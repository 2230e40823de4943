"""The page in a real browser: every tab is clicked through, and nothing is asked of elsewhere.

AXE_CORE names axe-core's axe.min.js, for what can be judged of accessibility by machine.
"""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from service import train_tiny
from sockets import Served, serving_process

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

TABS = ("play", "watch", "see", "learn")
NASTY = "<img src=x onerror=alert(1)>"
SERIOUS = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ['violations']}).then(found => done(found.violations
  .filter(one => ['serious', 'critical'].includes(one.impact))
  .map(one => one.id + ': ' + one.nodes.map(node => node.html).join(' | ').slice(0, 300))));
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    plain: dict[str, Any] = {"sample": {"interval": 2, "prompts": ["The"], "max_new_tokens": 30}}
    for name, rate, seed in (("with", 0.3, 1), ("without", 0.0, 2)):
        train_tiny(folder, f"runs/{name}", dropout={"rate": rate}, seed=seed, **plain)
    odd = folder / "runs" / NASTY.replace("/", "")
    odd.mkdir(parents=True)
    (odd / "config.yaml").write_text("seed: 1\n")
    with serving_process("runs/with", "runs/without", folder=folder) as served:
        yield served


class Page:
    """The page in the browser, by what its elements are for."""

    def __init__(self, browser: Any, served: Served) -> None:
        self.browser, self.served = browser, served
        self.root = f"http://localhost:{served.port}"

    def open(self, tab: str, width: int = 1400, scheme: str = "light") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.browser.get("about:blank")
        self.browser.get(f"{self.root}/#{tab}")
        self.wait(f"#{tab}-panel:not([hidden])")

    def wait(self, selector: str, seconds: float = 30) -> Any:
        """The element, as soon as it is there and shown."""

        def shown(_: Any) -> Any:
            found = self.browser.find_elements(By.CSS_SELECTOR, selector)
            return next((element for element in found if element.is_displayed()), None)

        gone = [StaleElementReferenceException]
        wait = WebDriverWait(self.browser, seconds, ignored_exceptions=gone)
        return wait.until(shown, selector)

    def until(self, judge: Any, seconds: float = 30) -> Any:
        """Until it holds; the page may draw anew while it is looked at."""
        gone = [StaleElementReferenceException]
        return WebDriverWait(self.browser, seconds, ignored_exceptions=gone).until(
            lambda _: judge()
        )

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return " ".join(element.text for element in self.all(selector))

    def click(self, selector: str) -> None:
        element = self.wait(selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def complaints(self) -> list[Any]:
        return [line for line in self.browser.get_log("browser") if line["level"] == "SEVERE"]

    def foreign(self) -> list[str]:
        asked = self.browser.execute_script(
            "return performance.getEntriesByType('resource').map(entry => entry.name)"
        )
        return [name for name in asked if not name.startswith(f"{self.root}/")]


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Page]:
    page = Page(browser, served)
    page.complaints()
    yield page
    assert page.complaints() == []
    assert page.foreign() == []


def test_play_writes_shows_probabilities_and_goes_on_from_another_token(page: Page) -> None:
    page.open("play")
    prompt = page.wait("#prompt")
    prompt.clear()
    prompt.send_keys("The of")
    page.click("#generate")
    output = "[data-column=a] [data-part=output]"
    page.until(lambda: "It ended because" in page.text("[data-column=a] [data-part=status]"))
    tokens = page.all(f"{output} .token")
    assert len(tokens) == 30
    assert all(0 <= float(token.get_attribute("data-p")) <= 1 for token in tokens)
    tokens[3].send_keys(Keys.ENTER)
    page.wait(".others[role=dialog]")
    alternatives = page.all(".others [data-alternative]")
    assert len(alternatives) == 10
    wanted = alternatives[1].get_attribute("data-alternative")
    before = "".join(token.get_attribute("textContent") for token in tokens[:3])
    alternatives[1].click()
    page.until(lambda: "It ended because" in page.text("[data-column=a] [data-part=status]"))
    assert f"The of{before}{wanted}" in page.wait(output).get_attribute("textContent")


def test_play_puts_two_models_side_by_side(page: Page) -> None:
    page.open("play")
    page.wait("#prompt").send_keys("The of")
    page.click("#side-by-side")
    Select(page.wait("[data-column=b] [data-field=model]")).select_by_value("without")
    page.click("#generate")
    for column in "ab":
        status = f"[data-column={column}] [data-part=status]"
        page.until(lambda status=status: "It ended because" in page.text(status))
    texts = [page.text(f"[data-column={column}] [data-part=output]") for column in "ab"]
    assert texts[0] != texts[1]


def test_a_mistake_is_told_where_it_was_made(page: Page) -> None:
    page.open("play")
    prompt = page.wait("#prompt")
    prompt.clear()
    prompt.send_keys("Ж")
    page.click("#generate")
    page.until(lambda: "character 'Ж'" in page.text("[data-column=a] [data-part=error]"))
    assert all("400" in line["message"] for line in page.complaints())  # the browser's own words


def test_watch_lists_compares_and_shows_names_as_text(page: Page) -> None:
    page.open("watch")
    page.wait("#runs [data-run=with]")
    assert NASTY.replace("/", "") in page.text("#runs")
    page.click("#runs [data-run=with] .open")
    page.wait("#run-detail .plot[role=slider]")

    def values() -> str:
        plot = page.wait("#run-detail .plot[role=slider]")
        plot.send_keys(Keys.ARROW_RIGHT)
        return str(plot.get_attribute("aria-valuetext")).lower()

    page.until(lambda: "val" in values())
    assert page.all("#run-detail .sample[data-step]")
    assert page.text("#run-detail .verdict")
    for name in ("with", "without"):
        page.click(f"#runs [data-run={name}] input[type=checkbox]")
    page.until(lambda: {"with", "without"} <= set(page.text("#run-detail").split()))
    assert page.all("img") == []


def test_see_shows_every_site_and_checks_the_split(page: Page) -> None:
    page.open("see")
    page.wait("#see-picked svg")
    page.wait("#see-text").send_keys("e")
    sites = [option.get_attribute("value") for option in Select(page.wait("#see-site")).options]
    assert len(sites) == 11
    for site in sites:
        Select(page.wait("#see-site")).select_by_value(site)
        page.until(lambda site=site: site in page.text("#see-picked"))
        assert page.text("#see-error") == ""
        assert page.all("#see-picked svg")
    page.click("#see-split")
    page.until(lambda: "same" in page.text("#see-split-answer"))
    assert page.all("#see-figures svg")
    assert page.all("#see-network svg")


def test_break_it_takes_parts_away_from_two_models(page: Page) -> None:
    page.open("see")
    page.wait("#see-picked svg")
    switch = page.wait('.switch[data-kind=heads][data-key="0,1"]')
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", switch)
    switch.send_keys(Keys.SPACE)
    page.until(lambda: len(page.all("#break-results .change")) >= 2)
    assert "loss" in page.text("#break-results .change")
    assert switch.get_attribute("aria-pressed") == "true"
    page.click("#break-heads")
    page.until(lambda: len(page.all(".switch[data-kind=heads][aria-pressed=true]")) == 4)
    page.click("#break-none")
    page.until(lambda: not page.all(".switch[aria-pressed=true]"))


def test_learn_leads_through_six_stops(page: Page) -> None:
    page.open("learn")
    assert len(page.all("#stops a")) == 6
    for number in range(1, 7):
        assert f"{number} of 6" in page.text("#stop-progress")
        if number < 6:
            page.click("#stop-next")
            page.until(lambda n=number: f"{n + 1} of 6" in page.text("#stop-progress"))
    page.open("learn")
    page.click("#stop-next")
    page.until(lambda: "2 of 6" in page.text("#stop-progress"))
    page.click("#learn-panel [data-action]")
    page.wait("#see-panel:not([hidden])")
    page.click("#tour-back")
    page.wait("#learn-panel:not([hidden])")


ASK = """
const done = arguments[arguments.length - 1];
const [url, options] = arguments;
fetch(url, options)
  .then(async answer => done(answer.type + (await answer.text())))
  .catch(() => done('refused'));
"""


class Elsewhere(BaseHTTPRequestHandler):
    """A page of another site: that it is on this machine too makes it no friend."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>another site</title>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_the_page_of_another_site_can_neither_read_nor_post(page: Page, elsewhere: str) -> None:
    body = '{"prompt": "The", "max_tokens": 1}'
    json_type = {"content-type": "application/json"}
    page.browser.get(elsewhere)
    for path, options in (
        ("/v1/models", {}),
        ("/v1/models", {"mode": "no-cors"}),
        ("/v1/completions", {"method": "POST", "headers": json_type, "body": body}),
        ("/v1/completions", {"method": "POST", "mode": "no-cors", "body": body}),
    ):
        found = page.browser.execute_async_script(ASK, page.root + path, options)
        assert found in ("refused", "opaque"), path
    page.browser.get("about:blank")
    written = page.served.gauge('gptlite_answers_total{path="other",status="403"}')
    assert written >= 1
    page.complaints()  # the browser says what it has refused


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("tab", TABS)
def test_every_tab_fits_in_both_schemes(page: Page, tab: str, width: int) -> None:
    papers = []
    for scheme in ("light", "dark"):
        page.open(tab, width, scheme)
        script = "return document.documentElement.scrollWidth"
        assert page.browser.execute_script(script) <= width
        color = "return getComputedStyle(document.body).backgroundColor"
        papers.append(page.browser.execute_script(color))
        if axe := os.environ.get("AXE_CORE"):
            page.browser.execute_script(Path(axe).read_text())
            assert page.browser.execute_async_script(SERIOUS) == []
    assert papers[0] != papers[1]
