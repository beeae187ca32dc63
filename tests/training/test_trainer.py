import errno
import json
import math
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from selfsteer import stopping
from selfsteer.data.records import Message, Principles, Triple
from selfsteer.errors import ArtifactError, ConfigError, EngineError, NumericsError
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.merge import merge_adapter
from selfsteer.models.save import add_lora, save_model
from selfsteer.models.score import score_sequences
from selfsteer.objectives import BASES, OBJECTIVES, Objective
from selfsteer.recipe.sections import Lora, Optimisation, Policy, resolve_path
from selfsteer.stages.fit import encode
from selfsteer.training.examples import Example
from selfsteer.training.preference import PreferenceTask
from selfsteer.training.trainer import (
    COMPLETE_MARK,
    RowBudget,
    RowTrainer,
    complete_checkpoints,
    publish,
    train,
)
from tests.make import make_checkpoint

SETTINGS: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-3, "warmup": 0.0}


def make_triple(i: int) -> Triple:
    return Triple(
        f"t{i}",
        (Message("user", "What does the bear eat? " * (1 + i % 2) + f"{i}"),),
        Principles("Be right.", "Be wrong.", ("Accuracy",)),
        {
            "plain": f"Fish {i}.",
            "good": "The bear eats honey" + " and fish" * (i % 4) + ".",
            "bad": "Bricks" + "!" * (i % 5) + f" {i}",
        },
    )


def make_examples(
    loaded: LoadedModel, objective: Objective, count: int, shift: float = 0.0
) -> list[Example]:
    """Examples whose reference is the loaded model, moved by ``shift`` nats a token."""
    examples = []
    for i in range(count):
        sequences = {n: loaded.chat.sequence(make_triple(i), n) for n in objective.sequences}
        reference = None
        if objective.base.needs_reference:
            scores = score_sequences(loaded.model, list(sequences.values()))
            reference = {
                n: s + shift * (k + 1)
                for k, (n, s) in enumerate(zip(sequences, scores, strict=True))
            }
        examples.append(Example(f"t{i}", sequences, reference))
    return examples


def settings(**values: Any) -> Optimisation:
    return Optimisation(**{**SETTINGS, **values})


def run(
    loaded: LoadedModel,
    objective: Objective,
    examples: Sequence[Example],
    output: Path,
    **arguments: Any,
) -> list[dict[str, float]]:
    """Trains; returns the log lines."""
    logs: list[dict[str, float]] = []
    given = {"settings": settings(), "label": "test", "seed": 3, "on_log": logs.append, **arguments}
    chosen = given.pop("settings")
    given["budget"] = given.get("budget") or RowBudget(chosen.batch_size, chosen.row_tokens)
    train(loaded, PreferenceTask(loaded, objective, examples), chosen, output=output, **given)
    publish(output)
    return logs


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, float]:
    """Largest and mean absolute difference over all weights."""
    assert a.keys() == b.keys()
    gap = torch.cat([(a[k].double() - b[k].double()).abs().flatten() for k in a])
    return float(gap.max()), float(gap.mean())


# -- the loss -------------------------------------------------------------------------------------


