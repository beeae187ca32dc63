import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer import score_records
from selfsteer.data.records import Message, Principles, Triple
from selfsteer.errors import DataError
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.score import batch_logps, pad, score_sequences, sums_by_row
from selfsteer.models.store import ScoreStore
from selfsteer.recipe.sections import Policy
from tests.make import make_checkpoint

SEQUENCES = (
    "plain/good",
    "plain/bad",
    "good/good",
    "good/bad",
    "bad/plain",
    "bad/good",
    "bad/bad",
)


def make_triple(i: int, **values: Any) -> Triple:
    """Prompts and responses of quite different lengths; every third bad response is cut off."""
    return Triple(
        f"t{i}",
        (Message("user", "What does the bear eat? " * (1 + i % 3)),),
        Principles("Be right. " * (1 + i % 2), "Be wrong."),
        {
            "plain": "Fish, I think.",
            "good": "The bear eats honey" + " and fish" * (i % 4) + ".",
            "bad": "Né." + " Bricks!" * (3 * i % 7),
        },
        {"bad": "length"} if i % 3 == 0 else {},
    )


TRIPLES = [make_triple(i) for i in range(5)]


def exact_logps(model: Any, sequence: EncodedSequence) -> Tensor:
    """One sequence alone, float64, all logits, log-softmax over all positions."""
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    table = torch.log_softmax(logits, dim=-1)
    first = len(sequence.prompt_ids)
    return torch.stack([table[t - 1, ids[0, t]] for t in range(first, ids.shape[1])])


def exact_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()


def test_scores_equal_an_unbatched_float64_recomputation(
    loaded: LoadedModel, checkpoints: dict[str, Path], family: str
) -> None:
    exact = exact_model(checkpoints[family])
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[family])
    chat = ChatFormat(tokenizer)
    found = score_records(loaded.model, tokenizer, TRIPLES, SEQUENCES, batch_size=2)
    assert list(found) == list(SEQUENCES)
    for name, (sums, lengths) in found.items():
        expected = [exact_logps(exact, chat.sequence(t, name)) for t in TRIPLES]
        assert sums.dtype == torch.float64
        assert lengths.dtype == torch.int64
        assert lengths.tolist() == [len(e) for e in expected]
        means = [float(e.mean()) for e in expected]
        assert (sums / lengths).tolist() == pytest.approx(means, abs=1e-5)
        totals = [float(e.sum()) for e in expected]
        assert sums.tolist() == pytest.approx(totals, rel=1e-5, abs=1e-5)
    # far from uniform, so that a wrong position or target cannot pass
    spread = found["plain/good"][0] / found["plain/good"][1]
    assert float(spread.std()) > 0.01


