"""NaN and infinities from a model: whose they are is said, and nothing is stored or saved."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selfsteer.data.records import Query, Triple
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.errors import NumericsError, named
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.models.load import LoadedModel
from selfsteer.models.save import add_lora, save_model
from selfsteer.models.score import score_sequences, settle_layout
from selfsteer.models.store import scored
from selfsteer.models.teacher import Teacher
from selfsteer.objectives import ContrastObjective
from selfsteer.recipe.sections import Lora
from tests.make import triple

TRIPLES = [
    triple("fine", "Order", plain="Nectar.", good="Nectar!"),
    triple("broken", "Order", plain="Nectar#", good="Nectar!"),
    triple("fine too", "Order", plain="Pollen.", good="Pollen!"),
]


def poison(loaded: LoadedModel, text: str = "#") -> LoadedModel:
    """The model, whose embedding of a character is NaN from now on."""
    (token,) = loaded.chat.tokenizer(text, add_special_tokens=False)["input_ids"]

    def broken(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill((given[0] == token).unsqueeze(-1), math.nan)

    loaded.model.get_input_embeddings().register_forward_hook(broken)
    return loaded


@pytest.fixture
def broken(load: Callable[..., LoadedModel]) -> LoadedModel:
    return poison(load("llama", layout="padded"))


def test_an_error_names_each_record_once_and_not_thousands() -> None:
    assert named(["a", "b", "a"]) == "the records a, b"
    assert named(map(str, range(40))).endswith("30, 31 and 8 more")


def test_scores_that_are_no_numbers_are_neither_returned_nor_stored(
    broken: LoadedModel, tmp_path: Path
) -> None:
    sequences = [broken.chat.sequence(t, "plain/plain") for t in TRIPLES]
    with pytest.raises(NumericsError, match=r"are NaN or infinite on the records broken\. ") as e:
        scored(tmp_path, broken, sequences, "scoring")
    assert e.value.exit_code == 3
    assert not list(tmp_path.rglob("*.npz"))
    with pytest.raises(NumericsError, match=r"collision.* on the records broken\. "):
        score_sequences(broken.model, sequences, collisions=True)
    with pytest.raises(NumericsError, match=r"on the records broken\. "):
        settle_layout(broken.model, "tree", sequences)


def test_nothing_is_ranked_with_them(broken: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsteer.models.load.load_model", lambda *a, **k: broken)
    judge = PrincipleContrast("policy", None, clip=1.0)  # type: ignore[arg-type]
    asked = [(_with_principles(t), t.responses["plain"]) for t in TRIPLES]
    with pytest.raises(NumericsError, match=r"on the records broken\. "):
        judge.score_all(asked)


def _with_principles(t: Triple) -> Query:
    assert t.principles is not None
    return Query(t.id, t.messages, {"principles": t.principles.to_dict()})


def test_a_teacher_has_no_target_that_is_no_number(broken: LoadedModel) -> None:
    objective = ContrastObjective()
    asked = [[broken.chat.sequence(t, name) for name in objective.read] for t in TRIPLES]
    with pytest.raises(NumericsError, match=r"Targets of the teacher .* on the records broken\. "):
        Teacher(broken, objective, 64, 0.99).teach(asked)


def test_a_teacher_whose_principles_rule_the_same_token_out_is_refused_too(
    load: Callable[..., LoadedModel],
) -> None:
    """−inf less −inf: the difference of the contexts is no number."""
    loaded, objective = load("llama", layout="padded"), ContrastObjective()
    head = loaded.model.get_output_embeddings()
    head.weight.data[7] = math.inf
    asked = [[loaded.chat.sequence(t, name) for name in objective.read] for t in TRIPLES[:1]]
    with pytest.raises(NumericsError, match=r"on the records fine\. "):
        Teacher(loaded, objective, 64, 0.99).teach(asked)


def test_sampling_from_no_distribution_names_the_requests(broken: LoadedModel) -> None:
    asked = [
        Request(name, tuple(triple(text=text).messages), 1)
        for name, text in (("fine", "Hi."), ("broken", "Hi#"), ("fine too", "Bee."))
    ]
    sampling = SamplingParams(0.7, 0.8, 4)
    with pytest.raises(NumericsError, match=r"logits became .* on the records broken\. "):
        answers(TransformersEngine(broken), asked, sampling)
    assert len(answers(TransformersEngine(broken), asked[::2], sampling)) == 2


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["whole", "adapters"])
def test_weights_that_are_no_numbers_are_not_saved(
    load: Callable[..., LoadedModel], tmp_path: Path, lora: Lora | None
) -> None:
    loaded = load("llama")
    model = add_lora(loaded.model, lora) if lora else loaded.model
    name, weight = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    weight.data.view(-1)[3] = math.nan
    with pytest.raises(NumericsError, match=f"1 of the .* weights in {name} are NaN"):
        save_model(model, loaded.chat, tmp_path / "m", torch.float32)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nor_are_those_that_a_lower_precision_cannot_hold(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = load("llama")
    next(loaded.model.parameters()).data.view(-1)[3] = 1e5
    with pytest.raises(NumericsError, match=r"are NaN or infinite as torch\.float16"):
        save_model(loaded.model, loaded.chat, tmp_path / "m", torch.float16)
    assert not list(tmp_path.rglob("*.safetensors"))
