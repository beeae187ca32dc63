"""Reading questions and ratings, what style judges what, and the table."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsteer.data.records import Message, Query
from selfsteer.errors import DataError
from selfsteer.evaluation.benchmark_table import markdown
from selfsteer.evaluation.judged_sets import judge_set
from selfsteer.evaluation.questions import Answered, Question, read_baseline, read_questions
from selfsteer.judges.base import Pair
from selfsteer.judges.chat import ChatJudge, Exchange, rate
from selfsteer.judges.oracle import OracleJudge
from selfsteer.judges.reading import extract_margin, extract_rating
from selfsteer.judges.stats import game
from selfsteer.recipe.sections import JudgeConfig, JudgedSet
from tests.fakes import FakeEngine

BEE = Query("bee", (Message("user", "What does the bee eat?"),))


def chat_judge(say: Callable[[str], str]) -> tuple[ChatJudge, FakeEngine]:
    engine = FakeEngine(lambda r: say(r.messages[-1].content))
    settings = JudgeConfig(kind="chat", model="canned", device="cpu")
    return ChatJudge(settings, engine=engine), engine


def shown_first(text: str) -> str:
    return text.partition("=== Answer A ===\n")[2].partition("\n\n=== Answer B")[0]


@pytest.mark.parametrize(
    ("text", "rating", "reason"),
    [
        ("Right and clear.\nRating: 8", 8.0, ""),
        ("**Rating:** 9/10", 9.0, ""),
        ("Rating: [[7]]", 7.0, ""),
        ("[[6]]", 6.0, ""),
        ("Rating: 7.5", 7.5, ""),
        ("Rating: 3\nOn reflection:\nRating: 5", 5.0, ""),
        ("<think>Rating: 2</think>Rating: 4", 4.0, ""),
        ("<think>Rating: 2", None, "no_rating"),
        ("An 8, I think.", None, "no_rating"),
        ("Rating: high", None, "no_rating"),
        ("Rating: 11", None, "out_of_range"),
        ("Rating: 0", None, "out_of_range"),
        ("Rating: -3", None, "out_of_range"),
        ("Rating: 4/5", None, "out_of_range"),
        ("Rating: 8 or Rating: 9", None, "ambiguous"),
        ("Rating: 7-8", None, "ambiguous"),
        ("Rating: 7 or 8", None, "ambiguous"),
        ("", None, "no_rating"),
    ],
)
def test_a_rating_is_read_strictly(text: str, rating: float | None, reason: str) -> None:
    assert extract_rating(text) == (rating, reason)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Margin: large\nVerdict: A", "large"),
        ("**Margin:** small.\nVerdict: B", "small"),
        ("Verdict: A", None),
        ("Margin: small or large\nVerdict: A", None),
    ],
)
def test_a_margin_is_read_strictly(text: str, found: str | None) -> None:
    assert extract_margin(text) == found


def test_large_margins_count_threefold_and_both_orders_count() -> None:
    """Won largely in one order and slightly in the other: 4 of 4; lost once slightly: 3 of 4."""

    def say(text: str) -> str:
        if "bricks" not in text:  # a judge with a bias: the first is much, the second a bit better
            return "Margin: large\nVerdict: A" if shown_first(text) == "Nectar." else "Verdict: A"
        good_first = shown_first(text) == "Nectar."
        return (
            f"Margin: {'large' if good_first else 'small'}\nVerdict: {'A' if good_first else 'B'}"
        )

    judge, engine = chat_judge(say)
    found = judge.compare_all(
        [
            Pair(BEE, "Nectar.", "It eats bricks."),
            Pair(BEE, "It eats bricks.", "Nectar."),
            Pair(BEE, "Nectar.", "Pollen."),
            Pair(BEE, "Same.", "Same."),
        ],
        margins=True,
    )
    assert [game(j) for j in found] == [(4.0, 4.0), (0.0, 4.0), (3.0, 4.0), (1.0, 2.0)]
    assert len(engine.asked) == 4  # the first two pairs are the same showings


def test_a_pair_with_one_unparseable_showing_is_not_judged() -> None:
    judge, _ = chat_judge(lambda t: "Verdict: A" if shown_first(t) == "x" else "Who knows.")
    (found,) = judge.compare_all([Pair(BEE, "x", "y")], margins=True)
    assert (game(found), found.reason) == ((0.0, 0.0), "no_verdict")


def test_judges_without_margins_count_each_showing_once() -> None:
    """The oracle's verdict, or a tie of equal texts."""
    pairs = [Pair(BEE, "The bee eats nectar.", "Purple."), Pair(BEE, "Purple.", "Purple.")]
    assert list(map(game, OracleJudge().compare_all(pairs))) == [(2.0, 2.0), (1.0, 2.0)]


