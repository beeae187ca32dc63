"""The data browser colours plain answers by what the principles make of their tokens."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from selfsteer.data.records import Query
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.methods import load_recipe
from selfsteer.recipe.sections import Loading, resolve_path
from selfsteer.report.browser import Index, build
from selfsteer.report.server import app
from selfsteer.run.execute import execute
from selfsteer.view import RunView
from tests.browsing import PHONE, Browser
from tests.e2e.support import TESTBED
from tests.e2e.test_view import served
from tests.make import SMALL

METHODS = {
    "contrast": ("policy", ()),
    "best-of-n-principles": ("preferences", ("ranking.samples=3",)),
    "distil": ("teacher", ()),
    "good-over-plain": ("quality", ("judge=oracle",)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run of each method, up to where its answers were weighed."""
    folder = tmp_path_factory.mktemp("runs")
    for method, (until, more) in METHODS.items():
        small = [*SMALL, "training.batch_size=4", f"runs_dir={folder}", f"name={method}", *more]
        execute(load_recipe(method, small), {"name": method}, until=until)
    return folder


def index_of(run: Path) -> Index:
    (found,) = RunView.open(run).sampled
    return Index(build(found))


def records(run: Path) -> list[dict[str, Any]]:
    index = index_of(run)
    return list(index.records(range(1, index.about["of"] + 1)))


def contrasts(record: dict[str, Any], texts: Sequence[str], finished: bool) -> list[list[float]]:
    """Computed again, by a model."""
    policy = PrincipleContrast(resolve_path(TESTBED), Loading(device="cpu"), clip=1.0)
    query = Query.from_dict(
        {k: v for k, v in record["triple"].items() if k not in ("responses", "finish_reasons")}
    )
    found = policy.gaps(policy.encoded([(query, text) for text in texts]))
    # a text is encoded as if it had ended
    return [gap[: None if finished else -1].tolist() for gap in found if gap is not None]


def test_tokens_have_the_contrast_that_the_teacher_kept(runs: Path) -> None:
    run = runs / "contrast"
    assert index_of(run).about["clip"] == 1.0
    found = records(run)
    assert {r["fate"] for r in found} == {"kept"}
    for record in found[:3]:
        text, tokens = record["triple"]["responses"]["plain"], record["tokens"]["plain"]
        finished = record["triple"]["finish_reasons"]["plain"] == "stop"
        (gaps,) = contrasts(record, [text], finished)
        clipped = [max(min(v, 1.0), -1.0) for v in gaps]
        assert tokens["contrast"] == pytest.approx(clipped, abs=0.006)
        assert sum(tokens["chars"]) == len(text)
        assert len(tokens["chars"]) == len(gaps)


def test_a_teacher_that_reads_one_principle_has_no_contrast(runs: Path) -> None:
    index = index_of(runs / "distil")
    assert index.counts("fate") == {"kept": index.about["of"]}
    assert index.about["why_no_colour"]
    assert all(not r["tokens"] for r in records(runs / "distil"))


def test_ranked_answers_have_their_scores_roles_and_contrasts(runs: Path) -> None:
    run = runs / "best-of-n-principles"
    lines = (run / "iteration-1/ranked/shard-00000.jsonl").read_text().splitlines()
    pairs = {p["id"]: p for p in map(json.loads, lines)}
    clip = 0.2
    for record in records(run):
        answers = record["triple"]["answers"]
        gaps = contrasts(record, answers, finished=True)
        for shown, text, expected in zip(record["answers"], answers, gaps, strict=True):
            tokens = record["tokens"][shown["name"]]
            assert tokens["contrast"] == pytest.approx(expected, abs=0.006)
            assert sum(tokens["chars"]) == len(text)
            if record["fate"] == "kept":
                mean = sum(max(min(v, clip), -clip) for v in expected) / len(expected)
                assert shown["score"] == pytest.approx(mean, abs=1e-4)
        if record["fate"] == "kept":
            roles = {a["role"]: t for a, t in zip(record["answers"], answers, strict=True)}
            pair = pairs[record["id"]]
            assert roles["chosen"] == pair["chosen"][0]["content"]
            assert roles["rejected"] == pair["rejected"][0]["content"]


def test_a_plain_answer_that_is_rejected_is_shown_and_judged_as_the_run_did(
    browser: Browser, runs: Path
) -> None:
    run = runs / "good-over-plain"
    quality = json.loads((run / "iteration-1/quality.json").read_text())["preferences"]
    kept = [r for r in records(run) if r["fate"] == "kept"]
    verdicts = {name: n for name, n in quality["verdicts"].items() if n}
    assert Counter(r["verdict"] for r in kept) == verdicts
    assert all(r["trained_on"]["bad"] == r["triple"]["responses"]["plain"] for r in kept)
    assert all(r["gap"] is None for r in kept), "one of good and bad answers"
    with (
        served(runs) as url,
        browser.visit(f"{url}data?run={run.name}#/triple/{kept[0]['id']}") as visit,
    ):
        visit.page.wait_for_selector("#browser-triple .card")
        plain, good, bad = visit.page.locator(".columns .card").all_text_contents()
        assert "the run took the plain answer here" in bad
        assert "a lead-in was cut" not in plain + good + bad
        assert "No principle." in bad
        assert kept[0]["triple"]["principles"]["bad"] not in bad
        assert visit.said == []