def test_per_token_scores_equal_the_recomputation(
    loaded: LoadedModel, checkpoints: dict[str, Path], family: str
) -> None:
    exact = exact_model(checkpoints[family])
    sequences = [loaded.chat.sequence(t, "good/bad") for t in TRIPLES]
    for piece, s in zip(score_sequences(loaded.model, sequences), sequences, strict=True):
        assert piece.dtype == torch.float32
        torch.testing.assert_close(piece.double(), exact_logps(exact, s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_sequences_longer_than_the_attention_window(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / name, name, sliding_window=8)
    exact = exact_model(folder)
    loaded = load_model(str(folder), Policy(model=str(folder), device="cpu"))
    sequences = [loaded.chat.sequence(t, "plain/good") for t in TRIPLES]
    assert min(map(len, sequences)) > 16
    for piece, s in zip(score_sequences(loaded.model, sequences), sequences, strict=True):
        torch.testing.assert_close(piece.double(), exact_logps(exact, s), rtol=1e-5, atol=1e-5)


def test_scores_depend_on_neither_batch_nor_order_nor_neighbours(loaded: LoadedModel) -> None:
    tokenizer = loaded.chat.tokenizer
    whole = score_records(loaded.model, tokenizer, TRIPLES, SEQUENCES)
    for batch_size in (1, 3, 100):
        other = score_records(loaded.model, tokenizer, TRIPLES, SEQUENCES, batch_size=batch_size)
        for name in SEQUENCES:
            torch.testing.assert_close(other[name][0], whole[name][0], rtol=0, atol=1e-4)
            assert torch.equal(other[name][1], whole[name][1])
    order = [4, 2, 0, 3, 1]
    turned = score_records(
        loaded.model, tokenizer, [TRIPLES[i] for i in order], tuple(reversed(SEQUENCES))
    )
    for name in SEQUENCES:
        torch.testing.assert_close(turned[name][0], whole[name][0][order], rtol=0, atol=1e-4)
    (alone, _) = score_records(loaded.model, tokenizer, TRIPLES[3:4], ["bad/plain"])["bad/plain"]
    assert alone.item() == pytest.approx(whole["bad/plain"][0][3].item(), abs=1e-4)


def test_max_length_scores_the_beginning_of_the_response(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    chat, t = loaded.chat, TRIPLES[3]
    whole = chat.sequence(t, "plain/good")
    (tokens,) = score_sequences(loaded.model, [whole])
    limit = len(whole.prompt_ids) + 4
    sums, lengths = score_records(
        loaded.model, chat.tokenizer, [t], ["plain/good"], max_length=limit
    )["plain/good"]
    assert lengths.tolist() == [4]
    assert sums.item() == pytest.approx(tokens[:4].double().sum().item(), abs=1e-5)
    with pytest.raises(DataError, match="t3"):
        score_records(
            loaded.model, chat.tokenizer, [t], ["plain/good"], max_length=len(whole.prompt_ids)
        )


def test_errors_name_what_is_missing(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    bare = Triple("t9", (Message("user", "Hi"),), None, {"good": "Yes."})
    arguments = (loaded.model, loaded.chat.tokenizer, [bare])
    with pytest.raises(DataError, match="t9 has no bad response"):
        score_records(*arguments, ["plain/bad"])
    with pytest.raises(DataError, match="t9 has no principles"):
        score_records(*arguments, ["bad/good"])
    with pytest.raises(ValueError, match="layout 'packed'"):
        score_records(*arguments, ["plain/good"], layout="packed")
    with pytest.raises(ValueError, match="context"):
        score_records(loaded.model, loaded.chat.tokenizer, TRIPLES, ["odd/good"])
    score_records(*arguments, ["plain/good"])  # what is not asked for may be absent


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(load: Callable[..., LoadedModel], training: bool) -> None:
    loaded = load("llama")
    loaded.model.train(training)
    score_records(loaded.model, loaded.chat.tokenizer, TRIPLES[:1], ["plain/good"])
    assert loaded.model.training is training


def test_the_models_mode_is_restored_after_an_error(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    loaded.model.train()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    loaded.model.lm_head.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        score_records(loaded.model, loaded.chat.tokenizer, TRIPLES[:1], ["plain/good"])
    assert loaded.model.training


def test_no_gradient_is_recorded_while_scoring(load: Callable[..., LoadedModel]) -> None:
    loaded = load("qwen2")
    scores = score_records(loaded.model, loaded.chat.tokenizer, TRIPLES[:1], ["plain/good"])
    assert not scores["plain/good"][0].requires_grad


def test_gradient_flows_through_batch_logps(load: Callable[..., LoadedModel]) -> None:
    """Against autograd through the full logits of each sequence alone."""
    loaded = load("mistral")
    sequences = [loaded.chat.sequence(t, "plain/good") for t in TRIPLES[:3]]
    weight = loaded.model.lm_head.weight
    batch_logps(loaded.model, pad(sequences, 0)).sum().backward()
    found = weight.grad.clone()
    weight.grad = None
    for s in sequences:
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids]])
        table = torch.log_softmax(loaded.model(input_ids=ids).logits[0], dim=-1)
        first = len(s.prompt_ids)
        table[range(first - 1, len(s) - 1), ids[0, first:]].sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-4)


def test_sums_by_row_adds_in_float64() -> None:
    """16777216 + 1 + 1 is 16777216 when added in float32."""
    values = torch.tensor([16777216.0, 1.0, 5.0, 1.0])
    sums = sums_by_row(values, torch.tensor([0, 0, 2, 0]), 3)
    assert sums.tolist() == [16777218.0, 0.0, 5.0]


# -- the store ------------------------------------------------------------------------------------


def poison(loaded: LoadedModel) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was asked")

    loaded.model.forward = fail


def encoded(loaded: LoadedModel, count: int = 5) -> list[EncodedSequence]:
    return [loaded.chat.sequence(t, n) for t in TRIPLES[:count] for n in ("plain/good", "bad/bad")]


def test_store_computes_each_sequence_once(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = load("llama")
    sequences = encoded(loaded)
    first = ScoreStore(tmp_path, "m1").score(loaded, sequences, label="x")
    direct = score_sequences(loaded.model, sequences)
    for a, b in zip(first, direct, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    poison(loaded)
    again = ScoreStore(tmp_path, "m1").score(loaded, sequences[::-1] + sequences[:1], label="x")
    for a, b in zip(again, [*first[::-1], first[0]], strict=True):
        assert torch.equal(a, b)


def test_store_asks_only_for_what_is_missing(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = load("llama")
    sequences = encoded(loaded)
    store = ScoreStore(tmp_path, "m1")
    store.score(loaded, sequences[:4], label="x")
    asked: list[int] = []
    plain = loaded.model.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        asked.append(len(kwargs["input_ids"]))
        return plain(*args, **kwargs)

    count.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    loaded.model.forward = count
    found = ScoreStore(tmp_path, "m1").score(loaded, sequences, label="x")
    assert sum(asked) == len(sequences) - 4
    loaded.model.forward = plain
    for a, b in zip(found, score_sequences(loaded.model, sequences), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [0, 10, -7])
def test_store_recomputes_what_a_truncated_file_held(
    load: Callable[..., LoadedModel], tmp_path: Path, size: int
) -> None:
    loaded = load("llama")
    sequences = encoded(loaded)
    first = ScoreStore(tmp_path, "m1").score(loaded, sequences, label="x")
    (file,) = (tmp_path / "m1").glob("scores-*.npz")
    data = file.read_bytes()
    file.write_bytes(data[:size])
    again = ScoreStore(tmp_path, "m1").score(loaded, sequences, label="x")
    for a, b in zip(again, first, strict=True):
        assert torch.equal(a, b)
    poison(loaded)
    ScoreStore(tmp_path, "m1").score(loaded, sequences, label="x")


def test_store_recomputes_what_a_file_with_lost_values_held(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = load("llama")
    sequences = encoded(loaded)
    first = ScoreStore(tmp_path, "m1").score(loaded, sequences, label="x")
    (file,) = (tmp_path / "m1").glob("scores-*.npz")
    with np.load(file) as data:
        parts = dict(data)
    np.savez(file, **{**parts, "values": parts["values"][:-1]})
    again = ScoreStore(tmp_path, "m1").score(loaded, sequences, label="x")
    for a, b in zip(again, first, strict=True):
        assert torch.equal(a, b)


def test_store_never_uses_the_scores_of_another_model(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    llama = load("llama")
    sequences = encoded(llama)
    first = ScoreStore(tmp_path, llama.digest).score(llama, sequences, label="x")
    other = load("llama")
    with torch.no_grad():
        other.model.lm_head.weight.mul_(0.5)
    assert len(ScoreStore(tmp_path, "changed")) == 0
    second = ScoreStore(tmp_path, "changed").score(other, sequences, label="x")
    for a, b in zip(first, second, strict=True):
        assert float((a - b).abs().max()) > 0.01
    poison(llama)
    kept = ScoreStore(tmp_path, llama.digest).score(llama, sequences, label="x")
    for a, b in zip(kept, first, strict=True):
        assert torch.equal(a, b)


def test_model_digest_tells_weights_and_precision_apart(tmp_path: Path) -> None:
    one, two = (make_checkpoint(tmp_path / str(s), "llama", seed=s) for s in (1, 2))

    def digest(folder: Path, dtype: str) -> str:
        return load_model(
            str(folder), Policy.model_validate({"model": "x", "device": "cpu", "dtype": dtype})
        ).digest

    found = {digest(one, "float32"), digest(two, "float32"), digest(one, "bfloat16")}
    assert len(found) == 3
    assert digest(one, "float32") in found


def test_store_restores_the_models_mode(load: Callable[..., LoadedModel], tmp_path: Path) -> None:
    loaded = load("llama")
    loaded.model.train()
    ScoreStore(tmp_path, "m1").score(loaded, encoded(loaded, 1), label="x")
    assert loaded.model.training
