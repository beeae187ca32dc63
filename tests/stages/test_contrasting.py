"""Only pairs whose order the principles confirm are left, and every other one is counted."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfsteer.data.jsonl import dump_lines
from selfsteer.data.records import Preference, Triple
from selfsteer.errors import ConfigError
from selfsteer.methods import METHODS
from selfsteer.methods.base import PrincipledPairs
from selfsteer.methods.online import SSOOnline
from selfsteer.recipe.read import method_of
from selfsteer.run.execute import execute
from selfsteer.run.folder import RunFolder, read_dropped
from selfsteer.run.stage import Artifact, Where
from selfsteer.stages import contrasting
from selfsteer.stages.contrasting import KeepContrasting
from selfsteer.stages.filter import WritePairs, rejected_by
from selfsteer.stages.inputs import stored_triples
from tests.make import SMALL, load_recipe, recipe, stages_of, triple

#: What the ranker says of each text.
SCORES = {"sure": 0.15, "same": 0.05, "worse": -0.1, "long": None}


class Ranker:
    """In `PrincipleContrast`'s place; checks that queries come with their own principles."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.loaded = SimpleNamespace(chat=self)

    def refuses(self, triple: Triple, sequences: Any) -> bool:
        return "refused" in triple.messages[-1].content

    def score_all(self, answers: Any, finished: Any) -> list[float | None]:
        assert all(
            query.extra["principles"]["good"] == f"Be fine {query.id}." for query, _ in answers
        )
        return [SCORES[text] for _, text in answers]


TRIPLES = (
    triple("right", "Accuracy", good="sure", bad="worse", plain="long"),
    triple("wrong", "Accuracy", good="worse", bad="sure", plain="same"),
    triple("tie", "Accuracy", good="same", bad="same", plain="worse"),
    triple("cut", "Accuracy", good="sure", bad="long", plain="worse"),
    triple("refused", "Accuracy", text="refused", good="sure", bad="long", plain="worse"),
    triple("right too", "Accuracy", good="sure", bad="worse"),
)


@pytest.mark.parametrize(
    ("least", "left"),
    [(0.0, ["right", "tie", "right too"]), (0.25, ["right", "right too"]), (-1.0, None)],
)
def test_what_the_principles_confirm_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: float, left: list[str] | None
) -> None:
    monkeypatch.setattr(contrasting, "PrincipleContrast", Ranker)
    monkeypatch.setattr(contrasting, "TOGETHER", 2)
    (tmp_path / "triples.jsonl").write_text(dump_lines(TRIPLES), "utf-8")
    stage = KeepContrasting(
        Artifact(tmp_path / "triples.jsonl"), Artifact(tmp_path), least, where=Where("pbaa", 1, "r")
    )
    run = RunFolder(tmp_path / "run")
    result = stage.run(run)
    found = [t.id for t in stored_triples(run / stage.outputs[0])]
    assert found == (left or ["right", "wrong", "tie", "right too"])
    assert result.n_in == 6 == result.n_out + result.dropped.total()
    assert (result.dropped["prompt_too_long"], result.dropped["template_refuses"]) == (1, 1)
    assert result.notes == {"lead": pytest.approx((0.25 - 0.25 + 0 + 0.25) / 4), "leads": 0.5}
    dropped = {d.id: d.reason for d in read_dropped(run / f"{stage.name}.dropped.jsonl")}
    assert dropped["cut"] == "prompt_too_long"
    low = {id for id, why in dropped.items() if why == "low_contrast"}
    assert low == {"right", "wrong", "tie", "right too"} - set(found)