def test_ranked_answers_are_searched_and_saved_as_stored(runs: Path) -> None:
    run = runs / "best-of-n-principles"
    (stored, *_) = (run / "iteration-1/ranked/candidates/shard-00000.jsonl").read_text().split("\n")
    first = json.loads(stored)
    index_of(run)
    with TestClient(app(runs), "http://localhost") as client:
        words = first["answers"][1][-30:].upper()
        asked = {"run": run.name, "q": words}
        assert first["id"] in [
            r["id"] for r in client.get("/api/rows", params=asked).json()["rows"]
        ]
        saved = json.loads(client.get("/api/export", params={"run": run.name}).text.split("\n")[0])
        assert {k: saved[k] for k in first} == first
        shown = client.get("/api/live", params={"run": run.name}).json()["samples"]["triples"]
        assert all(s["responses"]["answer 1"] for s in shown)


def test_candidates_that_are_none_are_counted(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "best-of-n-principles", run)
    shard = run / "iteration-1/ranked/candidates/shard-00000.jsonl"
    lines = shard.read_text().splitlines()
    bad: list[dict[str, Any]] = [
        {"answers": [1, 2]},
        {"answers": 7},
        {"principles": "be good"},
        {"messages": []},
    ]
    changed = [json.dumps({**json.loads(lines[0]), **values}) for values in bad]
    shard.write_text("\n".join([*lines, *changed]) + "\n")
    about = index_of(run).about
    assert (about["of"], about["unreadable"]) == (len(lines), len(bad))


@pytest.mark.parametrize("method", ["contrast", "best-of-n-principles"])
def test_the_page_shows_which_words_the_principles_like(
    browser: Browser, runs: Path, method: str
) -> None:
    first = records(runs / method)[0]
    tokens = next(iter(first["tokens"].values()))
    strongest = max(tokens["contrast"], key=abs)
    assert abs(strongest) >= 0.1
    with (
        served(runs) as url,
        browser.visit(f"{url}data?run={method}#/triple/{first['id']}", PHONE, "dark") as visit,
    ):
        page = visit.page
        page.wait_for_selector("#browser-triple .token")
        kind = "liked" if strongest > 0 else "disliked"
        marked = page.locator(".columns .card >> nth=0").locator(f".token.{kind}")
        # the figure, a line below the word, and the word again in a list: not colour alone
        titles = marked.evaluate_all("all => all.map((x) => x.title)")
        assert any(f"{strongest:+.2f} nats" in title for title in titles)
        assert f"{strongest:+.2f}" in visit.texts(".extremes")[0]
        assert "underline" in marked.first.evaluate("x => getComputedStyle(x).textDecorationLine")
        on = marked.first.evaluate("x => getComputedStyle(x).backgroundColor")
        page.keyboard.press("c")
        assert marked.first.evaluate("x => getComputedStyle(x).backgroundColor") != on
        texts = first["triple"].get("answers") or [first["triple"]["responses"]["plain"]]
        shown = page.locator(".columns .response").all_text_contents()
        assert [t.removesuffix("⏎") for t in shown] == texts
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        assert visit.said == []


@pytest.mark.parametrize(
    ("method", "heads"),
    [
        ("contrast", ["query", "went on"]),
        ("best-of-n-principles", ["query", "went on", "longer by"]),
    ],
)
def test_columns_without_a_figure_are_left_out(
    browser: Browser, runs: Path, method: str, heads: list[str]
) -> None:
    figures = {"judge": "verdict", "judge − principle": "disagreement"} | {
        "gap": "gap",
        "longer by": "length_difference",
    }
    rows = records(runs / method)
    for head, name in figures.items():
        assert any(row[name] is not None for row in rows) == (head in heads)
    with served(runs) as url, browser.visit(f"{url}data?run={method}") as visit:
        visit.page.wait_for_selector("#browser-list td")
        assert visit.texts("#browser-list th") == heads
        assert visit.count("#browser-list tbody tr:first-child td") == len(heads)
        # nor is an order offered that would change nothing
        offered = visit.page.locator("[name=sort] option").evaluate_all(
            "all => all.filter((o) => o.value && !o.disabled).map((o) => o.value.split(' ')[0])"
        )
        assert set(offered) == {figures[head] for head in heads[2:]} - {"verdict"}
        # a triple that is opened from the top of the page leaves the heading where it is
        visit.page.locator("#browser-list a").first.click()
        visit.page.wait_for_selector("#browser-triple .card")
        heading, head = (visit.page.locator(x).bounding_box() for x in ("h1", ".top"))
        assert heading is not None
        assert head is not None
        assert heading["y"] >= head["y"] + head["height"]
        assert visit.said == []
