"""What the tables of a run hold, for the terminal and the page alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import dump_lines
from selfsteer.formats.cards import model_card
from selfsteer.report import summary, tables
from selfsteer.report.document import content, headline
from selfsteer.report.page import render_text
from selfsteer.view import RunView
from tests.make import entry
from tests.test_view import FIGURES, make


def test_what_stages_warned_of_is_shown_wherever_a_run_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = {
        "iteration-1/triples": {"warnings": ["12% of 50 good answers are empty."]},
        "iteration-1/policy": {"selection": {"text": "step 1 kept", "warnings": ["it loses"]}},
        "iteration-1/quality": {},
    }
    lines = [entry("finish", stage, "Sample", notes=said) for stage, said in notes.items()]
    run = RunView.open(make(tmp_path, dump_lines(lines)))
    rows = [
        ("iteration-1/triples", "12% of 50 good answers are empty."),
        ("iteration-1/policy", "it loses"),
    ]
    assert tables.warnings(run).rows == rows
    summary.print_show(run)
    said = " ".join(capsys.readouterr().out.split())
    for stage, text in rows:
        assert f"warning: {stage}: {text}" in said
    (result,) = (s for s in content(run, [], [])["sections"] if s["anchor"] == "result")
    assert tables.warnings(run) in result["sheets"]


def test_stages_say_how_long_they_took_and_how_principles_came_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that has not ended says so where its time will stand, not among the drops."""
    tried = {"first_try": {"written": 20}, "retry": {"written": 3}, "sources": {"written": 23}}
    lines = [
        entry("finish", "queries", "ReadQueries", seconds=0.19463),
        entry("finish", "iteration-1/principles", "WritePrinciples", seconds=5000.0,
              notes={"sources": {"picked": 24}}),
        entry("finish", "iteration-2/principles", "WritePrinciples", round=2, notes=tried),
        entry("begin", "iteration-1/triples", "Sample"),
    ]  # fmt: skip
    run = RunView.open(make(tmp_path, dump_lines(lines), "iterations=2"))
    assert [row[-1] for row in tables.stages(run).rows] == ["0 s", "83 min", "2 s", "not finished"]
    assert tables.stages(run).rows[-1] == ["iteration-1/triples", None, None, "not finished"]
    assert tables.stages(run).columns == ["stage", "in", "out", "time"], "nothing was dropped"
    summary.print_show(run)
    said = capsys.readouterr().out
    assert "iteration-1/principles: 24 picked\n" in said
    first = "iteration-2/principles: first try 20 written; retry 3 written; in the end 23 written"
    assert first in " ".join(said.split())


def evaluated(folder: Path) -> RunView:
    """SSO beside PBAA, on 10 held-out queries, by one rule."""
    run = make(folder, "", "baseline=pbaa", "judge=checks:style.yaml")
    labels = ("base", "sso/iteration-1", "pbaa/iteration-1")
    rule = {
        "queries": 10,
        "kept": dict(zip(labels, (0.1, 0.5, 0.2), strict=True)),
        "gained": dict(zip(labels[1:], ((0.4, 0.2, 0.6), (0.1, -0.1, 0.3)), strict=True)),
    }
    found: dict[str, Any] = {
        "queries": 10,
        "judge": "checks:style.yaml",
        "score_scale": "share of the checks passed",
        "finals": {"sso": labels[1], "pbaa": labels[2]},
        "models": {
            label: {"tokens": 9.0, "unfinished": n, "score": [0.5, None, None]}
            for label, n in zip(labels, (9, 2, 5), strict=True)
        },
        "rules": {"Calm: no_match: [!|]": rule},
    }
    (run / "evaluation.json").write_text(json.dumps(found))
    return RunView.open(run)


def test_each_rule_stands_with_its_shares_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(tmp_path)
    sheet = tables.rules(run)
    assert sheet.columns == ("rule", "queries", "base", "pbaa", "sso", "gain of sso")
    assert sheet.rows == [
        ["Calm: no_match: [!|]", 10, 0.1, 0.2, 0.5, (0.4, 0.2, 0.6)],
        ["(cut off by the token budget)", 10, 0.9, 0.5, 0.2, None],
    ]
    assert run.to_json()["evaluation"]["rules"]
    summary.print_result(run)
    said = " ".join(capsys.readouterr().out.split())
    assert "Calm: no_match: [!|] 10 0.100 0.200 0.500 0.400 [.20, .60]" in said
    (result,) = (s for s in content(run, [], [])["sections"] if s["anchor"] == "result")
    assert sheet in result["sheets"]
    card = model_card(run.round())
    assert "| rule | queries | start | this model | gain of this model |" in card
    assert r"no_match: [!\|] | 10 | 0.100 | 0.500 | 0.400 [0.200, 0.600] |" in card
    assert "| (cut off by the token budget) | 10 | 0.900 | 0.200 |  |" in card


