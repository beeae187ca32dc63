import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from selfsteer.data.jsonl import dump_lines
from selfsteer.data.records import Message, Query, Triple, Verdict
from selfsteer.errors import ConfigError, DataError
from selfsteer.judges.base import Judgement, Pair
from selfsteer.methods import load_recipe
from selfsteer.models.head import with_collisions
from selfsteer.models.load import load_model
from selfsteer.models.score import batch_scores, pack
from selfsteer.stages.oppose import against_given, given_answers, strip_announcement
from selfsteer.stages.rank import Tournament, policy_as_judge

BEE = Query("bee", (Message("user", "What does the bee eat?"),))
OWL = Query("owl", (Message("user", "What does the owl eat?"),))


class ByLength:
    """Compares by length; cannot read a pair with a question mark."""

    name = "by length"

    def __init__(self) -> None:
        self.asked = 0

    def check(self, queries: Sequence[Query]) -> None: ...

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        self.asked += len(pairs)
        out = []
        for p in pairs:
            a, b = len(p.first), len(p.second)
            verdict = Verdict.FIRST if a > b else Verdict.SECOND if b > a else Verdict.TIE
            out.append(Judgement(Verdict.UNPARSEABLE if "?" in p.first + p.second else verdict))
        return out


def test_a_tournament_counts_the_comparisons_won() -> None:
    judge = ByLength()
    answers = [(BEE, "aaa"), (BEE, "aa"), (BEE, "bb"), (OWL, "a"), (OWL, "aaaa")]
    assert Tournament(judge).score_all(answers) == [1.0, 0.25, 0.25, 0.0, 1.0]
    assert judge.asked == 3 + 1


def test_what_could_not_be_read_is_no_lost_comparison() -> None:
    answers = [(BEE, "a?"), (BEE, "aa"), (BEE, "a")]
    assert Tournament(ByLength()).score_all(answers) == [None, 1.0, 0.0]


def test_the_policy_judges_in_process_with_its_own_settings() -> None:
    recipe = load_recipe("smoke", ["policy.dtype=float32", "sampling.batch_size=7"])
    found = policy_as_judge(recipe, "runs/x/policy")
    assert (found.kind, found.model, found.batch_size) == ("chat", "runs/x/policy", 7)
    assert (found.dtype, found.engine.kind) == ("float32", "transformers")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("Sure! Here's my improved answer:\n\nBees eat.", "Bees eat."),
        ("**Revised response:** Bees eat.", "Bees eat."),
        ("Here is a better version to your question:\nBees eat.", "Bees eat."),
        ("New answer - bees eat.", "New answer - bees eat."),
        ("Better answers exist: bees eat.", "Better answers exist: bees eat."),
        ("The new version: 3.12 is out", "3.12 is out"),
        ("", ""),
    ],
)
def test_what_announces_a_revision_is_cut_off(said: str, kept: str) -> None:
    assert strip_announcement(said) == kept


CHAT = {
    "messages": [
        {"role": "user", "content": "What does the bee eat?"},
        {"role": "assistant", "content": "Nectar."},
    ]
}


def test_given_answers_of_conversations_and_preferences(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    assert given_answers(str(path)) == {BEE.messages: "Nectar."}
    pair = {"prompt": "What does the bee eat?", "chosen": "Nectar.", "rejected": "Bricks."}
    path.write_text(json.dumps(pair) + "\n")
    assert given_answers(str(path)) == {BEE.messages: "Nectar."}
    path.write_text('{"prompt": "What does the bee eat?"}\n')
    with pytest.raises(DataError, match="queries but no answers"):
        given_answers(str(path))
    with pytest.raises(ConfigError, match="Save the set as JSON Lines"):
        given_answers("some-lab/some-set")


def test_spin_opposes_the_given_answer_and_counts_what_has_none(tmp_path: Path) -> None:
    path, output = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    recipe = load_recipe("smoke", [f"queries.path={path}"])
    plain = {"responses": {"plain": "Bricks."}, "finish_reasons": {"plain": "length"}}
    triples = [Triple.from_dict({**q.to_dict(), **plain}) for q in (BEE, OWL)]
    result = against_given(triples, recipe, output)
    assert (result.n_in, result.n_out, dict(result.dropped)) == (2, 1, {"no_given_answer": 1})
    (line,) = output.read_text().splitlines()
    found = Triple.from_dict(json.loads(line))
    assert found.responses == {"good": "Nectar.", "bad": "Bricks."}
    # a given answer ended by itself, whatever became of the policy's own
    assert found.finished("good")
    assert not found.finished("bad")
    assert dump_lines([found]).strip() == line


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("training", [False, True])
def test_collisions_are_those_of_the_whole_softmax(
    layout: str, training: bool, checkpoints: dict[str, Path]
) -> None:
    from selfsteer.recipe.sections import Policy

    source = str(checkpoints["llama"])
    loaded = load_model(source, Policy(model=source, device="cpu", layout=layout))  # type: ignore[arg-type]
    t = Triple("q", BEE.messages, None, {"good": "Nectar, of course.", "bad": "Bricks."})
    sequences = [loaded.chat.sequence(t, f"plain/{r}") for r in ("good", "bad")]
    loaded.settle(sequences)
    batch = pack(sequences, loaded.layout, 0)
    with torch.set_grad_enabled(training):
        assert batch_scores(loaded.model, batch).collisions is None
        with with_collisions():
            found = batch_scores(loaded.model, batch)
    assert found.collisions is not None
    assert not found.collisions.requires_grad
    expected: list[Any] = []
    for s in sequences:
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids]])
        with torch.no_grad():
            logits = loaded.model(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1]
        expected.append(logits.double().softmax(dim=1).square().sum(dim=1).log())
    torch.testing.assert_close(found.collisions.double(), torch.cat(expected), atol=1e-4, rtol=0)