def test_the_lead_is_over_the_answer_that_the_pair_rejects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrasting, "PrincipleContrast", Ranker)
    # with the plain answer rejected the pair is wrong, with the bad one it is right
    ids = [f"q{i}" for i in range(24)]
    rows = [triple(i, "Accuracy", good="same", bad="worse", plain="sure") for i in ids]
    (tmp_path / "triples.jsonl").write_text(dump_lines(rows), "utf-8")
    asked = load_recipe("bad-to-plain", [*SMALL, "hygiene.min_contrast=0"])
    for k, share in ((1, 0.0), (2, 0.5), (3, 1.0)):
        planned = stages_of(asked)[f"iteration-{k}/contrasting"]
        pairs = stages_of(asked)[f"iteration-{k}/preferences"]
        assert isinstance(planned, KeepContrasting)
        assert isinstance(pairs, WritePairs)
        assert planned.plain == pairs.plain == share
        stage = replace(planned, samples=Artifact(tmp_path / "triples.jsonl"))
        run = RunFolder(tmp_path / f"run-{k}")
        result = stage.run(run)
        plain = {i for i in ids if rejected_by(pairs.seed, share)(i) == "plain"}
        assert (len(plain) == 24 * share) if share != 0.5 else (0 < len(plain) < 24)
        found = {t.id for t in stored_triples(run / stage.outputs[0])}
        assert found == {*ids} - plain
        assert result.notes["leads"] == 1 - len(plain) / 24
        lost = {d.id: d.record for d in read_dropped(run / f"{planned.name}.dropped.jsonl")}
        assert lost.keys() == plain
        for record in lost.values():
            assert isinstance(record, Mapping)
            said = Preference.from_dict(record)
            assert (said.chosen, said.rejected) == ("same", "sure"), "the pair that was compared"


def test_an_answer_that_was_cut_off_is_known_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[bool] = []

    class Noted(Ranker):
        def score_all(self, answers: Any, finished: Any) -> list[float | None]:
            ends.extend(finished)
            return [SCORES.get(text) for _, text in answers]

    monkeypatch.setattr(contrasting, "PrincipleContrast", Noted)
    rows = [
        replace(triple("a", "Accuracy", good="sure", bad="worse"), finish_reasons=reasons)
        for reasons in ({"good": "length"}, {"good": "stop", "bad": "length"})
    ]
    rows.append(triple("b", "Accuracy", good="sure", bad=""))
    (tmp_path / "triples.jsonl").write_text(dump_lines(rows), "utf-8")
    files = Artifact(tmp_path / "triples.jsonl"), Artifact(tmp_path)
    result = KeepContrasting(*files, 0.0, where=Where("pbaa", 1, "r")).run(
        RunFolder(tmp_path / "r")
    )
    assert ends == [False, True, True, False, True, True]
    assert result.dropped == {"empty": 1}


#: SSO v1 trains on triples, and has no pairs to sort out.
PRINCIPLED = [m for m in METHODS if issubclass(m, PrincipledPairs) and m is not SSOOnline]


@pytest.mark.parametrize("method", [method_of(m) for m in PRINCIPLED])
def test_it_stands_before_the_pairs_where_it_is_asked_for(method: str) -> None:
    plain = stages_of(recipe(method))
    asked = stages_of(recipe(method, hygiene={"min_contrast": 0}))
    assert (
        [n for n in asked if n not in plain]
        == [n for n in asked if n.endswith("/contrasting")]
        != []
    )
    pairs = asked["iteration-1/preferences"]
    assert pairs.read is not None
    assert pairs.read.maker is asked["iteration-1/contrasting"]
    assert pairs.texts == plain["iteration-1/preferences"].texts


def test_a_method_that_trains_on_triples_refuses_it() -> None:
    with pytest.raises(
        ConfigError, match="sorts out pairs, and method sso-online trains on triples"
    ):
        recipe("sso-online", hygiene={"min_contrast": 0})


def test_the_real_ranker_confirms_most_of_the_tiny_worlds_pairs(tmp_path: Path) -> None:
    given = load_recipe(
        "pbaa", [*SMALL, f"runs_dir={tmp_path}", "hygiene.min_contrast=0", "evaluation=null"]
    )
    execute(given, {}, until="preferences")
    run = RunFolder(given.folder)
    (finish,) = (
        e for e in run.ledger() if e["stage"].endswith("contrasting") and e["event"] == "finish"
    )
    assert finish["n_in"] == finish["n_out"] + sum(finish["dropped"].values()) > 4
    assert finish["notes"]["leads"] > 0.6
