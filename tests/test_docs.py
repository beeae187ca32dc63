"""What README and docs show must run: commands parse, Python blocks hold, links lead somewhere."""

import re
import shlex
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer

from selfsteer import cli
from selfsteer.methods import recipe_of
from selfsteer.recipe.read import load_values, merge, recipe_names, validate
from selfsteer.recipe.sections import TrainConfig
from tests.browsing import Browser

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "AGENTS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.splitlines():
                line = line.partition(" #")[0].strip()
                if line.startswith("selfsteer "):
                    found.append(line)
    return found


def test_the_readme_shows_the_commands_of_the_first_day_and_stays_short() -> None:
    shown = {c.split()[1] for c in commands()}
    assert {"init", "check", "preview", "run", "chat"} <= shown
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 100


@pytest.mark.parametrize("line", commands())
def test_documented_commands_are_accepted(line: str) -> None:
    words = shlex.split(line)[1:]
    command = typer.main.get_command(cli.app)
    context = command.make_context("selfsteer", words, resilient_parsing=False)
    name, verb, rest = command.resolve_command(context, words)  # type: ignore[attr-defined]
    parsed = verb.make_context(name, list(rest), parent=context)
    if hasattr(verb, "resolve_command"):  # a group of verbs
        name, verb, rest = verb.resolve_command(parsed, rest)
        parsed = verb.make_context(name, rest, parent=parsed)
    if name in ("run", "check") and parsed.params["recipe"] in recipe_names():
        values = merge(load_values(parsed.params["recipe"]), parsed.params["overrides"] or [])
        assert recipe_of(values, line).name
    if name == "train":
        assert validate(TrainConfig, merge({}, parsed.params["settings"]), line).output == "DIR"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_hold(page: Path) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_placeholder_is_left(page: Path) -> None:
    assert not re.findall(r"\b[A-Z]+_TABLE\b|TODO|FIXME", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_make_targets_that_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(PAGES[0], "")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_page_of_commands_is_what_the_program_says() -> None:
    written = [sys.executable, str(ROOT / "docs/commands.py")]
    ended = subprocess.run(written, capture_output=True, text=True, check=True)
    assert ended.stdout == (ROOT / "docs/commands.md").read_text(), "run make docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation; strict: no dead link or anchor, every page in the navigation."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_the_site_has_the_pages_of_the_repository(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert "make demo" in home
    assert not re.search(r'(src|href)="https?://(?!arxiv|squidfunk)', home), "no foreign request"
    assert (site / "figures/method.svg").exists()
    assert "steering_loss" in (site / "api/index.html").read_text()


def test_the_site_can_be_searched_without_a_network(site: Path, browser: Browser) -> None:
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}/"
        with browser.visit(here) as visit:
            visit.page.locator(".md-search__input").click()
            # what is typed before the index is there may be lost
            visit.page.locator(".md-search-result__meta", has_text="Type to start").wait_for()
            visit.page.locator(".md-search__input").press_sequentially("unparseable")
            visit.page.locator(".md-search-result__item").first.wait_for()
            assert any(t.startswith("Judges") for t in visit.texts(".md-search-result__item h1"))
            assert all(url.startswith(here) for url in visit.requests)
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Files, without a line on stderr for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
