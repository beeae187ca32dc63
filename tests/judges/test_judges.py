import json
import math
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import dump_lines
from selfsteer.data.records import Message, Query, Verdict
from selfsteer.engines.base import PROMPT_TOO_LONG, Completion, Request
from selfsteer.errors import ArtifactError, ConfigError, DataError, NumericsError
from selfsteer.judges import store
from selfsteer.judges.base import Judgement, Pair, ScoringJudge
from selfsteer.judges.chat import ChatJudge, combine, question
from selfsteer.judges.load import load_judge
from selfsteer.judges.people import HumanJudge, pair_digest
from selfsteer.judges.reading import extract_verdict
from selfsteer.judges.reward import RewardJudge
from selfsteer.judges.stats import CLASSES, agreement, cohen_kappa, judge_report, position_bias
from selfsteer.models.load import load_reward
from selfsteer.recipe.read import validate
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.run.stage import identity
from tests.fakes import FakeEngine
from tests.make import make_checkpoint
from tests.reliability.fuzz import within

A, B, TIE = Verdict.FIRST, Verdict.SECOND, Verdict.TIE
ODD, LOST = Verdict.INCONSISTENT, Verdict.UNPARSEABLE


def query(number: int = 0, text: str = "What does the bee eat?") -> Query:
    return Query(f"q{number}", (Message("user", text),))


# -- reading a verdict -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        # as asked
        ("The second one invents facts.\nVerdict: A", A),
        ("Both say the same.\n\nVerdict: tie", TIE),
        ("verdict: b", B),
        ("VERDICT : B.", B),
        # markup and other conventions
        ("**Verdict:** B", B),
        ("**Verdict: A**", A),
        ("### Verdict\n\n**B**", B),
        ("Verdict: `tie`", TIE),
        ("Verdict: “B”", B),
        ("[[A]]", A),
        ("My final verdict is: [[B]].", B),
        ("[[C]]", TIE),
        ("$\\boxed{A}$", A),
        ("\\boxed{\\text{tie}}", TIE),
        ('```json\n{"verdict": "B"}\n```', B),
        ("Answer: B.", B),
        ("Final answer: Response A", A),
        ("Winner - B", B),
        ("Overall: A\nSafety: B", A),
        # nothing but a letter or a word
        ("A", A),
        ("(b)", B),
        ("Tie.", TIE),
        ("B\n\nIt answers the question.", B),
        ("Response B", B),
        # sentences
        ("Both are equally good", TIE),
        ("It's a tie: neither adds anything.", LOST),
        ("Response A is clearly better because it names nectar.", A),
        ("response b is better", B),
        ("I prefer Response B.", B),
        ("Answer A wins.", A),
        ("Conclusion: Answer A is better", A),
        # a verdict in the middle of an explanation
        ("Bees eat nectar. Verdict: A. The other answer speaks of bricks.", A),
        ("Verdict: A, because B is wrong about the nectar.", A),
        ("Response B is longer.\nVerdict: A\nIt is simply right.", A),
        ("Bricks are not food, so the verdict is A.", A),
        # two verdicts: the last line that states one decides, if it states only one
        ("Verdict: A\n\nOn second thoughts:\nVerdict: B", B),
        ("First [[A]] seemed right, but [[B]] is.", LOST),
        ("Verdict: A or B", LOST),
        ("Verdict: A/B", LOST),
        ("Verdict: A. No, wait: B.", LOST),
        ("Verdict: A\nActually, Response B is better.", LOST),
        ("I will end with Verdict: A, Verdict: B or Verdict: tie.", LOST),
        ("Response A is better. Response B is better.", LOST),
        # headings, articles, other people's answers
        ("**A**\nRight.\n**B**\nWrong.", LOST),
        ("Answer A: right.\nAnswer B: wrong.", LOST),
        ("The answer is a good one.", LOST),
        ("Answer: A good reply would name nectar.", LOST),
        ("Response A says that the answer is B.", LOST),
        ("Response A's final answer is B.", LOST),
        ("The worse answer is A.", LOST),
        # doubt and denial
        ("Response A is not better.", LOST),
        ("Response A might be better.", LOST),
        ("Response A seems better.", LOST),
        ("Verdict: A\nThough Response B could be better.", LOST),
        ("If brevity matters, the verdict is A", LOST),
        ("Response A is better at tone.", LOST),
        ("Verdict: neither", LOST),
        ("Verdict: both", LOST),
        ("Both answers are good.", LOST),
        # refusals and nothing
        ("I'm sorry, but I can't compare these answers.", LOST),
        ("As an AI, I have no preference.", LOST),
        ("", LOST),
        (" \n\n ", LOST),
        ("???", LOST),
        ("A > B", LOST),
        # other scripts
        ("Ｖｅｒｄｉｃｔ：Ｂ", B),
        ("Verdict: В", LOST),  # a Cyrillic letter that only looks like B
        ("निर्णय: ए", LOST),
        # thinking aloud
        ("<think>Surely [[A]].</think>\nVerdict: B", B),
        ("<think>Surely [[A]].", LOST),
    ],
)
def test_awkward_answers(text: str, verdict: Verdict) -> None:
    found, reason = extract_verdict(text)
    assert found is verdict
    assert bool(reason) == (verdict is LOST)


