"""Screenshots of report and data browser for the documentation, into ``docs/figures/``.

    selfsteer run demo
    python scripts/screenshots.py runs/demo

Needs Debian's chromium, as the tests of the pages do. Run it again after a change of the pages.
"""

import json
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
CHROMIUM = "/usr/bin/chromium"
#: The report is drawn, and the browser's index made, when they are first asked for.
PATIENCE_MS = 180_000
#: Name → page of a run of the demo, what is waited for, and whether it is clicked.
PAGES = {
    "report": ("/report?run={run}", "main table", False),
    "triple": ("/data?run={run}#/?set=iteration-1/triples", "#browser-list a", True),
    "contrast": ("/data?run={run}#/?set=contrast/iteration-1/samples", "#browser-list a", True),
}


def main(run: Path) -> None:
    """Serves the run and photographs the top of each page, 1200 x 720 pixels."""
    words = ("view", str(run), "--port", "0", "--no-browser", "--json")
    command = [sys.executable, "-m", "selfsteer", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            home = json.loads(server.stdout.readline())["url"].rstrip("/")
            photograph(home, run.name)
        finally:
            server.terminate()


def photograph(home: str, run: str) -> None:
    """Writes one picture a page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, (path, awaited, clicked) in PAGES.items():
            page = browser.new_page(viewport={"width": 1200, "height": 720})
            page.set_default_timeout(PATIENCE_MS)
            page.goto(home + path.format(run=run))
            page.locator(awaited).first.wait_for()
            if clicked:
                page.locator(awaited).first.click()
                page.locator("#browser-triple").wait_for()
            page.wait_for_load_state("networkidle")
            page.screenshot(path=FIGURES / f"{name}.png")
            print(FIGURES / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
