import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selfsteer.data.jsonl import dump_lines, read_shards
from selfsteer.data.records import Triple
from selfsteer.engines.base import Completion
from selfsteer.errors import ConfigError, DataError
from selfsteer.models.head import with_collisions
from selfsteer.models.load import load_model
from selfsteer.models.score import batch_scores, pack
from selfsteer.recipe.sections import JudgeConfig, Loading, Sampling
from selfsteer.run.folder import RunFolder, read_dropped
from selfsteer.run.stage import Artifact
from selfsteer.stages import oppose
from selfsteer.stages.oppose import (
    GivenAnswer,
    Improve,
    OpposeGiven,
    Relabel,
    given_answers,
    strip_announcement,
)
from tests.fakes import FakeEngine, FakeJudge, Said, answer_with, longer
from tests.make import query, triple, write_jsonl

BEE = query(id="bee")
OWL = query("What does the owl eat?", "owl")


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


def test_given_answers_of_conversations_and_preferences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    assert given_answers(str(path)) == {BEE.messages: GivenAnswer("Nectar.")}
    pair = {"prompt": "What does the bee eat?", "chosen": "Nectar.", "rejected": "Bricks."}
    path.write_text(json.dumps(pair) + "\n")
    assert given_answers(str(path)) == {BEE.messages: GivenAnswer("Nectar.")}
    known = {"finish_reasons": {"chosen": "length"}, "reasoning": {"chosen": "Hm.</think>"}}
    path.write_text(json.dumps(pair | known) + "\n")
    cut_off = GivenAnswer("Nectar.", "length", "Hm.</think>")
    assert given_answers(str(path)) == {BEE.messages: cut_off}
    asked, *_ = CHAT["messages"]
    sides = {k: [asked, {"role": "assistant", "content": pair[k]}] for k in ("chosen", "rejected")}
    of_good = {key: {"good": said["chosen"]} for key, said in known.items()}
    labelled = {"prompt": pair["prompt"], "completion": "Nectar.", "label": True}
    for row in (sides | known, CHAT | of_good, labelled | of_good):
        path.write_text(json.dumps(row) + "\n")
        assert given_answers(str(path)) == {BEE.messages: cut_off}
    assert not capsys.readouterr().err
    path.write_text(json.dumps(CHAT | {"finish_reason": "length"}) + "\n")
    assert given_answers(str(path)) == {BEE.messages: GivenAnswer("Nectar.")}
    assert "1 answers say how they ended in a way that is not read" in capsys.readouterr().err
    path.write_text('{"ask": "What does the bee eat?", "answer": "Nectar."}\n')
    assert given_answers(str(path), {"ask": "question"}) == {BEE.messages: GivenAnswer("Nectar.")}
    path.write_text('{"prompt": "What does the bee eat?"}\n')
    with pytest.raises(DataError, match="queries but no answers"):
        given_answers(str(path))
    with pytest.raises(ConfigError, match="Save the set as JSON Lines"):
        given_answers("some-lab/some-set")


def plain_answers(run: RunFolder, **answers: tuple[str, str]) -> Artifact:
    """Samples of a policy: id → its text and finish reason."""
    texts = {q.id: q.text for q in (BEE, OWL)}
    rows = [
        triple(i, text=texts[i], plain=said).to_dict() | {"finish_reasons": {"plain": reason}}
        for i, (said, reason) in answers.items()
    ]
    return Artifact(write_jsonl(run / "samples.jsonl", *rows))


def test_spin_opposes_the_given_answer_and_counts_what_has_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    answers = Artifact(write_jsonl(tmp_path / "a.jsonl", CHAT))
    samples = plain_answers(run, bee=("Bricks.", "length"), owl=("Mice.", "stop"))
    stage = OpposeGiven(samples, answers, Sampling())
    result = run.execute(stage)
    assert (result.n_in, result.n_out, dict(result.dropped)) == (2, 1, {"no_given_answer": 1})
    (line,) = (run / stage.outputs[0]).read_text().splitlines()
    found = Triple.from_dict(json.loads(line))
    assert found.responses == {"good": "Nectar.", "bad": "Bricks."}
    # a given answer of which nothing else is known ended by itself
    assert found.finished("good")
    assert not found.finished("bad")
    assert dump_lines([found]).strip() == line
    (lost,) = read_dropped(run / "opponents.dropped.jsonl")
    assert (lost.id, lost.reason) == ("owl", "no_given_answer")


