import errno
import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsteer import stopping
from selfsteer.data.records import Query, Triple, Verdict
from selfsteer.engines.base import Completion, SamplingParams
from selfsteer.errors import ConfigError
from selfsteer.judges.base import Pair
from selfsteer.judges.oracle import OracleJudge
from selfsteer.judges.quality import GAP_SEQUENCES, PLAIN_SEQUENCES, quality
from selfsteer.methods import load_recipe
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.score import score_records
from selfsteer.objectives import Objective
from selfsteer.principles import writer
from selfsteer.recipe.sections import Lora, Policy, Selection, resolve_path
from selfsteer.stages.selector import Selector, repeated_4grams
from selfsteer.training.select import (
    Candidate,
    Drift,
    beats,
    candidate_steps,
    choose,
    excess,
    gain,
    hold_out,
)
from selfsteer.training.trainer import RowBudget
from tests.fakes import FakeJudge
from tests.make import recipe
from tests.training.test_trainer import make_examples, make_triple, run, settings, weights

BOUNDS = Selection()
CALM = Drift(tokens=20.0, repeated=0.1, unfinished=0.05, kl=0.0, entropy=1.0)
FAR = replace(CALM, kl=1.5 * BOUNDS.max_kl)


# -- the rule -------------------------------------------------------------------------------------


def test_candidates_are_spread_evenly_and_end_with_the_last_step() -> None:
    assert candidate_steps(100, 4) == [25, 50, 75, 100]
    assert candidate_steps(14, 4) == [4, 7, 11, 14]
    assert candidate_steps(1, 4) == [1]
    assert candidate_steps(7, 1) == [7]


def test_a_tenth_is_held_out_whatever_the_order_and_whoever_asks() -> None:
    ids = [f"q{i}" for i in range(400)]
    held = hold_out(ids, BOUNDS, seed=1)
    assert len(held) == 40
    assert held == hold_out(ids[::-1], BOUNDS, seed=1)
    assert held != hold_out(ids, BOUNDS, seed=2)
    assert hold_out(ids, Selection(queries=20), seed=1) < held
    assert len(hold_out([f"q{i}" for i in range(5000)], BOUNDS, seed=1)) == BOUNDS.queries
    assert len(hold_out(ids[:160], BOUNDS, seed=1)) == 16
    assert hold_out(ids[:159], BOUNDS, seed=1) == set()
    assert hold_out(ids, Selection(points=0), seed=1) == set()


