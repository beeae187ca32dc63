"""A run whose recipe names models and files by relative paths, looked at from another folder."""

import json
import shutil
from pathlib import Path

import pytest

from selfsteer.data.files import read_rows
from selfsteer.recipe.sections import resolve_path
from tests.e2e.support import TESTBED, Here, fails
from tests.make import write_jsonl

ALIGN = "package:selfsteer.testbed/queries/align.jsonl"
RECIPE = """\
name: mine
runs_dir: runs
method: pbaa
policy: {model: base, threads: 1}
queries: {path: asked.jsonl, limit: 8}
principles: {mode: picked, features: random}
sampling: {max_new_tokens: 48}
judge: checks:style.yaml
evaluation: {queries: {path: held_out.jsonl, limit: 8}}
"""


@pytest.fixture
def moved(tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with other files of the same names as those that the run beside it was made of."""
    asked = [row for _, row in read_rows(resolve_path(ALIGN))]
    for name, start in (("here", 0), ("there", 100)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "asked.jsonl", *asked[start : start + 20])
        write_jsonl(tmp_path / name / "held_out.jsonl", *asked[start + 20 : start + 40])
        shutil.copy(resolve_path("package:selfsteer/catalogues/house-style.yaml"),
                    tmp_path / name / "style.yaml")  # fmt: skip
        shutil.copytree(resolve_path(TESTBED), tmp_path / name / "base")
    (tmp_path / "here" / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path / "here")
    ended = here("run", "mine.yaml")
    assert ended.code == 0, ended.err
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "here/runs/mine"


def test_another_base_model_of_the_same_name_is_not_taken(
    moved: Path, tmp_path: Path, here: Here
) -> None:
    question = ("--question", "What does the bee eat?")
    assert here("chat", moved, *question).code == 0, "the same weights will do"
    config = tmp_path / "there/base/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 500.0}))
    began = str(tmp_path / "here")
    for verb in (
        ("chat", moved, *question),
        ("audit", moved, "--queries", "held_out.jsonl"),
        ("export", moved, "--format", "reward", "--to", tmp_path / "reward"),
        ("benchmark", moved, "--judged", "mt-bench:held_out.jsonl", "--judge", "oracle"),
    ):
        fails(here(*verb), 2, "policy.model (base)", "not what", began)


def test_other_prompts_of_the_same_name_are_not_taken(moved: Path, here: Here) -> None:
    fails(here("audit", moved), 2, "evaluation.queries.path (held_out.jsonl)", "not what")


def test_other_rules_of_a_judge_are_told(moved: Path, tmp_path: Path, here: Here) -> None:
    assert "not what" not in here("judge", moved).err
    with (tmp_path / "there/style.yaml").open("a") as file:
        file.write("# of another day\n")
    ended = here("judge", moved)
    assert ended.code == 0, ended.err
    assert "judge.path (style.yaml): not what" in " ".join(ended.err.split())