def test_a_rating_is_asked_with_conversation_and_reference() -> None:
    judge, engine = chat_judge(lambda t: "Rating: 6")
    talk = Query(
        "t", (*BEE.messages, Message("assistant", "Nectar."), Message("user", "And the owl?"))
    )
    assert rate(judge, [Exchange(talk, "Mice.", "It eats mice.")]) == [(6.0, "")]
    (asked,) = (r.messages[-1].content for r in engine.asked)
    for part in ("user: What does the bee eat?", "assistant: Nectar.", "user: And the owl?"):
        assert part in asked
    assert asked.index("It eats mice.") < asked.index("=== Answer to rate ===\nMice.")
    assert rate(judge, [Exchange(BEE, "Nectar.")]) == [(6.0, "")]
    assert "correct answer, to compare" not in engine.asked[-1].messages[-1].content


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_questions_of_every_public_shape_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["One.", "Two."], "reference": ["1"]},
        {"uid": "u", "cluster": "x", "turns": [{"content": "Only."}]},
        {"instruction": "Sort these.", "input": "b a", "output": "a b", "generator": "g"},
        {"id": "own", "messages": [{"role": "user", "content": "Hi"}], "difficulty": -0.5},
    )
    questions = read_questions(JudgedSet(style="mt-bench", questions=path))
    one, two, three, own = questions
    assert (one.id, one.later, one.category, one.references) == ("81", ("Two.",), "writing", ("1",))
    assert (two.id, two.start) == ("u", (Message("user", "Only."),))
    assert three.start == (Message("user", "Sort these.\nb a"),)
    assert (own.id, own.difficulty) == ("own", -0.5)
    assert [m.content for m in one.query(["A."]).messages] == ["One.", "A.", "Two."]
    assert len(read_questions(JudgedSet(style="mt-bench", questions=path), 2)) == 2
    with pytest.raises(DataError, match=r"line 1 has 2 turns; style arena-hard"):
        read_questions(JudgedSet(style="arena-hard", questions=path))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "a"}, "line 2: "),
        ({"turns": []}, "turns must be a list of texts"),
        ({"turns": "Hi"}, "turns must be a list of texts"),
        ({"prompt": "Hi", "difficulty": "hard"}, "difficulty must be a number"),
        ({"prompt": "Hi", "difficulty": 10**400}, "difficulty must be a number"),
        ({"prompt": "Hi", "difficulty": math.nan}, "line 2: "),
        ({"prompt": "Hi", "reference": {"answer": "Ho"}}, "reference must be a text"),
        ({"id": "one", "prompt": "Hi"}, "'one' is there twice"),
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path: Path, row: Any, said: str) -> None:
    path = write(tmp_path / "q.jsonl", {"id": "one", "prompt": "Why?"}, row)
    with pytest.raises(DataError, match=said):
        read_questions(JudgedSet(style="alpaca-eval", questions=path))


def test_baseline_answers_are_found_by_id_or_by_question(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"id": "a", "prompt": "Why?"}, {"instruction": "How?"})
    answers = write(
        tmp_path / "a.jsonl",
        {"id": "a", "response": "So."},
        {"instruction": "How?", "output": "Thus.", "generator": "g"},
        {"instruction": "Other?", "output": "No."},
    )
    settings = JudgedSet(style="alpaca-eval", questions=path, baseline=answers)
    questions = read_questions(settings)
    assert read_baseline(settings, questions) == {"a": "So.", questions[1].id: "Thus."}
    for rows, said in (
        ([{"id": "a", "text": "So."}], "line 1 is not an answer"),
        ([{"id": "z", "response": "So."}], "answers none of the questions"),
    ):
        write(tmp_path / "a.jsonl", *rows)
        with pytest.raises(DataError, match=said):
            read_baseline(settings, questions)


def test_a_baseline_of_other_questions_is_refused_whatever_its_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *({"id": i, "prompt": f"{i}?"} for i in "abc"))
    answers = tmp_path / "a.jsonl"
    settings = JudgedSet(style="alpaca-eval", questions=path, baseline=str(answers))
    questions = read_questions(settings)
    # in another order, each answer still goes with the question beside it
    write(answers, {"id": "a", "prompt": "b?", "output": "B."}, {"id": "c", "output": "C."})
    assert read_baseline(settings, questions) == {"b": "B.", "c": "C."}
    write(answers, {"id": "a", "prompt": "Something else?", "output": "No."})
    with pytest.raises(DataError, match=r"line 1 has the id of question 'a' and states another"):
        read_baseline(settings, questions)