def exact_loss(objective: Objective, examples: Sequence[Example], model: Any) -> list[float]:
    """Each query's loss from ALGORITHM's table, one sequence at a time, in float64."""
    base, beta, gamma, steer = objective.base.name, 0.1, 0.1, 0.1
    alpha, margin = 0.66, 0.5

    def total(e: Example, name: str) -> Tensor:
        s = e.sequences[name]
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids]])
        table = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
        first = len(s.prompt_ids)
        return sum(table[t - 1, ids[0, t]] for t in range(first, ids.shape[1]))  # type: ignore[return-value]

    losses = []
    for e in examples:
        logp = {n: float(total(e, n)) for n in e.sequences}
        size = {n: len(s.response_ids) for n, s in e.sequences.items()}
        mean = {n: logp[n] / size[n] for n in logp}
        ref = {n: float(v.double().sum()) for n, v in (e.reference or {}).items()}

        def pair(
            a: str,
            b: str,
            logp: dict[str, float] = logp,
            mean: dict[str, float] = mean,
            ref: dict[str, float] = ref,
            size: dict[str, int] = size,
        ) -> float:
            def log_sigmoid(x: float) -> float:
                return -math.log1p(math.exp(-x))

            if base == "simpo":
                return -log_sigmoid(beta * (mean[a] - mean[b]) - margin)
            if base == "orpo":
                odds = [mean[n] - math.log(1 - math.exp(mean[n])) for n in (a, b)]
                return -mean[a] - beta * log_sigmoid(odds[0] - odds[1])
            h = (logp[a] - logp[b]) - (ref[a] - ref[b])
            if base == "sigmoid":
                return -log_sigmoid(beta * h)
            if base == "hinge":
                return max(0.0, 1 - beta * h)
            h = (mean[a] - mean[b]) - (ref[a] / size[a] - ref[b] / size[b])
            return (h - 1 / (2 * beta)) ** 2

        plus = ("good/good", "good/bad")
        minus = ("bad/plain", "bad/good")
        if objective.name == "pbaa":
            loss = pair("plain/good", "plain/bad")
        elif objective.name == "sso-online":
            gate = 1 / (1 + math.exp(alpha * mean["plain/good"] + (1 - alpha) * mean["plain/bad"]))
            loss = pair("plain/good", "plain/bad") + gate * steer * (pair(*plus) + pair(*minus))
        else:
            halves = {
                "sso": (plus, minus),
                "sso-plus-only": (plus,),
                "sso-minus-only": (minus,),
                "sso-direct-minus": (plus, ("bad/bad", "bad/good")),
            }[objective.name]
            loss = sum(pair(*half) - gamma * mean[half[0]] for half in halves)
        losses.append(loss)
    return losses


