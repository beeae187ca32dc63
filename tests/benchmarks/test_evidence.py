"""The evidence's bookkeeping on invented cells: order, pairing, verdicts, what is missing."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import dump_lines, read_jsonl
from selfsteer.methods import load_recipe
from selfsteer.principles.fixed import read_fixed
from selfsteer.stages.oppose import given_answers
from selfsteer.testbed.questions import question
from selfsteer.testbed.world import CHECKPOINT, QUERIES

FOLDER = Path(__file__).parents[2] / "benchmarks" / "evidence"


@pytest.fixture(scope="module")
def evidence() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    yield import_module("cells"), import_module("page"), import_module("running")
    sys.path.remove(str(FOLDER))
    for name in ("cells", "page", "running", "measures"):
        del sys.modules[name]


@pytest.fixture
def invented(evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes cells of invented scores into a folder of the test's own."""
    cells, *_ = evidence
    monkeypatch.setattr(cells, "CELLS", tmp_path)

    def write(cell: Any, scores: list[int], **more: Any) -> None:
        data = {
            "settings": list(cell.settings()),
            "scores": scores,
            "base_scores": [600] * len(scores),
            "iterations": [
                {
                    "accuracy": 0.9,
                    "on_policyness": {"both": 0.75, "chosen": 0.8, "rejected": 0.7},
                    "tokens": 30.0,
                }
            ],
            "compute": {"all": 1.5},
            "date": "2026-01-02",
            "hardware": "invented",
            "versions": {"selfsteer": "0"},
            "seconds": {"policy": 3.0},
        }
        (tmp_path / f"{cell.name}.json").write_text(json.dumps({**data, **more}))

    return write


def searched(cells: Any, write: Any) -> None:
    """A search whose second trial is the best of each family."""
    for family in cells.SEARCH:
        for i, cell in enumerate(cells.trials(family)):
            write(cell, [900 if i == 1 else 500, 500])


def test_every_method_is_searched_with_the_same_budget(evidence: Any) -> None:
    cells, *_ = evidence
    assert len({len(trials) for trials in cells.SEARCH.values()}) == 1
    assert all(len(set(trials)) == len(trials) for trials in cells.SEARCH.values())
    assert {arm.family for arm in cells.ARMS.values()} - {None} == set(cells.SEARCH)


def test_every_arm_and_trial_is_a_recipe(evidence: Any, invented: Any) -> None:
    cells, *_ = evidence
    searched(cells, invented)
    every = [c for family in cells.SEARCH for c in cells.trials(family)]
    for cell in [*every, *(cells.Cell(arm, 0, 0) for arm in cells.ARMS)]:
        kind, more = "demo", []
        if cells.ARMS[cell.arm].sets:
            kind, more = "reward", ["reward.data=x.jsonl", "policy.model=m"]
        recipe = load_recipe(kind, [*cell.settings(), *more, f"name={cell.name}"])
        assert recipe.name == cell.name
    assert {arm for table in cells.TABLES for arm in table.arms} == set(cells.ARMS)


def test_answers_and_true_principles_are_made_for_each_query(evidence: Any, tmp_path: Path) -> None:
    *_, running = evidence
    path = running.query_file(3, 20, tmp_path, answered=True)
    assert len(given_answers(str(path))) == 20
    rows = [
        json.loads(line) for line in running.query_file(3, 20, tmp_path).read_text().splitlines()
    ]
    truth = read_fixed(str(running.principle_file(running.query_file(3, 20, tmp_path), 3)))
    assert set(truth) == {row["id"] for row in rows}
    for row in rows:
        named = set(truth[row["id"]].features)
        assert len(named) == 2
        assert named < set(question(row["prompt"]).features)


def test_cells_wait_for_their_search_and_take_its_best_settings(
    evidence: Any, invented: Any
) -> None:
    cells, *_ = evidence
    wanted = cells.wanted()
    assert [c.trial is None for c in wanted].index(True) == 3 * 12
    assert len(wanted) == len(set(wanted))
    evidence_cells = [c for c in wanted if c.trial is None]
    assert [c.arm for c in evidence_cells][:4] == ["annotated", "pbaa", "sso", "annotated"]
    assert [c.base for c in evidence_cells][:6] == [0, 0, 0, 1, 1, 1]
    first_control = next(i for i, c in enumerate(wanted) if c.arm == "pbaa-compute")
    assert {c.arm for c in wanted[:first_control]} == {"annotated", "pbaa", "sso"}
    assert wanted[first_control].trial == 0
    assert cells.Cell("pbaa", 0, 0).settings() is None
    searched(cells, invented)
    assert set(cells.SEARCH["pbaa"][1]) < set(cells.Cell("pbaa", 0, 0).settings())
    # one trial missing, and nothing is known
    cells.trials("pbaa")[0].path.unlink()
    assert cells.Cell("pbaa", 0, 0).settings() is None
    assert cells.Cell("sso", 0, 0).settings() is not None