def test_repeated_4grams_counts_all_but_the_first() -> None:
    """1212121 has the 4-grams 1212, 2121, 1212, 2121; 1234 has one: 2 of 5."""
    assert repeated_4grams([[1, 2, 1, 2, 1, 2, 1], [1, 2, 3, 4]]) == pytest.approx(0.4)
    assert repeated_4grams([[1, 1, 1], []]) == 0
    assert repeated_4grams([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0


def test_excess_is_the_worst_context_in_multiples_of_the_bound() -> None:
    bounds = Selection(max_kl=0.5, max_length_ratio=2, max_repeated=0.1, max_unfinished=0.2)
    start = Candidate(0, {"good": CALM, "bad": CALM})
    good = replace(CALM, tokens=10.0, kl=0.25)  # half as long: on the edge
    bad = replace(CALM, tokens=20 * math.sqrt(2), repeated=0.13, unfinished=0.0, kl=0.4)
    found = excess(Candidate(3, {"good": good, "bad": bad}), start, bounds)
    assert found == pytest.approx(
        {"KL": 0.8, "length": 1.0, "repeated 4-grams": 0.3, "unfinished": 0.0}
    )


def test_gain_is_paired_by_query() -> None:
    """Gaps ½, 0, 1 over the three queries that both have: mean ½, s ½, error ½/√3."""
    mine = {"a": 1.0, "b": 0.5, "c": 1.0, "x": 0.0}
    theirs = {"a": 0.5, "b": 0.5, "c": 0.0, "y": 1.0}
    assert gain(mine, theirs) == pytest.approx((0.5, 0.5 / math.sqrt(3)))
    assert gain(mine, {"a": 0.0}) == (0.0, 0.0)


def wins(count: int, of: int = 10) -> dict[str, float]:
    return {f"q{i}": float(i < count) for i in range(of)}


def policy(step: int, won: int | None, drift: Drift = CALM) -> Candidate:
    return Candidate(step, {"plain": drift}, wins(won) if won is not None else {})


def writer_at(step: int, right: int, on: float, drift: Drift = CALM) -> Candidate:
    return Candidate(step, {"good": CALM, "bad": drift}, wins(right), on)


START = Candidate(0, {"plain": CALM, "good": CALM, "bad": CALM}, wins(9), 0.5)


def chosen(*candidates: Candidate, start: Candidate = START) -> int:
    return choose(start, candidates, BOUNDS).step


def test_one_more_win_is_within_the_error_two_are_not() -> None:
    """Of n, one: 1/n ± 1/n exactly, whatever n. Two of ten: 0.2 ± 0.133."""
    for n in (7, 10, 128):
        assert not beats(wins(4, n), wins(3, n))
        assert beats(wins(5, n), wins(3, n))
    assert gain(wins(7), wins(5)) == pytest.approx((0.2, 0.4 / 3))
    assert not beats({}, {})


def test_the_policy_that_wins_most_is_kept_and_the_earliest_of_equal_ones() -> None:
    assert chosen(policy(1, 5), policy(2, 6), policy(3, 4)) == 2
    assert chosen(policy(1, 7), policy(2, 5), policy(3, 7)) == 1
    # only queries that both have count: all of them were won by both
    few = Candidate(2, {"plain": CALM}, {f"q{i}": 1.0 for i in range(4)})
    assert chosen(policy(1, 5), few) == 1


def test_without_a_judge_the_last_policy_within_bounds_is_kept() -> None:
    assert chosen(policy(1, None), policy(2, None), policy(3, None)) == 3
    assert chosen(policy(1, None), policy(2, None), policy(3, None, FAR)) == 2


def test_what_drifted_is_not_kept_however_often_it_wins() -> None:
    assert chosen(policy(1, 5), policy(2, 10, FAR)) == 1
    assert chosen(policy(1, 10, FAR), policy(2, 2), policy(3, 2)) == 2
    assert chosen(policy(1, 3, FAR), policy(2, 9, FAR)) == 1  # the earliest of the broken


def test_of_generators_as_accurate_as_the_best_the_most_on_policy_is_kept() -> None:
    """The start has 9 of 10, which beats 7 and not 8."""
    assert chosen(writer_at(1, 9, 0.6), writer_at(2, 8, 0.7), writer_at(3, 7, 0.9)) == 2
    assert chosen(writer_at(1, 9, 0.7), writer_at(2, 9, 0.6)) == 1
    # a better one later shows that the kept one was not as accurate as could be
    low = replace(START, wins=wins(7))
    assert chosen(writer_at(1, 7, 0.9), writer_at(2, 10, 0.6), start=low) == 2
    # the start counts as a measure of what is possible
    assert chosen(writer_at(1, 5, 0.9), writer_at(2, 6, 0.8)) == 2
    # no staircase: each is close to the one before, the last is far from the best
    assert chosen(writer_at(1, 10, 0.6), writer_at(2, 9, 0.7), writer_at(3, 8, 0.8)) == 2


def test_a_drifted_generator_neither_wins_nor_sets_the_measure() -> None:
    assert chosen(writer_at(1, 8, 0.6), writer_at(2, 10, 0.9, FAR)) == 1


def test_one_set_of_weights_on_disk_is_enough() -> None:
    """Whatever the figures, the choice is the one before or the newest."""
    rng = np.random.default_rng(0)
    moved = 0
    for _ in range(300):
        kind = rng.integers(3)
        candidates: list[Candidate] = []
        for step in range(1, 7):
            drift = FAR if rng.random() < 0.3 else CALM
            right = int(rng.integers(11))
            if kind == 0:
                candidates.append(writer_at(step, right, float(rng.random()), drift))
            else:
                candidates.append(policy(step, right if kind == 1 else None, drift))
        before = candidates[0]
        for k in range(1, 7):
            now = choose(START, candidates[:k], BOUNDS)
            assert now in (before, candidates[k - 1])
            moved += now is not before
            before = now
    assert moved > 300


# -- the recipe -----------------------------------------------------------------------------------


def test_bounds_without_points_are_refused() -> None:
    off = recipe(training={"selection": {"points": 0}})
    assert off.training.selection.points == 0
    assert off.generator.selection.points == 4
    with pytest.raises(ConfigError, match="max_kl has no effect with points 0"):
        recipe(training={"selection": {"points": 0, "max_kl": 2}})


def test_what_decides_is_in_the_fingerprint() -> None:
    def made(*overrides: str) -> tuple[str, str]:
        found = {s.name: s.fingerprint for s in load_recipe("smoke", overrides).plan()}
        return found["iteration-1/generator"], found["iteration-1/policy"]

    on, off = made(), made("generator.selection.points=0", "training.selection.points=0")
    assert made("training.selection.max_kl=1")[0] == on[0]
    for change in ("judge=null", "generator.selection.points=3"):
        assert made(change)[0] != on[0]
    assert made("training.selection.points=3")[1] != on[1]
    assert (
        made("judge=null", "generator.selection.points=0", "training.selection.points=0")[0]
        == off[0]
    )


# -- what is measured -----------------------------------------------------------------------------


def tiny_world(count: int) -> tuple[LoadedModel, list[Triple]]:
    source = resolve_path("package:selfsteer.testbed/checkpoint")
    lines = Path(resolve_path("package:selfsteer.testbed/queries/align.jsonl")).read_text("utf-8")
    queries = [Query.from_dict(json.loads(line)) for line in lines.splitlines()[:count]]
    principles = writer.picked(("Accuracy", "Helpfulness"))
    triples = [Triple(q.id, q.messages, principles) for q in queries]
    return load_model(source, Policy(model=source, device="cpu", layout="padded")), triples


def make_selector(loaded: LoadedModel, held: Sequence[Triple], **more: Any) -> Selector:
    values: dict[str, Any] = {
        "settings": BOUNDS,
        "loaded": loaded,
        "load_start": lambda: pytest.fail("the starting model is loaded for nothing"),
        "held_out": held,
        "contexts": ("plain",),
        "sampling": SamplingParams(max_new_tokens=12),
        "batch_size": 16,
        "judge": None,
        "seed": 5,
        "label": "test",
    }
    return Selector(**{**values, **more})


def written(selector: Selector, step: int) -> list[Triple]:
    """The held-out triples with what the model answered."""
    record = json.loads((selector.work / f"candidate-{step:06d}.json").read_text())
    return [
        replace(
            t,
            responses={c: a[i]["text"] for c, a in record["answers"].items()},
            finish_reasons={c: a[i]["reason"] for c, a in record["answers"].items()},
        )
        for i, t in enumerate(selector.held_out)
    ]


@pytest.mark.parametrize("judged", [True, False])
def test_a_generators_figures_are_those_of_the_quality_report(tmp_path: Path, judged: bool) -> None:
    loaded, held = tiny_world(24)
    sampling = SamplingParams(max_new_tokens=96)
    judge = OracleJudge() if judged else None
    selector = make_selector(loaded, held, contexts=("good", "bad"), sampling=sampling, judge=judge)
    selector.begin(loaded.model, tmp_path, 8)
    pairs = written(selector, 0)
    names = (*PLAIN_SEQUENCES, *GAP_SEQUENCES)
    scores = score_records(loaded.model, loaded.chat.tokenizer, pairs, names)
    sums = {n: s.numpy() for n, (s, _) in scores.items()}
    lengths = {n: c.numpy() for n, (_, c) in scores.items()}
    expected = quality(pairs, sums, lengths, judge)
    record = selector._records[0]
    assert record["pairs"] == 24
    assert record["on_policyness"] == pytest.approx(
        {k: expected["on_policyness"][k] for k in ("chosen", "rejected")}, rel=1e-5
    )
    assert record["steering_gap"] == pytest.approx(expected["steering_gap"], abs=1e-5)
    assert selector.start.on_policyness == record["on_policyness"]["rejected"]
    values = list(record["wins"].values())
    if judged:
        assert selector.measure == "accuracy"
        assert np.mean(values) == pytest.approx(expected["accuracy"])
    else:
        assert selector.measure == "steering accuracy"
        m = {n: sums[n] / lengths[n] for n in names}
        both = (m["good/good"] > m["bad/good"]) & (m["bad/bad"] > m["good/bad"])
        assert values == [float(b) for b in both]
    assert 0 < np.mean(values) <= 1


def test_the_judge_of_candidates_knows_which_answers_were_cut_off(tmp_path: Path) -> None:
    loaded, held = tiny_world(4)
    seen: list[Pair] = []
    judge = FakeJudge(lambda pair: Verdict.TIE if seen.append(pair) else Verdict.FIRST)  # type: ignore[func-returns-value]
    selector = make_selector(loaded, held, judge=judge, load_start=lambda: tiny_world(4)[0])
    selector.begin(loaded.model, tmp_path, 8)
    own = selector._answers(("plain",))
    own["plain"][0]["reason"] = "stop" if own["plain"][0]["reason"] == "length" else "length"
    figures = selector._figures(1, own)
    before = selector._records[0]["answers"]["plain"]
    assert figures["wins"] == {t.id: 1.0 for t in held}
    assert [p.finished for p in seen] == [
        (a["reason"] == "stop", b["reason"] == "stop")
        for a, b in zip(own["plain"], before, strict=True)
    ]
    assert seen[0].finished[0] != seen[0].finished[1]


def test_answers_are_not_scored_after_the_thoughts_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, held = tiny_world(2)
    held = [replace(t, reasoning={"good": "Once.</think>"}) for t in held]
    said = Completion("", "The bee eats nectar.", "stop", 9, 9, "Now.</think>")
    monkeypatch.setattr(
        "selfsteer.stages.selector.answers",
        lambda engine, asked, *rest, **more: {r.id: replace(said, id=r.id) for r in asked},
    )
    scored: list[Triple] = []
    sequence = loaded.chat.sequence

    def noted(triple: Triple, name: str) -> EncodedSequence:
        scored.append(triple)
        return sequence(triple, name)

    monkeypatch.setattr(loaded.chat, "sequence", noted)
    selector = make_selector(loaded, held, contexts=("good", "bad"))
    selector.begin(loaded.model, tmp_path, 8)
    assert scored
    assert not any(t.reasoning for t in scored)


def test_weights_that_fill_the_disk_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: Any, path: Path) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("selfsteer.stages.selector.save_file", full)
    loaded, held = tiny_world(2)
    selector = make_selector(loaded, held, load_start=lambda: tiny_world(0)[0])
    selector.begin(loaded.model, tmp_path, 1)
    with pytest.raises(OSError, match="No space"):
        selector.visit(1)
    assert [p.name for p in tmp_path.iterdir()] == ["candidate-000000.json"]


@pytest.mark.parametrize("half", ["good", "bad"])
def test_half_a_generator_is_measured_beside_the_starts_other_half(
    tmp_path: Path, half: str
) -> None:
    """Unchanged weights: the half is sampled again, and every figure is the start's."""
    loaded, held = tiny_world(8)
    selector = make_selector(
        loaded,
        held,
        load_start=lambda: tiny_world(0)[0],
        contexts=(half,),
        sampling=SamplingParams(max_new_tokens=96),
        judge=OracleJudge(),
    )
    selector.begin(loaded.model, tmp_path, 8)
    assert not selector.visit(1)
    assert not selector.visit(2)
    start, candidate = selector.start, selector.candidates[0]
    assert candidate.step == 2
    assert set(selector._records[0]["answers"]) == {"good", "bad"}
    assert list(selector._records[2]["answers"]) == list(candidate.drift) == [half]
    assert candidate.wins == start.wins
    assert len(candidate.wins) == 8
    policyness = selector._records[2]["on_policyness"]
    assert candidate.on_policyness == policyness["chosen" if half == "good" else "rejected"]
    assert candidate.on_policyness == pytest.approx(start.on_policyness, rel=1e-5)
    assert candidate.drift[half].kl == pytest.approx(0, abs=1e-6)


def trained(
    load: Callable[..., LoadedModel],
    folder: Path,
    *,
    lora: Lora | None = None,
    learning_rate: float = 1e-2,
    budget: RowBudget | None = None,
    on_log: Callable[[dict[str, float]], None] = lambda logs: None,
    **more: Any,
) -> Selector:
    """12 examples, 2 a step, 2 epochs: 12 steps, candidates at 3, 6, 9, 12."""
    loaded = load("llama")
    objective = Objective.named("pbaa")
    held = [make_triple(i) for i in range(100, 108)]
    selector = make_selector(loaded, held, **{"load_start": lambda: load("llama"), **more})
    run(
        loaded,
        objective,
        make_examples(loaded, objective, 12, shift=0.05),
        folder,
        settings=settings(learning_rate=learning_rate, batch_size=2, epochs=2, save_every_steps=2),
        lora=lora,
        budget=budget,
        on_log=on_log,
        on_step=selector,
    )
    return selector


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=64)], ids=["whole", "lora"])
def test_kl_is_that_of_the_models_own_answers(
    load: Callable[..., LoadedModel], tmp_path: Path, lora: Lora | None
) -> None:
    """With adapters the start is the model without them, and is never loaded."""
    more: dict[str, Any] = {"load_start": lambda: pytest.fail("loaded")} if lora else {}
    held: dict[int, list[Triple]] = {}
    finish = Selector.restore

    def keep_answers(self: Selector) -> None:
        held.update({c.step: written(self, c.step) for c in self.candidates})
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selector, "restore", keep_answers)
        selector = trained(load, tmp_path / "m", lora=lora, settings=Selection(stop=1e9), **more)
    last = selector.candidates[-1].drift["plain"]
    states = []
    for source in (str(tmp_path / "m"), None):
        loaded = load("llama")
        if source:
            loaded.model.load_state_dict(weights(Path(source)))
        at = selector.chosen.step
        sums, lengths = score_records(
            loaded.model, loaded.chat.tokenizer, held[at], ["plain/plain"], layout="padded"
        )["plain/plain"]
        states.append((float(sums.sum()), int(lengths.sum())))
    found = selector.chosen.drift["plain"]
    assert found.kl == pytest.approx((states[0][0] - states[1][0]) / states[0][1], abs=2e-4)
    assert found.entropy == pytest.approx(-states[0][0] / states[0][1], abs=2e-4)
    assert last.kl > 0.01