def test_a_long_answer_is_read_in_time_and_one_without_an_end_is_not_read() -> None:
    for said, verdict in (("Verdict: A. ", A), ("Verdict: A or ", A), ("if Verdict: B ", LOST)):
        with within(30):
            assert extract_verdict(said * 5000)[0] is verdict
    assert extract_verdict(f"{'so ' * 40_000}\nVerdict: A") == (LOST, "too_long")
    assert extract_verdict(f"{'so ' * 40_000}</think>\nVerdict: A") == (A, "")


def test_a_verdict_that_is_swapped_reads_swapped() -> None:
    for text in ("Verdict: A", "I prefer Response A.", "[[A]]", "A", "Final answer: Response A"):
        assert extract_verdict(text)[0] is A
        assert extract_verdict(text.replace("A", "B"))[0] is B


def test_both_orders_become_one_verdict() -> None:
    expected = {(A, B): A, (B, A): B, (TIE, TIE): TIE}
    for shown in product((A, B, TIE, LOST), (A, B, TIE, LOST)):
        lost = LOST in shown
        assert combine(shown) is (LOST if lost else expected.get(shown, ODD))


# -- a chat model ----------------------------------------------------------------------------------


def scripted(rule: Callable[[str, str], str | Completion]) -> FakeEngine:
    """Answers each question by a rule on (answer shown as A, answer shown as B)."""

    def say(request: Request) -> str | Completion:
        (message,) = request.messages
        tail = message.content.partition("=== Answer A ===\n")[2]
        a, _, rest = tail.partition("\n\n=== Answer B ===\n")
        return rule(a, rest.partition("\n\n=== Your")[0])

    return FakeEngine(say, tokens=(100, 7))


def judge_of(engine: FakeEngine, folder: Path | None = None) -> ChatJudge:
    return ChatJudge(JudgeConfig(kind="chat", model="scripted", device="cpu"), folder, engine)


def longer_wins(a: str, b: str) -> str:
    return "Verdict: " + ("tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B")


def test_the_question_holds_conversation_and_both_answers_in_this_order() -> None:
    turns = (
        Message("system", "Be brief."),
        Message("user", "Hello {x}"),
        Message("assistant", "Yes?"),
        Message("user", "What is {}?"),
    )
    (asked,) = question(Query("q", turns), "first text {a}", "second text")
    parts = ["system: Be brief.", "user: Hello {x}", "assistant: Yes?", "user: What is {}?"]
    places = [asked.content.index(x) for x in (*parts, "first text {a}", "second text")]
    assert places == sorted(places)


def test_a_judge_without_bias_is_heard_in_both_orders() -> None:
    pairs = [
        Pair(query(), "long answer", "short"),
        Pair(query(), "s", "long"),
        Pair(query(), "ab", "xy"),
    ]
    found = judge_of(scripted(longer_wins)).compare_all(pairs)
    assert [j.verdict for j in found] == [A, B, TIE]
    assert found[0].shown == (A, B)
    assert (found[0].prompt_tokens, found[0].completion_tokens) == (200, 14)
    assert position_bias(found) == {"showings": 6, "decided": 4, "shown_first_wins": 0.5}