def test_a_rule_that_fewer_answers_keep_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(tmp_path)
    assert tables.worse_rules(run) == ""
    path = run.folder / "evaluation.json"
    found = json.loads(path.read_text())
    (rule,) = found["rules"].values()
    rule["gained"]["sso/iteration-1"] = (-0.3, -0.6, 0.0)
    path.write_text(json.dumps(found))
    assert tables.worse_rules(RunView.open(run.folder)) == "", "it may be chance"
    rule["gained"]["sso/iteration-1"] = (-0.3, -0.6, -0.1)
    path.write_text(json.dumps(found))
    said = "Fewer answers than before keep: Calm: no_match: [!|] (-0.300 [-0.600, -0.100])."
    worse = RunView.open(run.folder)
    assert said in headline(worse)
    summary.print_result(worse)
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ([0.026, 0.015, 0.037], "sso scores 0.026 [0.015, 0.037] more than pbaa"),
        ([-0.035, -0.047, -0.023], "sso scores 0.035 [0.023, 0.047] less than pbaa"),
        ([0.01, 0.0, 0.02], "sso and pbaa cannot be told apart by score: +0.010 [+0.000, +0.020]"),
        ([0.2, None, None], "sso - pbaa: +0.200 in score: one query decides nothing"),
    ],
)
def test_the_result_is_a_sentence(tmp_path: Path, figure: list[float | None], said: str) -> None:
    folder = evaluated(tmp_path).folder
    path = folder / "evaluation.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "differences": [{"of": "sso - pbaa", "score": figure}]}))
    run = RunView.open(folder)
    assert tables.sentence(run).startswith(f"{said}.")
    assert content(run, [], [])["headline"] == tables.sentence(run)
    assert "sso compared with pbaa, 1 iteration" in content(run, [], [])["subtitle"]


def test_without_a_baseline_the_result_is_that_against_base(tmp_path: Path) -> None:
    folder = evaluated(tmp_path).folder
    path = folder / "evaluation.json"
    found = json.loads(path.read_text())
    found["models"]["sso/iteration-1"] |= {"score": [0.7, 0.6, 0.8], "win_rate": [0.6, 0.5, 0.75]}
    path.write_text(json.dumps(found))
    assert content(RunView.open(folder), [], [])["headline"] == (
        "On 10 held-out queries, sso scores 0.700 [0.600, 0.800] and base 0.500; sso wins against "
        "base with 0.600 [0.500, 0.750] of its answers."
    )


def test_the_judge_in_the_head_is_named_without_its_folders(tmp_path: Path) -> None:
    run = evaluated(tmp_path)
    figures = {"judge": "checks:package:selfsteer/recipes/style.yaml", "scored_under": "x"}
    path = run.folder / "iteration-1" / "quality.json"
    path.write_text(json.dumps({**figures, "preferences": FIGURES}))
    cards = content(RunView.open(run.folder), [], [])["cards"]
    assert ("Accuracy of the pairs", "0.750", "judge: checks:style.yaml") in cards
    text = render_text("report.md.j2", folder="r", **content(RunView.open(run.folder), [], []))
    assert "\n\n## Result\n" in text


def test_a_column_that_holds_nothing_is_left_out(tmp_path: Path) -> None:
    run = evaluated(tmp_path)
    assert tables.results(run).columns == ["model", "score", "tokens", "time, s"]


def test_benchmarks_stand_in_the_card_of_the_last_policy(tmp_path: Path) -> None:
    run = make(tmp_path, "")
    cell = {"score": 0.25, "metric": "acc", "stderr": 0.1, "questions": 40, "truncated": 0}
    models = {"base": cell, "sso": {**cell, "score": 0.625}}
    column = {"name": "arc", "kind": "task", "models": models}
    found = {"models": [*models], "limit": None, "benchmarks": [column], "differences": []}
    assert "Not evaluated." in model_card(RunView.open(run).round())
    (run / "benchmarks.json").write_text(json.dumps(found))
    card = model_card(RunView.open(run).round())
    assert "| sso | 62.5 ± 10.0 |" in card
    assert "Not evaluated." not in card
