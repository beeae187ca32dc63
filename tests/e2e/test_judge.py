import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from selfsteer.judges.principles import PrincipleContrast
from selfsteer.methods import load_recipe
from selfsteer.run.execute import execute
from tests.e2e.support import TESTBED, TINY, Here, accepted, fails, finished
from tests.make import SMALL

CHAT = f"{{kind: chat, model: '{TESTBED}', max_new_tokens: 24}}"


def report(ended: Any) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_the_runs_own_judge_says_again_what_quality_says(smoke: Path, here: Here) -> None:
    (judge,) = report(here("judge", smoke, "--json"))["judges"]
    quality = json.loads((smoke / "iteration-1" / "quality.json").read_text())
    assert quality["judge"] == judge["name"] == "oracle"
    assert judge["verdicts"] == quality["preferences"]["verdicts"]
    assert judge["accuracy"] == quality["preferences"]["accuracy"]
    assert judge["position"] is None


def test_pairs_that_are_not_as_the_run_wrote_them_are_not_judged(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    shard = sorted((run / "iteration-1" / "preferences").glob("shard-*.jsonl"))[-1]
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[:-1]))
    for more in ((), ("--label-sheet", tmp_path / "sheet.jsonl")):
        fails(here("judge", run, *more), 3, shard.name)
    assert not (tmp_path / "sheet.jsonl").exists()


