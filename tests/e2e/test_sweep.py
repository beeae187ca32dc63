"""A small sweep through the command line, and what it refuses."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from selfsteer.errors import ConfigError
from selfsteer.recipe.read import load_values
from selfsteer.recipe.sections import Selection
from selfsteer.verbs.sweeping import _best, _cell, axes_of, cells_of, shown_value
from tests.e2e.support import Here, fails, finished
from tests.e2e.test_selection import ARGS

POLICY = ("method=pbaa", "generator=null", "training.selection.points=1",
          *(a for a in ARGS if not a.startswith("generator")))  # fmt: skip


def test_the_better_of_two_learning_rates_is_named(tmp_path: Path, here: Here) -> None:
    args = ("sweep", "smoke", f"runs_dir={tmp_path}", "name=s", *POLICY)
    axis = "training.learning_rate=1e-2,1e9,2e-4"
    ended = here(*args, axis, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["stage"] == "policy"
    failed = report["cells"].pop(1)
    assert failed.keys() == {"settings", "failed"}
    assert "nan" in failed["failed"] or "not finite" in failed["failed"]
    assert "the sweep goes on" in ended.err
    assert report["best"] == 2
    report["best"] = 1
    assert report["cells"][report["best"]]["settings"] == {"training.learning_rate": "2e-4"}
    broken, sound = (cell["kept"] for cell in report["cells"])
    assert max(broken["excess"].values()) > 1 >= max(sound["excess"].values())
    assert [cell["within"] for cell in report["cells"]] == [False, True]
    folder = tmp_path / "s-sweep"
    written = json.loads((folder / "sweep.json").read_text())
    assert [written["cells"][i] for i in (0, 2)] == report["cells"]
    # what comes before the training was done once, and is the same in every cell
    cells = sorted(p for p in folder.glob("cell-*") if p.name != "cell-training.learning_rate-1e9")
    assert len(cells) == 2
    samples = {(p / "iteration-1/preferences/shard-00000.jsonl").read_bytes() for p in cells}
    assert len(samples) == 1
    assert "iteration-1/policy" not in finished(folder / "shared")
    # a run with the best settings is that cell, to the byte
    run = ("run", "smoke", f"runs_dir={folder}", f"name={cells[1].name}", *POLICY)
    states = json.loads(here(*run, "training.learning_rate=2e-4", "--dry-run", "--json").out)
    assert states["iteration-1/policy"] == "done"
    again = here(*args, axis)
    assert again.code == 0
    assert "best" in again.out
    assert "training.learning_rate=2e-4" in again.out
    assert "cell 1 of 3" in again.err
    assert again.err.count("] iteration-1/policy") == 1, "a finished cell was trained again"
    fails(here(*args, axis, "queries.limit=167"), 2, "other settings", f"move {folder} away")


def test_what_cannot_be_compared_is_refused(tmp_path: Path, here: Here) -> None:
    args = ("sweep", "smoke", f"runs_dir={tmp_path}")
    fails(here(*args, "seed=1"), 2, "needs axes of generator.* or of training.*")
    fails(here(*args, "generator.gamma=0.1,1", "training.beta=0.1,1"), 2, "not of both")
    pbaa = ("method=pbaa", "generator=null", "baseline=null")
    fails(here(*args, *pbaa, "generator.gamma=0.1,1"), 2, "pbaa", "generator")
    fails(here(*args, "training.beta=0.1,1", "training.selection.points=0"), 2, "is off here")
    # all values are looked at before anything runs
    fails(here(*args, "training.base=sigmoid,../../../escaped"), 2, "escaped")
    assert not list(tmp_path.iterdir())


def test_policies_without_a_judge_are_not_compared(tmp_path: Path, here: Here) -> None:
    args = ("sweep", "smoke", f"runs_dir={tmp_path}", "training.learning_rate=2e-4,1e-6")
    for judge in ("null", f"human:{tmp_path / 'labels.jsonl'}"):
        fails(here(*args, f"judge={judge}"), 2, "needs a judge", "judge=checks:")
    assert not list(tmp_path.iterdir())


def cell(wins: dict[str, float], *, on: float | None = None, within: bool = True) -> dict[str, Any]:
    """A cell as the report has it; ``on`` is what a generator's pairs are judged by."""
    drift = {"plain": dict.fromkeys(("tokens", "repeated", "unfinished", "kl", "entropy"), 0.0)}
    figures = {"drift": drift, "on_policyness": on and {"rejected": on}}
    return {
        "settings": {},
        "start": {**figures, "wins": {}},
        "kept": {**figures, "wins": wins},
        "within": within,
    }