def test_references_are_texts_or_numbers_and_a_turn_may_have_none(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"turns": ["A?", "B?"], "reference": [None, "b"]},
        {"prompt": "6 x 7?", "reference": 42},
    )
    one, two = read_questions(JudgedSet(style="mt-bench", questions=path))
    assert one.references == (None, "b")
    assert two.references == ("42",)


def test_a_baseline_is_of_one_model_and_what_was_not_answered_is_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *({"id": i, "prompt": f"{i}?"} for i in "abc"))
    answers = tmp_path / "a.jsonl"
    settings = JudgedSet(style="alpaca-eval", questions=path, baseline=str(answers))
    questions = read_questions(settings)
    write(
        answers,
        {"id": "a", "response": "So."},
        {"id": "a", "response": "So."},
        {"id": "b", "response": "", "missing": "prompt_too_long"},
        {"id": "c", "response": "", "finish_reason": "request_failed"},
    )
    assert read_baseline(settings, questions) == {"a": "So."}
    write(answers, {"id": "a", "response": "So."}, {"id": "a", "response": "Thus."})
    with pytest.raises(DataError, match="line 2 answers question 'a'"):
        read_baseline(settings, questions)


def answered(*texts: str, missing: str | None = None) -> Answered:
    return Answered("q", texts, ("stop",) * len(texts), missing)


def test_win_rates_drops_and_lengths_against_a_baseline() -> None:
    """The judge prefers the longer text; one answer is missing, one has no rival."""
    questions = [Question(str(i), (Message("user", f"Q{i}?"),)) for i in range(5)]
    baseline = {str(i): "mmmm" for i in range(4)}
    answers = {
        "mine": {
            "0": answered("mmmmmm"),
            "1": answered("m"),
            "2": answered("mmmm"),
            "3": answered(missing="prompt_too_long"),
            "4": answered("mm"),
        }
    }

    def say(text: str) -> str:
        a = shown_first(text)
        b = text.partition("=== Answer B ===\n")[2].partition("\n\n=== Your")[0]
        return f"Verdict: {'A' if len(a) > len(b) else 'B'}"

    settings = JudgedSet(style="alpaca-eval", questions="q.jsonl")
    found = judge_set(settings, questions, answers, baseline, chat_judge(say)[0], 0)["mine"]
    assert found["verdicts"] == {
        "first": 1, "second": 1, "tie": 1, "inconsistent": 0, "unparseable": 0
    }  # fmt: skip
    assert found["win_rate"][0] == 0.5
    assert found["values"] == {"": {"0": 1.0, "1": 0.0, "2": 0.5}}
    assert found["dropped"] == {"no_baseline_answer": 1, "prompt_too_long": 1}
    assert found["characters"] == [3.67, 4.0]
    assert "found 1.5 and 1.5" in found["length_controlled"]["reason"]
    lost, _ = chat_judge(lambda t: "No idea.")
    found = judge_set(settings, questions, answers, baseline, lost, 0)["mine"]
    assert found["win_rate"] == (0.5, None, None)  # the equal pair ties without being asked
    assert found["dropped"]["no_verdict"] == 2
    assert found["values"][""] == {"2": 0.5}
    answers["mine"]["2"] = answered("m")
    found = judge_set(settings, questions, answers, baseline, lost, 0)["mine"]
    assert found["win_rate"] is None
    assert "length_controlled" not in found


def test_a_cut_off_answer_is_rated_as_such() -> None:
    asked: list[tuple[str, bool]] = []

    class Scoring(OracleJudge):
        def score_all(
            self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
        ) -> list[float | None]:
            assert finished is not None
            asked.extend((text, end) for (_, text), end in zip(answers, finished, strict=True))
            return [1.0] * len(answers)

    question = Question("a", (Message("user", "A?"),), ("More?",))
    said = {"mine": {"a": Answered("a", ("Whole.", "In ha"), ("stop", "length"))}}
    settings = JudgedSet(style="mt-bench", questions="q.jsonl")
    found = judge_set(settings, [question], said, {}, Scoring(), 0)["mine"]
    assert asked == [("Whole.", True), ("In ha", False)]
    assert found["unfinished"] == 1