def test_a_judge_that_always_takes_the_first_is_inconsistent() -> None:
    found = judge_of(scripted(lambda a, b: "[[A]]")).compare_all([Pair(query(), "x", "y")])
    assert found[0].verdict is ODD
    report = judge_report(found)
    assert report["position"]["shown_first_wins"] == 1.0
    assert report["accuracy"] == 0.5


def test_equal_responses_tie_without_being_asked_about() -> None:
    engine = scripted(longer_wins)
    assert judge_of(engine).compare_all([Pair(query(), "x", "x")]) == [Judgement(TIE)]
    assert len(engine.asked) == 0


def test_answers_that_cannot_be_used_are_unparseable_and_say_why() -> None:
    answers: dict[str, str | Completion] = {
        "cut": Completion("", "Verdict: A", "length", 90, 512),
        "long": Completion("", "", PROMPT_TOO_LONG, 9000, 0),
        "mute": "No idea.",
        "torn": "Verdict: A or B",
    }
    judge = judge_of(scripted(lambda a, b: answers.get(a) or answers.get(b) or ""))
    found = judge.compare_all([Pair(query(), name, "other") for name in answers])
    assert {j.verdict for j in found} == {LOST}
    reasons = ["cut_off", PROMPT_TOO_LONG, "no_verdict", "ambiguous"]
    assert [j.reason for j in found] == reasons
    assert judge_report(found)["unparseable_because"] == dict.fromkeys(sorted(reasons), 1)
    assert judge_report(found)["accuracy"] is None


def test_one_unparseable_order_makes_the_pair_unparseable() -> None:
    judge = judge_of(scripted(lambda a, b: "Verdict: A" if a == "x" else "Hm."))
    assert judge.compare_all([Pair(query(), "x", "y")])[0].verdict is LOST


def test_a_killed_judge_goes_on_behind_its_last_chunk_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK", 4)
    pairs = [Pair(query(i), "x" * i, "y" * (9 - i)) for i in range(1, 8)]
    whole = judge_of(scripted(longer_wins), tmp_path / "whole").compare_all(pairs)

    def killed(a: str, b: str) -> str:
        if len(dying.asked) > 8:
            raise KeyboardInterrupt
        return longer_wins(a, b)

    dying = scripted(killed)
    with pytest.raises(KeyboardInterrupt):
        judge_of(dying, tmp_path / "cut").compare_all(pairs)
    engine = scripted(longer_wins)
    again = judge_of(engine, tmp_path / "cut").compare_all(pairs)
    assert len(engine.asked) == 14 - 8
    assert [j.verdict for j in again] == [j.verdict for j in whole]
    names = sorted(p.name for p in (tmp_path / "cut").glob("*/*"))
    assert names == [f"answers-{i:05d}.jsonl" for i in range(4)]
    engine = scripted(longer_wins)
    judge_of(engine, tmp_path / "cut").compare_all(pairs)
    assert len(engine.asked) == 0


def test_a_torn_file_of_answers_is_asked_again(tmp_path: Path) -> None:
    pairs = [Pair(query(), "xx", "y")]
    judge_of(scripted(longer_wins), tmp_path).compare_all(pairs)
    (path,) = tmp_path.glob("*/answers-00000.jsonl")
    path.write_text(path.read_text()[:-30])
    engine = scripted(longer_wins)
    assert judge_of(engine, tmp_path).compare_all(pairs)[0].verdict is A
    assert len(engine.asked) == 2
    assert len(list(path.parent.iterdir())) == 2


