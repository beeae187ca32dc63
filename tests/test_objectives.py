import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfsteer import Objective, steering_loss
from selfsteer.errors import ConfigError
from selfsteer.objectives import (
    BASES,
    NO_MASS,
    OBJECTIVES,
    Budget,
    ContrastMargin,
    ContrastObjective,
    SteeringLoss,
    TokenObjective,
    noise_margins,
    with_rest,
    wpo_weights,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "objectives.json").read_text())

NEEDS_REFERENCE = ("sigmoid", "ipo", "hinge")
ALL_SEQUENCES = (
    "plain/good",
    "plain/bad",
    "good/good",
    "good/bad",
    "bad/plain",
    "bad/good",
    "bad/bad",
)


def golden_batch() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    def column(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: torch.tensor(v[kind], dtype=dtype) for n, v in GOLDEN["sequences"].items()}

    return (
        column("policy", torch.float64),
        column("reference", torch.float64),
        column("length", torch.int64),
    )


def case_name(case: dict[str, Any]) -> str:
    flags = "".join(f"-{f}={case[f]}" for f in ("use_weight", "use_steer") if f in case)
    return f"{case['objective']}-{case['base']}{flags}"


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_query(values: dict[str, float]) -> dict[str, Tensor]:
    return {name: vector(value) for name, value in values.items()}


def pair_loss(
    policy: tuple[float, float],
    reference: tuple[float, float] | None,
    lengths: tuple[int, int] = (1, 1),
    **arguments: Any,
) -> float:
    names = ("plain/good", "plain/bad")
    out = steering_loss(
        Objective.named("pbaa", **arguments),
        one_query(dict(zip(names, policy, strict=True))),
        None if reference is None else one_query(dict(zip(names, reference, strict=True))),
        {n: torch.tensor([k]) for n, k in zip(names, lengths, strict=True)},
    )
    assert out.loss.item() == out.per_query.item()
    return out.loss.item()


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=case_name)
def test_golden_case_per_query_and_mean(case: dict[str, Any]) -> None:
    arguments = {k: v for k, v in case.items() if k not in ("objective", "per_query", "loss")}
    out = steering_loss(Objective.named(case["objective"], **arguments), *golden_batch())
    assert out.per_query.tolist() == pytest.approx(case["per_query"], abs=1e-9, rel=0)
    assert out.loss.item() == pytest.approx(case["loss"], abs=1e-9, rel=0)
    assert out.loss.dtype == torch.float64


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=case_name)
def test_reference_free_bases_give_the_same_loss_without_a_reference(case: dict[str, Any]) -> None:
    arguments = {k: v for k, v in case.items() if k not in ("objective", "per_query", "loss")}
    objective = Objective.named(case["objective"], **arguments)
    policy, _, lengths = golden_batch()
    if case["base"] in NEEDS_REFERENCE:
        with pytest.raises(ValueError, match="needs reference"):
            steering_loss(objective, policy, None, lengths)
    else:
        out = steering_loss(objective, policy, None, lengths)
        assert out.per_query.tolist() == pytest.approx(case["per_query"], abs=1e-9, rel=0)


def test_sigmoid_by_hand() -> None:
    """h = (-2 + 4) - (-3 + 3) = 2, β h = 1, loss = log(1 + e^-1) = 0.313262."""
    loss = pair_loss((-2, -4), (-3, -3), (7, 9), base="sigmoid", beta=0.5)
    assert loss == pytest.approx(0.31326168751822286, abs=1e-12)


def test_sigmoid_with_label_smoothing_by_hand() -> None:
    """-log σ(-1) = -log σ(1) + 1, so ε = 0.1 adds exactly 0.1 to 0.313262."""
    loss = pair_loss((-2, -4), (-3, -3), base="sigmoid", beta=0.5, label_smoothing=0.1)
    assert loss == pytest.approx(0.41326168751822286, abs=1e-12)


def test_ipo_by_hand_uses_means_per_token() -> None:
    """Means -2/2 = -1, -4/4 = -1, reference -3/2, -3/4: h = 0 + 0.75; (0.75 - 1)² = 0.0625."""
    assert pair_loss((-2, -4), (-3, -3), (2, 4), base="ipo", beta=0.5) == pytest.approx(0.0625)


@pytest.mark.parametrize(("beta", "expected"), [(0.25, 0.5), (0.5, 0.0), (1.0, 0.0)])
def test_hinge_by_hand(beta: float, expected: float) -> None:
    """h = 2: max(0, 1 - 2 β)."""
    loss = pair_loss((-2, -4), (-3, -3), (2, 4), base="hinge", beta=beta)
    assert loss == pytest.approx(expected)