def test_a_cell_of_other_settings_is_missing(evidence: Any, invented: Any) -> None:
    cells, *_ = evidence
    searched(cells, invented)
    cell = cells.Cell("sso", 0, 3)
    invented(cell, [1])
    assert cell.found() is not None
    invented(cell, [1], settings=["training.epochs=9"])
    assert cell.found() is None


def test_claims_are_paired_and_carry_the_sign_of_the_interval(evidence: Any, invented: Any) -> None:
    cells, page, _ = evidence
    searched(cells, invented)
    claim = next(c for c in page.CLAIMS if c.text == "SSO is above PBAA")
    assert page.judged(claim) == ("not run", "", "not run")
    # queries differ wildly, the two arms always by one point: only pairing sees it
    for seed in range(3):
        levels = [100, 500, 900, 300 + seed]
        invented(cells.Cell("pbaa", 0, seed), levels)
        invented(cells.Cell("sso", 0, seed), [v + 10 for v in levels])
    assert page.judged(claim) == ("+1.00 [+1.00, +1.00]", "3 of 3, p 0.25, 27 not run", "holds")
    for seed in range(3):
        invented(cells.Cell("sso", 0, seed), [v - 10 for v in [100, 500, 900, 300 + seed]])
    assert page.judged(claim)[2] == "**fails**"
    invented(cells.Cell("sso", 0, 0), [900, 900, 900, 900])
    assert page.judged(claim)[2] == "undecided"


def test_greedy_scores_are_those_of_the_cells_that_have_them(evidence: Any, invented: Any) -> None:
    cells, page, _ = evidence
    searched(cells, invented)
    claim = next(c for c in page.CLAIMS if c.text.startswith("greedily, contrast"))
    for arm, greedy in (("contrast", 905), ("sso", 900)):
        sharp = {"greedy": [greedy, greedy], "hot": [500, 700], "entropy": 0.125, "distinct": 0.75}
        for seed in range(2):
            invented(cells.Cell(arm, 0, seed), [800, 900], sharpness=sharp, base_sharpness=sharp)
    invented(cells.Cell("sso", 0, 2), [800, 900])
    invented(cells.Cell("contrast", 0, 2), [800, 900])
    assert page.judged(claim) == ("+0.50 [+0.50, +0.50]", "2 of 2, p 0.50, 3 not run", "holds")
    table = next(t for t in cells.TABLES if t.name == "sharpness")
    rows = page.sharpness_table(table).splitlines()
    cell = "90.5 [90.5, 90.5] (3 not run) | 60.0 [50.0, 70.0] (3 not run)"
    assert any(row.startswith("| contrast |") and cell in row for row in rows)
    assert "| 0.125 [0.125, 0.125] (3 not run) | 0.75 [0.75, 0.75] (3 not run) |" in rows[2]
    assert "| annotated | not run |" in "\n".join(rows)


def test_a_model_is_asked_greedily_and_warmly(evidence: Any, tmp_path: Path) -> None:
    *_, running = evidence
    asked = tmp_path / "asked.jsonl"
    lines = QUERIES["final"].read_text("utf-8").splitlines(keepends=True)
    asked.write_text("".join(lines[:3]), "utf-8")
    found = running.sharpness(str(CHECKPOINT), asked, seed=0)
    assert [len(found[kind]) for kind in ("greedy", "hot")] == [3, 3]
    assert all(0 <= score <= 1000 for score in found["greedy"])
    assert 0.02 < found["entropy"] < 1
    assert 0.25 <= found["distinct"] <= 1


def test_the_sign_test_is_exact_and_leaves_zeros_out(evidence: Any) -> None:
    _, page, _ = evidence
    # 2 (C(10,9) + C(10,10)) / 2^10
    assert page.sign_test([1.0] * 9 + [-1.0]) == "9 of 10, p 0.021"
    assert page.sign_test([-1.0] * 10) == "0 of 10, p 0.002"
    assert page.sign_test([1.0] * 4 + [0.0]) == "4 of 5, p 0.12"
    assert page.sign_test([1.0, -1.0]) == "1 of 2, p 1.00"
    assert page.sign_test([1.0] * 30) == "30 of 30, p < 0.001"
    assert page.sign_test([0.0]) == "0 of 1"


