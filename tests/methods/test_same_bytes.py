"""Two runs of a recipe on a CPU make the same files, byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfsteer.judges.oracle import OracleJudge
from selfsteer.methods import METHODS, load_recipe
from selfsteer.methods.base import Principled
from selfsteer.recipe.read import load_values, method_of, recipe_names
from selfsteer.run.execute import execute
from selfsteer.stages import rank
from tests.make import SMALL, tiny_pairs, write_pairs

#: The cheapest recipe stands for all in `make test`.
CHEAP = "contrast"

#: What says how long something took, when, and where the command was given.
CLOCK = {"seconds", "time", "began", "share", "versions", "from"}

#: Files about the process, not about what it made.
ABOUT = ("ledger.jsonl", "progress.json", "lock")

NAMES = [n for n in recipe_names() if load_values(n)["name"] == n and n not in ("demo", "smollm2")]


def settings(name: str, given: Path) -> list[str]:
    """Those that make a shipped recipe tiny."""
    values = load_values(name)
    method = next(m for m in METHODS if method_of(m) == values.get("method", "sso"))
    own = [s for s in SMALL if issubclass(method, Principled) or not s.startswith("principles")]
    if getattr(method, "needs_answers", False):
        own = [s for s in own if not s.startswith("queries")]
        own += [f"queries={{path: '{given}', near_duplicates: null}}"]
    if name == "reward":
        own = [SMALL[0], f"reward.data={given}"]
    for section in ("training", "generator", "reward"):
        if isinstance(values.get(section), dict):
            own.append(f"{section}.batch_size=4")
    more = {
        "best-of-n": ["ranking.judge=oracle"],
        "spin-judged": ["judge=oracle"],
        "sso-online": ["queries.limit=24", "filter=false"],  # of eight triples it would leave none
        "reward": ["reward.forward_pairs=4"],
        "rlcd": ["reward.forward_pairs=4"],
    }
    return [*own, *more.get(name, [])]


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCK}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def made(folder: Path) -> dict[str, Any]:
    """Every file of a run folder: bytes, or JSON without what the clock said."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ABOUT):
        data, name = path.read_bytes(), str(path.relative_to(folder))
        found[name] = data
        if path.suffix in (".json", ".jsonl"):
            lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            found[name] = [without_clock(json.loads(line)) for line in lines]
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == CHEAP else pytest.mark.slow) for n in NAMES]
)
def test_two_runs_make_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "self-rewarding":  # the tiny model cannot judge
        monkeypatch.setattr(rank, "load_judge", lambda *given: OracleJudge())
    given = write_pairs(tmp_path / "given.jsonl", tiny_pairs(12, seed=1))
    both = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))  # paths of the run folder stand in its files
        recipe = load_recipe(name, [*settings(name, given), "runs_dir=runs"])
        execute(recipe, {"name": recipe.name})
        both.append(made(Path("runs", recipe.name).absolute()))
    first, second = both
    assert any(name.endswith(".safetensors") for name in first)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