def test_a_model_that_cannot_judge_is_unparseable_and_nothing_breaks(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    args = ("judge", smoke, "--judge", CHAT, "--judge", "oracle", "--store", tmp_path)
    found = report(here(*args, "--json"))
    chat, oracle = found["judges"]
    assert chat["verdicts"]["unparseable"] == chat["pairs"] == oracle["pairs"]
    assert chat["accuracy"] is None
    assert sum(chat["unparseable_because"].values()) == chat["pairs"]
    assert chat["cost"]["prompt_tokens"] > chat["cost"]["completion_tokens"] > 0
    assert sum(found["agreement"]["table"][4]) == chat["pairs"]
    assert found["agreement"]["parsed"] == {"pairs": 0, "kappa": None}
    stored = {p: p.read_bytes() for p in tmp_path.rglob("answers-*.jsonl")}
    assert stored
    assert report(here(*args, "--json")) == found  # from the store, seconds included
    assert {p: p.read_bytes() for p in tmp_path.rglob("answers-*.jsonl")} == stored
    shown = here(*args)
    assert f"chat:{TESTBED}" in shown.out
    assert "unparseable" in shown.out
    assert "undefined" in shown.out


def test_a_run_judged_by_a_model_that_cannot_judge(tmp_path: Path, here: Here) -> None:
    """Accuracy is null, never 0; every verdict class is in quality, evaluation and show."""
    tiny = [s for s in TINY if not s.startswith("generator")]
    method = ("method=pbaa", "baseline=null", "generator=null", f"judge={CHAT}")
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=c", *method, *tiny)
    ended = here(*args)
    assert ended.code == 0, ended.err
    run = tmp_path / "c"
    quality = json.loads((run / "iteration-1" / "quality.json").read_text())
    assert quality["judge"] == f"chat:{TESTBED}"
    assert quality["preferences"]["accuracy"] is None
    assert quality["preferences"]["verdicts"]["unparseable"] == quality["preferences"]["pairs"]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["score_scale"] is None
    figures = evaluation["models"]["pbaa/iteration-1"]
    # equal answers tie without the judge being asked
    assert figures["verdicts"]["unparseable"] + figures["verdicts"]["tie"] == 8
    assert ("win_rate" in figures) == bool(figures["verdicts"]["tie"])
    shown = here("show", run).out
    assert "unparseable" in shown
    assert "pbaa/iteration-1 preferences" in shown
    # the verb finds the run's own judge and its stored answers
    files = len(list(run.glob("judgements/*/*")))
    assert report(here("judge", run, "--json"))["judges"][0]["accuracy"] is None
    assert len(list(run.glob("judgements/*/*"))) == files


def test_another_judge_conflicts_with_what_it_decided(smoke: Path, here: Here) -> None:
    """Its verdicts choose the step of a training; what was sampled before is not touched."""
    ended = here("run", smoke, f"judge={CHAT}", "--dry-run", "--json")
    states = json.loads(ended.out)
    conflicts = {name for name, state in states.items() if state == "conflict"}
    untouched = {"queries", "iteration-1/principles", "iteration-1/triples", "iteration-1/filter",
                 "baseline/iteration-1/samples", "baseline/iteration-1/preferences"}  # fmt: skip
    assert conflicts == states.keys() - untouched


def test_people_can_label_a_sheet_and_be_compared(smoke: Path, tmp_path: Path, here: Here) -> None:
    sheet = tmp_path / "labels.jsonl"
    ended = here("judge", smoke, "--label-sheet", sheet, "--limit", 9)
    assert ended.code == 0, ended.err
    assert "--iteration" not in ended.out
    other = here("judge", smoke, "--label-sheet", tmp_path / "o", "--iteration", 1, "--baseline")
    assert "--iteration 1 --baseline" in " ".join(other.out.split())
    lines = [json.loads(line) for line in sheet.read_text().splitlines()]
    assert len(lines) == 9
    assert {line["verdict"] for line in lines} == {None}
    preferences = {
        v["id"]: v
        for shard in sorted((smoke / "iteration-1/preferences").glob("shard-*.jsonl"))
        for v in map(json.loads, shard.read_text().splitlines())
    }
    chosen = [preferences[line["id"]]["chosen"][0]["content"] for line in lines]
    first = [line["first"] == text for line, text in zip(lines, chosen, strict=True)]
    assert 0 < sum(first) < 9  # the place gives nothing away
    for line, is_first in zip(lines[:6], first, strict=False):
        line["verdict"] = "first" if is_first else "second"
    sheet.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report(here("judge", smoke, "--judge", f"human:{sheet}", "--json"))["judges"][0]
    assert found["verdicts"]["first"] == 6
    assert found["unparseable_because"] == {"no_label": found["pairs"] - 6}
    fails(here("judge", smoke, "--label-sheet", sheet), 3, "may hold labels")


def test_preferences_without_a_run_are_judged_too(smoke: Path, tmp_path: Path, here: Here) -> None:
    shard = smoke / "iteration-1/preferences/shard-00000.jsonl"
    copy = shutil.copy(shard, tmp_path / "p.jsonl")
    found = report(here("judge", copy, "--judge", "oracle", "--limit", 3, "--json"))
    assert found["pairs"] == 3
    fails(here("judge", copy), 2, "Name a judge")
    fails(
        here("judge", copy, "--judge", "oracle", "--baseline"), 2, "not a run folder", "--iteration"
    )
    fails(here("judge", copy, "--judge", "orcale"), 2, "oracle")
    fails(here("judge", copy, "--judge", "{kind: chat"), 2, "judge {kind: chat cannot be used")
    fails(here("judge", copy, "--judge", ""), 2, "cannot be used")
    fails(here("judge", smoke, "--iteration", 7), 3, "iteration-7 is not there", "(iteration-1)")
    fails(here("judge", copy, "--judge", f"reward:{TESTBED}"), 3, "is not a reward model")
    fails(here("judge", copy, *["--judge", "oracle"] * 3), 2, "one judge or two")
    Path(copy).write_text('{"prompt": "Hi"}\n')
    fails(here("judge", copy, "--judge", "oracle"), 2, "line 1", "chosen")
    assert here("judge", smoke, "--baseline", "--json").code == 0


def test_a_judge_that_is_missing_is_told_before_anything_runs(tmp_path: Path, here: Here) -> None:
    for judge, code, said in (
        (f"human:{tmp_path}/none.jsonl", 2, "there is no file"),
        (f"chat:{tmp_path}/none", 3, "no model folder"),
        (f"reward:{TESTBED}", 3, "is not a reward model"),
        (f"{{kind: chat, model: '{TESTBED}', max_new_tokens: 600}}", 2, "leaves no room"),
    ):
        ended = here("run", "smoke", f"runs_dir={tmp_path}", "name=j", f"judge={judge}", *TINY)
        fails(ended, code, said)
        assert not (tmp_path / "j" / "queries.jsonl").exists()


@pytest.mark.parametrize("fmt", ["trl", "authors", "parquet"])
def test_texts_written_to_harm_can_stay_out_of_exports(
    smoke: Path, tmp_path: Path, here: Here, fmt: str
) -> None:
    run = shutil.copytree(smoke, tmp_path / "run")
    recipe = json.loads((run / "resolved.json").read_text())
    recipe["hygiene"]["export_unsafe"] = False
    (run / "resolved.json").write_text(json.dumps(recipe))
    counts = {}
    for name, source in (("all", smoke), ("safe", run)):
        ended = here("export", source, "--format", fmt, "--to", tmp_path / name)
        assert ended.code == 0, ended.err
        counts[name] = int(ended.out.split(" records")[0])
        assert ("name Safety" in ended.err) == (name == "safe")
    stored = list((smoke / "iteration-1/preferences").glob("shard-*.jsonl"))
    about = sum(
        "Safety" in json.loads(line)["features"]
        for shard in stored
        for line in shard.read_text().splitlines()
    )
    assert finished(smoke)["iteration-1/preferences"]["notes"]["about_safety"] == about
    for shard in (run / "iteration-1/preferences").glob("shard-*.jsonl"):
        lines = [json.loads(line) for line in shard.read_text().splitlines()]
        for line in lines:
            del line["features"]
        shard.write_text("".join(json.dumps(line) + "\n" for line in lines))
    accepted(run)
    if fmt != "authors":
        ended = here("export", run, "--format", fmt, "--to", tmp_path / "blind")
        fails(ended, 2, "name no feature", "hygiene.export_unsafe is false")
    if fmt == "parquet":
        assert "their principles name Safety" in (tmp_path / "safe" / "README.md").read_text()
    if fmt != "authors":
        assert counts["all"] - counts["safe"] == about


def test_chosen_is_what_was_written_under_the_good_principle(smoke: Path) -> None:
    for where in ("iteration-1", "baseline/iteration-1"):
        samples = {
            v["id"]: v["responses"]
            for shard in sorted((smoke / where / "samples").glob("shard-*.jsonl"))
            for v in map(json.loads, shard.read_text().splitlines())
        }
        for shard in sorted((smoke / where / "preferences").glob("shard-*.jsonl")):
            for p in map(json.loads, shard.read_text().splitlines()):
                assert p["chosen"][0]["content"] == samples[p["id"]]["good"]
                assert p["rejected"][0]["content"] == samples[p["id"]]["bad"]


def test_a_run_is_ranked_measured_and_evaluated_by_principles(tmp_path: Path, here: Here) -> None:
    """The ranking's own principles agree with every pair that they made."""
    own = {"kind": "principles", "model": TESTBED, "good": "Be kind.", "bad": "Lie."}
    tiny = [s for s in TINY if not s.startswith(("generator", "principles"))]
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=r", "method=best-of-n", *tiny)
    parts = ("generator", "principles", "baseline")
    without = [f"{part}=null" for part in parts]
    ended = here(*args, *without, f"judge={json.dumps(own)}", "ranking.samples=3")
    assert ended.code == 0, ended.err
    run = tmp_path / "r"
    figures = json.loads((run / "iteration-1" / "quality.json").read_text())
    assert figures["judge"] == f"principles:{TESTBED}"
    assert figures["preferences"]["accuracy"] == 1.0
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["score_scale"] == PrincipleContrast.scale


def test_pairs_of_a_run_are_judged_by_the_principles_that_they_no_longer_hold(
    tmp_path: Path, here: Here
) -> None:
    given = [*SMALL, "ranking.samples=3", f"runs_dir={tmp_path}"]
    made = load_recipe("best-of-n-principles", given)
    execute(made, {"name": "given"}, until="preferences")
    ended = here("judge", made.folder, "--judge", f"principles:{TESTBED}", "--json")
    assert ended.code == 0, ended.err
    (judge,) = json.loads(ended.out)["judges"]
    assert judge["accuracy"] == 1.0
    assert judge["pairs"] == 8
