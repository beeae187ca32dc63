"""Every page by axe-core's rules for WCAG 2.2 A and AA, and by keyboard alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from selfsteer.report.browser import build
from selfsteer.report.document import write_report
from selfsteer.verbs.preview import page_of
from selfsteer.verbs.previewing import Preview, gathered
from selfsteer.view import RunView
from tests.browsing import DESKTOP, PHONE, Browser
from tests.e2e.test_view import TRIPLES, first_id, served

RULES = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]},
    "resultTypes": ["violations"],
}

#: Page → its address, and what is there once it is whole.
PAGES = {
    "runs": ("", "#runs tbody tr"),
    "live": ("live?run=done", "#live-stages tbody tr"),
    "list": ("data?run=done", "#browser-list tbody tr"),
    "triple": ("data?run=done#/triple/{id}", "#browser-triple .token"),
    "nothing": ("data?run=nobody", "[role=alert]"),
    "report": ("{report}", "#browser-list tbody tr"),
    "preview": ("{preview}", ".card"),
}


@pytest.fixture(scope="module")
def folder(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, its report and a preview's page."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(smoke, runs / "done")
    view = RunView.open(runs / "done")
    for found in view.sampled:
        build(found)
    write_report(runs / "done")
    rows = list(gathered(view).values())[:2]
    assert rows
    for row in rows:
        for answer in row.answers.values():
            answer.contrast = 0.5
            answer.pieces = [
                (word + " ", value)
                for word, value in zip(
                    answer.text.split(), [0.0, 0.2, 0.5, 2.0, -0.2, -0.5, -2.0] * 99, strict=False
                )
            ]
    rows[0].dropped = "unfinished in samples"
    made = Preview(rows, "pairs", "oracle", "share of faults", ["A note."])
    (runs / "preview.html").write_text(page_of(made, "smoke", "sso"))
    return runs


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with served(folder) as url:
        yield url


def address(server: str, folder: Path, page: str) -> str:
    given = {
        "report": (folder / "done" / "report.html").as_uri(),
        "preview": (folder / "preview.html").as_uri(),
        "id": first_id(folder),
    }
    path = PAGES[page][0].format(**given)
    return path if path.startswith("file:") else server + path


def faults(page: Any) -> list[str]:
    found = Axe().run(page, options=RULES).response["violations"]
    return [f"{v['id']}: {n['html'][:200]} {n['any']}" for v in found for n in v["nodes"]]


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        pytest.param(DESKTOP, "light", id="desktop-light"),
        pytest.param(PHONE, "dark", id="phone-dark", marks=pytest.mark.slow),
        pytest.param(DESKTOP, "dark", id="desktop-dark", marks=pytest.mark.slow),
        pytest.param(PHONE, "light", id="phone-light", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", PAGES)
def test_no_page_breaks_a_rule(
    browser: Browser, server: str, folder: Path, name: str, size: tuple[int, int], scheme: str
) -> None:
    with browser.visit(address(server, folder, name), size, scheme) as visit:
        visit.page.wait_for_selector(PAGES[name][1])
        for details in visit.page.locator("details").all():
            details.evaluate("x => { x.open = true; }")
        assert faults(visit.page) == []
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= size[0]
        if visit.count("#browser-keys:visible"):
            visit.page.click("#browser-keys")
            assert faults(visit.page) == []


def test_a_fault_would_be_found(browser: Browser, server: str) -> None:
    with browser.visit(server) as visit:
        visit.page.evaluate("document.querySelector('#theme').removeAttribute('aria-label')")
        visit.page.evaluate("document.querySelector('#theme').removeAttribute('title')")
        visit.page.evaluate("document.querySelector('#theme').textContent = ''")
        (fault,) = faults(visit.page)
        assert "button-name" in fault


STOP = """() => {
  const node = document.activeElement;
  if (node === document.body) return null;
  const style = getComputedStyle(node), box = node.getBoundingClientRect();
  const top = document.querySelector(".top").getBoundingClientRect().bottom;
  return {
    name: node.id || node.name || node.textContent.trim().slice(0, 30),
    outlined: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    seen: box.width > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth
      && box.bottom > (node.closest(".top, .skip") ? 0 : top),
    place: [...document.querySelectorAll("*")].indexOf(node),
  };
}"""


@pytest.mark.parametrize("name", PAGES)
def test_every_stop_of_the_tab_key_is_seen_in_the_order_of_the_page(
    browser: Browser, server: str, folder: Path, name: str
) -> None:
    with browser.visit(address(server, folder, name), PHONE) as visit:
        page = visit.page
        page.wait_for_selector(PAGES[name][1])
        stops: list[dict[str, Any]] = []
        for _ in range(60):
            page.keyboard.press("Tab")
            stop = page.evaluate(STOP)
            if stop is None or (stops and stop["place"] <= stops[0]["place"]):
                break
            stops.append(stop)
        assert stops[0]["name"] == "Skip to the content"
        assert len(stops) > 1
        assert [s["name"] for s in stops if not s["outlined"]] == []
        assert [s["name"] for s in stops if not s["seen"]] == []
        assert [s["place"] for s in stops] == sorted(s["place"] for s in stops)


def test_the_skip_link_leads_past_the_links(browser: Browser, server: str) -> None:
    with browser.visit(f"{server}data?run=done") as visit:
        page = visit.page
        page.wait_for_selector("#browser-list tbody tr")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('main') !== null")


def test_the_keyboard_opens_a_triple_and_comes_back(browser: Browser, server: str) -> None:
    with browser.visit(f"{server}data?run=done&set={TRIPLES}") as visit:
        page = visit.page
        page.wait_for_selector("#browser-list tbody tr")
        page.locator("#browser-list tbody a").nth(2).focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#browser-triple .columns .card")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('#browser-triple') !== null")
        page.keyboard.press("Escape")
        page.wait_for_selector("#browser-list tbody a:visible")
        page.keyboard.press("?")
        assert page.evaluate("document.activeElement.closest('dialog') !== null")
        page.keyboard.press("Escape")
        assert not page.locator("#browser-help").is_visible()