def test_simpo_by_hand_uses_means_per_token_and_margin() -> None:
    """Means -1 and -2: β·1 - 0.5 = 1.5, loss = log(1 + e^-1.5) = 0.201413."""
    loss = pair_loss((-2, -8), None, (2, 4), base="simpo", beta=2.0)
    assert loss == pytest.approx(0.20141327798275246, abs=1e-12)
    without = pair_loss((-2, -8), None, (2, 4), base="simpo", beta=2.0, simpo_margin=0.0)
    assert without == pytest.approx(math.log1p(math.exp(-2)), abs=1e-12)


def test_orpo_by_hand() -> None:
    """p = 1/2 has odds 1, p = 1/4 has odds 1/3: σ(log 3) = 3/4, loss = log 2 + log 4/3."""
    policy = (3 * math.log(1 / 2), 2 * math.log(1 / 4))
    loss = pair_loss(policy, None, (3, 2), base="orpo", beta=1.0)
    assert loss == pytest.approx(math.log(8 / 3), abs=1e-12)


ONLINE_HALF = -math.log(3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 1.15),
        ({"use_weight": False}, 1.2),
        ({"use_steer": False}, 0.75),
        ({"use_weight": False, "use_steer": False}, 1.0),
        ({"steer": 1.0}, 2.5),
    ],
)
def test_online_loss_and_its_gate_by_hand(arguments: dict[str, Any], expected: float) -> None:
    """Policy = reference, so each L is log 2; both means are -log 3, so W = σ(log 3) = 3/4.

    All of it: 1 + 3/4 · 0.1 · 2 = 1.15 times log 2. Without W the steering terms stay; without
    the steering terms W multiplies the pair.
    """
    sums = {n: ONLINE_HALF * k for k, n in enumerate(ALL_SEQUENCES, 2)}
    lengths = {n: torch.tensor([k]) for k, n in enumerate(ALL_SEQUENCES, 2)}
    objective = Objective.named("sso-online", **arguments)
    out = steering_loss(objective, one_query(sums), one_query(sums), lengths)
    assert out.loss.item() == pytest.approx(expected * math.log(2), abs=1e-12)
    if arguments.get("use_weight", True):
        assert out.metrics["weight"].item() == pytest.approx(0.75, abs=1e-12)
    else:
        assert "weight" not in out.metrics


def test_gate_mixes_good_and_bad_by_alpha() -> None:
    """α = 1/4: -(1/4 · -4 log 3 + 3/4 · 0) = log 3, W = 3/4; only α tells the two apart."""
    means = {"plain/good": -4 * math.log(3), "plain/bad": 0.0}
    lengths = {n: torch.tensor([1]) for n in means}
    objective = Objective.named("sso-online", alpha=0.25, use_steer=False)
    out = steering_loss(objective, one_query(means), one_query(means), lengths)
    assert out.loss.item() == pytest.approx(0.75 * math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "losses", "nlls"),
    [
        ("pbaa", 1, ()),
        ("sso", 2, ("good/good", "bad/plain")),
        ("sso-plus-only", 1, ("good/good",)),
        ("sso-minus-only", 1, ("bad/plain",)),
        ("sso-direct-minus", 2, ("good/good", "bad/bad")),
    ],
)
def test_nll_is_mean_per_token_of_the_preferred(
    name: str, losses: int, nlls: tuple[str, ...]
) -> None:
    """Policy = reference: each L is log 2; the NLL of sequence k is its own distinct number."""
    per_token = {n: 0.5 + 0.1 * k for k, n in enumerate(ALL_SEQUENCES)}
    lengths = {n: torch.tensor([2 + k]) for k, n in enumerate(ALL_SEQUENCES)}
    sums = one_query({n: -per_token[n] * int(lengths[n]) for n in ALL_SEQUENCES})
    out = steering_loss(Objective.named(name, gamma=0.3), sums, sums, lengths)
    expected = losses * math.log(2) + 0.3 * sum(per_token[n] for n in nlls)
    assert out.loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("pbaa", {}, 2),
        ("sso", {}, 4),
        ("sso-plus-only", {}, 2),
        ("sso-minus-only", {}, 2),
        ("sso-direct-minus", {}, 4),
        ("sso-online", {}, 6),
        ("sso-online", {"use_weight": False}, 6),
        ("sso-online", {"use_steer": False}, 2),
    ],
)
def test_sequences_are_each_named_once(name: str, arguments: dict[str, Any], count: int) -> None:
    sequences = Objective.named(name, **arguments).sequences
    assert len(sequences) == len(set(sequences)) == count
    assert set(sequences) <= set(ALL_SEQUENCES)


