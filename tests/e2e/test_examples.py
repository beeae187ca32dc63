"""The files of examples/ run as a user runs them: in a folder of their own, in a new process."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import TESTBED, environment, spawn

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

SMALL = ("queries.limit=16", "evaluation.queries.limit=8", "policy.threads=1")
#: What tells that of the house style apart: each answer is cut off early.
SHORT = (*SMALL, "sampling.max_new_tokens=16", "generator.batch_size=4", "training.batch_size=4")


def example(name: str, cwd: Path, *args: str) -> str:
    ended = subprocess.run(
        [sys.executable, EXAMPLES / name, *args],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_examples_are_short() -> None:
    lengths = {p.name: len(p.read_text("utf-8").splitlines()) for p in EXAMPLES.glob("*.py")}
    assert lengths.pop("one_round.py") <= 140  # the whole method on one page
    assert set(lengths) == {"custom_judge.py", "custom_method.py", "house_style.py"}
    assert max(lengths.values()) <= 80, lengths


def test_one_round_aligns(tmp_path: Path) -> None:
    assert "oracle score" in example("one_round.py", tmp_path, "--queries", "24")


def test_a_method_of_your_own_runs_and_is_evaluated(tmp_path: Path) -> None:
    said = example("custom_method.py", tmp_path, *SMALL)
    assert re.search(r"^first-bad/iteration-1: \d+ pairs, accuracy [01]\.\d", said, re.M), said
    assert re.findall(r"^(\S+): score", said, re.M) == ["base", "first-bad/iteration-1"]
    assert (tmp_path / "runs/first-bad/iteration-1/policy/model.safetensors").exists()


def test_a_judge_of_your_own_judges_a_run(tmp_path: Path) -> None:
    said = example("custom_judge.py", tmp_path, *SMALL)
    for words in ("grounded: win rate over base", "pairs: ", "same verdict as the oracle"):
        assert words in said
    again = spawn("run", "runs/judged", cwd=tmp_path)  # its recipe.yaml is the one that ran
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr


@pytest.mark.slow
def test_a_house_style_is_learnt_and_counted(tmp_path: Path) -> None:
    said = example("house_style.py", tmp_path, f"policy.model={TESTBED}", *SHORT)
    assert len(re.findall(r"\d\.\d\d before, \d\.\d\d after$", said, re.M)) == 3, said
    assert "\nsso/iteration-1: " in said


@pytest.mark.real
def test_a_real_model_takes_the_house_style(tmp_path: Path, smollm2: Path) -> None:
    """Its own answers, of which some keep a rule: nothing but zeros would be a broken template."""
    said = example("house_style.py", tmp_path, f"policy.model={smollm2}", *SHORT)
    kept = re.findall(r"(\d\.\d\d) before, (\d\.\d\d) after$", said, re.M)
    assert len(kept) == 3, said
    assert any(float(share) > 0 for both in kept for share in both), said
    base, after, model = re.split(r"^(?:base|sso/iteration-1|the model): ", said, flags=re.M)[1:]
    assert base.strip()
    assert after.strip()
    assert model.strip() == "runs/house-style/iteration-1/policy"
    shape = json.loads((tmp_path / model.strip() / "config.json").read_text())
    assert shape["num_hidden_layers"] == 30


def streams(cell: Any) -> str:
    """What a cell of a notebook printed, and the value that it ends in."""
    texts = (o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)
    return "".join(texts)


def test_the_notebook_runs_and_shows_what_it_last_gave(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    shown = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    again = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    for cell in again.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(again, timeout=300, kernel_name="python3", resources=place)
    client.coalesce_streams = True
    client.execute()
    scores = []
    for old, new in zip(shown.cells, again.cells, strict=True):
        if old.cell_type == "code":
            kinds = [o.output_type for o in old.outputs]
            assert kinds, "a cell without its output"
            assert kinds == [o.output_type for o in new.outputs]
            numbers = [re.sub(r"\d+", "0", streams(c)) for c in (old, new)]
            if "score" in numbers[0]:
                assert numbers[0] == numbers[1]
                scores = [float(s) for s in re.findall(r"score (\d\.\d+)", streams(new))]
    base, aligned = scores
    assert aligned > base + 0.1
