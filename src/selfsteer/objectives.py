"""Every method as a weighted list of preference terms over one triple; pure functions of tensors.

DPO minus the single context: a term compares two responses under one of three contexts, and an
objective sums terms. PBAA, the generator loss of SSO v2, the online loss of v1 and their ablations
differ only in that list. Nothing here knows a model.

Shape legend: B = queries of a batch. A sequence is named ``context/response``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsteer.errors import ConfigError
from selfsteer.recipe.sections import BASES, OBJECTIVES, WEIGHTINGS

#: Bases whose log-probs are means per token (SimPO, ORPO, IPO), and those that need no reference.
LENGTH_NORMALISED = frozenset({"ipo", "simpo", "orpo"})
REFERENCE_FREE = frozenset({"simpo", "orpo"})


@dataclass(frozen=True)
class Term:
    """One comparison: under ``context``, ``preferred`` ≻ ``dispreferred``.

    It costs ``weight · L + sft · NLL(preferred)``. A gated term has its L multiplied by v1's W.
    """

    context: str
    preferred: str
    dispreferred: str
    weight: float = 1.0
    sft: float = 0.0
    gated: bool = False

    @property
    def sequences(self) -> tuple[str, str]:
        """The two sequences that the term reads."""
        return f"{self.context}/{self.preferred}", f"{self.context}/{self.dispreferred}"


@dataclass(frozen=True)
class Gate:
    """v1's weight W = σ(−[α·m(y+|x) + (1−α)·m(y-|x)]), m = mean log-prob per token (SSO v1)."""

    alpha: float = 0.66
    detach: bool = False


@dataclass(frozen=True)
class BaseLoss:
    """The pairwise loss L under every term, and its constants (ALGORITHM's table of bases)."""

    name: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_margin: float = 0.5

    @property
    def needs_reference(self) -> bool:
        """False for SimPO and ORPO."""
        return self.name not in REFERENCE_FREE

    def __call__(
        self,
        chosen_B: Tensor,
        rejected_B: Tensor,
        ref_chosen_B: Tensor | None = None,
        ref_rejected_B: Tensor | None = None,
    ) -> Tensor:
        """The loss of each pair, shape (B,).

        Args:
            chosen_B: logπ of the preferred response, nats; sums for sigmoid and hinge, means per
                token for ipo, simpo and orpo.
            rejected_B: the same of the dispreferred response.
            ref_chosen_B: the same under the reference; None where the base needs none.
            ref_rejected_B: the same of the dispreferred response.
        """
        gap_B = chosen_B - rejected_B
        if self.name == "simpo":  # arXiv 2405.14734, eq. 6
            return -F.logsigmoid(self.beta * gap_B - self.simpo_margin)
        if self.name == "orpo":  # arXiv 2403.07691, eq. 6-7
            log_odds_B = gap_B - (_log1mexp(chosen_B) - _log1mexp(rejected_B))
            return -chosen_B - self.beta * F.logsigmoid(log_odds_B)
        assert ref_chosen_B is not None
        assert ref_rejected_B is not None
        h_B = gap_B - (ref_chosen_B - ref_rejected_B)
        if self.name == "sigmoid":  # arXiv 2305.18290, eq. 7; smoothing as in cDPO
            return (
                -F.logsigmoid(self.beta * h_B) * (1 - self.label_smoothing)
                - F.logsigmoid(-self.beta * h_B) * self.label_smoothing
            )
        if self.name == "ipo":  # arXiv 2310.12036, eq. 17
            return (h_B - 1 / (2 * self.beta)) ** 2
        return torch.relu(1 - self.beta * h_B)  # hinge: SLiC, arXiv 2305.10425


def _log1mexp(mean_logp_B: Tensor) -> Tensor:
    """log(1 − e^m), stable near 0: m is first bounded to ≤ −1e-7."""
    m = mean_logp_B.clamp(max=-1e-7)
    # both branches must stay finite in backward, where() would spread the nan of the unused one
    near = m > -0.693
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, m, torch.full_like(m, -0.5)))),
        torch.log1p(-torch.exp(torch.where(near, torch.full_like(m, -1.0), m))),
    )