def test_sequences_of_the_generator_loss_follow_equation_4() -> None:
    assert set(Objective.named("sso").sequences) == {
        "good/good",
        "good/bad",
        "bad/plain",
        "bad/good",
    }
    assert set(Objective.named("sso-direct-minus").sequences) == {
        "good/good",
        "good/bad",
        "bad/bad",
        "bad/good",
    }


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_query_counts_for_itself(name: str, base: str) -> None:
    objective = Objective.named(name, base=base)
    batch = golden_batch()
    whole = steering_loss(objective, *batch).per_query
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = steering_loss(objective, *({k: v[order] for k, v in t.items()} for t in batch))
    assert permuted.per_query.tolist() == pytest.approx(whole[order].tolist(), abs=1e-13)
    for i in range(5):
        single = steering_loss(objective, *({k: v[[i]] for k, v in t.items()} for t in batch))
        assert single.loss.item() == pytest.approx(whole[i].item(), abs=1e-13)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_that_of_the_value(name: str, base: str) -> None:
    objective = Objective.named(name, base=base, beta=0.2)
    policy, reference, lengths = ({k: v[:2] for k, v in t.items()} for t in golden_batch())
    names = objective.sequences

    def per_query(*values: Tensor) -> Tensor:
        out = steering_loss(objective, dict(zip(names, values, strict=True)), reference, lengths)
        return out.per_query

    inputs = tuple(policy[n].clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(per_query, inputs, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("use_steer", [True, False])
def test_detached_weight_changes_the_gradient_and_not_the_value(use_steer: bool) -> None:
    policy, reference, lengths = golden_batch()
    losses, gradients = [], []
    for detach in (False, True):
        objective = Objective.named("sso-online", use_steer=use_steer, detach_weight=detach)
        leaf = {k: v.clone().requires_grad_() for k, v in policy.items()}
        out = steering_loss(objective, leaf, reference, lengths)
        out.loss.backward()
        losses.append(out.loss.item())
        gradients.append(leaf["plain/good"].grad)
    assert losses[0] == losses[1]
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert (gradients[0] - gradients[1]).abs().min() > 1e-6


def test_detached_weight_scales_the_gradient_of_the_pair_loss() -> None:
    """W constant: the gradient of W·L is W times that of L."""
    policy, reference, lengths = golden_batch()
    gradients = []
    for name in ("sso-online", "pbaa"):
        leaf = {k: v.clone().requires_grad_() for k, v in policy.items()}
        objective = Objective.named(name, detach_weight=True, use_steer=False)
        steering_loss(objective, leaf, reference, lengths).loss.backward()
        found = leaf["plain/good"].grad
        assert found is not None
        gradients.append(found)
    good = policy["plain/good"] / lengths["plain/good"]
    bad = policy["plain/bad"] / lengths["plain/bad"]
    weight = 1 / (1 + torch.exp(0.66 * good + 0.34 * bad))
    torch.testing.assert_close(gradients[0], weight * gradients[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(-1e-9, -1.0), (-50.0, -1e-9), (-50.0, -50.0), (-1e-9, -1e-9)]
)
def test_orpo_is_stable_at_both_ends(chosen: float, rejected: float) -> None:
    """log-odds(m) = m - log(1 - e^m) with m bounded to ≤ -1e-7 inside the logarithm."""

    def log_odds(m: float) -> float:
        return m - math.log(-math.expm1(min(m, -1e-7)))

    expected = -chosen + 0.1 * math.log1p(math.exp(log_odds(rejected) - log_odds(chosen)))
    leaf = {
        "plain/good": vector(chosen).requires_grad_(),
        "plain/bad": vector(rejected).requires_grad_(),
    }
    ones = {n: torch.tensor([1]) for n in leaf}
    out = steering_loss(Objective.named("pbaa", base="orpo"), leaf, None, ones)
    assert out.loss.item() == pytest.approx(expected, rel=1e-9)
    out.loss.backward()
    assert all(torch.isfinite(v.grad).all() for v in leaf.values() if v.grad is not None)
    assert leaf["plain/good"].grad is not None
    assert leaf["plain/good"].grad.item() <= -1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    policy, reference, lengths = golden_batch()
    out = steering_loss(
        Objective.named(name),
        {k: v.to(dtype) for k, v in policy.items()},
        {k: v.to(dtype) for k, v in reference.items()},
        lengths,
    )
    exact = steering_loss(Objective.named(name), policy, reference, lengths)
    found = {out.loss.dtype, out.per_query.dtype, *(m.dtype for m in out.metrics.values())}
    assert found == {dtype}
    tolerance = {torch.float64: 0.0, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert out.loss.item() == pytest.approx(exact.loss.item(), abs=tolerance)


def test_keys_that_no_term_reads_are_ignored() -> None:
    policy, reference, lengths = golden_batch()
    plain = steering_loss(Objective.named("pbaa"), policy, reference, lengths)
    odd = {"bad/plain": vector(1.0), "else/where": torch.zeros(2, 3, dtype=torch.float64)}
    also = steering_loss(
        Objective.named("pbaa"),
        {**policy, **odd},
        {**reference, "bad/plain": vector(math.nan)},
        {**lengths, "bad/plain": torch.tensor([0])},
    )
    assert torch.equal(plain.per_query, also.per_query)
    assert plain.metrics == also.metrics


def drop(values: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in values.items() if k != name}


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_missing_sequence_is_named(kind: int) -> None:
    batch = list(golden_batch())
    batch[kind] = drop(batch[kind], "bad/plain")
    with pytest.raises(ValueError, match="bad/plain"):
        steering_loss(Objective.named("sso"), *batch)


def test_a_length_of_zero_is_an_error() -> None:
    policy, reference, lengths = golden_batch()
    lengths["good/bad"] = torch.tensor([11, 15, 0, 24, 49])
    with pytest.raises(ValueError, match="good/bad"):
        steering_loss(Objective.named("sso"), policy, reference, lengths)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("name", ["good/good", "bad/good"])
def test_unequal_shapes_are_an_error(kind: int, name: str) -> None:
    batch = list(golden_batch())
    batch[kind] = {**batch[kind], name: batch[kind][name][:1]}
    with pytest.raises(ValueError, match="shape"):
        steering_loss(Objective.named("sso"), *batch)


def test_a_scalar_or_a_matrix_is_an_error() -> None:
    policy, reference, lengths = golden_batch()
    for bad in (policy["plain/bad"].sum(), policy["plain/bad"].unsqueeze(1)):
        with pytest.raises(ValueError, match="plain/bad"):
            steering_loss(Objective.named("pbaa"), {**policy, "plain/bad": bad}, reference, lengths)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "dpo"},
        {"name": "pbaa", "base": "kto"},
        {"name": "pbaa", "beta": 0.0},
        {"name": "pbaa", "beta": -0.1},
        {"name": "pbaa", "beta": math.nan},
        {"name": "pbaa", "label_smoothing": 0.5},
        {"name": "pbaa", "label_smoothing": -0.1},
    ],
)
def test_unknown_names_and_impossible_constants_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Objective.named(**arguments)