def test_the_page_says_what_is_missing(
    evidence: Any, invented: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, page, _ = evidence
    monkeypatch.setattr(page, "README", tmp_path / "README.md")
    monkeypatch.setattr(page, "FIGURE", tmp_path / "figure3.png")
    monkeypatch.setattr(page, "COMPUTE", tmp_path / "compute.png")
    rows = [row for _, row in read_jsonl(page.FINAL)]
    of_a_fact = [question(row["prompt"]).task == "fact" for row in rows]
    two = tmp_path / "final.jsonl"
    two.write_text(dump_lines([rows[of_a_fact.index(True)], rows[of_a_fact.index(False)]]))
    monkeypatch.setattr(page, "FINAL", two)
    searched(cells, invented)
    invented(cells.Cell("sso", 0, 0), [700, 800])
    page.write()
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "| base 0 | 60.0 [60.0, 60.0] (9 not run) | not run |" in text
    assert "75.0 [70.0, 80.0] (9 not run)" in text
    chosen = "training.learning_rate=1e-4, training.epochs=1, generator.gamma=0.3"
    assert f"| sso | {chosen} | 70.00 | yes |" in text
    assert "2026-01-02; invented" in text
    for name in ("figure3.png", "compute.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_the_committed_page_is_that_of_the_committed_cells(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, page, _ = evidence
    monkeypatch.setattr(page, "README", tmp_path / "README.md")
    monkeypatch.setattr(page, "FIGURE", tmp_path / "figure3.png")
    monkeypatch.setattr(page, "COMPUTE", tmp_path / "compute.png")
    page.write()
    assert (tmp_path / "README.md").read_text() == (FOLDER / "README.md").read_text()


def test_arms_start_from_the_same_base_model(evidence: Any, invented: Any, tmp_path: Path) -> None:
    cells, _, running = evidence
    committed = FOLDER / "cells"
    answers: dict[tuple[int | str, int], set[str]] = {}
    for path in committed.glob("*-base*.json"):
        found = json.loads(path.read_text("utf-8"))
        # the shipped checkpoint is the same for all, what is built may not be
        if found["base"] and not path.name.startswith("search"):
            own = json.dumps(found["base_scores"])
            answers.setdefault((found["base"], found["seed"]), set()).add(own)
    for path in committed.glob("audit-*.json"):
        found = json.loads(path.read_text("utf-8"))
        own = str(found["base_figures"]["score/plain"])
        answers.setdefault(("audit", found["seed"]), set()).add(own)
    assert len(answers) >= 25
    assert {key for key, own in answers.items() if len(own) > 1} == set()
    # and none is added that does not
    searched(cells, invented)
    invented(cells.Cell("pbaa", 1, 0), [500, 500], base=1, seed=0)
    other = cells.Cell("dlma", 1, 0)
    running.refuse_other_base(other, {"base_scores": [600, 600]})
    with pytest.raises(running.Failed, match="pbaa-base1-seed0"):
        running.refuse_other_base(other, {"base_scores": [600, 599]})
    running.refuse_other_base(cells.Cell("dlma", 1, 1), {"base_scores": [600, 599]})


def test_the_readme_says_what_the_cells_say(evidence: Any) -> None:
    _, page, _ = evidence
    readme = (FOLDER.parents[1] / "README.md").read_text("utf-8")
    claims = {c.text: c for c in page.CLAIMS}
    rows = {
        "SSO above the base model": "SSO helps",
        "SSO above PBAA, its baseline": "SSO is above PBAA",
        "SSO above pairs ranked by an annotator who never errs": "SSO is above annotated pairs",
        "Contrast distillation above SSO, at a third of its compute": (
            "contrast distillation is above SSO"
        ),
        "Contrast distillation above those annotated pairs": (
            "contrast distillation is above annotated pairs"
        ),
    }
    for label, text in rows.items():
        ours, signs, _ = page.judged(claims[text])
        assert f"| {label} | {ours} | {signs.partition(',')[0]} |" in readme, (label, ours, signs)
    equal, *_ = page.judged(claims["SSO is above PBAA of nine tenths of its compute"])
    assert f"undecided ({equal})" in readme
    harder, signs, _ = page.judged(claims["on the harder world, SSO is above PBAA"])
    seeds = signs.partition(",")[0].rpartition(" ")[2]
    assert f"it is {harder} ({seeds} seeds)" in " ".join(readme.split())
    rounds = "on the harder world, contrast distillation in three rounds is above SSO"
    assert f"above it by {page.judged(claims[rounds])[0]}" in " ".join(readme.split())


def test_queries_of_a_seed_are_nested(evidence: Any, tmp_path: Path) -> None:
    *_, running = evidence
    files = [running.query_file(s, n, tmp_path) for s, n in ((1, 20), (1, 50), (2, 20))]
    sets = [{json.loads(line)["id"] for line in f.read_text().splitlines()} for f in files]
    assert list(map(len, sets)) == [20, 50, 20]
    assert sets[0] < sets[1]
    assert sets[0] != sets[2]
    assert len(running.query_file(1, 20, tmp_path).read_text().splitlines()) == 20