def test_the_best_cell_does_not_depend_on_their_order() -> None:
    good, poor = cell({"a": 1.0, "b": 1.0, "c": 0.5}), cell({"a": 0.5, "b": 0.5, "c": 0.5})
    failed: dict[str, Any] = {"settings": {}, "failed": "The loss became nan."}
    undecided, drifted = cell({}), cell({"a": 1.0, "b": 1.0, "c": 1.0}, within=False)
    for cells in itertools.permutations([good, poor, failed, undecided, drifted]):
        place = _best(cells, Selection())
        assert place is not None
        assert cells[place] is good
    assert _best([failed, undecided, drifted], Selection()) is None
    # generators: of those that the most accurate one does not beat, the most on-policy one
    right = {str(i): 1.0 for i in range(8)}
    accurate, equal = cell(right, on=-2.0), cell({**right, "0": 0.0}, on=-1.0)
    wrong = cell(dict.fromkeys(right, 0.0), on=-0.5)
    for cells in itertools.permutations([accurate, equal, wrong]):
        assert cells[_best(cells, Selection()) or 0] is equal
    unjudged = [cell({}, on=-1.0), cell({}, on=-2.0)]
    assert _best(unjudged, Selection()) == 0
    assert _best(unjudged[::-1], Selection()) == 1


def test_a_cell_is_a_folder_of_its_sweep(tmp_path: Path) -> None:
    values = {**load_values("smoke"), "runs_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="no name of a folder"):
        _cell(values, {"queries.path": "../../up.jsonl"}, tmp_path)
    assert _cell(values, {"training.beta": 1}, tmp_path)[0] == "cell-training.beta-1"


def test_too_few_queries_are_said_before_anything_is_trained(tmp_path: Path, here: Here) -> None:
    args = ("sweep", "smoke", f"runs_dir={tmp_path}", "name=s", "queries.limit=24")
    fails(
        here(*args, "training.beta=0.1,1"), 2, "at least 16; 24 are there after the stage queries"
    )
    assert finished(tmp_path / "s-sweep" / "shared").keys() == {"queries"}
    # enough queries, of which the filter leaves few
    filtered = ("sweep", "smoke", f"runs_dir={tmp_path}", "name=f", *ARGS, "filter=true")
    fails(
        here(*filtered, "generator.gamma=0.1,1"),
        2,
        "at least 16",
        "after the stage iteration-1/fil",
    )
    assert "iteration-1/generator" not in finished(tmp_path / "f-sweep" / "shared")
    assert not list((tmp_path / "f-sweep").glob("cell-*"))


@pytest.mark.parametrize("odd", ["{", "'", "*a", "!!int x"])
def test_values_that_are_no_yaml_are_texts(odd: str, here: Here) -> None:
    fails(here("sweep", "smoke", f"training.base=ipo,{odd}"), 2, "training.base: ")
    fails(here("benchmark", "nowhere", "--judged", odd), 2, "judged")


def test_a_grid_larger_than_the_budget_is_thinned_the_same_way_each_time() -> None:
    axes, stage = axes_of(["generator.gamma=0.1,1,2", "generator.epochs=1,2"])
    assert (axes["generator.gamma"], stage) == ([0.1, 1, 2], "generator")
    whole = cells_of(axes, 9, 0)
    assert len(whole) == 6
    assert len({tuple(c.values()) for c in whole}) == 6
    part = cells_of(axes, 3, 0)
    assert part == cells_of(axes, 3, 0)
    assert [c for c in whole if c in part] == part
    assert part != cells_of(axes, 3, 1)
    axes, _ = axes_of(["training.ceiling=null,0.5"])
    assert cells_of(axes, 9, 0) == [{"training.ceiling": None}, {"training.ceiling": 0.5}]
    assert list(map(shown_value, axes["training.ceiling"])) == ["null", "0.5"]
    for bad in (
        ["generator.gamma=1"],
        ["generator.gamma=1, "],
        ["generator.gamma=1,2"] * 2,
        ["generator.gamma=0.1,0.10"],
    ):
        with pytest.raises(ConfigError, match="An axis must look like"):
            axes_of(bad)