def test_a_refused_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="sso-online"):
        Objective.named("dpo")
    with pytest.raises(ConfigError, match="orpo"):
        Objective.named("pbaa", base="kto")


def test_metrics_of_one_term_have_no_suffix() -> None:
    """Two queries, β = 0.5.

    chosen -2, -6 against reference -3, -3: rewards 0.5, -1.5, mean -0.5;
    rejected -4, -2 against -3, -3: rewards -0.5, 0.5, mean 0; margins 1, -2, mean -0.5;
    one of two is won; NLL per token 2/2 and 6/3, mean 1.5.
    """
    out = steering_loss(
        Objective.named("pbaa", beta=0.5),
        {"plain/good": vector(-2, -6), "plain/bad": vector(-4, -2)},
        {"plain/good": vector(-3, -3), "plain/bad": vector(-3, -3)},
        {"plain/good": torch.tensor([2, 3]), "plain/bad": torch.tensor([4, 4])},
    )
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(
        {
            "logps/chosen": -4.0,
            "logps/rejected": -3.0,
            "rewards/chosen": -0.5,
            "rewards/rejected": 0.0,
            "rewards/margins": -0.5,
            "rewards/accuracies": 0.5,
            "nll_loss": 1.5,
        }
    )


@pytest.mark.parametrize("base", ["ipo", "simpo", "orpo"])
def test_rewards_are_what_the_base_compares(base: str) -> None:
    """By sums -60 loses to -40; per token, -60/300 = -0.2 wins over -40/50 = -0.8.

    The reference has -90/300 = -0.3 and -35/50 = -0.7, which only ipo compares with.
    """
    objective = Objective.named("pbaa", base=base, beta=2.0)
    out = steering_loss(
        objective,
        {"plain/good": vector(-60), "plain/bad": vector(-40)},
        {"plain/good": vector(-90), "plain/bad": vector(-35)},
        {"plain/good": torch.tensor([300]), "plain/bad": torch.tensor([50])},
    )
    chosen, rejected = (0.2, -0.2) if base == "ipo" else (-0.4, -1.6)
    found = {k: v.item() for k, v in out.metrics.items() if k.startswith("rewards/")}
    assert found == pytest.approx(
        {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": 1.0,
        }
    )
    assert out.metrics["logps/chosen"].item() == -60


