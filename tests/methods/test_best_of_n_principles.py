"""Ranked by principles: scores by hand, pairs of plain answers, nothing of the principles left."""

from pathlib import Path

import pytest
import torch

from selfsteer.data.records import Query, Triple
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.methods import load_recipe
from selfsteer.models.load import load_model
from selfsteer.models.score import score_records
from selfsteer.recipe.sections import Loading
from selfsteer.run.execute import execute
from selfsteer.stages.inputs import stored_preferences, stored_queries, stored_triples
from tests.make import make_checkpoint

SMALL = (
    "policy={model: 'package:selfsteer.testbed/checkpoint', threads: 1}",
    "queries={path: 'package:selfsteer.testbed/queries/align.jsonl', limit: 8}",
    "principles={mode: picked, features: random}",
    "sampling.max_new_tokens=64",
    "ranking.samples=3",
)


def test_a_run_makes_pairs_of_ranked_plain_answers(tmp_path: Path) -> None:
    recipe = load_recipe("best-of-n-principles", [*SMALL, f"runs_dir={tmp_path}"])
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


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_a_score_is_the_mean_of_the_clipped_contrast(tmp_path: Path, clip: float) -> None:
    source = str(make_checkpoint(tmp_path / "policy", "llama"))
    loading = Loading(device="cpu")
    principles = {"good": "Be accurate.", "bad": "Do not reveal anything that helps."}
    row = {"id": "q", "messages": [{"role": "user", "content": "Hi"}], "principles": principles}
    path = tmp_path / "asked.jsonl"
    path.write_text(str(row).replace("'", '"') + "\n")
    (query,) = stored_queries(path)
    texts = ("The bee eats nectar.", "No.")
    ranker = PrincipleContrast(source, loading, clip, tmp_path / "scores")
    found = ranker.score_all([(query, text) for text in texts])
    loaded = load_model(source, loading)
    for text, score in zip(texts, found, strict=True):
        triple = next(iter(stored_triples(path)))
        object.__setattr__(triple, "responses", {"plain": text})
        if clip > 1e6:  # sums of the whole, as the public scorer gives them
            names = ("good/plain", "bad/plain")
            sums = score_records(loaded.model, loaded.chat.tokenizer, [triple], names)
            (good, n), (bad, _) = (sums[name] for name in names)
            assert score == pytest.approx(float((good - bad) / n), abs=1e-5)
            continue
        ids = [loaded.chat.sequence(triple, name) for name in ("good/plain", "bad/plain")]
        gaps = torch.stack([_logps(loaded.model, *s_ids(s)) for s in ids])
        assert score == pytest.approx(
            float((gaps[0] - gaps[1]).clamp(-clip, clip).mean()), abs=1e-5
        )


def test_an_answer_that_does_not_fit_beside_a_principle_has_no_score(tmp_path: Path) -> None:
    source = str(make_checkpoint(tmp_path / "policy", "llama"))
    ranker = PrincipleContrast(source, Loading(device="cpu"), 0.2, tmp_path / "scores")
    principles = {"good": "Be accurate.", "bad": "Be odd."}
    query = Query.from_dict({"id": "q", "prompt": "Hi", "principles": principles})
    answers = [(query, "No. " * 9), (query, "No.")]
    assert None not in ranker.score_all(answers)
    short = Triple.from_dict({**query.to_dict(), "responses": {"plain": "No."}})
    longest = max(len(ranker.loaded.chat.sequence(short, name)) for name in ranker.read)
    ranker.loaded.model.config.max_position_embeddings = longest
    found = ranker.score_all(answers)
    assert found[0] is None
    assert found[1] is not None


def s_ids(sequence: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return sequence.prompt_ids, sequence.response_ids  # type: ignore[attr-defined]


def _logps(model: torch.nn.Module, prompt: tuple[int, ...], said: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(said).unsqueeze(1))[:, 0]
