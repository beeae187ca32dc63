"""`selfsteer view`: who may see what, files that are half written, and the pages in a browser."""

import http.client
import json
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect
from starlette.testclient import TestClient

from selfsteer.errors import ArtifactError, SelfsteerError
from selfsteer.report.browser import Index, build, cache_folder
from selfsteer.report.server import Jobs, app
from selfsteer.run.folder import RunFolder
from selfsteer.run.progress import progress_of
from selfsteer.view import RunView
from tests.browsing import PHONE, Browser
from tests.e2e.support import (
    PAUSING,
    TINY,
    Here,
    accepted,
    fails,
    finished,
    process,
    wait_until_stopped,
)

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
TRIPLES, KEPT = "iteration-1/triples", "iteration-1/filtered.jsonl"
ROWS = "#browser-list tbody tr"


@pytest.fixture(scope="module")
def folder(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, whose first triple was written by somebody hostile."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(smoke, runs / "done")
    identity = first_id(runs)
    for path in (runs / "done" / TRIPLES / "shard-00000.jsonl", runs / "done" / KEPT):
        triples = [json.loads(line) for line in path.read_text().splitlines()]
        for triple in triples:
            if triple["id"] == identity:
                triple["responses"]["bad"] = HOSTILE
                triple["messages"][-1]["content"] = f"{HOSTILE} Or the owl?"
        path.write_text("".join(json.dumps(triple) + "\n" for triple in triples))
    accepted(runs / "done")
    for found in RunView.open(runs / "done").sampled:
        build(found)
    return runs


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(app(folder), "http://localhost", follow_redirects=False) as client:
        yield client


def get(client: TestClient, path: str, status: int = 200, **values: Any) -> Any:
    answer = client.get(path, params=values)
    assert answer.status_code == status, answer.text
    return answer.json()


def first_id(folder: Path) -> str:
    line = (folder / "done" / TRIPLES / "shard-00000.jsonl").read_text().splitlines()[0]
    return str(json.loads(line)["id"])


# -- what is shown ---------------------------------------------------------------------------------


def test_the_table_of_runs_shows_what_evaluation_found(client: TestClient, folder: Path) -> None:
    (row,) = get(client, "/api/runs")["runs"]
    evaluation = json.loads((folder / "done" / "evaluation.json").read_text())
    figures = evaluation["models"][evaluation["finals"]["sso"]]
    assert row["run"] == "done"
    assert row["state"] == "finished"
    assert row["score"] == figures["score"]
    assert row["win_rate"] == figures["win_rate"]


def test_runs_are_told_apart_by_the_settings_that_differ(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(folder / "done", tmp_path / name)
    path = tmp_path / "two" / "resolved.json"
    recipe = json.loads(path.read_text())
    recipe["generator"]["learning_rate"] = 0.5
    path.write_text(json.dumps(recipe))
    with TestClient(app(tmp_path), "http://localhost") as client:
        one, two = get(client, "/api/runs")["runs"]
    assert list(one["differs"]) == ["generator.learning_rate"]
    assert two["differs"] == {"generator.learning_rate": 0.5}


def test_live_says_stages_curves_and_last_samples(client: TestClient, folder: Path) -> None:
    found = get(client, "/api/live", run="done")
    assert found["state"] == "finished"
    done = {s["name"]: s for s in found["stages"]}
    for name, entry in finished(folder / "done").items():
        assert done[name]["n_out"] == entry["n_out"]
    logged = [json.loads(x) for x in (folder / "done/metrics.jsonl").read_text().splitlines()]
    losses = [[e["step"], e["loss"]] for e in logged if e["stage"] == "iteration-1/policy"]
    drawn = found["curves"]["iteration-1/policy"]["loss"]
    assert drawn == [[step, pytest.approx(loss, abs=1e-6)] for step, loss in losses]
    assert len(found["samples"]["triples"]) == 3


def test_tokens_cover_the_response_and_have_its_log_probs(client: TestClient, folder: Path) -> None:
    page = get(client, "/api/rows", run="done", set=TRIPLES, fate="kept")
    assert page["total"] == page["fates"]["kept"]
    assert page["why_no_colour"] == ""
    scored = [r for r in page["rows"] if r["id"] != first_id(folder)]  # whose text was changed
    assert len(scored) > 10
    for row in scored:
        record = get(client, "/api/triple", run="done", set=TRIPLES, id=row["id"])
        for name in ("plain", "good", "bad"):
            tokens = record["tokens"][name]
            text = record["trained_on"].get(name, record["triple"]["responses"][name])
            assert sum(tokens["chars"]) == len(text)
            assert len(tokens["chars"]) == len(tokens["logps"])
            assert tokens["chars"][-1] == 0  # the end of the turn
            assert max(tokens["logps"]) <= 0
        assert row["gap"] == pytest.approx(sum(record["gaps"].values()))


def test_steering_gaps_of_the_rows_are_those_that_quality_averages(client: TestClient) -> None:
    rows = get(client, "/api/rows", run="done", set="iteration-1/samples", fate="kept")["rows"]
    records = [get(client, "/api/triple", run="done", set="iteration-1/samples", id=r["id"]) for r in rows]  # fmt: skip  # noqa: E501
    live = get(client, "/api/live", run="done")
    quality = json.loads(Path(live["folder"], "iteration-1/quality.json").read_text())
    for side, gap in quality["preferences"]["steering_gap"].items():
        assert sum(r["gaps"][side] for r in records) / len(records) == pytest.approx(gap, abs=1e-6)


def test_an_order_that_is_none_is_refused(client: TestClient) -> None:
    for path in ("/api/rows", "/api/export"):
        found = get(client, path, 400, run="done", set=TRIPLES, sort="bad; DROP TABLE rows")
        assert "Rows are sorted by gap, " in found["error"]


def test_an_export_is_the_selection(client: TestClient) -> None:
    answer = client.get("/api/export", params={"run": "done", "set": TRIPLES, "fate": "kept"})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    page = get(client, "/api/rows", run="done", set=TRIPLES, fate="kept")
    assert [x["id"] for x in lines] == [r["id"] for r in page["rows"]]
    name = "filename*=UTF-8''done-iteration-1-triples.jsonl"
    assert name in answer.headers["content-disposition"]


def test_a_run_that_is_named_in_any_script_is_exported(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / 'запуск "1"'
    shutil.copytree(folder / "done", run)
    build(RunView.open(run).sampled[0])
    with TestClient(app(run), "http://localhost") as client:
        answer = client.get("/api/export")
    assert answer.status_code == 200
    assert answer.headers["content-disposition"].endswith("%20%221%22-iteration-1-triples.jsonl")


# -- who may see what ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api/live?run=..",
        "/api/live?run=../runs/done",
        "/api/live?run=%2fetc",
        "/api/live?run=linked",
        "/api/live",
        "/api/rows?run=done&set=../../../../etc",
        "/api/rows?run=done&set=iteration-1/policy",
        "/api/triple?run=done&id=../../recipe.yaml",
        "/api/export?run=done&set=/etc/passwd",
        "/data?run=nobody",
        "/report?run=..%2f..",
    ],
)
def test_nothing_outside_the_folder_is_served(
    client: TestClient, folder: Path, smoke: Path, path: str
) -> None:
    if not (folder / "linked").exists():
        (folder / "linked").symlink_to(smoke)  # a whole run, but not of this folder
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text


def test_a_name_that_is_not_ours_is_refused(client: TestClient) -> None:
    for host in ("evil.example", "evil.example:8327", "localhost.evil.example", ""):
        assert client.get("/api/runs", headers={"host": host}).status_code == 421, host
    for host in ("localhost:8327", "127.0.0.1:8327", "[::1]:8327", "192.0.2.7"):
        assert client.get("/api/runs", headers={"host": host}).status_code == 200, host


def test_a_name_behind_a_proxy_can_be_allowed(folder: Path) -> None:
    with TestClient(app(folder, hosts=["Runs.Example"]), "http://runs.example") as client:
        assert get(client, "/api/runs")


def test_only_reading_is_allowed(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, "/api/runs").status_code == 405


def test_pages_forbid_frames_foreign_scripts_and_caches(client: TestClient) -> None:
    for path in ("/", "/live?run=done", "/data?run=done"):
        answer = client.get(path)
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', answer.text)
        assert policy is not None
        assert "default-src &#39;none&#39;" in policy[1]
        assert "unsafe-inline" not in policy[1].partition("style-src")[0]


def test_with_a_token_nobody_sees_anything_without_it(folder: Path) -> None:
    paths = ("/", "/live?run=done", "/data?run=done", "/api/runs", "/api/live?run=done", "/x")
    with TestClient(app(folder, "s3cret"), "http://localhost", follow_redirects=False) as client:
        for path in paths:
            for token in ("", "s3cre", "s3cret1", "ünïcode"):
                answer = client.get(path, params={"token": token} if token else None)
                assert answer.status_code == 401, path
                assert "done" not in answer.text
        assert get(client, "/api/runs", token="s3cret")["runs"]
        welcome = client.get("/data", params={"run": "done", "token": "s3cret"})
        assert welcome.status_code == 303
        assert welcome.headers["location"] == "/data?run=done"  # the token is out of the address
        assert "HttpOnly" in welcome.headers["set-cookie"]
        assert "SameSite=lax" in welcome.headers["set-cookie"]
        assert "s3cret" not in welcome.headers["set-cookie"]
        assert client.get("/data?run=done").status_code == 200  # by the cookie
        # other servers of this host keep cookies there that are none by the book
        mine = welcome.headers["set-cookie"].partition(";")[0]
        client.cookies.clear()
        assert client.get("/data?run=done").status_code == 401
        odd = {"cookie": f'layout={{"open": [1, 2]}}; {mine}'}
        assert client.get("/data?run=done", headers=odd).status_code == 200


def test_other_sites_cannot_start_work(client: TestClient) -> None:
    foreign = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/report?run=done", headers=foreign).status_code == 403
    for site in ("cross-site", "same-site"):
        link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
        assert client.get("/data?run=done", headers=link).status_code == 200
        for path in ("/report", "/report/", "/api/rows", "/api/triple", "/api/export"):
            assert client.get(f"{path}?run=done", headers=link).status_code == 403, "it is work"
        frame = {**link, "sec-fetch-dest": "iframe"}
        assert client.get("/data?run=done", headers=frame).status_code == 403


def test_what_is_refused_says_so_on_a_page(client: TestClient) -> None:
    answer = client.get("/data", params={"run": "<i>x</i>"})
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")
    assert "There is no run &#39;&lt;i&gt;x&lt;/i&gt;&#39;" in answer.text


def test_jobs_import_nothing_from_where_somebody_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text("")
    monkeypatch.chdir(tmp_path)
    jobs = Jobs()
    jobs.ask("name", "key", ["-c", "import planted"])
    jobs.running["name"].process.wait()
    with pytest.raises(SelfsteerError, match="No module named 'planted'"):
        jobs.ask("name", "key", ["-c", "import planted"])
    jobs.close()


def test_a_folder_of_indices_that_others_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for cache in (tmp_path / "cache", run / "none"):
        if cache.parent == run:
            cache.write_text("no folder can be here")
        monkeypatch.setenv("SELFSTEER_CACHE", str(cache))
        assert cache_folder(run).stat().st_mode & 0o077 == 0
        cache_folder(run).chmod(0o777)
        with pytest.raises(ArtifactError, match="open to others"):
            cache_folder(run)


def test_beyond_this_machine_the_address_holds_a_token(folder: Path) -> None:
    with served(folder, "--host", "0.0.0.0") as url:
        name = re.escape(socket.gethostname())
        assert re.fullmatch(rf"http://{name}:\d+/\?token=[\w-]{{32}}", url)


def test_the_printed_address_leads_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever name the server is bound to, and whatever the token is made of."""
    monkeypatch.setenv("SELFSTEER_VIEW_TOKEN", "a+b/c&d=")
    with served(folder, "--host", "127.1") as url:  # to the guard a name
        address = urlsplit(url)
        server = http.client.HTTPConnection(address.netloc, timeout=60)
        server.request("GET", f"/api/runs?{address.query}")
        assert json.load(server.getresponse())["runs"]
        server.close()


# -- files that are half written -------------------------------------------------------------------


def test_half_written_files_are_no_error(smoke: Path, tmp_path: Path) -> None:
    run = tmp_path / "half"
    shutil.copytree(smoke, run)
    (run / "evaluation.json").unlink()
    ledger = (run / "ledger.jsonl").read_text().splitlines()
    upto = next(i for i, x in enumerate(ledger) if '"begin"' in x and "iteration-1/policy" in x)
    (run / "ledger.jsonl").write_text("\n".join([*ledger[: upto + 1], ledger[upto + 1][:40]]))
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    whole = [m for m in metrics if '"iteration-1/generator"' in m]
    (run / "metrics.jsonl").write_text("\n".join([*whole, metrics[-1][:17]]))
    shard = run / TRIPLES / "shard-00001.jsonl"
    shard.write_text(shard.read_text()[:-30])
    said = json.loads((run / "progress.json").read_text()) | {"state": "working"}
    damaged = [said | {"state": ["working"]}, said | {"todo": 5}, said | {"todo": [[{}]]}]
    damaged += [said | {"bar": [1]}, said | {"bar": {"done": {}}}, said | {"time": "noon"}]
    damaged += [said | {"host": "elsewhere", "time": {}}, said | {"stage": {"a": [1]}}]
    texts = ("", "{", '{"state": "working"}', "[]", "[" * 9_999, *map(json.dumps, damaged))
    for text in texts:
        (run / "progress.json").write_text(text)
        with TestClient(app(run), "http://localhost") as client:
            found = get(client, "/api/live")
            assert found["state"] == "stopped"
            assert [len(m["loss"]) for m in found["curves"].values()] == [len(whole)]
            assert [s["state"] for s in found["stages"]][-1] == "begun"
            assert get(client, "/api/runs")["runs"][0]["state"] == "stopped"
    index = build(RunView.open(run).sampled[0])
    assert Index(index).about["unreadable"] == 1


def test_a_folder_that_is_no_run_does_not_hide_the_others(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "done", tmp_path / "fine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "resolved.json").write_text('{"method"')
    (tmp_path / "empty").mkdir()
    with TestClient(app(tmp_path), "http://localhost") as client:
        fine, odd = get(client, "/api/runs")["runs"]
    assert (fine["run"], fine["state"]) == ("fine", "finished")
    assert (odd["run"], odd["state"]) == ("odd", "unreadable")


def test_a_folder_that_is_full_of_nonsense_does_not_hide_the_others(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("fine", "odd"):
        shutil.copytree(folder / "done", tmp_path / name)
    evaluation = json.loads((tmp_path / "odd/evaluation.json").read_text())
    (tmp_path / "odd/evaluation.json").write_text(json.dumps({**evaluation, "finals": [1]}))
    evaluation["models"][evaluation["finals"]["sso"]]["tokens"] = float("nan")
    (tmp_path / "fine/evaluation.json").write_text(json.dumps(evaluation))
    with open(tmp_path / "fine/metrics.jsonl", "a") as file:
        file.write('{"stage": "iteration-1/policy", "step": 99, "loss": NaN}\n')
    accepted(tmp_path / "fine")
    accepted(tmp_path / "odd")
    with open(tmp_path / "fine/ledger.jsonl", "ab") as ledger:
        ledger.write('{"event": "fin", "notes": "ü'.encode()[:-1])  # cut in a character
    with TestClient(app(tmp_path), "http://localhost") as client:
        fine, odd = get(client, "/api/runs")["runs"]
        assert (fine["run"], fine["state"], fine["tokens"]) == ("fine", "finished", None)
        assert (odd["run"], odd["state"]) == ("odd", "unreadable")
        curves = get(client, "/api/live", run="fine")["curves"]["iteration-1/policy"]
        assert 99 not in [step for step, _ in curves["loss"]]


def test_a_run_that_was_told_to_stop_early_is_not_finished(smoke: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    upto = next(i for i, x in enumerate(lines) if '"iteration-1/generator"' in x)
    (run / "ledger.jsonl").write_text("".join(lines[:upto]))
    assert not RunView.open(run).finished
    with TestClient(app(run), "http://localhost") as client:
        assert get(client, "/api/live")["state"] == "stopped"


def test_a_viewer_never_holds_the_runs_lock(client: TestClient, folder: Path) -> None:
    with RunFolder(folder / "done").locked():
        get(client, "/api/live", run="done")
        get(client, "/api/rows", run="done", set=TRIPLES)


def test_a_folder_that_is_not_there_is_refused(here: Here, tmp_path: Path) -> None:
    fails(here("view", tmp_path / "nothing"), 2, "nothing")


def test_a_port_that_is_taken_is_refused(folder: Path, here: Here) -> None:
    with served(folder) as url:
        port = url.rstrip("/").rpartition(":")[2]
        fails(here("view", folder, "--port", port), 2, port, "--port")


# -- in a browser ----------------------------------------------------------------------------------


@contextmanager
def served(folder: Path, *more: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    with process("view", folder, "--port", "0", "--json", *more) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert line, running.communicate()[1]
        yield json.loads(line)["url"]


def test_the_browser_of_triples(browser: Browser, folder: Path) -> None:
    with served(folder) as url, browser.visit(f"{url}data?run=done") as visit:
        page = visit.page
        expect(page.locator(ROWS)).to_have_count(16)
        # filter: only what holds the words, and the address says so
        page.keyboard.press("/")
        page.keyboard.type("or the owl")
        expect(page.locator(ROWS)).to_have_count(1)
        assert "q=or+the+owl" in page.url
        assert HOSTILE in visit.texts("#browser-list tbody tr td:first-child")[0]
        page.keyboard.press("Escape")
        # open it: hostile text is text
        page.keyboard.press("Enter")
        page.wait_for_selector("#browser-triple .columns .card")
        assert visit.texts("#browser-triple .card.bad .response") == [HOSTILE]
        assert page.evaluate("window.broken") is None
        assert f"#/triple/{first_id(folder)}?" in page.url
        address = page.url
        # back, without the filter, and along the list
        page.keyboard.press("Escape")
        page.locator("#browser-filter [name=q]").fill("")
        expect(page.locator(ROWS)).to_have_count(16)
        page.keyboard.press("Escape")  # out of the field
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        page.wait_for_selector("#browser-triple .token")
        third = page.locator("#browser-triple .mono").inner_text()
        page.keyboard.press("k")
        expect(page.locator("#browser-triple .mono")).not_to_have_text(third)
        page.keyboard.press("?")
        assert page.locator("#browser-help").is_visible()
        assert visit.said == []
        # a permalink opens what it names
        page.goto("about:blank")
        page.goto(address)
        page.wait_for_selector("#browser-triple .columns .card")
        assert visit.texts("#browser-triple .mono") == [first_id(folder)]
        assert visit.said == []


def test_sorting_colours_and_saving(browser: Browser, folder: Path) -> None:
    with served(folder) as url, browser.visit(f"{url}data?run=done", PHONE, "dark") as visit:
        page = visit.page
        page.wait_for_selector(ROWS)
        page.select_option("#browser-filter [name=sort]", "gap")
        page.wait_for_function(
            f"() => {{ const g = [...document.querySelectorAll('{ROWS}')]"
            ".map((r) => r.cells[3].textContent).filter(Boolean).map(Number);"
            "return g.length > 9 && g.every((v, i) => !i || g[i - 1] >= v); }"
        )
        page.select_option("#browser-filter [name=fate]", "kept")
        expect(page).to_have_url(re.compile("fate=kept"))
        with page.expect_download() as saved:
            page.click("#browser-export")
        lines = Path(saved.value.path()).read_text().splitlines()
        assert {json.loads(x)["fate"] for x in lines} == {"kept"}
        page.locator("#browser-list tbody tr a").first.click()
        page.wait_for_selector("#browser-triple .token")
        tinted = "getComputedStyle(document.querySelector('.card .token')).backgroundColor"
        on = page.evaluate(tinted)
        page.keyboard.press("c")
        assert page.evaluate(tinted) != on
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        assert visit.said == []


def test_the_report_holds_the_same_browser_without_a_server(
    browser: Browser, folder: Path, tmp_path: Path
) -> None:
    from selfsteer.report.document import write_report

    written = write_report(folder / "done", tmp_path / "report.html")
    with browser.visit(f"file://{written.html}#/triple/{first_id(folder)}") as visit:
        visit.page.wait_for_selector("#browser-triple .columns .card")
        assert visit.texts("#browser-triple .card.bad .response") == [HOSTILE]
        assert visit.page.evaluate("window.broken") is None
        visit.page.keyboard.press("Escape")
        assert visit.count(ROWS) == 16
        visit.page.locator("#browser-filter [name=q]").fill("or the owl")
        expect(visit.page.locator(ROWS)).to_have_count(1)
        visit.page.get_by_role("link", name="Recipe", exact=True).click()
        assert visit.count(ROWS) == 1  # another part of the page leaves the list alone
        assert visit.said == []
    with browser.visit(f"file://{written.html}#recipe") as visit:
        expect(visit.page.locator(ROWS)).to_have_count(16)


#: Counts what is read out anew of a page's live regions.
READ_OUT = """() => {
  window.readOut = 0;
  const count = (changes) => { window.readOut += changes.length; };
  const all = { childList: true, subtree: true, characterData: true };
  for (const node of document.querySelectorAll("[role=status], [role=alert]")) {
    new MutationObserver(count).observe(node, all);
  }
}"""


def test_a_state_is_read_out_when_it_changes(browser: Browser, smoke: Path, tmp_path: Path) -> None:
    run = shutil.copytree(smoke, tmp_path / "run")
    path = run / "progress.json"
    said = json.loads(path.read_text()) | {"state": "interrupted", "stage": "evaluation"}
    said["todo"] = ["evaluation"]
    path.write_text(json.dumps(said))
    with served(run) as url, browser.visit(url) as visit:
        page = visit.page
        page.wait_for_selector("#live-state.interrupted")
        page.evaluate(READ_OUT)
        for _ in range(2):
            with page.expect_response("**/api/live*"):
                pass
        assert page.evaluate("window.readOut") == 0
        path.write_text(json.dumps(said | {"state": "failed", "error": "It broke."}))
        page.wait_for_selector("[role=status] .warn")
        assert page.evaluate("window.readOut") == 1
        assert visit.texts("[role=status] b") == ["evaluation"]
        assert visit.said == []


@pytest.mark.slow
def test_a_page_follows_a_run_that_is_killed_and_resumed(browser: Browser, tmp_path: Path) -> None:
    tiny = [x for x in TINY if not x.startswith(("generator", "evaluation"))]
    only = ("method=pbaa", "baseline=null", "generator=null", "evaluation=null")
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=live", *only, *tiny)
    run = tmp_path / "live"
    with served(tmp_path) as url, browser.visit(url) as visit:
        page = visit.page
        page.set_default_timeout(120_000)
        page.wait_for_selector("text=No run here yet.")
        # it stops itself, so that no page is too slow, and no machine too fast, to see it
        with process("iteration-1/samples", *args, program=PAUSING) as running:
            wait_until_stopped(running)
            page.get_by_role("link", name="live").click()
            page.wait_for_selector("#live-state.working")
            policy = "#live-stages tr:has-text('iteration-1/policy') td:nth-of-type(3)"
            assert visit.texts(policy) == ["to do"]
            assert visit.count("[data-points]") == 0
            running.kill()
            running.wait()
        assert (progress_of(run) or {})["state"] == "killed"
        page.wait_for_selector("#live-state.killed")
        assert visit.texts("#live-now code") == [f"selfsteer run {run}"]
        with process("iteration-1/samples", *args, program=PAUSING) as running:
            wait_until_stopped(running)
            page.wait_for_selector("#live-state.working")
            page.wait_for_selector("#live-now b:text-is('iteration-1/samples')")
            running.send_signal(signal.SIGCONT)
            assert running.wait() == 0
        page.wait_for_selector("#live-state.finished")
        page.wait_for_selector('[data-curve="iteration-1/policy loss"][data-points="4"]')
        assert visit.count("#live-samples article") == 3
        assert visit.said == []
