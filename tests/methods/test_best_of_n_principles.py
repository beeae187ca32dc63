"""Ranked by principles: scores by hand, pairs of plain answers, nothing of the principles left."""

from pathlib import Path

import pytest
import torch

from selfsteer.data.records import Query, Triple
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.methods import load_recipe
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.load import load_model
from selfsteer.recipe.sections import Loading
from selfsteer.run.execute import execute
from selfsteer.stages.inputs import stored_preferences, stored_queries, stored_triples
from tests.make import SMALL, make_checkpoint


def test_a_run_makes_pairs_of_ranked_plain_answers(tmp_path: Path) -> None:
    recipe = load_recipe(
        "best-of-n-principles", [*SMALL, "ranking.samples=3", f"runs_dir={tmp_path}"]
    )
    execute(recipe, {"name": "given"}, until="preferences")
    folder = recipe.folder / "iteration-1"
    asked = {t.id: t for t in stored_triples(folder / "principles.jsonl")}
    competed = {q.id: q.extra["answers"] for q in stored_queries(folder / "ranked/candidates")}
    pairs = list(stored_preferences(folder / "ranked"))
    assert pairs
    for pair in pairs:
        assert pair.prompt == asked[pair.id].messages
        scores = dict(zip(competed[pair.id], pair.extra["scores"], strict=True))
        assert scores[pair.chosen] == max(scores.values())
        assert scores[pair.rejected] == min(scores.values())
        assert "principles" not in pair.extra


PRINCIPLES = {"good": "Be accurate.", "bad": "Do not reveal anything that helps."}


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_a_score_is_the_mean_of_the_clipped_contrast(tmp_path: Path, clip: float) -> None:
    source = str(make_checkpoint(tmp_path / "policy", "llama"))
    loading = Loading(device="cpu")
    query = Query.from_dict({"id": "q", "prompt": "Hi", "principles": PRINCIPLES})
    texts = ("The bee eats nectar.", "No.")
    ranker = PrincipleContrast(source, loading, clip=clip, folder=tmp_path / "scores")
    found = ranker.score_all([(query, text) for text in texts])
    loaded = load_model(source, loading)
    for text, score in zip(texts, found, strict=True):
        triple = Triple.from_dict({**query.to_dict(), "responses": {"plain": text}})
        good, bad = (
            whole_logps(loaded.model, loaded.chat.sequence(triple, f"{context}/plain"))
            for context in ("good", "bad")
        )
        expected = (good - bad).clamp(-clip, clip).mean()
        assert score == pytest.approx(float(expected), abs=1e-5)


def test_an_answer_that_does_not_fit_beside_a_principle_has_no_score(tmp_path: Path) -> None:
    source = str(make_checkpoint(tmp_path / "policy", "llama"))
    ranker = PrincipleContrast(source, Loading(device="cpu"), clip=0.2)
    query = Query.from_dict({"id": "q", "prompt": "Hi", "principles": PRINCIPLES})
    answers = [(query, "No. " * 9), (query, "No.")]
    assert None not in ranker.score_all(answers)
    short = Triple.from_dict({**query.to_dict(), "responses": {"plain": "No."}})
    longest = max(len(ranker.loaded.chat.sequence(short, name)) for name in ranker.read)
    ranker.loaded.model.config.max_position_embeddings = longest
    found = ranker.score_all(answers)
    assert found[0] is None
    assert found[1] is not None


def whole_logps(model: torch.nn.Module, sequence: EncodedSequence) -> torch.Tensor:
    """Log-probs of the response's tokens, from the logits of the whole sequence."""
    prompt, said = sequence.prompt_ids, sequence.response_ids
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(said).unsqueeze(1))[:, 0]
