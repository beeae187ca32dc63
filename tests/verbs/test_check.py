"""The figures behind `selfsteer check`, on numbers small enough to work out by hand."""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from selfsteer.data.records import Principles, Triple, Verdict
from selfsteer.engines.base import Completion, Request
from selfsteer.errors import ArtifactError, DataError
from selfsteer.judges.base import Judgement
from selfsteer.judges.checks import ChecksJudge
from selfsteer.judges.quality import FEW, steering, strangers
from selfsteer.methods import METHODS
from selfsteer.recipe.read import method_of
from selfsteer.recipe.sections import JudgeConfig, Loading
from selfsteer.run.cost import Rates, Scale, total
from selfsteer.run.folder import RunFolder
from selfsteer.terminal import duration, interval
from selfsteer.verbs import checks
from selfsteer.verbs.check import _tables, conclusion, tell
from selfsteer.verbs.checks import Checks, Line
from tests import make
from tests.fakes import FakeEngine, Said, answer_with

SEQUENCES = (
    "good/good",
    "bad/good",
    "bad/bad",
    "good/bad",
    "stranger-good/good",
    "stranger-bad/bad",
)


def triple(i: int, *features: str) -> Triple:
    return make.triple(f"q{i}", *features, good="The Seine.", bad="Go away.")


def means(**columns: Sequence[float]) -> dict[str, np.ndarray]:
    """Columns named as in ``good_good``; what is not given is 0."""
    n = len(next(iter(columns.values())))
    given = {k.replace("__", "-").replace("_", "/"): v for k, v in columns.items()}
    return {s: np.array(given.get(s, [0.0] * n)) for s in SEQUENCES}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_gaps_by_hand() -> None:
    """Gap good: mean(3, 1) = 2; bad: mean(2, 2) = 2. Net good: mean(2, 0) = 1; bad: 1."""
    found = steering(
        [triple(0, "Safety"), triple(1, "Safety")],
        means(
            good_good=[-1, -2],
            bad_good=[-4, -3],
            bad_bad=[-1, -1],
            good_bad=[-3, -3],
            stranger__good_good=[-2, -3],
            stranger__bad_bad=[-2, -2],
        ),
        [Verdict.FIRST, Verdict.TIE],
        rng(),
    )
    assert found["gap"]["good"][0] == 2
    assert found["gap"]["bad"] == (2, 2, 2)
    assert found["net_gap"]["good"] == (1, 0, 2)
    assert found["net_gap"]["bad"] == (1, 1, 1)
    assert found["accuracy"][0] == 0.75
    assert found["features"]["Safety"]["gap"] == {"good": 2, "bad": 2}
    assert found["features"]["Safety"]["adds"] is None, "two triples say nothing of a feature"
    assert found["steers"] is False, "the interval of the good half reaches 0"


def steered(net: float, n: int = 30) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(1).normal(0, 0.01, n)
    return means(
        good_good=[1.0] * n,
        bad_bad=[1.0] * n,
        stranger__good_good=(net + noise).tolist(),
        stranger__bad_bad=(net - noise).tolist(),
    )


def test_a_gap_without_a_net_gap_does_not_steer() -> None:
    triples = [triple(i, "Safety") for i in range(30)]
    assert steering(triples, steered(0.1), None, rng())["steers"] is True
    found = steering(triples, steered(0.0), None, rng())
    assert found["steers"] is False
    assert found["gap"]["good"][1] > 0.9
    assert found["accuracy"] is None


def test_a_judge_has_the_last_word() -> None:
    triples = [triple(i, "Safety") for i in range(30)]
    wrong = [Verdict.SECOND] * 20 + [Verdict.FIRST] * 10
    assert steering(triples, steered(0.1), wrong, rng())["steers"] is False
    nothing = steering(triples, steered(0.1), [Verdict.UNPARSEABLE] * 30, rng())
    assert nothing["accuracy"] is None
    assert nothing["steers"] is True


