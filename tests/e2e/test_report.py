"""`selfsteer report`: what the page shows is what the run measured, and nothing runs in it."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsteer.judges.quality import on_policyness
from selfsteer.methods.pbaa import PBAA
from selfsteer.report.logprobs import likelihoods
from selfsteer.run.folder import read_ledger
from selfsteer.view import RunView
from tests.browsing import PHONE, Browser, Visit
from tests.e2e.support import TESTBED, Here, accepted, fails, finished

HOSTILE = "<script>window.broken = 1</script><img src='http://x.invalid/a.png' onerror='broken=2'>"

FIGURES = {
    "results", "accuracy", "likelihood", "gaps", "funnel", "lengths", "selection", "loss",
    "margins", "reward-accuracies", "rewards", "times",
}  # fmt: skip


@pytest.fixture(scope="module")
def reported(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report."""
    from selfsteer.report.document import write_report

    run = tmp_path_factory.mktemp("reported") / "done"
    shutil.copytree(smoke, run)
    write_report(run)
    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def quiet(visit: Visit) -> None:
    """No error, and nothing asked for but the page itself."""
    assert visit.said == []
    assert [u for u in visit.requests if not u.startswith("data:")] == [visit.page.url]


def test_a_report_is_written_into_the_run_folder(smoke: Path, reported: Path) -> None:
    before, after = ({p.relative_to(x) for p in x.rglob("*")} for x in (smoke, reported))
    made = after - before
    assert before <= after
    assert {str(p) for p in made if p.parent == Path()} == {
        "report.html",
        "report.md",
        "report",
    }
    drawn = FIGURES - {"selection"}  # a tenth of 16 queries is too few to select by
    files = {p.name for p in made if p.parent.name == "report"}
    assert files == {f"{name}.{suffix}" for name in drawn for suffix in ("svg", "png")}
    html = (reported / "report.html").read_text()
    assert len(html) < 1_000_000
    addresses = set(re.findall(r"https?://[^\s\"'<]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "No checkpoint was selected, as a tenth of the queries is too few to hold back" in html
    markdown = (reported / "report.md").read_text()
    linked = re.findall(r"\]\((\S+)\)", markdown)
    assert sorted(linked) == sorted(f"report/{name}.png" for name in drawn)


def test_the_page_shows_the_numbers_of_the_run(reported: Path, browser: Browser) -> None:
    evaluation = read(reported / "evaluation.json")
    stages = finished(reported)
    with browser.visit((reported / "report.html").as_uri()) as visit:
        quiet(visit)
        rows = visit.texts("#result ~ .scroll tbody tr")
        for row, label in zip(rows, ("base", *reversed(evaluation["finals"])), strict=True):
            model = evaluation["models"][evaluation["finals"].get(label, "base")]
            mean, low, high = model["score"]
            assert row.split()[0] == label
            assert f"{mean:.3f} [{low:.3f}, {high:.3f}]" in row
        mean, low, high = evaluation["differences"][0]["score"]
        assert f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" in visit.texts(".lede")[0]

        marks = {name: visit.count(f"#figure-{name} .mark") for name in FIGURES}
        features = {
            f
            for line in (reported / "iteration-1/filtered.jsonl").read_text().splitlines()
            for f in json.loads(line)["principles"]["features"]
        }
        to_policy = [n for n in stages if not n.startswith("baseline/")]
        assert marks == {
            "results": 3,  # base, pbaa, sso
            "accuracy": 3,  # the policy's own triples, the generator's pairs, the baseline's
            "likelihood": 6,  # plain, chosen, rejected; before and after
            "gaps": 2 * len(features),
            "funnel": len(to_policy) - 2,  # quality and evaluation hand nothing on
            "lengths": 2 + 4,  # answers of two methods; chosen and rejected of each
            "selection": 0,
            "loss": 3,  # generator, policy, the baseline's policy
            "margins": 4,  # the generator has two terms
            "reward-accuracies": 4,
            "rewards": 8,
            "times": len(stages),
        }
        # each figure has a name, a caption and its numbers
        for name in FIGURES - {"selection"}:
            label = visit.page.locator(f"#figure-{name} svg").get_attribute("aria-labelledby")
            assert visit.texts(f"#{label}")[0]
            assert len(visit.texts(f"#figure-{name} figcaption")[0]) > 40
        visit.page.locator("#figure-times summary").click()
        shown = dict(r.split("\t") for r in visit.texts("#figure-times tbody tr"))
        assert list(shown) == list(stages)
        slowest = max(stages, key=lambda n: stages[n]["seconds"])
        assert float(shown[slowest]) == pytest.approx(stages[slowest]["seconds"], abs=0.06)


def test_stored_log_probs_are_those_that_were_measured(smoke: Path, tmp_path: Path) -> None:
    """Also when another model has scored the same sequences, as a reference does."""
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    (mine,) = (run / "scores").iterdir()
    other = run / "scores" / "0000000000000000"
    other.mkdir()
    for path in mine.glob("*.npz"):
        with np.load(path) as data:
            np.savez(other / path.name, **{**data, "values": data["values"] * 0.5})
    quality = read(run / "iteration-1/quality.json")
    for folder in (smoke, run):
        found, missing = likelihoods(RunView.open(folder))
        assert missing == []
        triples, preferences = found
        assert (triples.kind, preferences.kind) == ("triples", "preferences")
        for drawn in (triples, preferences):
            measured = quality[drawn.kind]
            assert drawn.rows == drawn.size == measured["pairs"]
            for sequence, name in (("plain/good", "chosen"), ("plain/bad", "rejected")):
                value = on_policyness(drawn.means[sequence])
                assert value == pytest.approx(measured["on_policyness"][name], abs=1e-6)
        gap = triples.means["good/good"] - triples.means["bad/good"]
        assert gap.mean() == pytest.approx(quality["triples"]["steering_gap"]["good"], abs=1e-6)
    (small, _), _ = likelihoods(RunView.open(smoke), sample=5)
    assert small.rows == 5


def test_what_a_model_wrote_stays_text(reported: Path, tmp_path: Path, browser: Browser) -> None:
    run = tmp_path / "run"
    shutil.copytree(reported, run)
    exhibit = read(run / "evaluation/exhibit.json")
    exhibit["responses"]["policy"]["bad"] = HOSTILE
    exhibit["query"] = HOSTILE
    (run / "evaluation/exhibit.json").write_text(json.dumps(exhibit))
    for shard in (run / "iteration-1/preferences").glob("*.jsonl"):
        rows = [json.loads(line) for line in shard.read_text().splitlines()]
        for row in rows:
            row["rejected"][0]["content"] = HOSTILE
        shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = "package:selfsteer.testbed/queries/align.jsonl"
    replace_in(run / "resolved.json", json.dumps(queries), json.dumps(HOSTILE))
    accepted(run, lambda line: line.replace("over_limit", "</svg><script>broken=3<\\/script>"))
    from selfsteer.report.document import write_report

    written = write_report(run)
    with browser.visit(written.html.as_uri()) as visit:
        quiet(visit)
        assert visit.page.evaluate("window.broken") is None
        assert visit.count("script") == 4  # its own: theme, dom, browser, and the browser's data
        assert visit.count("img") == 0
        assert HOSTILE in visit.texts("h1 + p")[0]
        assert HOSTILE in visit.texts("#steering ~ .columns .bad .response")
        assert visit.texts("#samples ~ .columns .bad .response") == [HOSTILE] * 5
    assert "<script" not in written.markdown.read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_on_a_phone_and_a_desktop(
    reported: Path, browser: Browser, scheme: str
) -> None:
    ground = {"light": "rgb(251, 251, 249)", "dark": "rgb(20, 22, 26)"}
    colour = "getComputedStyle(document.body).backgroundColor"
    bar = "getComputedStyle(document.querySelector('#figure-times .mark path')).fill"
    for size in ((1280, 900), PHONE):
        with browser.visit((reported / "report.html").as_uri(), size, scheme) as visit:
            page = visit.page
            assert page.evaluate("document.documentElement.scrollWidth") == size[0]
            assert page.evaluate(colour) == ground[scheme]
            before = page.evaluate(bar)
            page.click("#theme")
            other = {"light": "dark", "dark": "light"}[scheme]
            assert page.evaluate(colour) == ground[other]
            assert page.evaluate(bar) != before
            quiet(visit)


def test_a_run_that_stopped_gets_a_report(smoke: Path, tmp_path: Path, here: Here) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    entries = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    begun = [json.loads(e)["event"] for e in entries]
    stop = next(
        i for i, e in enumerate(entries) if json.loads(e)["stage"] == "iteration-1/generator"
    )
    assert begun[stop] == "begin"
    (run / "ledger.jsonl").write_text("".join(entries[: stop + 1]) + '{"event": "fin')
    shutil.rmtree(run / "baseline")
    shutil.rmtree(run / "iteration-1/preferences")
    for name in ("evaluation.json", "iteration-1/quality.json", "evaluation/exhibit.json"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + lines[1][:30])
    ended = here("report", run)
    assert ended.code == 0, ended.err
    html = (run / "report.html").read_text()
    assert "The run stopped in stage iteration-1/generator." in html
    assert "There is no result yet" in html
    assert "models are not compared" in ended.err
    drawn = {p.stem for p in (run / "report").iterdir()}
    assert drawn >= {"funnel", "times", "loss", "likelihood"}
    assert not drawn & {"results", "accuracy", "lengths"}

    # nothing at all but the recipe
    for path in [*run.iterdir()]:
        if path.name not in ("resolved.json", "recipe.yaml", "report.html", "report"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    ended = here("report", run)
    assert ended.code == 0, ended.err
    assert not (run / "report").exists()
    assert "No stage has finished" in (run / "report.html").read_text()


@pytest.mark.slow
def test_online_without_judge_or_evaluation(tmp_path: Path, here: Here) -> None:
    ended = here(
        "run", "sso-online", f"runs_dir={tmp_path}", "name=online", f"policy.model={TESTBED}",
        "queries.path=package:selfsteer.testbed/queries/align.jsonl", "queries.limit=8",
        "baseline=null", "iterations=2", "judge=null", "evaluation=null", "filter=false",
        "principles.max_new_tokens=96", "sampling.max_new_tokens=96", "policy.threads=1",
        "training.max_length=512", "training.batch_size=4",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    run = tmp_path / "online"
    opened = RunView.open(run)
    assert opened.state == "finished"
    found, missing = likelihoods(opened)
    assert missing == []
    assert [(s.round.k, s.kind) for s in found] == [(1, "triples"), (2, "triples")]
    for k, drawn in enumerate(found, 1):
        figures = read(run / f"iteration-{k}/quality.json")["triples"]
        value = on_policyness(drawn.means["plain/plain"])
        assert math.isclose(value, figures["on_policyness"]["plain"], abs_tol=1e-6)
    ended = here("report", run, "--out", tmp_path / "other.html")
    assert ended.code == 0, ended.err
    assert (
        "There is no result: the recipe has no evaluation." in (tmp_path / "other.html").read_text()
    )
    assert not (run / "report.html").exists()
    svg = (tmp_path / "other" / "margins.svg").read_text()
    assert [context in svg for context in ("plain context", "good context", "bad context")] == [
        True
    ] * 3


def test_pbaa_alone(smoke: Path, tmp_path: Path, here: Here) -> None:
    """The baseline's half of a run is a PBAA run."""
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    given = read(run / "resolved.json")
    recipe = {name: given[name] for name in PBAA.model_fields if name in given}
    recipe = {**recipe, "method": "pbaa", "name": "pbaa", "baseline": None}
    (run / "resolved.json").write_text(json.dumps(recipe))
    principles = (run / "iteration-1/principles.jsonl").read_bytes()
    shutil.rmtree(run / "iteration-1")
    shutil.move(run / "baseline/iteration-1", run / "iteration-1")
    (run / "iteration-1/principles.jsonl").write_bytes(principles)
    kept = [
        {**e, "stage": e["stage"].removeprefix("baseline/"), "sums": {}}
        for e in read_ledger(run / "ledger.jsonl")
        if not e["stage"].startswith("iteration-1/") or e["stage"].endswith("/principles")
    ]
    (run / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in steps if m["stage"].startswith("baseline/")]
    text = "".join(json.dumps(m) + "\n" for m in steps).replace("baseline/", "")
    (run / "metrics.jsonl").write_text(text)
    evaluation = read(run / "evaluation.json")
    evaluation["finals"].pop("sso")
    evaluation["models"].pop("sso/iteration-1")
    evaluation.pop("differences")
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    accepted(run)
    ended = here("report", run, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert {Path(p) for p in found["figures"]} == set((run / "report").iterdir())
    assert found["html"] == str(run / "report.html")
    assert [text for text in found["not_drawn"] if "No checkpoint was selected" in text]
    html = (run / "report.html").read_text()
    low, *_ = evaluation["models"]["pbaa/iteration-1"]["score"]
    assert f"pbaa scores {low:.3f}" in html
    ((drawn,), _) = likelihoods(RunView.open(run))
    assert "good/good" in drawn.means
    assert "plain/plain" not in drawn.means


def test_links_that_lead_out_of_a_run_are_not_shown(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    run, secret, target = (tmp_path / name for name in ("run", "secret.json", "target"))
    shutil.copytree(smoke, run)
    exhibit = read(run / "evaluation/exhibit.json")
    secret.write_text(json.dumps({**exhibit, "query": "s3cret"}))
    (run / "evaluation/exhibit.json").unlink()
    (run / "evaluation/exhibit.json").symlink_to(secret)
    (run / "iteration-1/preferences").rename(tmp_path / "preferences")
    (run / "iteration-1/preferences").symlink_to(tmp_path / "preferences")
    target.write_text("mine")
    (run / ".report.html.partial").symlink_to(target)
    ended = here("report", run)
    assert ended.code == 0, ended.err
    assert ended.err.count("by a link") == 2
    assert target.read_text() == "mine"
    assert "s3cret" not in (run / "report.html").read_text()
    assert 'id="samples"' not in (run / "report.html").read_text()
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").symlink_to(secret)
    fails(here("report", run), 3, "leads out of the run folder")


def test_benchmarks_are_in_the_report(smoke: Path, tmp_path: Path, here: Here) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    task = {"metric": "acc,none", "stderr": 0.1, "questions": 40, "truncated": 0}
    models = {"base": {**task, "score": 0.25}, "sso": {**task, "score": 0.625}}
    found = {
        "models": list(models),
        "limit": 40,
        "benchmarks": [{"name": "arc", "kind": "task", "models": models}],
        "differences": [],
    }
    (run / "benchmarks.json").write_text(json.dumps(found))
    ended = here("report", run)
    assert ended.code == 0, ended.err
    for text in ((run / "report.html").read_text(), (run / "report.md").read_text()):
        assert "62.5 ± 10.0" in text
        assert "only the first 40 questions" in text


def test_what_is_no_run_and_no_page_is_refused(smoke: Path, tmp_path: Path, here: Here) -> None:
    fails(here("report", tmp_path), 3, "not a run folder")
    fails(here("report", smoke, "--out", tmp_path / "report.pdf"), 2, ".html")
