"""Which stages of a plan run, in which order, and what of a folder is left alone."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.run.execute import execute, select, summary_line
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import COSTS_ONLY, Artifact, Stage, Where

RAN: list[str] = []

#: Stage → what it says beside its setting, as a server might another time.
SAID: dict[str, str] = {}


@dataclass(frozen=True)
class Step(Stage):
    """Writes a file; remembers that it ran."""

    title: str = field(default="step", kw_only=True)
    source: Artifact | None = None
    setting: int = 1
    fails: bool = field(default=False, metadata=COSTS_ONLY)

    makes = ("{name}.txt",)

    def run(self, run: RunFolder) -> StageResult:
        RAN.append(self.name)
        if self.fails:
            raise ArtifactError("it fails")
        (run / self.outputs[0]).parent.mkdir(exist_ok=True)
        (run / self.outputs[0]).write_text(str(self.setting) + SAID.get(self.name, ""))
        return StageResult(1, 1)

    def check(self) -> Any:
        yield "odd, but it works"

    def tidy(self, run: RunFolder) -> None:
        RAN.append(f"tidy {self.name}")


@dataclass
class Plan:
    """As far as running goes, a recipe: three stages, each reads the one before."""

    folder: Path
    settings: Mapping[str, int] = field(default_factory=dict)
    fails: str = ""
    tracking: tuple[Any, ...] = ()

    def plan(self) -> list[Stage]:
        found: list[Stage] = []
        for title, folder in (("first", ""), ("second", "iteration-1"), ("third", "")):
            found.append(
                Step(
                    title=title,
                    source=Artifact(self.folder, found[-1]) if found else None,
                    setting=self.settings.get(title, 1),
                    fails=title == self.fails,
                    where=Where(folder=folder),
                )
            )
        return found

    def with_models(self, named: Callable[[str], str]) -> "Plan":
        return self

    def model_dump_json(self, *, indent: int | None = None, exclude_unset: bool = False) -> str:
        return json.dumps(dict(self.settings), indent=indent)


NAMES = ["first", "iteration-1/second", "third"]


@pytest.fixture(autouse=True)
def ran() -> list[str]:
    RAN.clear()
    SAID.clear()
    return RAN


def test_stages_run_once_in_their_order_and_the_whole_run_is_tidied(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(Plan(tmp_path / "run"), {"name": "x"}) == 3
    assert ran == [*NAMES, *(f"tidy {n}" for n in NAMES)]
    assert capsys.readouterr().err.count("odd, but it works") == 1
    ran.clear()
    assert execute(Plan(tmp_path / "run"), {"name": "x"}) == 0
    assert not set(ran) & set(NAMES)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "name: x\n"


@pytest.mark.parametrize("until", ["iteration-1/second", "second"])
def test_until_ends_after_a_stage_and_tidies_nothing(
    tmp_path: Path, ran: list[str], until: str
) -> None:
    assert execute(Plan(tmp_path / "run"), {}, until=until) == 2
    assert ran == NAMES[:2]
    assert execute(Plan(tmp_path / "run"), {}) == 1


def test_a_stage_that_is_not_there_is_refused_and_the_others_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stage 'fourth'; stages are first, second, third"):
        select(Plan(tmp_path).plan(), "fourth")


def test_a_run_that_broke_goes_on_where_it_was(tmp_path: Path, ran: list[str]) -> None:
    with pytest.raises(ArtifactError, match="it fails"):
        execute(Plan(tmp_path / "run", fails="third"), {})
    ran.clear()
    assert execute(Plan(tmp_path / "run"), {}) == 1
    assert ran[0] == "third"


def test_work_of_another_recipe_is_refused_or_moved_away(tmp_path: Path, ran: list[str]) -> None:
    run = tmp_path / "run"
    execute(Plan(run), {})
    ran.clear()
    other = Plan(run, {"second": 2})
    with pytest.raises(ConfigError, match=r"iteration-1/second, third .*--redo"):
        execute(other, {})
    assert ran == []
    assert execute(other, {}, redo=True) == 2
    assert ran[:2] == NAMES[1:]
    moved = {p.read_text() for p in (run / "superseded").rglob("*.txt")}
    assert moved == {"1"}
    assert (run / "iteration-1/second.txt").read_text() == "2"
    (kept,) = (run / "superseded").glob("recipe-*/resolved.json")
    assert kept.read_text() == "{}\n"


def test_work_made_from_what_came_out_differently_is_refused_or_redone(
    tmp_path: Path, ran: list[str]
) -> None:
    run = tmp_path / "run"
    execute(Plan(run), {})
    (run / "first.txt").unlink()
    SAID["first"] = " otherwise"
    ran.clear()
    for _ in range(2):  # the second time nothing but the ledger tells
        with pytest.raises(ConfigError, match=r"work of iteration-1/second that .*differently"):
            execute(Plan(run), {})
        assert ran == ["first"]
    ran.clear()
    SAID["iteration-1/second"] = " as well"
    assert execute(Plan(run), {}, redo=True) == 2
    assert ran[:2] == NAMES[1:]
    assert {p.read_text() for p in (run / "superseded").rglob("*.txt")} == {"1"}
    ran.clear()
    assert execute(Plan(run), {}) == 0


def test_what_was_begun_with_it_is_not_gone_on_with(tmp_path: Path, ran: list[str]) -> None:
    run = tmp_path / "run"
    with pytest.raises(ArtifactError, match="it fails"):
        execute(Plan(run, fails="third"), {})
    (run / "iteration-1/second.txt").unlink()
    SAID["iteration-1/second"] = " otherwise"
    with pytest.raises(ConfigError, match="work of third that"):
        execute(Plan(run), {})
    ran.clear()
    assert execute(Plan(run), {}, redo=True) == 1
    assert ran[0] == "third"


def reported(run: Path) -> dict[str, str]:
    """Writes reports into a run folder; their names and texts."""
    found = {n: f"of {n}" for n in ("report.html", "report.md", "report/a.svg", "audit/audit.json")}
    for name, text in found.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
    return found


def test_no_report_outlives_its_results(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    execute(Plan(run), {}, until="second")
    reports = reported(run)
    execute(Plan(run), {})
    assert all((run / name).exists() for name in reports), "they say how far the run was"
    other = Plan(run, {"second": 2})
    with pytest.raises(ConfigError, match="--redo"):
        execute(other, {})
    assert all((run / name).exists() for name in reports)
    with monkeypatch.context() as killed:
        killed.setattr(RunFolder, "append", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            execute(other, {}, redo=True)
    assert not any((run / name).exists() for name in reports)
    aside = {name: [p.read_text() for p in run.glob(f"superseded/*/{name}")] for name in reports}
    assert aside == {name: [text] for name, text in reports.items()}
    execute(other, {}, redo=True)
    # what is deleted is made again, and a server may answer otherwise
    reported(run)
    (run / "third.txt").unlink()
    assert execute(other, {}) == 1
    assert not any((run / name).exists() for name in reports)
    reported(run)
    assert execute(other, {}) == 0
    assert all((run / name).exists() for name in reports)
    elsewhere = tmp_path / "elsewhere"
    (run / "audit").rename(elsewhere)
    (run / "audit").symlink_to(elsewhere)
    execute(Plan(run), {}, redo=True)
    assert not (run / "report.md").exists()
    assert (elsewhere / "audit.json").exists()


def test_work_made_from_what_came_out_the_same_stays(tmp_path: Path, ran: list[str]) -> None:
    run = tmp_path / "run"
    execute(Plan(run), {})
    (run / "first.txt").unlink()
    ran.clear()
    assert execute(Plan(run), {}) == 1
    assert ran[0] == "first"
    (run / "first.txt").unlink()
    SAID["first"] = " otherwise"
    ran.clear()
    # the second is done again, comes out the same, and the third stays
    assert execute(Plan(run), {}, redo=True) == 2
    assert ran[:2] == NAMES[:2]


def test_the_new_recipe_is_there_before_old_work_moves_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    execute(Plan(run), {})

    def killed(self: RunFolder, entries: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "supersede", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(Plan(run, {"second": 2}), {"new": True}, redo=True)
    assert (run / "recipe.yaml").read_text() == "new: true\n"


def test_what_changes_no_result_changes_nothing(tmp_path: Path) -> None:
    plan = Plan(tmp_path).plan()
    assert [replace(s, fails=True).fingerprint for s in plan] == [s.fingerprint for s in plan]  # type: ignore[call-arg]


def test_a_summary_names_the_commonest_reason_first() -> None:
    result = StageResult(1400, 1391, Counter(equals_plain=4, unfinished=5))
    assert summary_line(result) == ("1,400 in, 1,391 out, dropped 9 (5 unfinished, 4 equals_plain)")
    assert summary_line(StageResult(2, 2)) == "2 in, 2 out"