def test_a_feature_does_not_live_on_its_company() -> None:
    """Accuracy adds 0.2 and Safety 0, in pairs with a third: only regression tells them apart."""
    pairs = (("Accuracy", "Safety"), ("Safety", "Concision"), ("Accuracy", "Concision"))
    triples = [triple(i, *pairs[i % 3]) for i in range(45)]
    noise = np.random.default_rng(2).normal(0, 0.02, 45)
    adds = {"Accuracy": 0.2, "Safety": 0.0, "Concision": 0.1}
    values = [sum(adds[f] for f in pairs[i % 3]) + noise[i] for i in range(45)]
    columns = means(
        good_good=values,
        bad_bad=values,
        stranger__good_good=values,
        stranger__bad_bad=values,
    )
    features = steering(triples, columns, None, rng())["features"]
    assert features["Safety"]["gap"]["good"] == pytest.approx(0.15, abs=0.02)
    for name, value in adds.items():
        assert features[name]["adds"][0] == pytest.approx(value, abs=0.02)
        assert features[name]["steers"] is (value > 0)
        assert features[name]["triples"] == 30


def test_too_few_triples_say_nothing_of_a_feature() -> None:
    triples = [triple(i, "Safety", *(["Accuracy"] if i < FEW - 1 else [])) for i in range(30)]
    features = steering(triples, steered(0.1), None, rng())["features"]
    assert features["Accuracy"]["steers"] is None
    assert features["Safety"]["steers"] is True


def test_features_that_every_principle_holds_are_not_told_apart() -> None:
    def shown(*features: str) -> list[str]:
        triples = [triple(i, "Safety", *(features if i else ())) for i in range(1, 31)]
        _, by_feature = _tables(steering(triples, steered(0.1), None, rng()))
        return list(map(str, by_feature.columns[4].cells))

    assert shown("Accuracy") == ["not separable"] * 2
    assert shown()[0].startswith("+0.1"), "one feature is the whole"


def test_strangers_never_lend_ones_own_text() -> None:
    a, b, c = Principles("A.", "a."), Principles("B.", "b."), Principles("C.", "c.")
    assert strangers([a, b, c, c]) == [c, c, a, b]
    assert strangers([a, a, b]) == [b, b, a]
    assert strangers([a, a]) == [a, a], "one principle for all: there is no other"


def test_a_failure_ends_its_own_check_only() -> None:
    told: list[Line] = []
    found = Checks(told.append)
    with found.line("one"):
        raise DataError("no data")
    with found.line("two") as line:
        line.found = "fine"
    with found.line("three"):
        raise ArtifactError("no model")
    found.skip("four five", "a model")
    assert [(x.name, x.status) for x in told] == [
        ("one", "FAILED"),
        ("two", "ok"),
        ("three", "FAILED"),
        ("four, five", "skipped"),
    ]
    assert told[0].found == "no data"
    assert found.exit_code == 2, "the first failure's"
    with pytest.raises(ZeroDivisionError), found.line("six"):
        raise ZeroDivisionError


def test_the_conclusion_names_what_to_mend() -> None:
    def steering(status: str, steers: bool, undecided: bool, safe: bool = True) -> dict[str, Any]:
        features = {"Safety": {"steers": safe}, "Relevance": {"steers": None}}
        figures = {"steers": steers, "undecided": undecided, "triples": 40, "features": features}
        return {"status": status, "figures": figures}

    def ranking(status: str, decides: bool = True) -> dict[str, Any]:
        return {"status": status, "figures": {"decides": decides, "decided": 33}}

    def told(steering: dict[str, Any], ranking: dict[str, Any], **more: Any) -> str:
        return conclusion({"checks": {"steering": steering, "ranking": ranking, **more}})

    ok, skipped = steering("ok", True, False), {"status": "skipped", "figures": {}}
    assert told(ok, skipped) == "ready: the policy steers on 40 queries (no warnings)"
    assert told(steering("warning", False, False), skipped) == (
        "it would run, but the policy does not steer on 40 queries (1 warning)"
    )
    assert told(steering("warning", False, True), skipped) == (
        "it would run; 40 queries do not say whether the policy steers (1 warning)"
    )
    assert told(steering("warning", True, False, safe=False), ranking("ok")) == (
        "ready: the policy steers on 40 queries, but not by Safety (1 warning)"
    )
    missing = {"status": "warning", "figures": {"missing": ["Brevity: words"]}}
    assert told(ok, skipped, rules=missing) == (
        "ready: the policy steers on 40 queries, but not by Brevity: words (1 warning)"
    )
    assert told(ok, ranking("warning")) == (
        "it would run; the policy steers on 40 queries, but the principles do not rank 33 pairs "
        "of plain answers (1 warning)"
    )
    assert told(ok, ranking("warning", decides=False)).startswith("ready"), "not this method"
    bad = {"status": "FAILED", "figures": {}}
    assert told(ok, skipped, judge=bad, disk=bad) == "not ready: fix judge, disk, then check again"