@dataclass(frozen=True)
class Objective:
    """A name, a base loss, terms, and v1's gate if the method has one."""

    name: str
    base: BaseLoss
    terms: tuple[Term, ...]
    gate: Gate | None = None
    #: ``wpo``: the loss of a query is multiplied by its `wpo_weights`; None: by nothing.
    weighting: str | None = None

    @property
    def sequences(self) -> tuple[str, ...]:
        """The sequences a query contributes, each once, in order of first use."""
        names = [s for term in self.terms for s in term.sequences]
        if self.gate is not None:
            names += ["plain/good", "plain/bad"]
        return tuple(dict.fromkeys(names))

    @classmethod
    def named(
        cls,
        name: str,
        *,
        base: str = "sigmoid",
        beta: float = 0.1,
        gamma: float = 0.1,
        alpha: float = 0.66,
        steer: float = 0.1,
        use_weight: bool = True,
        use_steer: bool = True,
        detach_weight: bool = False,
        label_smoothing: float = 0.0,
        simpo_margin: float = 0.5,
        weighting: str | None = None,
    ) -> Self:
        """An objective of the papers; arguments it has no use for are ignored.

        Args:
            name: ``pbaa``; ``sso`` (v2, eq. 1, 2, 4), ``sso-plus-only``, ``sso-minus-only``
                (v2, table 3), ``sso-direct-minus`` (v2, eq. 3); ``sso-online`` (v1).
            base: ``sigmoid`` (DPO), ``ipo``, ``hinge``, ``simpo`` or ``orpo``.
            beta: the base's β. 0.1 (v2, DPO); v1 runs IPO with 0.2.
            gamma: weight γ of the NLL in the sso terms. 0.1 (v2).
            alpha: v1's α in W. 0.66 (v1).
            steer: v1's β_G, the weight of the two steering terms. 0.1 (v1).
            use_weight: False sets W = 1; the steering terms stay.
            use_steer: False leaves the steering terms out; W then multiplies the pair loss.
            detach_weight: stops the gradient through W; the released code lets it flow.
            label_smoothing: cDPO's ε, for the sigmoid base.
            simpo_margin: SimPO's margin γ. 0.5.
            weighting: ``wpo`` for objective ``pbaa``; `steering_loss` is then given weights.

        Raises:
            ConfigError: unknown name or base, or a constant outside its range.
        """
        if name not in OBJECTIVES:
            raise ConfigError(f"Unknown objective {name!r}; choose from {', '.join(OBJECTIVES)}.")
        if base not in BASES:
            raise ConfigError(f"Unknown base loss {base!r}; choose from {', '.join(BASES)}.")
        if not 0 < beta < math.inf:
            raise ConfigError(f"beta must be above 0 and finite, found {beta}.")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha must be in [0, 1], found {alpha}.")
        for label, value in (("gamma", gamma), ("steer", steer)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{label} must be 0 or above and finite, found {value}.")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing must be in [0, 0.5), found {label_smoothing}.")
        if weighting not in (None, *WEIGHTINGS):
            raise ConfigError(
                f"Unknown weighting {weighting!r}; choose from {', '.join(WEIGHTINGS)}, or none."
            )
        pair = Term("plain", "good", "bad")
        plus = Term("good", "good", "bad", sft=gamma)
        minus = Term("bad", "plain", "good", sft=gamma)
        gate = None
        if name == "pbaa":
            terms: tuple[Term, ...] = (pair,)
        elif name == "sso":
            terms = (plus, minus)
        elif name == "sso-plus-only":
            terms = (plus,)
        elif name == "sso-minus-only":
            terms = (minus,)
        elif name == "sso-direct-minus":
            terms = (plus, Term("bad", "bad", "good", sft=gamma))
        else:
            gate = Gate(alpha, detach_weight) if use_weight else None
            if use_steer:
                terms = (
                    pair,
                    Term("good", "good", "bad", weight=steer, gated=use_weight),
                    Term("bad", "plain", "good", weight=steer, gated=use_weight),
                )
            else:
                terms = (Term("plain", "good", "bad", gated=use_weight),)
        weighting = weighting if name == "pbaa" else None
        return cls(
            name, BaseLoss(base, beta, label_smoothing, simpo_margin), terms, gate, weighting
        )


def wpo_weights(logps: Tensor, collisions: Tensor, lengths: Tensor) -> Tensor:
    """WPO's weight of each pair, (B,), without gradient (arXiv 2406.11827, eq. 2).

    A response weighs exp of the mean over its tokens of log π(y_t) − log Σ_v π(v)²: about 1 where
    it is as likely as what the policy would have sampled itself (the paper's sampled alignment),
    above 1 where it is likelier. A pair weighs the product of its two.

    Args:
        logps: (2, B), log-prob sums of chosen and rejected responses under the policy, nats.
        collisions: (2, B), sums over their tokens of log Σ_v π(v)², nats.
        lengths: (2, B), their tokens.
    """
    return ((logps - collisions) / lengths).sum(dim=0).detach().exp()