def test_ratings_by_turn_and_category_with_unparseable_ones_counted() -> None:
    questions = [
        Question("a", (Message("user", "A?"),), ("More?",), "writing"),
        Question("b", (Message("user", "B?"),), ("More?",), "math"),
        Question("c", (Message("user", "C?"),), ("More?",), "math"),
    ]
    answers = {
        "mine": {
            "a": answered("eight", "four"),
            "b": answered("six", "what"),
            "c": answered("two", missing="prompt_too_long"),
        }
    }
    numbers = {"eight": 8, "four": 4, "six": 6, "two": 2}

    def say(text: str) -> str:
        word = text.partition("=== Answer to rate ===\n")[2].partition("\n")[0]
        return f"Rating: {numbers[word]}" if word in numbers else "Hm."

    settings = JudgedSet(style="mt-bench", questions="q.jsonl")
    found = judge_set(settings, questions, answers, {}, chat_judge(say)[0], 0)["mine"]
    # only one was rated on every turn
    assert found["score"][0] == 6.0
    assert (found["questions"], found["judged"]) == (3, 1)
    assert {k: v[0] for k, v in found["turns"].items()} == {"1": 8.0, "2": 4.0}
    assert {k: v[0] for k, v in found["categories"].items()} == {"writing": 6.0}
    assert found["dropped"] == {"no_rating": 1, "prompt_too_long": 1}
    assert found["values"] == {"": {"a": 6.0}}


def test_arena_games_are_weighted_and_their_values_add_up_to_the_score() -> None:
    questions = [Question(str(i), (Message("user", f"Q{i}?"),)) for i in range(3)]
    baseline = dict.fromkeys("012", "theirs")
    answers = {"mine": {i: answered(f"mine {i}") for i in "012"}}

    def say(text: str) -> str:
        mine_first = shown_first(text).startswith("mine")
        winner = "B" if ("Q0" in text) == mine_first else "A"  # only question 0 is lost
        return f"Margin: {'large' if 'Q1' in text else 'small'}\nVerdict: {winner}"

    settings = JudgedSet(style="arena-hard", questions="q.jsonl")
    found = judge_set(settings, questions, answers, baseline, chat_judge(say)[0], 0)["mine"]
    assert found["win_rate"][0] == pytest.approx((0 + 6 + 2) / (2 + 6 + 2))
    assert np.mean(list(found["values"][""].values())) == pytest.approx(0.8)


def test_the_table_shows_every_model_and_what_was_lost() -> None:
    task = {"metric": "acc,none", "score": 0.5, "stderr": 0.1, "questions": 9, "truncated": 2}
    second = {**task, "score": 0.75}
    perplexity = {**task, "score": 0.5, "stderr": None, "higher_is_better": False}
    judged = {
        "win_rate": [0.6, 0.5, 0.7],
        "characters": [10.0, 20.0],
        "dropped": {"cut_off": 3},
        "length_controlled": {
            "win_rate": [0.7, 0.6, 0.8],
            "length_effect": [1.0, 0.5, 1.5],
            "difficulty_from": "none",
        },
    }
    hard = {"name": "hard", "kind": "alpaca-eval", "judge": "j", "against": "base"}
    gap = {"of": ["sso", "base"], "questions": 9, "difference": [0.25, 0.1, 0.4]}
    report = {
        "models": {"base": "b", "sso": "s"},
        "limit": 9,
        "benchmarks": [
            {"name": "quiz", "kind": "task", "models": {"base": task, "sso": second}},
            {"name": "ppl", "kind": "task", "models": {"base": perplexity}},
            {**hard, "models": {"sso": judged}},
        ],
        "differences": [{"benchmark": "quiz", "figure": "", **gap}],
    }
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in markdown(report).splitlines()]
    assert lines[0] == ["model", "quiz", "ppl", "hard LC win rate", "hard win rate"]
    assert lines[2] == ["base", "50.0 ± 10.0", "0.500", "baseline", "baseline"]
    assert lines[3] == ["sso", "75.0 ± 10.0", "", "70.0 [60.0, 80.0]", "60.0 [50.0, 70.0]"]
    assert ["quiz", "sso - base", "9", "+25.0 [+10.0, +40.0]"] in lines
    text = markdown(report)
    assert "- hard, sso: not judged: 3 cut_off" in text
    assert "- quiz, base: 2 prompts cut" in text
    assert "only the first 9 questions" in text