def test_the_verdict_claims_no_more_than_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same gaps on more queries, under one principle each or under one for all."""

    def verdict(count: int, judge: Any, one: bool = False) -> tuple[str, bool, str]:
        made = [triple(i, "Safety") for i in range(count)]
        own = {"plain": "Paris.", **made[0].responses}
        triples = [
            replace(t, responses=own, principles=(made[0] if one else t).principles) for t in made
        ]
        # each answer has one token, which is the likelier the better it fits its context
        scores = {"good/good": -1.0, "bad/bad": -1.0, "stranger": -2.0}
        chat = SimpleNamespace(sequence=lambda t, name: name)
        monkeypatch.setattr(checks, "load_model", lambda *_: SimpleNamespace(chat=chat))
        monkeypatch.setattr(
            checks,
            "scored",
            lambda folder, loaded, flat, label: [torch.tensor([scores.get(n, -3.0)]) for n in flat],
        )
        line = Line("steering")
        probe = checks.Probe(tmp_path, triples)
        checks._measure(line, "m", Loading(), triples, judge, probe, seed=0)
        return line.found.split(";")[0], line.figures["steers"], " ".join(line.todo)

    good = SimpleNamespace(compare_all=lambda pairs: [Judgement(Verdict.FIRST) for _ in pairs])
    assert verdict(15, None)[:2] == ("no verdict yet on 15 queries", False)
    assert "15 queries are too few" in verdict(15, None)[2]
    assert verdict(16, None)[:2] == ("steers on 16 queries", True)
    found, steers, todo = verdict(16, None, one=True)
    assert (found, steers) == ("no verdict on 16 queries", False)
    assert "name a judge" in todo
    assert "too few" not in todo
    assert verdict(16, good, one=True)[:2] == ("steers on 16 queries", True)


def test_a_folder_in_use_is_told_without_a_trace(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.check_free()
    assert not run.path.exists()
    with run.locked(), pytest.raises(ArtifactError, match=r"in use by process \d+"):
        run.check_free()
    run.check_free()


def test_times_and_intervals_as_a_person_says_them() -> None:
    spoken = [duration(s) for s in (42, 1500, 30_000, 400_000)]
    assert spoken == ["42 s", "25 min", "8.3 h", "4.6 days"]
    assert interval((0.0941, 0.0838, 0.1039)) == "+0.094 [+0.084, +0.104]"
    assert interval((0.5, 0.25, 1.0), ".2f") == "0.50 [0.25, 1.00]"
    assert interval((0.5, None, None)) == "+0.500"


def test_what_would_be_dropped_is_told_by_stage() -> None:
    """Of two queries the bad answer to one is cut off, and the plain answer to the other."""
    done, cut = (Completion("q", "Nectar.", reason, 9, 3) for reason in ("stop", "length"))
    said = [{"plain": done, "good": done, "bad": cut}, {"plain": cut, "good": done, "bad": done}]
    lost = checks.unfinished_by_stage(make.recipe("sso"), said)
    assert lost == {"triples": 1.0, "samples": 0.5}
    kept = make.recipe("sso", sampling={"keep_unfinished": True})
    assert checks.unfinished_by_stage(kept, said) == {}
    assert checks.fault(Completion("q", " ", "stop", 9, 1)) == "empty"


def test_answers_without_an_end_count_where_a_method_learns_from_them(tmp_path: Path) -> None:
    engine = FakeEngine(lambda request: (f"Answer {request.id}", "length"))
    probe = checks.Probe(tmp_path / "contrast", [triple(i, "Safety") for i in range(2)])
    kept, _ = checks._sample(Line("sampling"), engine, make.recipe("contrast"), probe)
    assert [t.id for t in kept] == ["q0", "q1"]
    probe = checks.Probe(tmp_path / "pbaa", [triple(i, "Safety") for i in range(2)])
    with pytest.raises(ArtifactError, match="0 of 2 triples left"):
        checks._sample(Line("sampling"), engine, make.recipe("pbaa"), probe)


# -- what ranks the policy's own answers -----------------------------------------------------------


def ranking(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    say: Callable[[Request], Said],
    *,
    left: float = 100,
) -> tuple[Checks, list[str]]:
    """Of four queries whose answers may have three words; the contrast likes short ones."""
    scored = list[str]()

    class Contrast:
        read = ("good/plain", "bad/plain")
        loaded = chat = property(lambda self: self)

        def sequence(self, triple: Triple, name: str) -> Triple:
            assert triple.principles is not None
            assert triple.principles.good == f"Be fine {triple.id}."
            assert triple.finished("plain") == (triple.id != "q3"), "no end of turn where none was"
            return triple

        def score(self, pairs: Sequence[Sequence[Triple]]) -> list[float | None]:
            assert all(first is second for first, second in pairs)
            scored.extend(triple.responses["plain"] for triple, _ in pairs)
            return [-float(len(triple.responses["plain"])) for triple, _ in pairs]

    monkeypatch.setattr(checks, "PrincipleContrast", lambda *args, **more: Contrast())
    answer_with(monkeypatch, FakeEngine(say))
    rules = {"checks": [{"words": {"max": 3}}]}
    triples = [replace(triple(i, "Safety"), extra=rules) for i in range(4)]
    probe = checks.Probe(tmp_path, triples)
    probe.seconds |= {"sampling": 10, "scoring": 10, "judging": 20}
    found, probed = Checks(lambda line: None), checks.Probed(1, 4, None, "tree", speed=1000)
    judge = ChecksJudge(JudgeConfig(kind="checks"))
    until = time.monotonic() + left
    checks._ranking(found, make.recipe("pbaa"), probed, judge, probe, until)
    return found, scored


def test_two_plain_answers_are_ranked_by_contrast_and_by_the_rules_of_their_query(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def say(request: Request) -> Said:
        number, query = request.id.split("/")[1:]
        text = "Nectar." if number == "0" else "It is nectar that it eats."
        if query == "q2" and number == "0":
            text = ""
        return (text, "length" if query == "q3" else "stop")

    found, scored = ranking(monkeypatch, tmp_path, say)
    (line,) = found.lines
    assert line.figures["pairs"] == line.figures["decided"] == 3, "one is empty"
    assert (line.figures["answers"], line.figures["cut_off"]) == (6, 2)
    assert "on 3 queries (2 of the 6 answers are cut off); as the judge does" in line.found
    assert line.figures["agreement"][0] == 1.0
    assert line.figures["spread"] == len("It is nectar that it eats.") - len("Nectar.")
    assert len(scored) == 6


def test_the_methods_that_would_learn_noise_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The contrast likes short answers, and the judge those with at most three words."""
    monkeypatch.setattr(checks, "DECIDING", 3)

    def say(request: Request) -> Said:
        number, query = request.id.split("/")[1:]
        text = "Nectar and nothing." if number == "0" else "It is as it is."
        return (text, "length" if query == "q3" else "stop")

    found, _ = ranking(monkeypatch, tmp_path, say)
    (line,) = found.lines
    assert line.figures["agreement"][0] == 0.0
    (todo,) = line.todo
    assert todo.startswith("That is not above chance, and ")
    named = set(re.findall(r"[\w-]+", todo.partition(":")[0])) & set(map(method_of, METHODS))
    assert named == {"contrast", "dlma", "best-of-n-principles", "pbaa-best-of-n"}