# -- a reward model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with one label, with the tokenizer of the tiny Llama family."""
    folder = make_checkpoint(tmp_path_factory.mktemp("reward"), "llama")
    config = LlamaConfig.from_pretrained(folder)
    config.num_labels = 1
    config.architectures = ["LlamaForSequenceClassification"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def reward_config(folder: Path, **more: Any) -> JudgeConfig:
    values = {"kind": "reward", "model": str(folder), "dtype": "float32", "device": "cpu", **more}
    return validate(JudgeConfig, values, "judge")


ANSWERS = ["Nectar.", "The bee eats nectar and pollen.", "Bricks and mortar, mostly.", "Milk"]


def test_scores_are_the_models_own_whatever_the_batch(reward_model: Path) -> None:
    judge = RewardJudge(reward_config(reward_model, batch_size=3), None)
    assert isinstance(judge, ScoringJudge)
    judge.check([])
    scores = judge.score_all([(query(), text) for text in ANSWERS])
    loaded = load_reward(str(reward_model), reward_config(reward_model).loading)
    for text, score in zip(ANSWERS, scores, strict=True):
        rendered = loaded.chat.tokenizer.apply_chat_template(
            [
                {"role": "user", "content": "What does the bee eat?"},
                {"role": "assistant", "content": text},
            ],
            tokenize=False,
        )
        ids = loaded.chat.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            expected = float(loaded.model(**ids).logits[0, 0])
        assert score == pytest.approx(expected, abs=1e-5)
    assert len({round(s, 3) for s in scores if s is not None}) == len(ANSWERS)


def test_the_better_score_wins_in_either_place(reward_model: Path) -> None:
    judge = RewardJudge(reward_config(reward_model), None)
    scores = judge.score_all([(query(), text) for text in ANSWERS])
    for (i, a), (k, b) in product(enumerate(ANSWERS), repeat=2):
        (found,) = judge.compare_all([Pair(query(), a, b)])
        left, right = scores[i], scores[k]
        assert left is not None
        assert right is not None
        assert found.verdict is (TIE if i == k else A if left > right else B)
        assert found.shown is None
        assert found.prompt_tokens > 0


def test_a_margin_makes_near_scores_tie(reward_model: Path) -> None:
    low, high = sorted(
        s for s in RewardJudge(reward_config(reward_model), None).score_all(
            [(query(), t) for t in ANSWERS[:2]]
        ) if s is not None
    )  # fmt: skip
    pair = Pair(query(), ANSWERS[0], ANSWERS[1])
    for margin, ties in ((0.9 * (high - low), False), (1.1 * (high - low), True)):
        judge = RewardJudge(reward_config(reward_model, tie_margin=margin), None)
        assert (judge.compare_all([pair])[0].verdict is TIE) == ties


def test_scores_are_stored_and_the_model_is_not_loaded_again(
    reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = reward_config(reward_model)
    first = RewardJudge(config, tmp_path).score_all([(query(), t) for t in ANSWERS])

    def never(*args: Any) -> Any:
        raise AssertionError("loaded again")

    monkeypatch.setattr("selfsteer.judges.reward.load_reward", never)
    assert RewardJudge(config, tmp_path).score_all([(query(), t) for t in ANSWERS]) == first


def test_a_response_beyond_the_context_has_no_score(reward_model: Path) -> None:
    judge = RewardJudge(reward_config(reward_model), None)
    long = "nectar " * 2000
    assert judge.score_all([(query(), long), (query(), "Nectar.")])[0] is None
    (found,) = judge.compare_all([Pair(query(), "Nectar.", long)])
    assert (found.verdict, found.reason) == (LOST, "too_long")


def test_what_is_no_reward_model_is_refused(reward_model: Path, tmp_path: Path) -> None:
    chat = make_checkpoint(tmp_path / "chat", "llama")
    with pytest.raises(ArtifactError, match=r"2 labels.*chat:MODEL"):
        RewardJudge(reward_config(chat), None).check([])
    config = json.loads((chat / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (chat / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((reward_model / "tokenizer.json").read_text())
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    other = shutil.copytree(reward_model, tmp_path / "other")
    last = len(load_reward(str(reward_model), reward_config(reward_model).loading).chat.tokenizer)
    tokenizer["added_tokens"] += [
        {"id": last + i, "content": f"<more-{i}>", **dict.fromkeys(flags, False)}
        for i in range(5000)
    ]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ArtifactError, match="do not belong together"):
        load_reward(str(other), reward_config(other).loading)
    with pytest.raises(ArtifactError, match=r"lacks the weights score\.weight"):
        load_reward(str(chat), reward_config(chat).loading)


def test_a_score_that_is_no_number_is_an_error(reward_model: Path, tmp_path: Path) -> None:
    loaded = load_reward(str(reward_model), reward_config(reward_model).loading)
    with torch.no_grad():
        loaded.model.score.weight.fill_(3e38)  # their sum overflows
    loaded.model.save_pretrained(tmp_path)
    loaded.chat.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NumericsError, match="not finite"):
        RewardJudge(reward_config(tmp_path), None).score_all([(query(), "Nectar.")])


# -- labels ----------------------------------------------------------------------------------------


def labels(path: Path, *lines: dict[str, Any]) -> HumanJudge:
    path.write_text(dump_lines(lines))
    return HumanJudge(path)


def verdicts(judge: HumanJudge, *pairs: Pair) -> list[Verdict]:
    return [j.verdict for j in judge.compare_all(pairs)]


def test_a_label_counts_for_its_two_texts_in_either_order_and_for_no_others(tmp_path: Path) -> None:
    judge = labels(
        tmp_path / "l.jsonl",
        {"id": "q0", "first": "Nectar.", "second": "Bricks.", "verdict": "first"},
        {"id": "q1", "pair": pair_digest("Honey.", "Tin."), "preferred": "Honey."},
        {"id": "q2", "pair": pair_digest("Fish.", "Mice."), "verdict": "tie"},
        {"id": "q3", "first": "a", "second": "b", "verdict": None},
    )
    judge.check([])
    assert verdicts(
        judge,
        Pair(query(0), "Nectar.", "Bricks."),
        Pair(query(0), "Bricks.", "Nectar."),
        Pair(query(1), "Tin.", "Honey."),
        Pair(query(2), "Mice.", "Fish."),
    ) == [A, B, B, TIE]
    found = judge.compare_all(
        [
            Pair(query(0), "Nectar!", "Bricks."),
            Pair(query(1), "Nectar.", "Bricks."),
            Pair(query(3), "a", "b"),
        ]
    )
    assert [(j.verdict, j.reason) for j in found] == [(LOST, "no_label")] * 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"first": "a", "second": "b", "verdict": "first"}, "needs the id"),
        ({"id": "q", "first": "a", "second": "b", "verdict": "better"}, "is not first, second"),
        ({"id": "q", "first": "a", "second": "b", "verdict": ["first"]}, "is not first, second"),
        ({"id": "q", "first": "a", "second": "a", "verdict": "first"}, "two equal responses"),
        ({"id": "q", "first": "a", "verdict": "first"}, "is not a label"),
        ({"id": "q", "pair": "0" * 16, "verdict": "first"}, "needs the preferred response"),
    ],
)
def test_lines_that_are_no_labels(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        labels(tmp_path / "l.jsonl", line).check([])


def test_labels_that_contradict_each_other_or_their_pair_are_errors(tmp_path: Path) -> None:
    one = {"id": "q0", "first": "a", "second": "b", "verdict": "first"}
    same = {"id": "q0", "first": "b", "second": "a", "verdict": "second"}
    assert verdicts(labels(tmp_path / "l", one, same), Pair(query(), "a", "b")) == [A]
    with pytest.raises(DataError, match="line 2 contradicts"):
        labels(tmp_path / "l", one, {**same, "verdict": "first"}).check([])
    odd = labels(tmp_path / "l", {"id": "q0", "pair": pair_digest("a", "b"), "preferred": "c"})
    with pytest.raises(DataError, match="neither of the two"):
        odd.compare_all([Pair(query(), "a", "b")])
    with pytest.raises(DataError, match="holds no label"):
        labels(tmp_path / "l", {**one, "verdict": None}).check([])


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("chat", "needs a model"),
        ("human", "needs a path"),
        ("oracel", "'oracle', 'checks', 'chat', 'reward', 'principles' or 'human'"),
        ({"kind": "oracle", "model": "m"}, "model has no effect"),
        ({"kind": "chat", "model": "m", "tie_margin": 0.1}, "tie_margin has no effect"),
        ({"kind": "reward", "model": "m", "temperature": 0.1}, "temperature has no effect"),
        ({"kind": "human", "path": "p", "modle": "m"}, "did you mean 'model'"),
    ],
)
def test_settings_that_a_judge_has_no_use_for(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(JudgeConfig, {"kind": value} if isinstance(value, str) else value, "judge")


def test_a_judge_can_be_named_in_one_word() -> None:
    for text, values in (
        ("oracle", {"kind": "oracle"}),
        ("chat:org/model", {"kind": "chat", "model": "org/model"}),
        ("reward:a:b", {"kind": "reward", "model": "a:b"}),
        ("human:l.jsonl", {"kind": "human", "path": "l.jsonl"}),
    ):
        assert JudgeConfig.model_validate(text) == JudgeConfig.model_validate(values)


def test_fingerprints_follow_labels_and_weights_not_their_paths(
    reward_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text("{}\n")
    human = JudgeConfig(kind="human", path=str(path))
    before = identity(human)
    path.write_text('{"a": 1}\n')
    assert identity(human) != before
    moved = shutil.copytree(reward_model, tmp_path / "moved")
    one, other = (identity(reward_config(f)) for f in (reward_model, moved))
    assert one == other
    assert identity(reward_config(moved, tie_margin=0.5)) != one
    (moved / "model.safetensors").write_bytes(b"other")
    assert identity(reward_config(moved)) != one
    with pytest.raises(ConfigError, match="there is no file"):
        load_judge(JudgeConfig(kind="human", path=str(tmp_path / "none")))


# -- agreement -------------------------------------------------------------------------------------


def test_kappa_by_hand() -> None:
    """[[20, 5], [10, 15]]: p_o = 35/50, p_e = (25·30 + 25·20)/50² = 0.5, κ = 0.2/0.5 = 0.4."""
    assert cohen_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert cohen_kappa(np.array([[5, 0], [0, 5]])) == 1.0
    assert cohen_kappa(np.array([[0, 5], [5, 0]])) == -1.0
    assert math.isnan(cohen_kappa(np.array([[5, 0], [0, 0]])))
    assert math.isnan(cohen_kappa(np.zeros((2, 2))))


def judgements(*verdicts: Verdict) -> list[Judgement]:
    return [Judgement(v) for v in verdicts]


def test_agreement_shows_every_class_and_kappa_with_and_without_the_lost() -> None:
    """Ten pairs: 4 A/A, 2 B/B, 1 A/B, 1 tie/A, 2 lost/lost.

    All: p_o = 8/10; margins A 5 and 5, B 2 and 3, tie 1 and 0, lost 2 and 2:
    p_e = (25 + 6 + 0 + 4)/100 = 0.35; κ = 0.45/0.65.
    Without the lost, 8 pairs: p_o = 6/8, p_e = (25 + 6)/64, κ = (48 − 31)/(64 − 31).
    """
    first = judgements(*[A] * 4, B, B, A, TIE, LOST, LOST)
    second = judgements(*[A] * 4, B, B, B, A, LOST, LOST)
    found = agreement(first, second, np.random.default_rng(0), 300)
    assert found["classes"] == list(CLASSES)
    assert found["table"] == [
        [4, 1, 0, 0, 0],
        [0, 2, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 2],
    ]
    assert found["same"] == 0.8
    kappa, low, high = found["kappa"]
    assert kappa == pytest.approx(0.45 / 0.65)
    assert low < kappa <= high <= 1
    assert found["parsed"]["pairs"] == 8
    assert found["parsed"]["kappa"][0] == pytest.approx(17 / 33)
    again = agreement(first, second, np.random.default_rng(0), 300)
    assert again == found


def test_agreement_that_is_undefined_is_none() -> None:
    lost = judgements(LOST, LOST)
    found = agreement(lost, lost, np.random.default_rng(0))
    assert found["kappa"] is None
    assert found["parsed"] == {"pairs": 0, "kappa": None}
    json.dumps(found, allow_nan=False)


def test_position_bias_counts_showings_with_a_winner() -> None:
    """Shown (A, A), (A, B), (tie, B): the first shown wins 3 of 5."""
    shown = [(A, A), (A, B), (TIE, B)]
    found = position_bias([Judgement(combine(s), s) for s in shown])
    assert found == {"showings": 6, "decided": 5, "shown_first_wins": 0.6}
    assert position_bias(judgements(A, B)) is None
    one_sided = [Judgement(LOST, (A, LOST)), Judgement(A, (A, B))]
    assert position_bias(one_sided) == {"showings": 2, "decided": 2, "shown_first_wins": 0.5}
    assert position_bias([Judgement(TIE, (TIE, TIE))]) == {
        "showings": 2,
        "decided": 0,
        "shown_first_wins": None,
    }


def test_pair_digests_do_not_depend_on_the_order() -> None:
    assert pair_digest("a", "b") == pair_digest("b", "a") != pair_digest("a", "c")
    assert len(digest("a")) == 16
