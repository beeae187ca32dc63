"""Targets of tokens: what is kept, what the policy is charged for, and that it is all of it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from selfsteer.data.records import Principles, Triple
from selfsteer.models import head, tree
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.head import with_token_loss
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.score import batch_scores, pack
from selfsteer.models.teacher import Lesson, Teacher, lessons, targets
from selfsteer.objectives import ContrastObjective
from selfsteer.recipe.sections import Loading
from tests.make import make_checkpoint

OBJECTIVE = ContrastObjective()
TEXTS = ("The bee eats nectar.", "Fish, milk and mice; the cat eats them.", "No.")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_checkpoint(tmp_path_factory.mktemp("policy"), "llama")
    return load_model(str(folder), Loading(device="cpu"))


def answers(loaded: LoadedModel) -> list[list[EncodedSequence]]:
    principles = Principles("Be accurate.", "Do not reveal anything that helps.")
    triples = [
        Triple(str(i), ({"role": "user", "content": "Hi"},), principles, {"plain": text})  # type: ignore[arg-type]
        for i, text in enumerate(TEXTS)
    ]
    return [[loaded.chat.sequence(t, name) for name in OBJECTIVE.read] for t in triples]


def logps(loaded: LoadedModel, sequence: EncodedSequence) -> torch.Tensor:
    """Log-probs over the whole vocabulary at each token of the answer."""
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
    with torch.no_grad():
        return loaded.model(ids).logits[0, len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)


def taught(
    loaded: LoadedModel, folder: Path, *, top_k: int, coverage: float
) -> tuple[list[Lesson], dict[str, Any]]:
    made = Teacher(loaded, OBJECTIVE, top_k, coverage).teach(answers(loaded))
    save_file(made, folder / "targets.safetensors")
    return lessons(folder / "targets.safetensors"), made


def test_targets_are_those_of_the_model_in_three_contexts(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    found, made = taught(loaded, tmp_path, top_k=10_000, coverage=0.999999)
    assert [a.tokens for a in found] == [len(a[0].response_ids) for a in answers(loaded)]
    for lesson, answer in zip(found, answers(loaded), strict=True):
        plain, good, bad = (logps(loaded, s) for s in answer)
        wanted = OBJECTIVE.target(plain, good, bad)
        got = targets([(lesson, lesson.tokens)])
        known = got.logq > -1e3
        torch.testing.assert_close(got.logq[known], wanted.gather(1, got.ids)[known])
        said = torch.tensor(answer[0].response_ids).unsqueeze(1)
        reward = OBJECTIVE.reward(*(p.gather(1, said) for p in (plain, good, bad)))[:, 0]
        torch.testing.assert_close(
            made["reward"][lesson.first : lesson.first + lesson.tokens], reward
        )


def test_as_few_entries_are_kept_as_cover_the_mass_everywhere(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    found, made = taught(loaded, tmp_path, top_k=10_000, coverage=0.9)
    for lesson, answer in zip(found, answers(loaded), strict=True):
        three = [logps(loaded, s) for s in answer]
        every = torch.stack([*three, OBJECTIVE.target(*three)])
        got = targets([(lesson, lesson.tokens)])
        for t in range(lesson.tokens):
            ids = got.ids[t][got.logq[t] > -1e3]
            covered = every[:, t, ids].exp().sum(-1)
            assert covered.min() >= 0.9 - 1e-5
            assert every[:, t, ids[:-1]].exp().sum(-1).min() < 0.9  # the last one was needed
    assert made["covered"].min() >= 0.9 - 1e-5


def test_a_bound_on_entries_shows_in_what_is_covered(loaded: LoadedModel, tmp_path: Path) -> None:
    _, made = taught(loaded, tmp_path, top_k=2, coverage=0.99)
    assert made["kept"].max() == 2
    assert made["covered"].min() < 0.99


def test_of_tokens_with_too_few_entries_those_that_would_do_are_counted(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    _, few = taught(loaded, tmp_path, top_k=2, coverage=0.99)
    _, made = taught(loaded, tmp_path, top_k=10_000, coverage=0.99)
    assert not len(made["needed"])
    assert few["needed"].tolist() == made["kept"][few["covered"] < 0.99].tolist()


@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_loss_and_gradients_are_those_of_whole_logits(
    loaded: LoadedModel, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 3)  # several chunks, one of them cut short
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    found, _ = taught(loaded, tmp_path, top_k=50, coverage=0.95)
    sequences = [a[0] for a in answers(loaded)]
    wanted = targets([(lesson, lesson.tokens) for lesson in found])
    model = loaded.model
    expected = torch.cat([_naive(loaded, s) for s in sequences])
    whole = wanted.divergence(OBJECTIVE, expected, 0)
    whole.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    if layout == "tree":
        tree.install(model)
    try:
        with with_token_loss(partial(wanted.divergence, OBJECTIVE)):
            losses = batch_scores(model, pack(sequences, layout, 0)).logps
        losses.sum().backward()
    finally:
        tree.uninstall(model)
    torch.testing.assert_close(losses, whole, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)
    model.zero_grad()


def _naive(loaded: LoadedModel, sequence: EncodedSequence) -> torch.Tensor:
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
    return loaded.model(ids).logits[0, len(sequence.prompt_ids) - 1 : -1]


def test_an_answer_cut_short_has_the_targets_of_its_beginning(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    found, _ = taught(loaded, tmp_path, top_k=50, coverage=0.95)
    whole, part = targets([(found[1], found[1].tokens)]), targets([(found[1], 3)])
    width = part.ids.shape[1]
    assert torch.equal(part.ids, whole.ids[:3, :width])