def test_a_policy_with_one_answer_to_a_query_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, _ = ranking(monkeypatch, tmp_path, lambda request: "Nectar.")
    assert (found.lines[0].status, found.exit_code) == ("ok", 0)
    assert found.lines[0].found.startswith("nothing to rank")


def test_nothing_is_ranked_that_would_end_too_late(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, scored = ranking(monkeypatch, tmp_path, lambda request: request.id, left=25)
    assert (found.lines[0].status, scored) == ("skipped", [])


# -- which rules the principles bring about ------------------------------------------------------


STYLE = """
closing: ""
features:
- {name: Calm, good_adjective: calm, bad_adjective: loud, good: C., bad: L.,
   checks: [{no_match: "!"}, {words: {max: 2}}]}
- {name: Candour, good_adjective: frank, bad_adjective: sly, good: F., bad: S.,
   checks: [{starts_with: Frankly}]}
- {name: End, good_adjective: ended, bad_adjective: open, good: E., bad: O.,
   checks: [{ends_with: [".", "!"]}]}
"""


def by_rule(tmp_path: Path, n: int, *, mode: str = "picked", say: str = "It is so.") -> Line:
    """Half of the principles name Candour; all good answers lose their "!" and have three words."""
    path = tmp_path / "style.yaml"
    path.write_text(STYLE)
    settings: dict[str, Any] = {"mode": mode, "catalogue": str(path), "features": "random"}
    settings["features_per_query"] = 1
    if mode == "fixed":
        settings = {"mode": mode, "good": "G.", "bad": "B."}
    triples = [
        make.triple(f"q{i}", "Calm", "End", *(["Candour"] if i % 2 else []), good=say, plain="So!")
        for i in range(n)
    ]
    line = Line("rules")
    judge = ChecksJudge(JudgeConfig(kind="checks", path=str(path)))
    recipe = make.recipe("contrast", principles=settings)
    checks._by_rule(line, recipe, triples, judge)
    return line


def test_a_rule_that_the_good_principle_does_not_bring_about_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = by_rule(tmp_path, 32)
    calm, words, candour, end = line.figures["rules"].values()
    assert (calm["queries"], calm["plain"], calm["good"], calm["gain"]) == (32, 0, 1, (1, 1, 1))
    assert (words["plain"], words["good"]) == (1, 0)
    assert (candour["queries"], candour["gain"]) == (16, (0, 0, 0))
    assert (end["plain"], end["gain"][0]) == (1, 0)
    assert (line.status, line.figures["unsure"]) == ("warning", True)
    low, none, advice = line.todo
    assert low.startswith("Calm: words: max 2: 1.00 of the plain answers keep it, 0.00 under")
    assert low.endswith("(32 queries): fewer.")
    assert none.startswith("Candour: starts_with: ")
    assert none.endswith("(16 queries): no gain beyond chance.")
    assert "measure more queries" in advice
    tell(line)
    said = " ".join(capsys.readouterr().out.split())
    assert "has more answers keep 1 of 4 rules beyond chance, on 32 queries" in said
    assert "Calm: no_match: ! 32 0.00 1.00 +1.00 [+1.00, +1.00]" in said


def test_too_few_queries_say_nothing_of_a_rule(tmp_path: Path) -> None:
    line = by_rule(tmp_path, 2 * FEW - 2, say="Frankly so.")
    assert line.figures["rules"]["Candour: starts_with: Frankly"]["queries"] == FEW - 1
    assert (line.status, line.todo, line.figures["unsure"]) == ("ok", [], True)
    line = by_rule(tmp_path, 2 * FEW, say="Frankly so.")
    assert (line.status, line.figures["unsure"]) == ("ok", False)


def test_no_rule_on_enough_queries_is_no_verdict(tmp_path: Path) -> None:
    line = by_rule(tmp_path, FEW - 2)
    assert line.found == f"no verdict: none of 4 rules was asked for on {FEW} queries"


def test_principles_that_know_no_feature_are_measured_on_all_queries(tmp_path: Path) -> None:
    line = by_rule(tmp_path, 32, mode="fixed")
    assert {r["queries"] for r in line.figures["rules"].values()} == {32}


def test_more_queries_are_asked_while_a_rule_is_not_sure() -> None:
    found = Checks(lambda line: None)
    with found.line("steering") as line:
        line.figures["steers"] = True
    assert checks._clear(found, 16)
    with found.line("rules") as line:
        line.figures["unsure"] = True
    assert [checks._clear(found, n) for n in (16, 32)] == [False, True]


# -- how many queries ------------------------------------------------------------------------------


def rounds(
    monkeypatch: pytest.MonkeyPatch, steers: Callable[[int], bool], *, left: float, each: float = 1
) -> tuple[list[int], Checks]:
    """Sizes of the rounds that take ``each`` seconds a query, and the lines in the end."""
    clock, sizes = [0.0], list[int]()

    def one_round(c: Checks, *given: Any) -> None:
        chosen, probe = given[4], given[6]
        clock[0] += each * (len(chosen) - len(probe.triples))
        probe.triples[:] = [triple(i) for i in range(len(chosen))]
        sizes.append(len(chosen))
        with c.line("steering") as line:
            line.figures["steers"] = steers(len(chosen))

    monkeypatch.setattr(checks, "_round", one_round)
    monkeypatch.setattr(checks, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    queries = [triple(i).query for i in range(64)]
    probed = checks.Probed(1, 4, None, "tree", speed=1000)
    recipe = make.recipe("pbaa", sampling={"max_new_tokens": 100})
    found = Checks(lambda line: None)
    nothing: Any = None
    probe = checks.Probe(Path("none"))
    checks._steering(found, recipe, nothing, probed, queries, queries, None, probe, until=left)
    return sizes, found


def test_more_queries_are_asked_until_the_verdict_is_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, found = rounds(monkeypatch, lambda n: True, left=1000)
    assert sizes == [8, 16], "8 queries are too few to tell"
    assert [line.name for line in found.lines] == ["steering"], "only the last round is told"
    assert rounds(monkeypatch, lambda n: n > 20, left=1000)[0] == [8, 16, 32]
    assert rounds(monkeypatch, lambda n: False, left=1000)[0] == [8, 16, 32, 64]


def test_no_round_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounds(monkeypatch, lambda n: False, left=20)[0] == [8, 16]
    assert rounds(monkeypatch, lambda n: False, left=20, each=2)[0] == [8]
    assert rounds(monkeypatch, lambda n: False, left=2)[0] == [3], "0.3 s a query, half of the time"
    assert rounds(monkeypatch, lambda n: False, left=0)[0] == [2]


def test_what_would_be_enough_queries_is_said_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    eight = [triple(i) for i in range(8)]
    probe = checks.Probe(Path("none"), eight, began=880.0, most=32)
    # 8 in two minutes; 24 more take up to one and a half times as long each
    assert probe.enough(32, 8) == "--minutes 11"
    # where half of the answers are dropped, twice as many have to be asked
    assert probe.enough(32, 4).startswith("give more than 32 queries")
    probe.most = 20
    assert probe.enough(32, 8) == "give more than 20 queries (--queries, or queries.path)"


def test_a_judge_that_no_query_is_tried_with_is_counted_all_the_same() -> None:
    """It meets 4 answers to each of 10 queries, each with each, in both orders."""
    server = {"kind": "openai", "base_url": "http://h/v1", "price": {"input": 1e6, "output": 0}}
    ranks = {"kind": "chat", "model": "m", "engine": server}
    recipe = make.recipe("best-of-n", ranking={"judge": ranks, "samples": 4}, judge="oracle")
    found = Checks(lambda line: None)
    of = {s.name: (getattr(s, "judge", None), s.cost(Scale(10)).judged) for s in recipe.plan()}
    checks._judging(found, recipe, of)
    (line,) = found.lines
    assert list(line.figures) == ["iteration-1/ranked"]
    asked = line.figures["iteration-1/ranked"]
    assert asked["requests"] == 2 * 10 * 6
    assert asked["cost"] == asked["prompt_tokens"]
    assert line.found.startswith("iteration-1/ranked: the judge gets 120 requests, ")
    checks._judging(
        found, make.recipe("pbaa", judge=ranks), {"quality": (JudgeConfig.model_validate(ranks), 9)}
    )
    assert found.lines == [line], "the recipe's own is measured"


def test_only_what_the_measured_judge_is_asked_takes_time_at_its_rate() -> None:
    """RLCD's reward model ranks 4 answers to 10 queries; the judge compares 10 pairs."""
    recipe = make.recipe("rlcd", judge="oracle")
    stages = recipe.plan()
    costs = [stage.cost(Scale(10)) for stage in stages]
    todo = total(costs)
    assert todo.judged == 40 + 10
    rates = Rates(0.0, {}, 0.0, per_judged=2.0)
    for judge, seconds in ((recipe.judge, 2.0 * 10), (None, 0.0)):
        found = Checks(lambda line: None)
        mine = checks._of_own_judge(judge, stages, costs, todo)
        checks._time(found, stages, mine, rates, {})
        (line,) = found.lines
        assert line.figures["seconds"]["judging"] == seconds
        assert "judging in iteration-1/ranked" in line.figures["not_counted"]
        assert ("judging in iteration-1/quality" in line.figures["not_counted"]) == (not judge)


def test_what_a_judge_at_a_server_will_be_asked() -> None:
    """4 pairs took 400 tokens in and 40 out, so 100 pairs take 25 times as much."""
    price = {"input": 1e6, "output": 2e6, "batch": 0.25}
    server = {"kind": "openai", "base_url": "http://h/v1", "batch": True, "price": price}
    served = JudgeConfig.model_validate({"kind": "chat", "model": "m", "engine": server})
    seen = Counter(pairs=4, prompt_tokens=400, completion_tokens=40)
    assert checks._judge_cost(served, 100, seen) == {
        "requests": 200,
        "prompt_tokens": 10000,
        "completion_tokens": 1000,
        "cost": (10000 + 2 * 1000) / 4,
    }
    here = JudgeConfig(kind="chat", model="m")
    for judge, pairs, judged in ((here, 100, seen), (None, 100, seen), (served, 0, seen)):
        assert checks._judge_cost(judge, pairs, judged) == {}
    assert checks._judge_cost(served, 100, Counter()) == {}