def test_metrics_of_several_terms_carry_the_context() -> None:
    out = steering_loss(Objective.named("sso", beta=0.2), *golden_batch())
    policy, reference, _ = golden_batch()
    ratio = {n: policy[n] - reference[n] for n in policy}
    plus = 0.2 * (ratio["good/good"] - ratio["good/bad"])
    minus = 0.2 * (ratio["bad/plain"] - ratio["bad/good"])
    assert out.metrics["rewards/margins/good"].item() == pytest.approx(plus.mean().item())
    assert out.metrics["rewards/margins/bad"].item() == pytest.approx(minus.mean().item())
    assert out.metrics["rewards/accuracies/bad"].item() == (minus > 0).double().mean().item()
    expected = torch.log1p(torch.exp(-plus)).mean().item()
    assert out.metrics["loss/good"].item() == pytest.approx(expected)
    assert "rewards/margins" not in out.metrics


def test_metrics_carry_no_gradient() -> None:
    policy, reference, lengths = golden_batch()
    leaf = {k: v.requires_grad_() for k, v in policy.items()}
    out = steering_loss(Objective.named("sso-online"), leaf, reference, lengths)
    assert out.loss.requires_grad
    assert not any(m.requires_grad for m in out.metrics.values())


def test_weights_multiply_the_loss_of_each_query() -> None:
    """h = 2 and 0: losses 0.5981 and log 2; weights 0.5 and 2; mean (0.2991 + 1.3863) / 2."""
    names = ("plain/good", "plain/bad")
    policy = dict(zip(names, (vector(-10, -10), vector(-12, -10)), strict=True))
    start = dict(zip(names, (vector(-11, -11), vector(-11, -11)), strict=True))
    lengths = {n: torch.tensor([5, 6]) for n in names}
    out = steering_loss(Objective.named("pbaa"), policy, start, lengths, weights=vector(0.5, 2.0))
    assert out.per_query.tolist() == pytest.approx([0.29907, 1.38629], abs=1e-5)
    assert out.loss.item() == pytest.approx(0.84268, abs=1e-5)
    assert out.metrics["weight/query"].item() == 1.25
    plain = steering_loss(Objective.named("pbaa"), policy, start, lengths)
    assert out.metrics["rewards/margins"] == plain.metrics["rewards/margins"]
    ones = steering_loss(Objective.named("pbaa"), policy, start, lengths, weights=vector(1, 1))
    assert ones.per_query.tolist() == plain.per_query.tolist()


def test_weights_that_are_missing_or_of_another_shape_are_refused() -> None:
    policy, reference, lengths = golden_batch()
    weighted = Objective.named("pbaa", weighting="wpo")
    with pytest.raises(ValueError, match="the weighting wpo needs weights"):
        steering_loss(weighted, policy, reference, lengths)
    with pytest.raises(ValueError, match="weights have shape"):
        steering_loss(weighted, policy, reference, lengths, weights=vector(1.0))
    with pytest.raises(ConfigError, match="Unknown weighting 'most'"):
        Objective.named("pbaa", weighting="most")
    assert Objective.named("sso", weighting="wpo").weighting is None


def test_wpo_weights_by_hand() -> None:
    """Two tokens, two words each of probability 1/2: Σp² = 1/2 and p = 1/2, so the weight is 1.

    With p = 0.9 and 0.1: Σp² = 0.82. A response of likely words weighs 0.9/0.82, one of unlikely
    words 0.1/0.82, whatever its length; the pair weighs the product.
    """
    half = torch.full((2, 1), 2 * math.log(0.5), dtype=torch.float64)
    assert wpo_weights(half, half, torch.full((2, 1), 2)).item() == pytest.approx(1.0)
    lengths = torch.tensor([[2], [3]])
    logps = lengths * torch.tensor([[0.9], [0.1]], dtype=torch.float64).log()
    collisions = lengths * torch.full((2, 1), 0.82, dtype=torch.float64).log()
    found = wpo_weights(logps.requires_grad_(), collisions, lengths)
    assert found.item() == pytest.approx(0.9 * 0.1 / 0.82**2)
    assert not found.requires_grad


# -- what pairs bring with them --------------------------------------------------------------------


def of_two(base: str, **given: Tensor) -> Tensor:
    """h is 2 for the first pair and -1 for the second, at 4 tokens; β is 0.5."""
    policy = {"plain/good": torch.tensor([-8.0, -9.0]), "plain/bad": torch.tensor([-10.0, -8.0])}
    reference = {name: torch.full((2,), -9.0) for name in policy}
    lengths = {name: torch.tensor([4, 4]) for name in policy}
    objective = Objective.named("pbaa", base=base, beta=0.5)
    return steering_loss(objective, policy, reference, lengths, **given).per_query


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_margins_by_hand() -> None:
    margins = torch.tensor([1.0, -3.0])
    expected = [-log_sigmoid(0.5 * (2 - 1)), -log_sigmoid(0.5 * (-1 + 3))]
    assert of_two("sigmoid", margins=margins).tolist() == pytest.approx(expected)
    assert of_two("hinge", margins=margins).tolist() == pytest.approx([0.5, 0.0])
    means = [(2 / 4 - 1 - 1) ** 2, (-1 / 4 + 3 - 1) ** 2]  # IPO's log-probs are means per token
    assert of_two("ipo", margins=margins).tolist() == pytest.approx(means)


