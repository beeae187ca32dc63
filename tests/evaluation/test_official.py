"""Answers in the input formats of AlpacaEval, Arena-Hard-Auto and FastChat's MT-Bench."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.records import Message
from selfsteer.evaluation.official import FILES, Official, write_official
from selfsteer.evaluation.questions import Answered, Question

ASKED = [
    Question("81", (Message("user", "Name a fish."),), ("And a bird.",)),
    Question("u-2", (Message("system", "Be brief."), Message("user", "Name a tree.")), ("Why?",)),
]
ANSWERS = {
    "mine-base": {
        "81": Answered("81", ("Trout.", "Owl."), ("stop", "length")),
        "u-2": Answered("u-2", ("Oak.",), ("stop",), "prompt_too_long"),
    },
    "mine-sso": {
        "81": Answered("81", ("Carp.", "Hen."), ("stop", "stop")),
        "u-2": Answered("u-2", ("Elm.", "It is tall."), ("stop", "stop")),
    },
}


def written(style: str, folder: Path) -> tuple[Official, dict[str, list[dict[str, Any]]]]:
    """What was written, and the rows of each model's file."""
    found = write_official(style, ASKED, ANSWERS, folder)
    rows = {}
    for model, path in zip(ANSWERS, found.paths, strict=True):
        assert path == folder / FILES[style].format(model=model)
        text = path.read_text("utf-8")
        is_list = path.suffix == ".json"
        rows[model] = json.loads(text) if is_list else list(map(json.loads, text.splitlines()))
    return found, rows


@pytest.mark.parametrize("style", FILES)
def test_unanswered_questions_are_left_out_and_counted(style: str, tmp_path: Path) -> None:
    found, rows = written(style, tmp_path / "to here")
    assert {model: len(r) for model, r in rows.items()} == {"mine-base": 1, "mine-sso": 2}
    assert (found.answers, found.left_out) == (3, {"mine-base": 1})
    assert shlex.quote(str(tmp_path / "to here")) in found.commands
    assert "{" not in found.commands


def test_alpaca_eval(tmp_path: Path) -> None:
    _, rows = written("alpaca-eval", tmp_path)
    assert rows["mine-sso"] == [
        {"instruction": "Name a fish.", "output": "Carp.", "generator": "mine-sso"},
        {"instruction": "Name a tree.", "output": "Elm.", "generator": "mine-sso"},
    ]


def test_arena_hard(tmp_path: Path) -> None:
    found, rows = written("arena-hard", tmp_path)
    row = rows["mine-sso"][1]
    assert row.keys() == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
    assert (row["uid"], row["model"]) == ("u-2", "mine-sso")
    assert row["messages"][-1] == {"role": "assistant", "content": {"answer": "Elm."}}
    assert row["messages"][-2] == {"role": "user", "content": "Name a tree."}
    assert found.paths[0].parent == tmp_path / "data" / "arena-hard-v2.0" / "model_answer"
    assert "'mine-base mine-sso'.split()" in found.commands


def test_mt_bench_joins_by_number(tmp_path: Path) -> None:
    found, rows = written("mt-bench", tmp_path)
    one, two = rows["mine-sso"]
    assert one.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (one["question_id"], two["question_id"]) == (81, "u-2")
    assert one["choices"] == [{"index": 0, "turns": ["Carp.", "Hen."]}]
    assert one["answer_id"] != two["answer_id"]
    assert found.paths[1] == tmp_path / "data/mt_bench/model_answer/mine-sso.jsonl"
    assert "--model-list mine-base mine-sso" in found.commands