@dataclass(frozen=True)
class SteeringLoss:
    """What `steering_loss` returns: scalar mean, loss per query (B,), detached metrics."""

    loss: Tensor
    per_query: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def steering_loss(
    objective: Objective,
    policy: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
    lengths: Mapping[str, Tensor],
    *,
    weights: Tensor | None = None,
) -> SteeringLoss:
    """The loss of a batch of queries under an objective.

    Args:
        objective: terms, base loss and gate.
        policy: ``context/response`` → (B,) log-prob **sums** over response tokens, nats. Keys
            that the objective does not read are ignored.
        reference: the same under the reference; may be None for simpo and orpo.
        lengths: ``context/response`` → (B,) response tokens, end-of-turn token included.
        weights: (B,), multiplies the whole loss of each query; None is 1 for all. The mean is over
            queries, not over weights. The metrics are not weighted.

    Returns:
        The mean over queries, the loss per query, and batch means under TRL's names. Rewards are
        β·(logπ − logπ_ref) of sums, β·logπ without a reference. Where the objective has more
        than one term, each metric carries the term's context as suffix.

    Raises:
        ValueError: a sequence is missing, shapes differ, a length is below 1, or the objective has
            a weighting and no weights are given.
    """
    base = objective.base
    if objective.weighting is not None and weights is None:
        raise ValueError(f"the weighting {objective.weighting} needs weights")
    if reference is None and base.needs_reference:
        raise ValueError(f"the {base.name} base needs reference log-probs")
    _check(objective.sequences, policy, "policy", None)
    shape = policy[objective.sequences[0]].shape
    _check(objective.sequences, policy, "policy", shape)
    _check(objective.sequences, lengths, "lengths", shape)
    if reference is not None:
        _check(objective.sequences, reference, "reference", shape)
    for name in objective.sequences:
        if bool((lengths[name] < 1).any()):
            raise ValueError(f"lengths[{name!r}] has a response without tokens")

    if weights is not None and weights.shape != shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}, others {tuple(shape)}")

    sums = {s: policy[s] for s in objective.sequences}
    tokens = {s: lengths[s].to(sums[s].dtype) for s in objective.sequences}
    means = {s: sums[s] / tokens[s] for s in objective.sequences}
    logps = means if base.name in LENGTH_NORMALISED else sums
    ref_sums: Mapping[str, Tensor] = reference or {}
    ref_logps = (
        {s: ref_sums[s] / tokens[s] for s in objective.sequences if s in ref_sums}
        if base.name in LENGTH_NORMALISED
        else ref_sums
    )

    metrics: dict[str, Tensor] = {}
    gate_B: Tensor | float = 1.0
    if objective.gate is not None:
        alpha = objective.gate.alpha
        gate_B = torch.sigmoid(-(alpha * means["plain/good"] + (1 - alpha) * means["plain/bad"]))
        if objective.gate.detach:
            gate_B = gate_B.detach()
        metrics["weight"] = gate_B.detach().mean()

    per_query = torch.zeros_like(sums[objective.sequences[0]])
    for term in objective.terms:
        a, b = term.sequences
        loss_B = base(logps[a], logps[b], ref_logps.get(a), ref_logps.get(b))
        nll_B = -means[a]
        scale = term.weight * gate_B if term.gated else term.weight
        per_query = per_query + scale * loss_B + term.sft * nll_B

        suffix = f"/{term.context}" if len(objective.terms) > 1 else ""
        with torch.no_grad():
            chosen_B, rejected_B = sums[a], sums[b]
            metrics[f"logps/chosen{suffix}"] = chosen_B.mean()
            metrics[f"logps/rejected{suffix}"] = rejected_B.mean()
            if reference is not None:
                chosen_B, rejected_B = chosen_B - reference[a], rejected_B - reference[b]
            chosen_B, rejected_B = base.beta * chosen_B, base.beta * rejected_B
            metrics[f"rewards/chosen{suffix}"] = chosen_B.mean()
            metrics[f"rewards/rejected{suffix}"] = rejected_B.mean()
            metrics[f"rewards/margins{suffix}"] = (chosen_B - rejected_B).mean()
            metrics[f"rewards/accuracies{suffix}"] = (chosen_B > rejected_B).to(loss_B.dtype).mean()
            metrics[f"nll_loss{suffix}"] = nll_B.mean()
            if suffix:
                metrics[f"loss{suffix}"] = loss_B.mean()
    if weights is not None:
        metrics["weight/query"] = weights.detach().mean()
        per_query = per_query * weights
    return SteeringLoss(per_query.mean(), per_query, metrics)


def _check(
    names: tuple[str, ...],
    given: Mapping[str, Tensor],
    kind: str,
    shape: torch.Size | None,
) -> None:
    for name in names:
        if name not in given:
            raise ValueError(
                f"{kind} lacks the sequence {name!r}; given are {', '.join(given) or 'none'}"
            )
        if given[name].dim() != 1:
            raise ValueError(f"{kind}[{name!r}] must be (B,), found {tuple(given[name].shape)}")
        if shape is not None and given[name].shape != shape:
            raise ValueError(
                f"{kind}[{name!r}] has shape {tuple(given[name].shape)}, others {tuple(shape)}"
            )