def test_smoothing_of_each_pair_by_hand() -> None:
    expected = [-log_sigmoid(1.0), -0.7 * log_sigmoid(-0.5) - 0.3 * log_sigmoid(0.5)]
    smoothing = torch.tensor([0.0, 0.3])
    assert of_two("sigmoid", smoothing=smoothing).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("base", "name"), [("simpo", "margins"), ("hinge", "smoothing")])
def test_a_base_without_margins_or_smoothing_of_pairs_says_so(base: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} have no effect with the {base} base"):
        of_two(base, **{name: torch.zeros(2)})
    with pytest.raises(ValueError, match=f"{name} have shape"):
        of_two("sigmoid", **{name: torch.zeros(3)})


LOGPS = {
    "plain/good": vector(-12, -8),
    "plain/bad": vector(-9, -6),
    "good/good": vector(-8, -8),
    "bad/good": vector(-20, -8),
    "good/bad": vector(-7, -90),
    "bad/bad": vector(-6, -30),
}


def test_dora_weights_by_hand() -> None:
    """4 and 3 tokens: m falls by 1 without the good principle, and by 1 without the bad one.

    Both c are σ(-1) = 0.268941, so the pair weighs 2c. The second good answer is as likely without
    its principle, c = ½, and the bad one likelier by 24/3 = 8: ½ + σ(8).
    """
    lengths = {name: torch.tensor([4, 4] if name.endswith("good") else [3, 3]) for name in LOGPS}
    objective = Objective.named("pbaa", weighting="dora")
    assert objective.read == ("plain/good", "good/good", "plain/bad", "bad/bad")
    found = objective.figures(LOGPS, lengths)
    assert list(found) == ["weights"]
    expected = [2 * 0.2689414213699951, 0.5 + math.exp(log_sigmoid(8))]
    assert found["weights"].tolist() == pytest.approx(expected)
    same = {name: vector(-5, -3) for name in LOGPS}
    assert objective.figures(same, lengths)["weights"].tolist() == [1.0, 1.0]


def test_the_margin_of_dlma_by_hand() -> None:
    """M = (-8 + 20) - (-7 + 6) = 13, and 0 - (-90 + 30) = 60, cut at 40; 0.2 of it counts."""
    objective = replace(Objective.named("pbaa"), margin=ContrastMargin())
    assert objective.read == ("good/good", "bad/good", "good/bad", "bad/bad")
    found = objective.figures(LOGPS, {})
    assert list(found) == ["margins"]
    assert found["margins"].tolist() == pytest.approx([2.6, 8.0])
    swapped = {k.replace("good/", "x/").replace("bad/", "good/"): v for k, v in LOGPS.items()}
    swapped = {k.replace("x/", "bad/"): v for k, v in swapped.items()}
    assert objective.figures(swapped, {})["margins"].tolist() == pytest.approx([-2.6, -8.0])
    wider = replace(objective, margin=ContrastMargin(weight=0.5, bound=50.0))
    assert wider.figures(LOGPS, {})["margins"].tolist() == pytest.approx([6.5, 25.0])
    both = replace(objective, weighting="dora")
    assert sorted(both.read) == sorted(LOGPS)
    assert Objective.named("pbaa", weighting="wpo").read == Objective.named("sso").read == ()


def test_the_margin_of_noise_by_hand() -> None:
    """4 tokens of two words of ½ each: Σp² = ½; σ 1 takes ½ · 4 · ½ = 1 nat off, σ 2 takes 4.

    A response of sure words loses nothing, whatever its length.
    """
    lengths = {"plain/bad": vector(4, 7)}
    for sigma, expected in ((1.0, 1.0), (2.0, 4.0)):
        objective = Objective.named("pbaa", noise=sigma)
        assert objective.read == ("plain/bad",)
        found = objective.figures({}, lengths, vector(4 * 0.5, 7))
        assert found["margins"].tolist() == [expected, 0.0]
    both = replace(objective, margin=ContrastMargin())
    of_bad = {name: vector(3, 3) for name in LOGPS}
    found = both.figures(LOGPS, of_bad, vector(1, 2))
    assert found["margins"].tolist() == pytest.approx([2.6 + 2 * 2, 8.0 + 2 * 1])
    assert Objective.named("pbaa", base="ipo", noise=1.0).noise == 0.0


