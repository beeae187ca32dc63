"""A model that thinks: thoughts that end by themselves, and thoughts that the budget ends."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer.data.records import Message, Query
from selfsteer.engines.answers import answers, read_answers
from selfsteer.engines.base import Completion, Request, SamplingParams, completion
from selfsteer.engines.openai import read_reply
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.evaluation.questions import Answered, read_baseline, read_questions
from selfsteer.judges.reading import read_verdict
from selfsteer.models.load import load_chat, load_model
from selfsteer.recipe.sections import JudgedSet, Loading, Policy, Sampling
from selfsteer.stages.sample import Asking, Wanted, tokens_kept
from tests.fakes import FakeEngine
from tests.make import make_checkpoint, query, write_jsonl

HI = (Message("user", "Hi"),)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its prompts leave a block open; the end of that block, and of the turn, are likely tokens."""
    folder = make_checkpoint(tmp_path_factory.mktemp("thinker"), "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # new rows are random
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weight = model.lm_head.weight
        for token, like in (("</think>", 70), ("<|im_end|>", 80)):
            weight[tokenizer.convert_tokens_to_ids(token)] = 1.3 * weight[like]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_thinks_has_answers_without_thoughts(thinker: Path, tmp_path: Path) -> None:
    loaded = load_model(str(thinker), Policy(model=str(thinker), device="cpu"), inference=True)
    assert loaded.chat.opens_reasoning
    asked = [Request(f"q{i}", (Message("user", "Hi"),), i) for i in range(24)]
    store = tmp_path / "answers.jsonl"
    engine = TransformersEngine(loaded)
    found = answers(engine, asked, SamplingParams(1.0, 1.0, 24), store=store)
    assert read_answers(store) == (found, 0), "also once they are stored"
    lost = {c.missing for c in found.values()}
    assert {None, "unfinished_reasoning"} <= lost <= {None, "unfinished_reasoning", "no_answer"}
    for c in found.values():
        assert ("</think>" in c.reasoning) or c.missing
        assert "</think>" not in c.text.partition("</think>")[0]
        assert c.retokenised is not None
        if c.missing is None:
            assert c.text
            assert c.reasoning.rstrip().endswith("</think>")


def test_the_token_that_ends_the_turn_is_no_part_of_the_comparison(thinker: Path) -> None:
    loaded = load_model(str(thinker), Policy(model=str(thinker), device="cpu"), inference=True)
    chat = loaded.chat

    def made(text: str, *more: int) -> Completion:
        ids: Sequence[int] = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return completion("q", chat, [chat.end_of_turn], 7, [*ids, *more])

    whole = made("So.\n</think>\n\nThe bee.", chat.end_of_turn, 5)
    assert (whole.text, whole.finish_reason) == ("The bee.", "stop")
    assert (whole.retokenised, whole.special_tokens) == (False, False)
    assert made("So.</think>The bee.").finish_reason == "length"
    assert made("So").missing == "unfinished_reasoning"
    assert made("So", chat.end_of_turn).missing == "no_answer"
    again = made("</think>The bee <|im_start|>")
    assert (again.text, again.retokenised, again.special_tokens) == ("The bee", True, True)


def test_answers_that_train_as_other_tokens_are_counted_once_whatever_is_resumed(
    tmp_path: Path,
) -> None:
    def say(request: Request) -> Completion:
        number = int(request.id.rpartition("/")[2])
        if number == 5:
            return Completion("", "", "length", 1, 1, "<think>", False)
        known = None if number == 4 else number % 2 == 1
        return Completion("", "B", "stop", 1, 1, "", known, number == 3)

    engine = FakeEngine(say)
    asking = Asking[Query]([Wanted("plain", "m")], lambda q, r: q.messages, lambda q, said: q)
    queries = [query(id=str(i)) for i in range(6)]

    def run() -> dict[str, float]:
        how = Sampling(shard_size=2)
        result = asking.shards(queries, tmp_path / "s", lambda m: engine, how, seed=1, label="s")
        found: dict[str, float] = result.notes["sampled"]
        return found

    expected = {"answers": 4, "retokenised": 0.5, "special_tokens": 0.25}
    assert run() == expected
    assert run() == expected, "from the shards that are there"
    (tmp_path / "s" / "shard-00001.done.json").unlink()
    assert run() == expected
    assert len(engine.asked) == 8
    assert not tokens_kept([Completion("", "B", "stop", 1, 1)]), "a server knows no tokens"


@pytest.mark.parametrize(
    ("text", "reason", "verdict"),
    [
        ("Verdict: B", "stop", ("second", "")),
        ("", "length", ("unparseable", "unfinished_reasoning")),
        ("", "stop", ("unparseable", "no_answer")),
        ("Verdict: B", "length", ("unparseable", "cut_off")),
    ],
)
def test_a_judge_that_thinks_is_read_by_its_answer(
    text: str, reason: str, verdict: tuple[str, str]
) -> None:
    said = Completion("", text, reason, 1, 1, "<think>Verdict: A</think>" if text else "<think>A")
    assert read_verdict(vars(said)) == verdict


def test_a_question_that_was_only_thought_about_has_no_answer(tmp_path: Path) -> None:
    lost = Completion("a", "", "length", 1, 1, "<think>Hm")
    assert Answered("a", (), ()).then(lost).missing == "unfinished_reasoning"
    rows = [{"id": i, "prompt": f"Is it {i}?"} for i in "ab"]
    given = [
        {"id": "a", "response": "", "finish_reason": "length", "missing": lost.missing},
        {"id": "b", "response": "Yes.", "finish_reason": "stop"},
    ]
    judged = JudgedSet(
        style="alpaca-eval",
        questions=str(write_jsonl(tmp_path / "q.jsonl", *rows)),
        baseline=str(write_jsonl(tmp_path / "b.jsonl", *given)),
    )
    assert read_baseline(judged, read_questions(judged)) == {"b": "Yes."}
    assert json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])["missing"]


@pytest.mark.parametrize("begins", [False, True])
def test_a_served_answer_is_cut_at_a_closing_mark_where_a_prompt_may_open_thoughts(
    thinker: Path, tmp_path: Path, begins: bool
) -> None:
    folder = thinker if begins else make_checkpoint(tmp_path / "plain", "llama")
    said = "Write </think> at the end."
    message = {"role": "assistant", "content": said}
    body = {
        "choices": [{"message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5},
    }
    reply = read_reply(json.dumps(body).encode(), load_chat(str(folder), Loading()))
    assert reply.text == ("at the end." if begins else said)
