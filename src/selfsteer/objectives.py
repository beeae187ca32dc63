"""Every method as a weighted list of preference terms over one triple; pure functions of tensors.

DPO minus the single context: a term compares two responses under one of three contexts, and an
objective sums terms. PBAA, the generator loss of SSO v2, the online loss of v1 and their ablations
differ only in that list. Nothing here knows a model.

Shape legend: B = queries of a batch. A sequence is named ``context/response``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

from selfsteer.errors import ConfigError, short

if TYPE_CHECKING:  # whoever has tensors has torch; recipes and plans read this module without it
    from torch import Tensor

Direction = Literal["reverse", "forward", "jsd"]
ObjectiveName = Literal[
    "pbaa", "sso", "sso-plus-only", "sso-minus-only", "sso-direct-minus", "sso-online"
]
BaseName = Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"]
Weighting = Literal["wpo", "dora"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
BASES: tuple[str, ...] = get_args(BaseName)
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

#: Bases whose log-probs are means per token (SimPO, ORPO, IPO), and those that need no reference.
LENGTH_NORMALISED = frozenset({"ipo", "simpo", "orpo"})
REFERENCE_FREE = frozenset({"simpo", "orpo"})
#: Bases of log-prob sums against a reference: a margin in nats of sums has a meaning there.
SUMMED = frozenset({"sigmoid", "hinge"})


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
    #: Where the implicit reward of either response stops, in units of β·nats; None: nowhere.
    ceiling: float | None = None

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
        *,
        margin_B: Tensor | float = 0.0,
        smoothing_B: Tensor | None = None,
    ) -> Tensor:
        """The loss of each pair, shape (B,).

        Args:
            chosen_B: logπ of the preferred response, nats; sums for sigmoid and hinge, means per
                token for ipo, simpo and orpo.
            rejected_B: the same of the dispreferred response.
            ref_chosen_B: the same under the reference; None where the base needs none.
            ref_rejected_B: the same of the dispreferred response.
            margin_B: by how much h has to be larger than 0, nats; of sigmoid, ipo and hinge.
            smoothing_B: in place of ``label_smoothing``, of sigmoid.
        """
        from torch.nn.functional import logsigmoid

        gap_B = chosen_B - rejected_B
        if self.name == "simpo":  # arXiv 2405.14734, eq. 6
            return -logsigmoid(self.beta * gap_B - self.simpo_margin)
        if self.name == "orpo":  # arXiv 2403.07691, eq. 6-7
            log_odds_B = gap_B - (_log1mexp(chosen_B) - _log1mexp(rejected_B))
            return -chosen_B - self.beta * logsigmoid(log_odds_B)
        assert ref_chosen_B is not None
        assert ref_rejected_B is not None
        h_B = gap_B - (ref_chosen_B - ref_rejected_B) - margin_B
        if self.name == "sigmoid":  # arXiv 2305.18290, eq. 7; smoothing as in cDPO
            eps_B = self.label_smoothing if smoothing_B is None else smoothing_B
            x_B = self.beta * h_B
            if self.ceiling is not None:  # after TSO's dual clip, arXiv 2409.02118
                up_B = (self.beta * (chosen_B - ref_chosen_B)).clamp(max=self.ceiling)
                down_B = (self.beta * (rejected_B - ref_rejected_B)).clamp(min=-self.ceiling)
                x_B = up_B - down_B - self.beta * margin_B
            return -logsigmoid(x_B) * (1 - eps_B) - logsigmoid(-x_B) * eps_B
        if self.name == "ipo":  # arXiv 2310.12036, eq. 17
            return (h_B - 1 / (2 * self.beta)) ** 2
        return (1 - self.beta * h_B).relu()  # hinge: SLiC, arXiv 2305.10425


def _log1mexp(mean_logp_B: Tensor) -> Tensor:
    """log(1 − e^m), stable near 0: m is first bounded to ≤ −1e-7."""
    m = mean_logp_B.clamp(max=-1e-7)
    # both branches must stay finite in backward, where() would spread the nan of the unused one
    near = m > -0.693
    small, large = m.masked_fill(~near, -0.5), m.masked_fill(near, -1.0)
    return (-small.expm1()).log().where(near, (-large.exp()).log1p())


@dataclass(frozen=True)
class Budget:
    """What a chosen response may lose against the reference: a hinge on its log-prob.

    A term costs ``weight`` · max(0, −D − slack·tokens) more, D = logπ − logπ_ref of its preferred
    response; per token where the base has means. After the budget of arXiv 2411.05875, whose
    abstract alone we know; without slack it is DPOP's penalty (arXiv 2402.13228), beside the
    sigmoid instead of inside it.

    Args:
        weight: per nat; above 0.
        slack: nats per token that are free; 0 or above.
    """

    weight: float = 1.0
    slack: float = 0.1


@dataclass(frozen=True)
class ContrastMargin:
    """DLMA's margin of a pair, nats (arXiv 2402.11907, eq. 8): ``weight`` · clamp(M, ±``bound``).

    M = R(y+) − R(y-), where R(y) = log π0(y|x+) − log π0(y|x-) are sums over tokens and π0 is the
    frozen start.
    """

    weight: float = 0.2
    bound: float = 40.0

    read: ClassVar[tuple[str, ...]] = ("good/good", "bad/good", "good/bad", "bad/bad")

    def __call__(self, sums: Mapping[str, Tensor]) -> Tensor:
        """The margin of each pair, (B,), from log-prob sums of what it reads, (B,) nats."""
        good, bad = (sums[f"good/{r}"] - sums[f"bad/{r}"] for r in ("good", "bad"))
        return self.weight * (good - bad).clamp(-self.bound, self.bound)


#: What `dora_weights` reads.
DORA_SEQUENCES = ("plain/good", "good/good", "plain/bad", "bad/bad")


def dora_weights(means: Mapping[str, Tensor]) -> Tensor:
    """Weight of each pair, (B,), from 0 to 2: how likely its answers were sampled plainly.

    After DoRA (arXiv 2504.05831), whose weight of an answer is 2c for two sources, where a trained
    classifier says the probability c that it is from the wanted one. Here that is the policy
    without a principle, and c = σ(m(y|x) − m(y|x±)), m the mean log-prob per token under the
    frozen start. A pair weighs the mean of its two, 1 where the principles did nothing. The
    robust optimisation of the paper is left out.

    Args:
        means: `DORA_SEQUENCES` → (B,), nats per token.
    """
    plain_good, good, plain_bad, bad = (means[name] for name in DORA_SEQUENCES)
    return (plain_good - good).sigmoid() + (plain_bad - bad).sigmoid()


#: What `noise_margins` is about.
REJECTED = "plain/bad"


def noise_margins(collisions: Tensor, lengths: Tensor, sigma: float) -> Tensor:
    """What noise on the reference's logits of rejected responses takes off the gap, (B,) nats.

    Gaussian noise of deviation σ on every logit raises the log-sum-exp by ½σ²·(1 − Σ_v ref(v)²) on
    average, to second order in σ (half of σ² times the trace of its Hessian), and lowers the
    token's log-prob by that. After DNPO (arXiv 2502.05400), which trains the σ of each logit.

    Args:
        collisions: (B,), sums over the tokens of rejected responses of Σ_v ref(v)².
        lengths: (B,), their tokens.
        sigma: σ, in the unit of logits.
    """
    return 0.5 * sigma**2 * (lengths - collisions)


@dataclass(frozen=True)
class Objective:
    """A name, a base loss, terms, and v1's gate if the method has one."""

    name: str
    base: BaseLoss
    terms: tuple[Term, ...]
    gate: Gate | None = None
    #: By what the loss of a query is multiplied: ``wpo``: `wpo_weights` under the policy as it is;
    #: ``dora``: `dora_weights`; None: nothing.
    weighting: str | None = None
    #: What the gap of each pair has to exceed; None: 0.
    margin: ContrastMargin | None = None
    #: σ of the `noise_margins` that are added to it.
    noise: float = 0.0
    #: Of the preferred response of every term, for bases with a reference; None: no bound.
    budget: Budget | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether its base loss compares with a reference's log-probs."""
        return self.base.needs_reference

    @property
    def sequences(self) -> tuple[str, ...]:
        """The sequences a query contributes, each once, in order of first use."""
        names = [s for term in self.terms for s in term.sequences]
        if self.gate is not None:
            names += ["plain/good", "plain/bad"]
        return tuple(dict.fromkeys(names))

    @property
    def read(self) -> tuple[str, ...]:
        """What the frozen start is asked about each pair before it is trained on."""
        dora = DORA_SEQUENCES if self.weighting == "dora" else ()
        margin = self.margin.read if self.margin else ()
        return tuple(dict.fromkeys((*dora, *margin, *((REJECTED,) if self.noise else ()))))

    def figures(
        self,
        sums: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        collisions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The ``weights`` and ``margins`` of pairs for `steering_loss`, (B,), as far as it has any.

        Args:
            sums: what it reads → (B,) log-prob sums under the frozen start, nats.
            lengths: the same → (B,) tokens.
            collisions: see `noise_margins`; needed where there is noise.
        """
        found = {}
        if self.weighting == "dora":
            found["weights"] = dora_weights({n: sums[n] / lengths[n] for n in DORA_SEQUENCES})
        if self.margin is not None:
            found["margins"] = self.margin(sums)
        if self.noise:
            assert collisions is not None
            noise = noise_margins(collisions, lengths[REJECTED], self.noise)
            found["margins"] = found.get("margins", 0) + noise
        return found

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
        ceiling: float | None = None,
        weighting: str | None = None,
        noise: float = 0.0,
        budget: Mapping[str, float] | None = None,
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
            ceiling: stops both implicit rewards at ±ceiling, for the sigmoid base.
            weighting: ``wpo`` or ``dora`` for objective ``pbaa``; the loss then needs weights.
            noise: σ of `noise_margins`, for objective ``pbaa`` and the sigmoid and hinge bases.
            budget: the fields of a `Budget`, for bases with a reference.

        Raises:
            ConfigError: unknown name or base, or a constant outside its range.
        """
        for label, given, known in (
            ("objective", name, OBJECTIVES),
            ("base loss", base, BASES),
            ("weighting", weighting or WEIGHTINGS[0], WEIGHTINGS),
        ):
            if given not in known:
                raise ConfigError(
                    f"Unknown {label} {short(given)}; choose from {', '.join(known)}."
                )
        limit = None if budget is None else Budget(**budget)
        above = "above 0 and finite"
        for label, value, holds, bounds in (
            ("beta", beta, 0 < beta < math.inf, above),
            ("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]"),
            ("gamma", gamma, 0 <= gamma < math.inf, "0 or above and finite"),
            ("steer", steer, 0 <= steer < math.inf, "0 or above and finite"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)"),
            ("ceiling", ceiling, ceiling is None or 0 < ceiling < math.inf, above),
            ("noise", noise, 0 <= noise < math.inf, "0 or above and finite"),
            ("budget.weight", limit and limit.weight, limit is None or limit.weight > 0, above),
            (
                "budget.slack",
                limit and limit.slack,
                limit is None or limit.slack >= 0,
                "0 or above",
            ),
        ):
            if not holds:
                raise ConfigError(f"{label} must be {bounds}, found {value}.")
        gated = name == "sso-online" and use_weight
        pair = Term("plain", "good", "bad", gated=gated and not use_steer)
        plus = Term("good", "good", "bad", sft=gamma)
        minus = Term("bad", "plain", "good", sft=gamma)
        steering = tuple(
            replace(term, weight=steer, sft=0.0, gated=use_weight) for term in (plus, minus)
        )
        terms: dict[str, tuple[Term, ...]] = {
            "pbaa": (pair,),
            "sso": (plus, minus),
            "sso-plus-only": (plus,),
            "sso-minus-only": (minus,),
            "sso-direct-minus": (plus, Term("bad", "bad", "good", sft=gamma)),
            "sso-online": (pair, *steering) if use_steer else (pair,),
        }
        return cls(
            name,
            BaseLoss(base, beta, label_smoothing, simpo_margin, ceiling),
            terms[name],
            Gate(alpha, detach_weight) if gated else None,
            weighting=weighting if name == "pbaa" else None,
            noise=noise if name == "pbaa" and base in SUMMED else 0.0,
            budget=None if base in REFERENCE_FREE else limit,
        )


@dataclass(frozen=True)
class TokenObjective:
    """At each token of a plain answer the policy is drawn to a target, under the plain context.

    Args:
        direction: ``reverse`` KL(π ‖ q), ``forward`` KL(q ‖ π), or ``jsd``, half of each to their
            mean.
    """

    direction: Direction = "reverse"
    name: str = "distil"

    #: What is trained on, what the teacher reads, and whether log-probs of a reference are needed.
    sequences: ClassVar[tuple[str, ...]] = ("plain/plain",)
    read: ClassVar[tuple[str, ...]] = ("good/plain",)
    needs_reference: ClassVar[bool] = False

    def target(self, *logps_RV: Tensor) -> Tensor:
        """Log q, (R, V), from log-probs in nats of what the teacher reads: here the good context.

        On-policy context distillation (OPCD, arXiv 2602.12275).
        """
        (good_RV,) = logps_RV
        return good_RV

    def reward(self, *logps: Tensor) -> Tensor:
        """What a token is worth, from its log-probs in what the teacher reads; here nothing."""
        return logps[0].new_zeros(logps[0].shape)

    def divergence(self, policy_RK: Tensor, target_RK: Tensor) -> Tensor:
        """The divergence of each token, (R,) in nats, from log masses of K disjoint events."""
        if self.direction == "reverse":
            return _kl(policy_RK, target_RK)
        if self.direction == "forward":
            return _kl(target_RK, policy_RK)
        mean_RK = policy_RK.logaddexp(target_RK) - math.log(2)
        return (_kl(policy_RK, mean_RK) + _kl(target_RK, mean_RK)) / 2


@dataclass(frozen=True)
class ContrastObjective(TokenObjective):
    """Contrast distillation: the target goes along the difference of the principles.

    The teacher is the frozen start π0, which reads the answer under x, x+ and x-. Its target is
    q ∝ π0(·|x) · exp(λ·clip(log π0(·|x+) − log π0(·|x-), ±c)): the policy of highest expected
    reward r = clip(log π0(y|x+) − log π0(y|x-), ±c) per token, less KL(π ‖ π0)/λ (docs/method.md).

    Args:
        strength: λ.
        clip: c, nats; it is what keeps λ from wrecking the language.
    """

    name: str = "contrast"
    strength: float = 4.0
    clip: float = 1.0

    read: ClassVar[tuple[str, ...]] = ("plain/plain", "good/plain", "bad/plain")

    def reward(self, *logps: Tensor) -> Tensor:
        """clip(log π0(·|x+) − log π0(·|x-), ±c), of log-probs of any one shape."""
        _, good, bad = logps
        return (good - bad).clamp(-self.clip, self.clip)

    def target(self, *logps_RV: Tensor) -> Tensor:
        """See `TokenObjective.target`."""
        return (logps_RV[0] + self.strength * self.reward(*logps_RV)).log_softmax(dim=-1)


#: Log of a mass that counts as none: its exponential is 0, and products with it stay finite.
NO_MASS = -1e4

#: Least mass of the rest beside the known tokens: below it lies rounding.
LEAST_REST = 1e-6


def with_rest(known_RK: Tensor) -> Tensor:
    """Log masses of the known tokens and of all others together, (R, K + 1)."""
    from torch import cat

    rest_R = (1 - known_RK.exp().sum(dim=-1)).clamp(min=LEAST_REST).log()
    return cat([known_RK, rest_R.unsqueeze(-1)], dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(dim=-1)


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
    margins: Tensor | None = None,
    smoothing: Tensor | None = None,
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
        margins: (B,) nats, what the gap h of every term has to exceed: L(h − margin), as DLMA's
            (arXiv 2402.11907, eq. 8); sigmoid, ipo and hinge.
        smoothing: (B,) in [0, 0.5], label smoothing of each pair in place of the base's one
            constant; sigmoid.

    Returns:
        The mean over queries, the loss per query, and batch means under TRL's names. Rewards are
        what the base compares: β·(logπ − logπ_ref), β·logπ for simpo and orpo, of sums or of means
        per token. Where the objective has more than one term, each metric carries the term's
        context as suffix.

    Raises:
        ValueError: a sequence is missing, shapes differ, a length is below 1, the objective has a
            weighting or a margin and they are not given, or its base has no margin or smoothing
            of pairs.
    """
    base = objective.base
    if objective.weighting is not None and weights is None:
        raise ValueError(f"the weighting {objective.weighting} needs weights")
    if (objective.margin is not None or objective.noise) and margins is None:
        raise ValueError(f"objective {objective.name} needs margins")
    if reference is None and base.needs_reference:
        raise ValueError(f"the {base.name} base needs reference log-probs")
    given = {"policy": policy, "lengths": lengths}
    shape = _check(objective.sequences, given | ({"reference": reference} if reference else {}))
    for name in objective.sequences:
        if bool((lengths[name] < 1).any()):
            raise ValueError(f"lengths[{name!r}] has a response without tokens")
    of_pairs = {"weights": weights, "margins": margins, "smoothing": smoothing}
    for name, value in of_pairs.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} have shape {tuple(value.shape)}, others {shape}")
    for name, bases in (("margins", ("sigmoid", "ipo", "hinge")), ("smoothing", ("sigmoid",))):
        if of_pairs[name] is not None and base.name not in bases:
            raise ValueError(f"{name} have no effect with the {base.name} base")

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
        gate_B = (-(alpha * means["plain/good"] + (1 - alpha) * means["plain/bad"])).sigmoid()
        if objective.gate.detach:
            gate_B = gate_B.detach()
        metrics["weight"] = gate_B.detach().mean()

    per_query = sums[objective.sequences[0]].new_zeros(shape)
    for term in objective.terms:
        a, b = term.sequences
        loss_B = base(
            *(logps[a], logps[b], ref_logps.get(a), ref_logps.get(b)),
            margin_B=0.0 if margins is None else margins,
            smoothing_B=smoothing,
        )
        nll_B = -means[a]
        scale = term.weight * gate_B if term.gated else term.weight
        per_query = per_query + scale * loss_B + term.sft * nll_B
        lost_B = None
        if (limit := objective.budget) is not None:
            free_B = limit.slack if base.name in LENGTH_NORMALISED else limit.slack * tokens[a]
            lost_B = (ref_logps[a] - logps[a] - free_B).relu()
            per_query = per_query + limit.weight * lost_B

        suffix = f"/{term.context}" if len(objective.terms) > 1 else ""
        found = {"logps/chosen": sums[a].detach(), "logps/rejected": sums[b].detach()}
        chosen_B, rejected_B = logps[a].detach(), logps[b].detach()
        if base.needs_reference:
            chosen_B, rejected_B = chosen_B - ref_logps[a], rejected_B - ref_logps[b]
        chosen_B, rejected_B = base.beta * chosen_B, base.beta * rejected_B
        found |= {
            "rewards/chosen": chosen_B,
            "rewards/rejected": rejected_B,
            "rewards/margins": chosen_B - rejected_B,
            "rewards/accuracies": (chosen_B > rejected_B).to(loss_B.dtype),
            "nll_loss": nll_B.detach(),
        }
        found |= {} if lost_B is None else {"budget_loss": lost_B.detach()}
        found |= {"loss": loss_B.detach()} if suffix else {}
        metrics |= {f"{name}{suffix}": value_B.mean() for name, value_B in found.items()}
    if margins is not None:
        metrics["margin/query"] = margins.mean()
    if weights is not None:
        metrics["weight/query"] = weights.detach().mean()
        per_query = per_query * weights
    return SteeringLoss(per_query.mean(), per_query, metrics)


def _check(names: tuple[str, ...], given: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, ...]:
    """The shape that all of them have."""
    shape: tuple[int, ...] | None = None
    for kind, tensors in given.items():
        for name in names:
            if name not in tensors:
                raise ValueError(
                    f"{kind} lacks the sequence {name!r}; given are {', '.join(tensors) or 'none'}"
                )
            found = tuple(tensors[name].shape)
            if len(found) != 1:
                raise ValueError(f"{kind}[{name!r}] must be (B,), found {found}")
            shape = found if shape is None else shape
            if found != shape:
                raise ValueError(f"{kind}[{name!r}] has shape {found}, others {shape}")
    assert shape is not None
    return shape