def test_noise_on_logits_raises_the_log_sum_exp_by_the_trace_of_its_hessian() -> None:
    logits = vector(0.3, -1.2, 2.0, 0.1)
    curvature: Any = torch.autograd.functional.hessian(lambda z: z.logsumexp(0), logits)
    collisions = (logits.softmax(0) ** 2).sum()
    found = noise_margins(collisions, torch.ones(()), 0.3)
    assert found.item() == pytest.approx(0.5 * 0.3**2 * curvature.trace().item())


def test_the_loss_of_dlma_by_hand() -> None:
    """Changes of +4 and -2 nats: h = 6; less the margin 2.6, at β 0.5: -log σ(1.7)."""
    objective = replace(Objective.named("pbaa", beta=0.5), margin=ContrastMargin())
    names = ("plain/good", "plain/bad")
    policy = dict(zip(names, (vector(-8), vector(-11)), strict=True))
    start = dict(zip(names, (vector(-12), vector(-9)), strict=True))
    lengths = {name: torch.tensor([4]) for name in names}
    out = steering_loss(objective, policy, start, lengths, margins=vector(2.6))
    assert out.loss.item() == pytest.approx(-log_sigmoid(1.7))
    assert out.metrics["margin/query"].item() == 2.6
    assert out.metrics["rewards/margins"].item() == 3.0
    with pytest.raises(ValueError, match="objective pbaa needs margins"):
        steering_loss(objective, policy, start, lengths)


# -- what bounds a pair ----------------------------------------------------------------------------


def bounded(base: str, **constants: Any) -> SteeringLoss:
    """The chosen answers changed by -3 and +1 nats, the rejected by -2 and -9; 4 tokens; β 0.5."""
    policy = {"plain/good": vector(-12, -8), "plain/bad": vector(-11, -18)}
    reference = {name: vector(-9, -9) for name in policy}
    lengths = {name: torch.tensor([4, 4]) for name in policy}
    objective = Objective.named("pbaa", base=base, beta=0.5, **constants)
    return steering_loss(objective, policy, reference, lengths)


@pytest.mark.parametrize(
    ("base", "slack", "lost"),
    [
        ("sigmoid", 0.0, 3.0),
        ("sigmoid", 0.5, 1.0),
        ("sigmoid", 0.75, 0.0),
        ("hinge", 0.5, 1.0),
        ("ipo", 0.5, 0.25),
    ],
)
def test_a_budget_by_hand(base: str, slack: float, lost: float) -> None:
    """The first lost 3 nats of 4 tokens, 4·slack of them free; the second gained and costs none.

    IPO's log-probs are means per token: 3/4 - 1/2.
    """
    free, found = bounded(base), bounded(base, budget={"weight": 2.0, "slack": slack})
    assert (found.per_query - free.per_query).tolist() == pytest.approx([2 * lost, 0.0])
    assert found.metrics["budget_loss"].item() == pytest.approx(lost / 2)
    assert "budget_loss" not in free.metrics


def test_a_budget_holds_the_chosen_answer_alone() -> None:
    policy = {"plain/good": vector(-12, -8), "plain/bad": vector(-11, -18)}
    reference = {name: vector(-9, -9) for name in policy}
    lengths = {name: torch.tensor([4, 4]) for name in policy}
    grads = []
    for budget in (None, {"weight": 2.0, "slack": 0.5}):
        leaf = {name: v.clone().requires_grad_() for name, v in policy.items()}
        objective = Objective.named("pbaa", budget=budget)
        steering_loss(objective, leaf, reference, lengths).per_query.sum().backward()
        grads.append([leaf[name].grad for name in leaf])
    (chosen, rejected), (held, same) = grads
    assert (held - chosen).tolist() == [-2.0, 0.0]  # type: ignore[operator]
    assert torch.equal(same, rejected)  # type: ignore[arg-type]


def test_a_budget_without_a_reference_is_left_out() -> None:
    assert Objective.named("pbaa", base="simpo", budget={}).budget is None
    assert Objective.named("pbaa", budget={}).budget == Budget(1.0, 0.1)
    for impossible in ({"weight": 0.0}, {"slack": -0.1}):
        with pytest.raises(ConfigError, match=r"budget\.(weight|slack) must be"):
            Objective.named("pbaa", budget=impossible)


