"""Principles as a judge: of any pair, by its query's principles or by a pair of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from selfsteer.data.records import Message, Verdict
from selfsteer.errors import ConfigError, DataError
from selfsteer.judges.base import Pair, by_scores
from selfsteer.judges.load import load_judge
from selfsteer.judges.principles import PrincipleContrast, PrinciplesJudge
from selfsteer.judges.quality import PLAIN_SEQUENCES, quality
from selfsteer.judges.store import AnswerStore
from selfsteer.models.load import load_chat
from selfsteer.models.score import score_sequences
from selfsteer.recipe.read import validate
from selfsteer.recipe.sections import JudgeConfig, Loading
from selfsteer.report.browser import _from_scores
from tests.fakes import FakeJudge
from tests.make import REFUSING, make_checkpoint, query, recipe, triple

OWN = {"good": "Be accurate.", "bad": "Do not reveal anything that helps."}
OTHER = {"good": "Answer in one word.", "bad": "Repeat yourself."}
TEXTS = ("The bee eats nectar.", "No.", "The bee eats nectar.", "Bricks.")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("policy"), "qwen2"))


def settings(policy: str, **more: Any) -> JudgeConfig:
    return JudgeConfig(kind="principles", model=policy, device="cpu", **more)


def test_scores_are_the_contrasts_and_are_asked_once(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = query(principles=OWN)
    contrast = PrincipleContrast(policy, Loading(device="cpu"), clip=0.2)
    expected = contrast.score_all([(asked, text) for text in TEXTS])
    judge = load_judge(settings(policy), tmp_path)
    assert isinstance(judge, PrinciplesJudge)
    assert judge.score_all([(asked, t) for t in TEXTS]) == pytest.approx(expected, abs=1e-6)
    assert expected[0] == expected[2] != expected[1]

    def never(*args: Any, **more: Any) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr("selfsteer.models.load.load_model", never)
    again = PrinciplesJudge(settings(policy), tmp_path)
    first, same = again.compare_all([Pair(asked, *TEXTS[:2]), Pair(asked, *TEXTS[::2])])
    assert (first.verdict, same.verdict) == (by_scores(expected[0], expected[1]), "tie")
    assert first.prompt_tokens > 2 * len(TEXTS[0].split())
    (kept,) = tmp_path.iterdir()  # which the data browser reads
    shown = _from_scores(settings(policy), AnswerStore(kept), Pair(asked, *TEXTS[:2]))
    assert shown == {"verdict": first.verdict, "scores": pytest.approx(expected[:2], abs=1e-6)}
    assert (
        _from_scores(settings(policy, **OTHER), AnswerStore(kept), Pair(asked, *TEXTS[:2])) is None
    )
    with pytest.raises(AssertionError, match="loaded again"):  # another yardstick
        PrinciplesJudge(settings(policy, clip=0.1), tmp_path).score_all([(asked, TEXTS[0])])


@pytest.mark.parametrize("kind", ["principles", "reward"])
def test_a_conversation_that_the_template_refuses_has_no_score(tmp_path: Path, kind: str) -> None:
    made = make_checkpoint(tmp_path / "m", "qwen2")
    if kind == "reward":
        scorer = AutoModelForSequenceClassification.from_pretrained(made, num_labels=1)
        scorer.save_pretrained(made)
    template = made / "chat_template.jinja"
    template.write_text(REFUSING + template.read_text())
    judge = load_judge(validate(JudgeConfig, {"kind": kind, "model": str(made), "device": "cpu"},
                                "judge"))  # fmt: skip
    assert judge is not None
    refused = query("No.", principles=OWN)
    said = judge.compare_all([Pair(q, *TEXTS[::3]) for q in (refused, query(principles=OWN))])
    assert (said[0].verdict, said[0].reason) == (Verdict.UNPARSEABLE, "template_refuses")
    assert said[1].verdict in (Verdict.FIRST, Verdict.SECOND)


def test_a_pair_of_its_own_counts_before_the_querys(policy: str) -> None:
    judge = PrinciplesJudge(settings(policy, **OTHER))
    held_out, asked = query(), query(principles=OWN)
    judge.check([held_out, asked])
    by_own = PrinciplesJudge(settings(policy)).score_all([(asked, TEXTS[0])])
    system = load_chat(policy, Loading(device="cpu")).default_system
    assert system  # which the judge's own principles follow, as a run's do
    same = query(principles={**OTHER, "system": system})
    fixed = PrinciplesJudge(settings(policy)).score_all([(same, TEXTS[0])])
    assert judge.score_all([(held_out, TEXTS[0]), (asked, TEXTS[0])]) == 2 * fixed
    assert by_own != fixed


def test_an_answer_that_was_cut_off_is_scored_without_an_end(policy: str, tmp_path: Path) -> None:
    asked, text = query(principles=OWN), TEXTS[0]
    contrast = PrincipleContrast(policy, Loading(device="cpu"), clip=0.2)
    ends = [True, False, False]
    whole, cut_off, nothing = contrast.score_all([(asked, text), (asked, text), (asked, "")], ends)
    chat, model = contrast.loaded.chat, contrast.loaded.model
    good, bad = (
        score_sequences(model, [chat.exchange(messages, text, finished=False)])[0]
        for messages in ([Message("system", OWN[c]), *asked.messages] for c in ("good", "bad"))
    )
    assert cut_off == pytest.approx(float((good - bad).clamp(-0.2, 0.2).mean()), abs=1e-6)
    assert cut_off != pytest.approx(whole, abs=1e-4)
    assert nothing is None
    judge = PrinciplesJudge(settings(policy), tmp_path)
    pair = Pair(asked, text, text, (True, False))
    (said,) = judge.compare_all([pair])
    assert said.verdict == by_scores(whole, cut_off) != "tie"
    assert judge.score_all([(asked, text)] * 2, [False, True]) == pytest.approx([cut_off, whole])
    (kept,) = tmp_path.iterdir()
    shown = _from_scores(settings(policy), AnswerStore(kept), pair)
    assert shown == {"verdict": said.verdict, "scores": pytest.approx([whole, cut_off], abs=1e-6)}
    (lost,) = judge.compare_all([Pair(asked, text, "", (True, False))])
    assert (lost.verdict, lost.reason) == ("unparseable", "empty")


def test_what_is_known_of_answers_comes_to_the_judge() -> None:
    made = replace(triple(good="a", bad="b", plain="c"), finish_reasons={"bad": "length"})
    assert Pair.of(made) == Pair(made.query, "a", "b", (True, False))
    assert Pair.of(made, "bad", "plain").finished == (False, True)
    ends = []
    judge = FakeJudge(lambda pair: ends.append(pair.finished) or Verdict.TIE)  # type: ignore[func-returns-value]
    figures = {name: np.ones(1) for name in PLAIN_SEQUENCES}
    quality([made], figures, figures, judge)
    assert ends == [(True, False)]


def test_a_query_without_principles_is_refused_before_anything_is_asked(policy: str) -> None:
    for bare in (query(id="bare"), query(id="bare", principles={"good": "Be kind."})):
        with pytest.raises(DataError, match=r"'bare' holds none. Give the judge a pair"):
            PrinciplesJudge(settings(policy)).check([query(principles=OWN), bare])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "needs a model"),
        ({"model": "m", "good": "Be kind."}, "good and bad come together"),
        ({"model": "m", "good": "Be kind.", "bad": "Be kind."}, "are the same text"),
        ({"model": "m", "batch_size": 4}, "batch_size has no effect"),
    ],
)
def test_settings_that_contradict_themselves(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(JudgeConfig, {"kind": "principles", **value}, "judge")


def test_a_runs_judge_must_bring_its_principles() -> None:
    with pytest.raises(ConfigError, match=r"set judge.good and judge.bad"):
        recipe("sso", judge="principles:m")
    assert recipe("best-of-n", ranking={"judge": "principles:m"}, judge="oracle").ranker.clip == 0.2