def test_a_judge_says_which_answer_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It likes length and cannot read a question mark."""
    monkeypatch.setattr(oppose, "load_judge", lambda *_: FakeJudge(longer))
    rows = [
        triple("kept", good="Long.", bad="S."),
        replace(
            triple("swapped", good="S.", bad="Long."),
            finish_reasons={"bad": "length"},
            reasoning={"good": "Hm.</think>"},
        ),
        triple("equal", good="Aha.", bad="Oho."),
        triple("odd", good="What?", bad="S."),
    ]
    run = RunFolder(tmp_path)
    pairs = Artifact(write_jsonl(tmp_path / "pairs.jsonl", *(t.to_dict() for t in rows)))
    stage = Relabel(pairs, JudgeConfig(kind="oracle"), shard_size=3)
    result = run.execute(stage)
    assert (result.n_in, result.n_out) == (4, 2)
    assert result.dropped == {"tie": 1, "unparseable": 1}
    assert result.notes == {"swapped": 1}
    kept, swapped = map(Triple.from_dict, read_shards(run / stage.outputs[0]))
    assert kept == rows[0]
    assert swapped.responses == {"good": "Long.", "bad": "S."}
    assert swapped.finish_reasons == {"good": "length"}
    assert swapped.reasoning == {"bad": "Hm.</think>"}
    again = stage.run(run)
    assert again.notes == {"swapped": 1}, "counted again where the shards were there"


def test_an_improver_is_shown_the_answer_and_its_new_one_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, Said] = {
        "a": "Here is the improved answer: Nectar and pollen.",
        "b": ("Nectar, and also", "length"),
        "c": ("", "prompt_too_long"),
    }
    engine = answer_with(monkeypatch, FakeEngine(lambda r: said[r.id.rpartition("/")[2]]))
    run = RunFolder(tmp_path)
    rows = [triple(i, text=BEE.text, plain="Nectar.").to_dict() for i in said]
    samples = Artifact(write_jsonl(run / "samples.jsonl", *rows))
    result = run.execute(Improve(samples, Artifact(Path("m")), None, Sampling()))
    assert (result.n_in, result.n_out) == (3, 1)
    assert result.dropped == {"unfinished": 1, "prompt_too_long": 1}
    (pair,) = map(Triple.from_dict, read_shards(run / "improved"))
    assert pair.responses == {"good": "Nectar and pollen.", "bad": "Nectar."}
    shown = engine.asked[0].messages
    assert [m.role for m in shown] == ["user", "assistant", "user"]
    assert shown[1].content == "Nectar."
    assert [d.id for d in read_dropped(run / "improved.dropped.jsonl")] == ["b", "c"]
    kept = Improve(samples, Artifact(Path("m")), None, Sampling(keep_unfinished=True))
    assert kept.run(RunFolder(tmp_path / "again")).dropped == {"prompt_too_long": 1}


def test_thoughts_stay_with_the_answers_that_they_led_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Completion("", "Pollen.", "stop", 10, 5, "Better?</think>")
    engine = answer_with(monkeypatch, FakeEngine(lambda r: again))
    run = RunFolder(tmp_path)
    first = replace(
        triple("bee", text=BEE.text, plain="Nectar."), reasoning={"plain": "So.</think>"}
    )
    samples = Artifact(write_jsonl(run / "samples.jsonl", first.to_dict()))
    run.execute(Improve(samples, Artifact(Path("m")), None, Sampling(reasoning="keep")))
    (pair,) = map(Triple.from_dict, read_shards(run / "improved"))
    assert pair.responses == {"good": "Pollen.", "bad": "Nectar."}
    assert pair.reasoning == {"good": "Better?</think>", "bad": "So.</think>"}
    assert engine.asked[0].messages[1].content == "Nectar.", "the improver sees the answer alone"
    pair_row = {
        "prompt": BEE.text,
        "chosen": "Honey.",
        "rejected": "Bricks.",
        "reasoning": {"chosen": "Well.</think>"},
    }
    answers = Artifact(write_jsonl(tmp_path / "a.jsonl", pair_row))
    opposed = OpposeGiven(samples, answers, Sampling(reasoning="keep"))
    run.execute(opposed)
    (line,) = (run / opposed.outputs[0]).read_text().splitlines()
    both = {"good": "Well.</think>", "bad": "So.</think>"}
    assert Triple.from_dict(json.loads(line)).reasoning == both
    apart = RunFolder(tmp_path / "apart")
    OpposeGiven(samples, answers, Sampling()).run(apart)
    (line,) = (apart / "opponents.jsonl").read_text().splitlines()
    assert "good" not in Triple.from_dict(json.loads(line)).reasoning, "not where they are dropped"


def test_a_given_answer_that_was_cut_off_stays_so(tmp_path: Path) -> None:
    row = {
        "prompt": BEE.text,
        "chosen": "Nectar and",
        "rejected": "Bricks.",
        "finish_reasons": {"chosen": "length"},
    }
    run, kept = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "kept")
    answers = Artifact(write_jsonl(tmp_path / "a.jsonl", row))
    samples = plain_answers(RunFolder(tmp_path), bee=("Honey.", "stop"))
    result = OpposeGiven(samples, answers, Sampling()).run(run)
    assert (result.n_in, result.n_out, result.dropped) == (1, 0, {"unfinished": 1})
    (lost,) = read_dropped(run / "opponents.dropped.jsonl")
    assert isinstance(lost.record, dict)
    assert lost.record["responses"] == {"good": "Nectar and", "bad": "Honey."}
    OpposeGiven(samples, answers, Sampling(keep_unfinished=True)).run(kept)
    (line,) = (kept / "opponents.jsonl").read_text().splitlines()
    reasons = Triple.from_dict(json.loads(line)).finish_reasons
    assert reasons == {"good": "length", "bad": "stop"}


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("training", [False, True])
def test_collisions_are_those_of_the_whole_softmax(
    layout: str, training: bool, checkpoints: dict[str, Path]
) -> None:
    settings = Loading(device="cpu", layout=layout)  # type: ignore[arg-type]
    loaded = load_model(str(checkpoints["llama"]), settings)
    t = triple("q", text=BEE.text, good="Nectar, of course.", bad="Bricks.")
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