def test_a_ceiling_by_hand() -> None:
    """Rewards -1.5, 0.5 and -1, -4.5; at 0.8 the second chosen stays, both rejected stop.

    -1.5 + 0.8 = -0.7 and 0.5 + 0.8 = 1.3; without it -0.5 and 5.
    """
    expected = [-log_sigmoid(-0.7), -log_sigmoid(1.3)]
    assert bounded("sigmoid", ceiling=0.8).per_query.tolist() == pytest.approx(expected)
    lower = [-log_sigmoid(-1.5 + 0.2), -log_sigmoid(0.2 + 0.2)]
    assert bounded("sigmoid", ceiling=0.2).per_query.tolist() == pytest.approx(lower)
    plain = bounded("sigmoid").per_query.tolist()
    assert plain == pytest.approx([-log_sigmoid(-0.5), -log_sigmoid(5.0)])
    assert bounded("sigmoid", ceiling=99.0).per_query.tolist() == pytest.approx(plain)
    with pytest.raises(ConfigError, match="ceiling must be above 0"):
        bounded("sigmoid", ceiling=0.0)


def test_a_margin_and_smoothing_beside_a_ceiling_by_hand() -> None:
    """-0.7 less β·margin 0.5 is -1.2; a tenth of the loss is that of the opposite pair."""
    policy = {"plain/good": vector(-12), "plain/bad": vector(-11)}
    reference = {name: vector(-9) for name in policy}
    lengths = {name: torch.tensor([4]) for name in policy}
    objective = Objective.named("pbaa", beta=0.5, ceiling=0.8, label_smoothing=0.1)
    out = steering_loss(objective, policy, reference, lengths, margins=vector(1.0))
    expected = -0.9 * log_sigmoid(-1.2) - 0.1 * log_sigmoid(1.2)
    assert out.loss.item() == pytest.approx(expected)


# -- objectives of tokens --------------------------------------------------------------------------

PLAIN, GOOD, BAD = (
    torch.tensor([p], dtype=torch.float64).log()
    for p in ((0.5, 0.25, 0.25), (0.6, 0.2, 0.2), (0.2, 0.2, 0.6))
)


def test_the_target_of_contrast_by_hand() -> None:
    """Rewards log 3, 0 and −log 3, cut at ±1; at λ 2 the plain masses times e², 1 and e⁻²."""
    found = ContrastObjective(strength=2.0, clip=1.0).target(PLAIN, GOOD, BAD).exp()
    masses = torch.tensor([[0.5 * math.e**2, 0.25, 0.25 * math.e**-2]], dtype=torch.float64)
    torch.testing.assert_close(found, masses / masses.sum())


def test_the_target_of_context_distillation_is_the_good_context() -> None:
    assert torch.equal(TokenObjective().target(GOOD), GOOD)


@pytest.mark.parametrize("strength", [0.5, 4.0])
def test_the_target_is_the_best_policy_of_its_reward_less_its_kl(strength: float) -> None:
    contrast = ContrastObjective(strength=strength)

    def worth(logp: torch.Tensor) -> float:
        reward = (logp.exp() * contrast.reward(PLAIN, GOOD, BAD)).sum()
        return float(reward - (logp.exp() * (logp - PLAIN)).sum() / strength)

    best = contrast.target(PLAIN, GOOD, BAD)
    noise = torch.randn(64, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert all(worth((best + step * 0.1).log_softmax(-1)) < worth(best) for step in noise)


def test_divergences_by_hand() -> None:
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ((0.5, 0.5), (0.75, 0.25)))
    reverse, forward, jsd = (
        TokenObjective(direction=d).divergence(p, q).item() for d in ("reverse", "forward", "jsd")
    )
    assert reverse == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert forward == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    to_mean = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    from_target = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    assert jsd == pytest.approx((to_mean + from_target) / 2)


def test_what_is_not_known_counts_together() -> None:
    """Of four masses two are known: the divergence is that of (.4, .3, .3) from (.1, .2, .7)."""
    known_p, known_q = (torch.tensor([x]).double().log() for x in ((0.4, 0.3), (0.1, 0.2)))
    found = TokenObjective().divergence(with_rest(known_p), with_rest(known_q)).item()
    pairs = ((0.4, 0.1), (0.3, 0.2), (0.3, 0.7))
    assert found == pytest.approx(sum(p * math.log(p / q) for p, q in pairs))


def test_an_entry_without_mass_adds_nothing_and_has_no_gradient() -> None:
    logp = torch.tensor([[0.4, 0.3]]).double().log().requires_grad_()
    nothing = torch.full((1, 1), NO_MASS, dtype=torch.float64)
    target = torch.tensor([[0.1, 0.2]]).double().log()
    alone = TokenObjective().divergence(with_rest(logp), with_rest(target))
    padded = TokenObjective().divergence(
        with_rest(torch.cat([logp, nothing], 1)), with_rest(torch.cat([target, nothing], 1))
    )
    torch.testing.assert_close(padded, alone)
    assert torch.isfinite(torch.autograd.grad(padded.sum(), logp)[0]).all()