# -- training with it -----------------------------------------------------------------------------


def test_the_weights_of_the_chosen_step_are_written(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """A judge that likes the answers of step 6 best; measuring changes nothing in the training."""

    asked: list[Pair] = []

    def likes_the_second(pair: Pair) -> Verdict:
        asked.append(pair)
        return Verdict.FIRST if 8 < len(asked) <= 16 else Verdict.TIE

    states: dict[int, dict[str, Tensor]] = {}
    losses: dict[bool, list[float]] = {}
    for measured in (True, False):
        loaded = load("llama")
        objective = Objective.named("pbaa")
        lines: list[float] = []

        def on_log(
            line: dict[str, float], loaded: LoadedModel = loaded, lines: list[float] = lines
        ) -> None:
            if "loss" in line:
                lines.append(line["loss"])
                state = loaded.model.state_dict()
                states[int(line["step"])] = {k: v.clone() for k, v in state.items()}

        selector = make_selector(
            loaded,
            [make_triple(i) for i in range(100, 108)],
            load_start=lambda: load("llama"),
            judge=FakeJudge(likes_the_second),
            settings=Selection(max_kl=1e9),
        )
        run(
            loaded,
            objective,
            make_examples(loaded, objective, 12, shift=0.05),
            tmp_path / str(measured),
            settings=settings(batch_size=2, epochs=2),
            on_log=on_log,
            on_step=selector if measured else None,
        )
        losses[measured] = lines
        if measured:
            assert selector.chosen.step == 6
            assert [round(sum(c.wins.values())) for c in selector.candidates] == [4, 8, 4, 4]
            assert "step 6 of 12 kept (win rate 1.00" in selector.sentence()
    assert losses[True] == losses[False]
    for measured, step in ((True, 6), (False, 12)):
        for name, value in weights(tmp_path / str(measured)).items():
            assert torch.equal(value, states[step][name]), name
    assert not torch.equal(states[6]["lm_head.weight"], states[12]["lm_head.weight"])


def prefers_high_letters(pair: Pair) -> Verdict:
    mine, theirs = (sum(map(ord, text)) for text in (pair.first, pair.second))
    return Verdict.FIRST if mine > theirs else Verdict.SECOND


def without_seconds(selector: Selector) -> dict[str, Any]:
    report = selector.report()
    for candidate in report["candidates"]:
        del candidate["seconds"]
    return report


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_training_killed_around_a_measurement_ends_like_an_undisturbed_one(
    load: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a judge the last one is kept: every candidate is written, and replaces another."""
    more: dict[str, Any] = {"settings": Selection(max_kl=1e9)}
    straight = trained(load, tmp_path / "straight", **more)
    assert straight.chosen.step == 12
    undisturbed = weights(tmp_path / "straight")
    measured: list[int] = []
    measure, record = Selector._figures, Selector._record

    def counting(self: Selector, step: int, answers: Any) -> dict[str, Any]:
        measured.append(step)
        return measure(self, step, answers)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    monkeypatch.setattr(Selector, "_figures", counting)
    for kill in ("no figures", "figures", "between", "end"):
        measured.clear()
        folder = tmp_path / kill
        with pytest.MonkeyPatch.context() as patch:

            def breaking(
                self: Selector,
                step: int,
                kill: str = kill,
                patch: pytest.MonkeyPatch = patch,
            ) -> None:
                if step == 6 and kill == "no figures":
                    patch.setattr("selfsteer.stages.selector.write_atomic", stop)
                record(self, step)
                if step == 6 and kill == "figures":
                    stop()

            def on_log(line: dict[str, float], kill: str = kill) -> None:
                if line["step"] == 8 and kill == "between":
                    stop()

            patch.setattr(Selector, "_record", breaking)
            if kill == "end":
                patch.setattr(Selector, "restore", stop)
            with pytest.raises(Killed):
                trained(load, folder, on_log=on_log, **more)
        assert not folder.exists()
        resumed = trained(load, folder, **more)
        again = [6] if kill == "no figures" else []
        assert sorted(measured) == sorted([0, 3, 6, 9, 12, *again]), kill
        assert without_seconds(resumed) == without_seconds(straight)
        found = weights(folder)
        assert all(torch.equal(found[k], undisturbed[k]) for k in found), kill
        assert not folder.with_name(f"{kill}.partial").exists()


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("within", [False, True], ids=["before", "within"])
def test_a_training_stopped_at_a_measurement_makes_up_for_it(
    load: Callable[..., LoadedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    within: bool,
) -> None:
    more: dict[str, Any] = {"settings": Selection(max_kl=1e9)}
    straight = trained(load, tmp_path / "straight", **more)
    steps, figures = list[int](), Selector._figures

    def stopped(self: Selector, step: int, answers: Any) -> dict[str, Any]:
        if within and step == 6:
            signal.raise_signal(signal.SIGTERM)
        return figures(self, step, answers)

    def on_log(line: dict[str, float]) -> None:
        if "loss" in line:
            steps.append(int(line["step"]))
            if not within and steps == [1, 2, 3, 4, 5]:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Selector, "_figures", stopped)
        with pytest.raises(KeyboardInterrupt):
            trained(load, tmp_path / "m", on_log=on_log, **more)
    assert max(steps) == 6
    assert not (tmp_path / "m.partial" / "candidate-000006.json").exists()
    monkeypatch.setattr(stopping, "_asked", None)
    resumed = trained(load, tmp_path / "m", on_log=on_log, **more)
    assert steps == list(range(1, 13))
    assert without_seconds(resumed) == without_seconds(straight)
    found, undisturbed = weights(tmp_path / "m"), weights(tmp_path / "straight")
    assert all(torch.equal(found[k], undisturbed[k]) for k in found)


def test_drift_far_beyond_its_bound_ends_the_training(
    load: Callable[..., LoadedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []

    def on_log(line: dict[str, float]) -> None:
        steps.append(int(line["step"]))

    more: dict[str, Any] = {"settings": Selection(max_kl=1e-3)}
    with pytest.MonkeyPatch.context() as patch:  # killed after the stop, before the model is saved
        patch.setattr(Selector, "restore", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            trained(load, tmp_path / "m", on_log=on_log, **more)
    assert max(steps) == 3
    selector = trained(load, tmp_path / "m", on_log=on_log, **more)
    assert max(steps) == 3
    assert selector.stopped == 3
    assert selector.chosen.step == 3
    assert [c.step for c in selector.candidates] == [3]
    assert "stopped at step 3, drift is too large" in capsys.readouterr().err
    assert "stopped at step 3" in selector.sentence()
    assert "times its bound" in selector.sentence()
    assert "every candidate drifted" in selector.warnings()[0]
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_rows_of_one_and_of_eight_choose_alike(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    more: dict[str, Any] = {
        "judge": FakeJudge(prefers_high_letters),
        "settings": Selection(max_kl=1e9),
    }
    found = [
        trained(load, tmp_path / str(n), budget=RowBudget(8, 10_000, n), learning_rate=1e-3, **more)
        for n in (1, 8)
    ]
    assert found[0].chosen.step == found[1].chosen.step
    for a, b in zip(found[0].candidates, found[1].candidates, strict=True):
        assert a.wins == b.wins
        assert a.drift["plain"].kl == pytest.approx(b.drift["plain"].kl, abs=1e-4)


def test_a_step_whose_answers_say_nothing_is_noticed_when_it_is_measured(
    load: Callable[..., LoadedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 16 answers 8 go in circles, from the second measured step on."""
    loaded = load("llama")
    fine = [{"text": f"Fish {i}.", "reason": "stop"} for i in range(16)]
    circles = [
        {"text": "fish " * 40, "reason": "length"} if i % 2 else a for i, a in enumerate(fine)
    ]
    drift = {"plain": asdict(CALM)}
    figures = {"drift": drift, "wins": {}, "on_policyness": None}
    said = iter([fine, fine, circles, circles])
    monkeypatch.setattr(Selector, "_answers", lambda *a: {"plain": next(said)})
    monkeypatch.setattr(Selector, "_figures", lambda *a: dict(figures))
    selector = make_selector(loaded, [], judge=None)
    selector.begin(loaded.model, tmp_path, 3)
    for step in (1, 2, 3):
        selector._record(step)
    assert selector.collapse().startswith('step 2: 50% of 16 plain answers go in circles ("fish f')
    assert " ".join(capsys.readouterr().err.split()).count("go in circles") == 1
    selector._records[0]["answers"]["plain"] = circles
    assert selector.collapse() == "", "the start's own way"
    for step, record in selector._records.items():
        record["answers"]["plain"] = fine
        record["drift"] = {"plain": {"tokens": 10.0 + 10 * step}}
    assert selector.collapse().startswith("plain answers get ever longer: 10, 20, 30, 40 tokens")


def test_losing_and_inaccurate_models_are_said_to_be_so(tmp_path: Path) -> None:
    loaded, held = tiny_world(4)
    selector = make_selector(loaded, held, judge=OracleJudge())
    selector.begin(loaded.model, tmp_path, 4)
    lost = {"step": 1, "drift": selector._records[0]["drift"], "on_policyness": None}
    selector._records[1] = {**lost, "wins": wins(2)}
    assert "loses against the policy it started from" in selector.warnings()[0]
    selector._records[1] = {**lost, "wins": wins(5)}
    assert selector.warnings() == []
