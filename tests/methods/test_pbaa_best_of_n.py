"""Of several answers under each principle, the pair is the two that are furthest apart."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfsteer.data.jsonl import dump_lines
from selfsteer.data.records import Triple
from selfsteer.errors import ConfigError
from selfsteer.methods import load_recipe
from selfsteer.run.cost import Scale
from selfsteer.run.execute import execute
from selfsteer.run.folder import RunFolder, read_dropped
from selfsteer.run.stage import Artifact, Where
from selfsteer.stages import contrasting
from selfsteer.stages.contrasting import PickFurthest
from selfsteer.stages.inputs import stored_triples
from selfsteer.view import RunView
from tests.make import SMALL, recipe, stages_of, triple

#: What the ranker says of each text.
SCORES = {"best": 0.3, "fine": 0.2, "weak": 0.1, "poor": -0.1, "worst": -0.3, "long": None}


class Ranker:
    """In `PrincipleContrast`'s place; checks that queries come with their own principles."""

    def __init__(self, *args: Any, **more: Any) -> None:
        assert more["clip"] == 0.2
        self.loaded = SimpleNamespace(chat=self)

    def refuses(self, triple: Triple, sequences: Any) -> bool:
        return False

    def score_all(self, answers: Any, finished: Any) -> list[float | None]:
        assert all(q.extra["principles"]["good"] == f"Be fine {q.id}." for q, _ in answers)
        return [SCORES[text] for _, text in answers]


def answered(id: str, good: str, bad: str) -> Triple:
    return replace(
        triple(id, "Accuracy", good=good, bad=bad),
        finish_reasons={"good": "stop", "bad": "length" if bad == "worst" else "stop"},
        reasoning={"bad": f"before {bad}"},
    )


FIRST = (
    answered("a", "fine", "worst"),
    answered("b", "weak", "poor"),
    answered("c", "long", "poor"),
    answered("d", "long", "worst"),
)
#: Query c is in the first set alone, e in the second alone.
SECOND = (
    answered("a", "best", "poor"),
    answered("b", "weak", "weak"),
    answered("d", "weak", "long"),
    answered("e", "poor", "weak"),
)


def test_the_best_good_and_the_worst_bad_answer_are_picked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrasting, "PrincipleContrast", Ranker)
    monkeypatch.setattr(contrasting, "TOGETHER", 2)
    sets = []
    for name, rows in (("1", FIRST), ("2", SECOND)):
        (tmp_path / name).write_text(dump_lines(rows), "utf-8")
        sets.append(Artifact(tmp_path / name))
    stage = PickFurthest(tuple(sets), Artifact(tmp_path), 0.2, where=Where("m", 1, "r"))
    run = RunFolder(tmp_path / "run")
    result = stage.run(run)
    assert (result.n_in, result.n_out, result.dropped) == (5, 4, {"prompt_too_long": 1})
    assert [d.id for d in read_dropped(run / "r/samples.dropped.jsonl")] == ["c"]
    found = {t.id: t for t in stored_triples(run / stage.outputs[0])}
    assert {i: (t.responses["good"], t.responses["bad"]) for i, t in found.items()} == {
        "a": ("best", "worst"),
        "b": ("weak", "poor"),
        "d": ("weak", "worst"),
        "e": ("poor", "weak"),
    }
    assert found["a"].finish_reasons == {"good": "stop", "bad": "length"}
    assert found["a"].reasoning == {"bad": "before worst"}


def test_sequences_are_scored_once_however_often_they_are_read() -> None:
    """3 sets of a good and a bad answer, each under both principles: 12 sequences per query."""
    made = stages_of(recipe("pbaa-best-of-n", ranking={"samples": 3}, hygiene={"min_contrast": 0}))
    scale = Scale(3)
    picking = made["iteration-1/samples"].cost(scale).scores
    assert len(picking) == 12
    assert set(picking.values()) == {3}
    assert made["iteration-1/contrasting"].cost(scale).scores.items() <= picking.items()


def test_a_run_makes_pairs_of_answers_of_its_sets(tmp_path: Path) -> None:
    given = load_recipe("pbaa-best-of-n", [*SMALL, "ranking.samples=2", f"runs_dir={tmp_path}"])
    execute(given, {}, until="preferences")
    folder = given.folder / "iteration-1"
    said: dict[tuple[str, str], set[str]] = {}
    for number in (1, 2):
        for t in stored_triples(folder / f"answers/{number}"):
            for name, text in t.responses.items():
                said.setdefault((t.id, name), set()).add(text)
    assert max(map(len, said.values())) == 2, "the sets differ"
    picked = list(stored_triples(folder / "samples"))
    assert {t.id for t in picked} == {id for id, _ in said}
    assert all(text in said[t.id, name] for t in picked for name, text in t.responses.items())
    (shown,) = RunView.open(given.folder).rounds[0].sampled
    assert shown.name == "iteration-1/samples"
    assert [t.title for t in shown.takers] == ["preferences"]


def test_answers_that_are_all_alike_are_refused() -> None:
    with pytest.raises(ConfigError, match="pbaa-best-of-n needs answers that differ"):
        recipe("pbaa-best-of-n", sampling={"temperature": 0})