def make_trainer(
    loaded: LoadedModel, objective: Objective, examples: Sequence[Example], folder: Path
) -> RowTrainer:
    task = PreferenceTask(loaded, objective, examples)
    return RowTrainer(loaded, task, settings(), budget=RowBudget(8, 16_384), work=folder, seed=0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_of_a_batch_equals_the_float64_recomputation(
    load: Callable[..., LoadedModel],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    name: str,
    base: str,
) -> None:
    loaded = load("llama")
    objective = Objective.named(name, base=base)
    examples = make_examples(loaded, objective, 3, shift=0.05)
    with torch.no_grad():
        found, _ = PreferenceTask(loaded, objective, examples).loss(loaded.model, examples)
    exact = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float64).eval()
    with torch.no_grad():
        expected = exact_loss(objective, examples, exact)
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_response_that_is_cut_in_two_contexts_is_one_truncated_response(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded, objective = load("llama"), Objective.named("sso-online")
    triple = make_triple(3)
    whole = {name: loaded.chat.sequence(triple, name) for name in objective.sequences}
    limit = min(len(whole["good/good"]), len(whole["bad/good"])) - 1
    assert limit >= max(len(s) for n, s in whole.items() if not n.endswith("/good"))
    (example,), dropped, truncated = encode(loaded, [triple], objective, limit, tmp_path)
    cut = example.sequences
    assert len(cut["good/good"]) == len(cut["bad/good"]) == limit
    assert (example.id, dropped, truncated) == (triple.id, {}, 1)


def test_logged_loss_and_metrics_are_means_over_the_queries_of_a_step(
    load: Callable[..., LoadedModel], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Five queries in rows of 2, 2, 1: means of means would weigh the last one double."""
    loaded = load("qwen2")
    objective = Objective.named("pbaa")
    examples = make_examples(loaded, objective, 5, shift=0.05)
    exact = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2"], dtype=torch.float64).eval()
    with torch.no_grad():
        expected = exact_loss(objective, examples, exact)
    logs = run(loaded, objective, examples, tmp_path / "m", budget=RowBudget(6, 10_000, 2))
    (line,) = [entry for entry in logs if "loss" in entry]
    assert line["step"] == 1
    assert line["loss"] == pytest.approx(sum(expected) / 5, abs=1e-4)
    # β·h from the loss itself: -log σ(β h) = l  ⇔  β h = -log(e^l - 1)
    margins = [-math.log(math.expm1(value)) for value in expected]
    assert line["rewards/margins"] == pytest.approx(sum(margins) / 5, abs=1e-4)
    assert line["rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 5)


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [16, 13], ids=["whole-steps", "incomplete-last-step"])
@pytest.mark.parametrize(
    ("name", "base"), [("pbaa", "sigmoid"), ("sso", "sigmoid"), ("sso-online", "ipo")]
)
def test_one_query_eight_times_is_eight_queries_once(
    load: Callable[..., LoadedModel], tmp_path: Path, name: str, base: str, count: int
) -> None:
    objective = Objective.named(name, base=base)
    start = load("llama").model.state_dict()
    found = []
    for row_queries in (1, 8, 3):
        loaded = load("llama")
        examples = make_examples(loaded, objective, count, shift=0.05)
        folder = tmp_path / str(row_queries)
        budget = RowBudget(8, 10_000, row_queries)
        logs = run(loaded, objective, examples, folder, budget=budget)
        assert [line["step"] for line in logs if "loss" in line] == [1, 2]
        found.append((weights(folder), [line["loss"] for line in logs if "loss" in line]))
    moved = differences(start, found[1][0])
    assert moved[1] > 1e-4, "nothing was trained"
    for other in (found[0], found[2]):
        largest, mean = differences(found[1][0], other[0])
        assert largest < 2e-5
        assert mean < 2e-7
        assert other[1] == pytest.approx(found[1][1], rel=1e-4)


class TooSmall:
    """Runs out of memory, as CUDA does, in any forward of more tokens than it has room for."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.rows: list[int] = []
        own = model.forward

        def forward(*args: Any, tree_row: Any = None, **kwargs: Any) -> Any:
            if tree_row is not None and torch.is_grad_enabled():
                size = tree_row[0].shape[1]
                self.rows.append(size)
                if size > tokens:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            return own(*args, tree_row=tree_row, **kwargs)

        model.forward = forward


def trees(
    load: Callable[..., LoadedModel], objective: Objective, count: int = 16
) -> tuple[LoadedModel, list[Example]]:
    loaded = load("llama", layout="tree")
    examples = make_examples(loaded, objective, count, shift=0.05)
    loaded.settle([s for e in examples for s in e.sequences.values()])
    return loaded, examples


def test_too_little_memory_halves_the_rows_and_loses_nothing(
    load: Callable[..., LoadedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = Objective.named("sso")
    loaded, examples = trees(load, objective)
    expected = run(loaded, objective, examples, tmp_path / "roomy")
    whole = sum(e.tokens() for e in examples[:8])
    loaded, examples = trees(load, objective)
    small = TooSmall(loaded.model, whole // 3)
    found = run(loaded, objective, examples, tmp_path / "small")
    assert max(small.rows) > whole // 3, "the first row fitted: nothing was tried"
    assert capsys.readouterr().err.count("the GPU's memory is too small for a row of") in (1, 2)
    assert small.rows[-1] <= whole // 3
    largest, mean = differences(weights(tmp_path / "roomy"), weights(tmp_path / "small"))
    assert largest < 2e-5
    assert mean < 2e-7
    for a, b in zip(expected, found, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["rewards/margins/good"] == pytest.approx(a["rewards/margins/good"], abs=1e-5)


def test_running_out_of_memory_in_a_later_row_counts_nothing_twice(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """The first row's gradients and metrics are there already when the second one fails."""
    objective = Objective.named("sso")
    found = []
    for failing in (0, 2):
        loaded, examples = trees(load, objective, 8)
        own, calls = loaded.model.forward, [0]

        def forward(
            *args: Any,
            own: Any = own,
            calls: list[int] = calls,
            failing: int = failing,
            **kwargs: Any,
        ) -> Any:
            calls[0] += 1
            if calls[0] == failing:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return own(*args, **kwargs)

        loaded.model.forward = forward
        trainer = make_trainer(loaded, objective, examples, tmp_path)
        half = sum(e.tokens() for e in examples) * 2 // 3
        trainer.budget = RowBudget(8, half)
        loss = trainer.training_step(loaded.model, {"examples": examples})
        assert (trainer.budget.row_tokens < half) == (failing > 0)
        grads = {n: p.grad for n, p in loaded.model.named_parameters() if p.grad is not None}
        metrics = {n: float(t) / float(w) for n, (t, w) in trainer._metrics.items()}
        assert trainer._metrics["rewards/margins/good"][1] == 8
        found.append((float(loss), grads, metrics))
    (one, grads, metrics), (other, other_grads, other_metrics) = found
    assert other == pytest.approx(one, rel=1e-5)
    assert differences(grads, other_grads)[0] < 1e-4 * max(
        float(g.abs().max()) for g in grads.values()
    )
    for name in metrics.keys() - {"entropy", "mean_token_accuracy"}:  # sampled row by row
        assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name


def test_a_query_that_does_not_fit_at_all_is_an_error(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    objective = Objective.named("sso")
    loaded, examples = trees(load, objective)
    TooSmall(loaded.model, 10)
    with pytest.raises(EngineError, match="memory is too small for a row of"):
        run(loaded, objective, examples, tmp_path / "m")


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_entropy_and_accuracy_are_means_over_sampled_tokens(
    load: Callable[..., LoadedModel], tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsteer.models.head.STRIDE", 1)
    loaded = load("llama", layout=layout)
    objective = Objective.named("pbaa")
    examples = make_examples(loaded, objective, 8)
    entropies, hits = [], []
    for e in examples:
        for s in e.sequences.values():
            ids = torch.tensor([[*s.prompt_ids, *s.response_ids]])
            with torch.no_grad():
                table = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
            at = table[len(s.prompt_ids) - 1 : -1]
            entropies += (-(at.exp() * at).sum(-1)).tolist()
            hits += (at.argmax(-1) == torch.tensor(s.response_ids)).tolist()
    logs = run(loaded, objective, examples, tmp_path / "m", budget=RowBudget(8, 10_000, 3))
    assert logs[0]["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert logs[0]["mean_token_accuracy"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)


# -- resuming -------------------------------------------------------------------------------------


def stop_at(step: int) -> Callable[[dict[str, float]], None]:
    def on_log(line: dict[str, float]) -> None:
        if line["step"] == step:
            raise KeyboardInterrupt

    return on_log


RESUME: dict[str, Any] = {
    "settings": settings(save_every_steps=2, batch_size=2, epochs=2),
    "budget": RowBudget(2, 10_000, 1),
}


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8)], ids=["whole", "lora"])
@pytest.mark.parametrize("step", [4, 8], ids=["first-epoch", "second-epoch"])
def test_a_resumed_training_equals_an_uninterrupted_one(
    load: Callable[..., LoadedModel], tmp_path: Path, lora: Lora | None, step: int
) -> None:
    """9 examples, 2 a step, 2 epochs: 10 steps; checkpoints at 2, 4, 6 …"""
    objective = Objective.named("pbaa")
    arguments = {**RESUME, "lora": lora}

    def start() -> tuple[LoadedModel, Objective, list[Example]]:
        loaded = load("llama")
        return loaded, objective, make_examples(loaded, objective, 9, shift=0.05)

    straight = run(*start(), tmp_path / "straight", **arguments)
    with pytest.raises(KeyboardInterrupt):
        run(
            *start(),
            tmp_path / "broken",
            **{**arguments, "on_log": stop_at(step)},
        )
    assert not (tmp_path / "broken").exists()
    kept = complete_checkpoints(tmp_path / "broken.partial")
    assert [p.name for p in kept] == [f"checkpoint-{step - 2}"]
    resumed = run(*start(), tmp_path / "broken", **arguments)
    assert not (tmp_path / "broken.partial").exists()
    assert [line["step"] for line in resumed if "loss" in line] == list(range(step - 1, 11))
    for a, b in zip(resumed, straight[step - 2 :], strict=True):
        if "loss" in a:
            assert a["loss"] == b["loss"]
            assert a["learning_rate"] == b["learning_rate"]
    first, second = weights(tmp_path / "straight"), weights(tmp_path / "broken")
    assert differences(first, second) == (0.0, 0.0)
    assert differences(first, load("llama").model.state_dict())[1] > 1e-5


@pytest.mark.usefixtures("listening")
def test_asked_to_stop_it_saves_the_step_in_hand(
    load: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a checkpoint was not due for a thousand steps, no step is done twice."""
    objective, steps = Objective.named("pbaa"), list[int]()
    arguments: dict[str, Any] = {
        "settings": settings(batch_size=2, epochs=2, save_every_steps=1000)
    }

    def start() -> tuple[LoadedModel, Objective, list[Example]]:
        loaded = load("llama")
        return loaded, objective, make_examples(loaded, objective, 9, shift=0.05)

    run(*start(), tmp_path / "straight", **arguments)
    step = RowTrainer.training_step

    def counted(trainer: Any, *args: Any) -> Tensor:
        steps.append(trainer.state.global_step + 1)
        if steps in ([1, 2, 3], [*range(1, 11)]):
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *args)

    monkeypatch.setattr(RowTrainer, "training_step", counted)
    for last in (3, 10):
        with pytest.raises(KeyboardInterrupt):
            run(*start(), tmp_path / "stopped", **arguments)
        (kept,) = complete_checkpoints(tmp_path / "stopped.partial")
        assert kept.name == f"checkpoint-{last}"
        monkeypatch.setattr(stopping, "_asked", None)
    run(*start(), tmp_path / "stopped", **arguments)
    assert steps == list(range(1, 11))
    first, second = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert differences(first, second) == (0.0, 0.0)


def test_a_checkpoint_without_its_mark_is_ignored(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    objective = Objective.named("pbaa")
    loaded = load("llama")
    run(loaded, objective, make_examples(loaded, objective, 9, 0.05), tmp_path / "a", **RESUME)
    loaded = load("llama")
    examples = make_examples(loaded, objective, 9, 0.05)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, objective, examples, tmp_path / "b", **{**RESUME, "on_log": stop_at(3)})
    partial = tmp_path / "b.partial"
    (partial / "checkpoint-2" / COMPLETE_MARK).unlink()
    (partial / "checkpoint-8").mkdir()  # a kill while the first file was written
    (partial / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    assert complete_checkpoints(partial) == []
    loaded = load("llama")
    logs = run(loaded, objective, examples, tmp_path / "b", **RESUME)
    assert [line["step"] for line in logs if "loss" in line] == list(range(1, 11))
    assert differences(weights(tmp_path / "a"), weights(tmp_path / "b")) == (0.0, 0.0)


def test_only_the_wanted_number_of_checkpoints_is_kept(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    objective = Objective.named("pbaa")
    loaded = load("llama")
    examples = make_examples(loaded, objective, 9)
    with pytest.raises(KeyboardInterrupt):
        run(
            loaded,
            objective,
            examples,
            tmp_path / "m",
            **{**RESUME, "on_log": stop_at(10), "keep_checkpoints": 2},
        )
    found = [p.name for p in complete_checkpoints(tmp_path / "m.partial")]
    assert found == ["checkpoint-6", "checkpoint-8"]  # by number, not by name


def test_part_of_an_epoch_takes_part_of_the_steps(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """9 examples, 2 a step: 1.5 epochs of 5 steps are 8, and the rate ends at the cosine's end."""
    loaded = load("llama")
    objective = Objective.named("pbaa")
    examples = make_examples(loaded, objective, 9)
    half = settings(batch_size=2, epochs=1.5, save_every_steps=100)
    logs = run(loaded, objective, examples, tmp_path / "m", settings=half)
    rates = [line["learning_rate"] for line in logs if "loss" in line]
    assert rates == pytest.approx([5e-4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])


# -- numerics -------------------------------------------------------------------------------------


def test_a_nan_names_its_triple_and_keeps_the_checkpoint(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = load("llama")
    objective = Objective.named("pbaa")
    examples = make_examples(loaded, objective, 6)
    assert examples[4].reference is not None
    examples[4].reference["plain/bad"][1] = math.nan  # type: ignore[index]
    lines: list[dict[str, float]] = []
    with pytest.raises(NumericsError) as caught:
        run(
            loaded,
            objective,
            examples,
            tmp_path / "m",
            settings=settings(save_every_steps=1, batch_size=2, epochs=2),
            seed=1,
            on_log=lines.append,
        )
    steps = len(lines)
    assert 1 <= steps <= 2, "choose a seed that does not begin with the broken triple"
    assert f"nan at step {steps + 1} on the records t4." in str(caught.value)
    kept = complete_checkpoints(tmp_path / "m.partial")
    assert [p.name for p in kept] == [f"checkpoint-{steps}"]
    assert not (tmp_path / "m").exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = load("llama")
    objective = Objective.named("pbaa")
    examples = make_examples(loaded, objective, 6)
    lines: list[dict[str, float]] = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if len(lines) >= 2 else gradient

    next(loaded.model.parameters()).register_hook(poison)
    with pytest.raises(NumericsError, match="gradient became nan at step 3 on the records t"):
        run(
            loaded,
            objective,
            examples,
            tmp_path / "m",
            settings=settings(save_every_steps=1, batch_size=2, epochs=2),
            on_log=lines.append,
        )
    assert all(torch.isfinite(p).all() for p in loaded.model.parameters())
    assert not (tmp_path / "m").exists()
    assert [p.name for p in complete_checkpoints(tmp_path / "m.partial")] == ["checkpoint-2"]


def test_dropout_is_off_while_training(load: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """The reference is scored without it; the first loss is that of equal models."""
    folder = make_checkpoint(tmp_path / "start", "llama", attention_dropout=0.5)
    objective = Objective.named("pbaa")
    for layout in ("padded", "tree"):
        policy = Policy.model_validate({"model": "x", "device": "cpu", "layout": layout})
        loaded = load_model(str(folder), policy)
        assert loaded.model.model.layers[0].self_attn.attention_dropout == 0.5
        examples = make_examples(loaded, objective, 8)
        logs = run(loaded, objective, examples, tmp_path / layout)
        assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), layout
        assert weights(tmp_path / layout).keys() == weights(folder).keys()
        assert (
            AutoModelForCausalLM.from_pretrained(tmp_path / layout).config.attention_dropout == 0.5
        )


# -- adapters and precision -----------------------------------------------------------------------


def test_lora_begins_at_the_reference_and_saves_a_plain_checkpoint(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = load("mistral")
    objective = Objective.named("pbaa")
    examples = make_examples(loaded, objective, 8)
    start = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    logs = run(
        loaded,
        objective,
        examples,
        tmp_path / "m",
        lora=Lora(rank=4, alpha=8),
        settings=settings(epochs=3, learning_rate=1e-2),
    )
    losses = [line["loss"] for line in logs if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert "model.safetensors" in names
    assert {p.name for p in (tmp_path / "m" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
    }
    modules = json.loads((tmp_path / "m/adapter/adapter_config.json").read_text())["target_modules"]
    assert len(modules) > 4
    assert modules == sorted(modules), "the same bytes in every process"
    trained = weights(tmp_path / "m")
    assert trained.keys() == start.keys()
    changed = {k for k in start if not torch.equal(start[k], trained[k])}
    assert changed
    assert all("proj" in k for k in changed), "adapters sit on linear layers only"
    for k in changed:
        assert torch.linalg.matrix_rank(trained[k] - start[k], rtol=1e-3) <= 4


def test_merging_the_adapters_makes_the_saved_model(
    load: Callable[..., LoadedModel],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, objective = load("qwen2"), Objective.named("pbaa")
    examples = make_examples(loaded, objective, 4)
    lora = Lora(rank=2)
    run(
        loaded,
        objective,
        examples,
        tmp_path / "m",
        lora=lora,
        settings=settings(learning_rate=1e-2),
    )
    policy = Policy(model="x", dtype="float32")
    used = merge_adapter(tmp_path / "m" / "adapter", tmp_path / "merged", policy, None)
    assert used == str(checkpoints["qwen2"])
    merged, saved = weights(tmp_path / "merged"), weights(tmp_path / "m")
    assert merged.keys() == saved.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], saved[name], rtol=0, atol=1e-7)
    moved = tmp_path / "copy of the base"
    shutil.copytree(checkpoints["qwen2"], moved)
    merge_adapter(tmp_path / "m" / "adapter", tmp_path / "again", policy, str(moved))

    def full(model: Any, chat: Any, folder: Path, dtype: Any) -> None:
        (folder / "model.safetensors").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("selfsteer.models.merge.save_model", full)
        with pytest.raises(ArtifactError, match="disk is full"):
            merge_adapter(tmp_path / "m" / "adapter", tmp_path / "full", policy, str(moved))
    assert not list(tmp_path.glob("full*"))
    assert torch.equal(weights(tmp_path / "again")[name], merged[name])
    other = resolve_path("package:selfsteer.testbed/checkpoint")
    with pytest.raises(ConfigError, match=rf"other weights than .*testbed.*--base {used}"):
        merge_adapter(tmp_path / "m" / "adapter", tmp_path / "no", policy, other)
    with pytest.raises(ArtifactError, match=r"do not fit .*testbed.*--base"):
        merge_adapter(
            tmp_path / "m" / "adapter", tmp_path / "no", policy, other, other_weights=True
        )
    assert not list(tmp_path.glob("no*"))
    with pytest.raises(ConfigError, match="is there already"):
        merge_adapter(tmp_path / "m" / "adapter", tmp_path / "merged", policy, None)


def test_what_is_not_lora_cannot_be_merged(tmp_path: Path) -> None:
    policy = Policy(model="x")
    with pytest.raises(ArtifactError, match="holds no adapters"):
        merge_adapter(tmp_path, tmp_path / "out", policy, None)
    config = tmp_path / "adapter_config.json"
    config.write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(ArtifactError, match="type PROMPT_TUNING for CAUSAL_LM; only LORA"):
        merge_adapter(tmp_path, tmp_path / "out", policy, None)
    config.write_text('{"peft_type": "LORA"}')
    with pytest.raises(ArtifactError, match="does not name its base"):
        merge_adapter(tmp_path, tmp_path / "out", policy, None)


def test_quantised_weights_name_the_extra_that_is_missing() -> None:
    testbed = resolve_path("package:selfsteer.testbed/checkpoint")
    policy = Policy(model=testbed, device="cpu", lora=Lora(bits=4))
    with pytest.raises(ConfigError, match=r"selfsteer\[quant\]"):
        load_model(testbed, policy, bits=4)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nonsense"], "lora.targets does not fit Llama"),
        (["lm_head"], "output projection of Llama"),
    ],
)
def test_adapters_that_would_do_nothing_are_refused(
    load: Callable[..., LoadedModel], tmp_path: Path, targets: list[str], message: str
) -> None:
    objective = Objective.named("pbaa")
    loaded, examples = trees(load, objective, 2)
    with pytest.raises(ConfigError, match=message):
        run(loaded, objective, examples, tmp_path / "m", lora=Lora(rank=2, targets=targets))


def test_reference_is_the_model_with_its_adapters_off(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    objective = Objective.named("sso")
    (example,) = make_examples(loaded, objective, 1)
    assert example.reference is not None
    model = add_lora(loaded.model, Lora(rank=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    names = list(example.sequences)
    on = score_sequences(model, list(example.sequences.values()))
    with model.disable_adapter():
        off = score_sequences(model, list(example.sequences.values()))
    for name, a, b in zip(names, off, on, strict=True):
        torch.testing.assert_close(a, example.reference[name], rtol=0, atol=1e-5)
        assert float((b - a).abs().max()) > 0.1


def test_the_saved_model_is_the_trained_one_with_its_tokenizer(
    load: Callable[..., LoadedModel], tmp_path: Path, family: str
) -> None:
    loaded = load(family)
    objective = Objective.named("pbaa")
    examples = make_examples(loaded, objective, 8)
    run(loaded, objective, examples, tmp_path / "m")
    again = load_model(str(tmp_path / "m"), Policy(model="x", device="cpu"))
    assert again.chat.sequence(make_triple(2), "good/good") == loaded.chat.sequence(
        make_triple(2), "good/good"
    )
    sequences = list(examples[2].sequences.values())
    new, old = score_sequences(again.model, sequences), score_sequences(loaded.model, sequences)
    for a, b in zip(new, old, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert again.model.generation_config.do_sample is True


def test_bfloat16_is_close_to_float32(load: Callable[..., LoadedModel], tmp_path: Path) -> None:
    losses, states = {}, {}
    for dtype in ("float32", "bfloat16"):
        loaded = load("llama", dtype=dtype)
        objective = Objective.named("sso")
        examples = make_examples(loaded, objective, 8, shift=0.05)
        logs = run(loaded, objective, examples, tmp_path / dtype)
        losses[dtype] = logs[0]["loss"]
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
        states[dtype] = weights(tmp_path / dtype)
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert {v.dtype for v in states["bfloat16"].values()} == {torch.bfloat16}
    assert {v.dtype for v in states["float32"].values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path, dtype: str) -> None:
    folder = make_checkpoint(tmp_path / "tied", "gemma", tie_word_embeddings=True)
    policy = Policy.model_validate({"model": "x", "device": "cpu", "dtype": dtype})
    loaded = load_model(str(folder), policy)
    save_model(loaded.model, loaded.chat, tmp_path / "saved", loaded.dtype)
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    again = load_model(str(tmp_path / "saved"), policy).model
    assert again.lm_head.weight is again.model.embed_tokens.weight
    expected = loaded.model.lm_head.weight.to(loaded.dtype).float()
    assert torch.equal(again.lm_head.weight, expected)


def test_gradient_checkpointing_changes_nothing_but_memory(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    states = []
    for checkpointing in (False, True):
        loaded = load("qwen2")
        objective = Objective.named("pbaa")
        examples = make_examples(loaded, objective, 8, shift=0.05)
        folder = tmp_path / str(checkpointing)
        run(
            loaded,
            objective,
            examples,
            folder,
            settings=settings(gradient_checkpointing=checkpointing),
        )
        states.append(weights(folder))
    largest, mean = differences(*states)
    assert largest < 2e-5
    assert mean < 2e-7


def test_a_gradient_whose_norm_overflows_ends_the_training(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Each gradient is finite; clipping to norm 1 would make zeros of them and go on."""
    loaded, objective = load("llama"), Objective.named("pbaa")
    examples = make_examples(loaded, objective, 4)
    lines: list[dict[str, float]] = []
    loaded.model.get_input_embeddings().weight.register_hook(
        lambda g: torch.full_like(g, 1e30) if lines else g
    )
    with pytest.raises(NumericsError, match="grad_norm became inf at step 2 on the records t"):
        run(
            loaded,
            objective,
            examples,
            tmp_path / "m",
            settings=settings(save_every_steps=1, batch_size=2),
            on_log=lines.append,
        )
    assert len(lines) == 1
    assert [p.name for p in complete_checkpoints(tmp_path / "m.partial")] == ["checkpoint-1"]


def test_weights_that_overflow_are_not_a_checkpoint(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded, objective = load("llama"), Objective.named("pbaa")
    examples = make_examples(loaded, objective, 6)
    lines: list[dict[str, float]] = []

    def overflow(line: dict[str, float]) -> None:
        lines.append(line)
        if len(lines) == 2:
            next(loaded.model.parameters()).data.view(-1)[0] = math.inf

    with pytest.raises(NumericsError, match=r"1 of the .* became NaN or infinite at step 2 on the"):
        run(
            loaded,
            objective,
            examples,
            tmp_path / "m",
            settings=settings(save_every_steps=1, batch_size=2),
            on_log=overflow,
        )
    assert [p.name for p in complete_checkpoints(tmp_path / "m.partial")] == ["checkpoint-1"]
