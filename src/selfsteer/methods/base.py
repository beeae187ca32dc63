"""What every method has: its recipe's common sections, and the loop around its rounds.

A method is a file of this folder: its recipe class with its settings, its objectives and its round,
on one screen. `Plan` collects the stages that a recipe comes to; nothing runs while it does.
"""

import os
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator
from typing_extensions import override

from selfsteer.errors import ConfigError, clip, short
from selfsteer.objectives import Objective, TokenObjective
from selfsteer.recipe.read import choose, known_settings, laid_over
from selfsteer.recipe.sections import (
    CONSTANTS,
    Benchmarks,
    EngineConfig,
    Evaluation,
    Generator,
    GrownQueries,
    Hygiene,
    JudgeConfig,
    Keep,
    Policy,
    PolicyStage,
    PolicyTraining,
    PrincipledHygiene,
    PrincipledSampling,
    PrinciplesConfig,
    Queries,
    Reward,
    Rows,
    Sampling,
    Section,
    Tracker,
    resolve_path,
)
from selfsteer.run.stage import Artifact, Stage, Where
from selfsteer.stages.augment import GrowQueries
from selfsteer.stages.benchmark import RunBenchmarks
from selfsteer.stages.contrasting import KeepContrasting
from selfsteer.stages.evaluate import Evaluate, Exhibit
from selfsteer.stages.figures import FigurePairs
from selfsteer.stages.filter import WritePairs
from selfsteer.stages.inputs import Share
from selfsteer.stages.measure import MeasureQuality
from selfsteer.stages.principles import WritePrinciples
from selfsteer.stages.queries import ReadQueries
from selfsteer.stages.train import RewardSet, Train, TrainReward

#: What a run has once, whatever its methods.
COMMON = frozenset(
    [
        *("name", "runs_dir", "seed", "tracking", "iterations", "queries", "principles"),
        *("baseline", "evaluation", "benchmarks"),
    ]
)


#: Characters of a run's name; file systems allow 255 bytes.
LONGEST_NAME = 240


class Plan:
    """The stages of a recipe, in the order they run; called with a stage it adds it.

    Args:
        recipe: whose seed, model settings and folder hold for all stages.
    """

    def __init__(self, recipe: "Recipe") -> None:
        self.stages: list[Stage] = []
        self.folder = recipe.folder
        self.base = Artifact(Path(resolve_path(recipe.policy.model)))
        #: Method → the policy after each round.
        self.policies: defaultdict[str, list[Artifact]] = defaultdict(list)
        #: The principles of each round, which a baseline uses as well.
        self.asked: list[Artifact] = []
        #: The newest preferences of the recipe's own method.
        self.pairs: Artifact | None = None
        #: The reward model that the run trains; there is one at most.
        self.reward: Artifact | None = None
        self.exhibit: Exhibit | None = None
        #: The queries of the run, once they are planned.
        self.queries = self.base
        self._common: dict[str, Any] = {"seed": recipe.seed, "loading": recipe.policy.loading}
        self._where = Where()

    @property
    def round(self) -> int:
        """Which round is being planned; what precedes the rounds is of the first one."""
        return self._where.round or 1

    @contextmanager
    def at(self, method: str | None, k: int | None, folder: str) -> Iterator[None]:
        """Places what is planned in this block in a round of a method."""
        before, self._where = self._where, Where(method, k, folder)
        yield
        self._where = before

    def reference(self, settings: Rows, policy: Artifact) -> Artifact:
        """The frozen model of a training: the policy that its round starts from, or the first."""
        return self.base if settings.reference == "first" else policy

    def __call__(self, stage: Stage, *, shared: bool = False) -> Artifact:
        """Adds a stage; returns what it will have made.

        Args:
            stage: gets its place, seed and model settings.
            shared: whether a baseline uses what it makes as well.

        Raises:
            ValueError: another stage has its name.
        """
        where = replace(self._where, method=None) if shared else self._where
        placed = replace(stage, where=where, **self._common)
        if any(placed.name == other.name for other in self.stages):
            raise ValueError(
                f"two stages are called {placed.name}, so one would overwrite what the other "
                "made; give one of them another title"
            )
        self.stages.append(placed)
        return Artifact(self.folder / placed.outputs[0], placed)


class Recipe(Section):
    """Everything a run needs to know, whatever its method."""

    name: str = Field(..., description="name of the run; runs_dir/name is the run folder")
    runs_dir: str = Field("runs", description="folder that holds run folders")
    seed: int = Field(0, description="seed of everything", ge=0, lt=2**31)
    policy: Policy
    keep: Keep = Keep()
    tracking: tuple[Tracker, ...] = Field(
        (), description="trackers to report to as well: [tensorboard], [wandb], [trackio], [mlflow]"
    )

    #: The method's name, as users write it.
    method: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(os.path.expanduser(self.runs_dir)) / self.name

    @abstractmethod
    def plan(self) -> list[Stage]:
        """All stages, in the order they run; nothing is read or loaded for it."""

    @property
    def judges(self) -> tuple[JudgeConfig, ...]:
        """Who judges or ranks answers to the queries."""
        return ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The method, and its baselines."""
        return (self.method,)

    @property
    def homes(self) -> dict[str, str]:
        """Method → the folder of its rounds in the run folder; the recipe's own needs none."""
        names = ("", "baseline", *self.methods[2:])
        return dict(zip(self.methods, names, strict=False))

    @property
    def last_round(self) -> int:
        """How many rounds there are."""
        return 0

    @override
    def faults(self) -> Iterator[str]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            yield f"name must be a plain folder name, found {short(self.name)}"
        if len(self.name) > LONGEST_NAME:
            yield (
                f"name has {len(self.name):,} characters, of which file systems take about "
                f"{LONGEST_NAME} in a folder's name"
            )


class Aligning(Recipe):
    """A method that trains a policy in rounds, each from the policy of the one before."""

    iterations: int = Field(
        1, description="rounds, each from the policy of the last one; v1 runs 3", ge=1, le=1000
    )
    queries: Queries
    sampling: Sampling = Sampling()
    training: PolicyStage = PolicyStage()
    judge: JudgeConfig | None = Field(
        None,
        description="what compares responses: oracle, checks, chat:MODEL, reward:MODEL, "
        "human:PATH, {kind: principles, …}; null: no judge",
    )
    evaluation: Evaluation | None = Field(
        None, description="evaluation on held-out queries; null: none"
    )
    benchmarks: Benchmarks | None = Field(
        None, description="benchmarks of base, baseline and policy; null: none"
    )

    @property
    @override
    def last_round(self) -> int:
        return self.iterations

    #: Whether an answer must stand beside each query.
    needs_answers: ClassVar[bool] = False
    #: Whether that answer may be the chosen or the rejected one.
    either_side: ClassVar[bool] = False

    #: What the policy is trained on and how that came about, as cards tell it.
    learnt: ClassVar[str] = "pairs of a chosen and a rejected answer"
    pair: ClassVar[str]
    #: Whether the rejected answers were asked to be bad.
    bad_on_purpose: ClassVar[bool] = False

    @property
    def ranker(self) -> JudgeConfig | None:
        """The judge that says which answer is chosen; None: no judge of the recipe does."""
        return None

    @abstractmethod
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        """Plans one round.

        Args:
            plan: gets the stages.
            k: which round, counted from 1.
            policy: at its start.

        Returns:
            The trained policy.
        """

    @override
    def plan(self) -> list[Stage]:
        """Queries, rounds with what is before and after them, evaluation, benchmarks."""
        plan = Plan(self)
        plan.queries = self._queries(plan)
        policy = self.before_rounds(plan)
        for k in range(1, self.iterations + 1):
            with plan.at(self.method, k, f"iteration-{k}"):
                policy = self.round(plan, k, policy)
            plan.policies[self.method].append(policy)
        self.after_rounds(plan)
        self._evaluation(plan)
        return plan.stages

    def before_rounds(self, plan: Plan) -> Artifact:
        """Plans what precedes the rounds; returns the policy that the first one starts from."""
        return plan.base

    def after_rounds(self, plan: Plan) -> None:
        """Plans what follows the rounds and precedes the evaluation; nothing of every method."""

    # -- the parts that rounds are made of ---------------------------------------------------------

    def train(
        self,
        plan: Plan,
        data: Artifact,
        policy: Artifact,
        objective: Objective | TokenObjective,
        settings: Generator | PolicyStage,
        *,
        contexts: tuple[str, ...] = ("plain",),
        title: str = "policy",
        teacher: Artifact | None = None,
        principled: Artifact | None = None,
    ) -> Artifact:
        """The policy of the next round, or a generator, trained from this one's start.

        Args:
            plan: gets the stages.
            data: what it is trained on.
            policy: at the start of the round.
            objective: what to minimise.
            settings: of the training.
            contexts: in which the trained model will answer.
            title: of the training.
            teacher: targets of the data.
            principled: records of the same ids with principles, where figures of pairs need them.

        Raises:
            ValueError: they need them, and they are not given.
        """
        figures = None
        if isinstance(objective, Objective) and objective.read:
            beside = [name for name in objective.read if not name.startswith("plain/")]
            if beside and principled is None:
                raise ValueError(
                    f"objective {objective.name} reads {', '.join(beside)}, and pairs hold no "
                    "principles; call train(…, principled=asked)"
                )
            longest = settings.max_length
            figures = plan(FigurePairs(data, principled, policy, objective, longest))
        measured = settings.selection.points > 0
        # candidates answer in process, whoever else samples
        sampling = self.sampling.model_copy(update={"engine": EngineConfig()})
        return plan(
            Train(
                data,
                start=policy,
                reference=plan.reference(settings, policy),
                objective=objective,
                settings=settings,
                contexts=contexts,
                sampling=sampling if measured else None,
                judge=self.judge if measured else None,
                lora=self.policy.lora,
                keep_checkpoints=self.keep.checkpoints,
                keep=title == "policy" or self.keep.generator,
                teacher=teacher,
                figures=figures,
                title=title,
            )
        )

    def _queries(self, plan: Plan) -> Artifact:
        queries = plan(ReadQueries(plain_queries(self.queries), self.judges, self.reads_answers))
        if not isinstance(self.queries, GrownQueries) or self.queries.augment is None:
            return queries
        settings = GrownQueries(
            **{name: getattr(self.queries, name) for name in GrownQueries.model_fields}
        )
        held_out = self.evaluation.queries if self.evaluation else None
        return plan(GrowQueries(queries, plan.base, settings, self.sampling, held_out, self.judges))

    def _evaluation(self, plan: Plan) -> None:
        every = {
            f"{method}/iteration-{k}": policy
            for method, made in plan.policies.items()
            for k, policy in enumerate(made, 1)
        }
        finals = {method: f"{method}/iteration-{len(m)}" for method, m in plan.policies.items()}
        if self.evaluation is not None:
            plan(
                Evaluate(
                    plan.queries,
                    {"base": plan.base, **every},
                    finals,
                    self.evaluation,
                    self.sampling,
                    self.judge,
                    plan.exhibit,
                )
            )
        if self.benchmarks is not None:
            last = {method: made[-1] for method, made in reversed(plan.policies.items())}
            judge = self.benchmarks.judge or self.judge
            plan(RunBenchmarks({"base": plan.base, **last}, self.benchmarks, judge, self.sampling))

    @property
    def reads_answers(self) -> bool:
        """Whether the recipe wants an answer beside each query, as its method may always do."""
        return self.needs_answers

    @property
    @override
    def judges(self) -> tuple[JudgeConfig, ...]:
        return () if self.judge is None else (self.judge,)

    # -- what contradicts itself -------------------------------------------------------------------

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.judge and self.judge.kind == "principles" and self.judge.good is None:
            yield (
                "judge of kind principles: pairs and held-out queries hold no principles; set "
                "judge.good and judge.bad"
            )
        if self.benchmarks:
            yield from self.benchmarks.judge_faults(self.benchmarks.judge or self.judge)
        yield from self.engine_faults()
        budget, shortest = self.sampling.max_new_tokens, self.shortest
        if budget > shortest:
            yield (
                f"sampling.max_new_tokens {budget} is longer than max_length {shortest}, so that "
                "sampled responses could not be trained on"
            )

    @property
    def shortest(self) -> int:
        """Tokens of the longest sequence that every training of the method takes."""
        return self.training.max_length

    def engines(self) -> dict[str, EngineConfig]:
        """Setting → an engine that brings its own model."""
        return {}

    def sampled_models(self) -> dict[str, bool]:
        """Trained models, and whether the recipe samples from them."""
        return {
            "the policies of earlier iterations": self.iterations > 1,
            "the trained policy (evaluation)": self.evaluation is not None,
            "the trained policy (benchmarks)": bool(self.benchmarks and self.benchmarks.judged),
        }

    def answers_in_process(self) -> bool:
        """Whether anything answers with transformers, whatever sampling.engine is."""
        return self.training.selection.points > 0

    def engine_faults(self) -> Iterator[str]:
        """Engines that contradict themselves or cannot answer with every model of this recipe."""
        engine, others = self.sampling.engine, self.engines()
        yield from engine.conflicts("sampling.engine")
        for where, other in others.items():
            yield from other.conflicts(where, named=True)
        answering, longest = engine.answering.kind, engine.answering.max_model_len
        clusters = {e.address for e in (engine, *others.values()) if e.kind == "ray"}
        in_process = answering == "transformers" or self.answers_in_process()
        asked = ", ".join(name for name, sampled in self.sampled_models().items() if sampled)
        budget = self.sampling.max_new_tokens
        wrong = {
            **{f"{where}.model is missing": e.model is None for where, e in others.items()},
            f"sampling.engine and {', '.join(others)} are on different Ray clusters, but a stage "
            "can join only one: give both the same address": len(clusters) > 1,
            f"sampling.engine: max_model_len {longest} leaves no room for a prompt beside "
            f"sampling.max_new_tokens {budget}": longest is not None and longest <= budget,
            f"sampling.batch_size has no effect with an engine of kind {answering}; unset it": (
                "batch_size" in self.sampling.model_fields_set and not in_process
            ),
            f"sampling.engine asks one server that serves {engine.model}, the policy as it is now, "
            f"but this recipe also samples from {asked}. Give sampling.engine.launch, so that each "
            "model is served in its turn, or set sampling.engine: transformers. A vLLM that takes "
            "adapters can stay where policy.lora is set: sampling.engine.adapters: true": (
                answering != "transformers"
                and engine.base_url is not None
                and bool(asked)
                and not engine.adapters
            ),
            "sampling.engine.adapters needs policy.lora: without it, whole models are trained": (
                engine.adapters and self.policy.lora is None
            ),
            f"sampling.engine.adapters: with iterations {self.iterations}, those of later rounds "
            "belong to the policies of earlier ones, which the server does not hold. Give "
            "sampling.engine.launch in place of base_url": engine.adapters and self.iterations > 1,
        }
        yield from (text for text, holds in wrong.items() if holds)


class Paired(Aligning):
    """A method that trains on preferences."""

    hygiene: Hygiene = Hygiene()
    training: PolicyTraining = PolicyTraining()
    reward: Reward | None = Field(None, description="reward model trained on the pairs; null: none")

    def pairs(
        self,
        plan: Plan,
        samples: Artifact,
        policy: Artifact,
        *,
        principled: Artifact | None = None,
        triples: Artifact | None = None,
        cleaned: bool = False,
        plain: float = 0.0,
    ) -> Artifact:
        """Preferences of the good response over the bad or plain one, and their quality."""
        samples = self.confirmed(plan, samples, policy, plain)
        catalogue = self.principles.catalogue if isinstance(self, Principled) else None
        pairs = plan(
            WritePairs(
                samples,
                plan.base,
                self.hygiene,
                self.sampling.shard_size,
                catalogue=catalogue,
                cleaned=cleaned,
                plain=plain,
            )
        )
        plan(MeasureQuality(pairs, policy, self.judge, principled, triples))
        plan.pairs = pairs
        return pairs

    def confirmed(self, plan: Plan, samples: Artifact, policy: Artifact, plain: float) -> Artifact:
        """What of the samples is made into pairs: all of them, unless hygiene asks for more."""
        return samples

    @override
    def after_rounds(self, plan: Plan) -> None:
        if self.reward is not None and plan.reward is None:
            assert plan.pairs is not None
            plan.reward = plan(reward_stage(self, self.reward, own=(self.method, plan.pairs)))

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.reward and self.method in {d.label for d in self.reward.data}:
            yield f"a set of reward.data is called {short(self.method)}, as the run's own"


class Principled(Aligning):
    """A method that asks under principles."""

    #: Whether it learns from how far the principles tell answers apart.
    by_contrast: ClassVar[bool] = False

    principles: PrinciplesConfig = PrinciplesConfig()
    queries: GrownQueries
    baseline: str | dict[str, dict[str, Any]] | None = Field(
        None,
        description="another method to run on the same queries and principles, such as pbaa; or "
        "several, with settings of their own: {pbaa: {}, contrast: {training: {epochs: 2}}}",
    )

    @field_validator("baseline", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        each = value.values() if isinstance(value, dict) else ()
        if isinstance(value, list) or not all(isinstance(own, dict) for own in each):
            raise ValueError(
                "it takes the name of a method, or several with settings of their own, {} for "
                "none: {pbaa: {}, contrast: {}}"
            )
        return value

    @cached_property
    def baselines(self) -> tuple["Principled", ...]:
        """A recipe per baseline: this one's settings, as far as its method has them, and its own.

        Raises:
            ConfigError: no such method, one that asks under no principles, or settings that it
                cannot honour.
        """
        named = {self.baseline: {}} if isinstance(self.baseline, str) else self.baseline or {}
        return tuple(self._baseline(method, own) for method, own in named.items())

    def _baseline(self, method: str, own: Mapping[str, Any]) -> "Principled":
        from selfsteer.methods import METHODS, recipe_of

        where = f"baseline {clip(method)}"
        kind = choose(METHODS, {"method": method}, where)
        if not issubclass(kind, Principled) or method == self.method:
            raise ConfigError(
                f"The {where} cannot be used: a baseline is another method that asks under "
                f"principles, and {method} is "
                + ("the recipe's own." if method == self.method else "none.")
            )
        idle = [name for name in own if name in COMMON]
        if isinstance(policy := own.get("policy"), Mapping):
            idle += [f"policy.{name}" for name in policy if name != "lora"]
        # a reward model is the recipe's, unless the method itself needs one
        if "reward" in own and issubclass(kind, Paired):
            idle += [] if kind.model_fields["reward"].default else ["reward"]
        if idle:
            raise ConfigError(
                f"The {where} cannot be used: {', '.join(idle)} would have no effect there, as the "
                "recipe's own holds for all methods of a run; set it in the recipe or remove it."
            )
        alone = {"method", "baseline", "reward", "evaluation", "benchmarks"}
        given = self.model_dump(mode="json", exclude_unset=True, exclude=alone)
        shared = known_settings(kind, {**given, "iterations": self.iterations})
        made = recipe_of({**laid_over(shared, own), "method": method}, where)
        assert isinstance(made, Principled)
        return made

    @property
    @override
    def methods(self) -> tuple[str, ...]:
        return (self.method, *(b.method for b in self.baselines))

    @override
    def after_rounds(self, plan: Plan) -> None:
        super().after_rounds(plan)
        for other in self.baselines:
            policy = other.before_rounds(plan)
            for k in range(1, self.iterations + 1):
                with plan.at(other.method, k, f"{self.homes[other.method]}/iteration-{k}"):
                    policy = other.round(plan, k, policy)
                plan.policies[other.method].append(policy)

    def ask(self, plan: Plan, policy: Artifact, share: Share | None = None) -> Artifact:
        """Features, p+ and p- for the queries of a round; a baseline takes those that are there."""
        if (k := plan.round) <= len(plan.asked):
            return plan.asked[k - 1]
        engine = self.sampling.engine if self.principles.asks_a_model else EngineConfig()
        writing = WritePrinciples(plan.queries, policy, self.principles, engine, share)
        asked = plan(writing, shared=len(self.methods) > 1)
        plan.asked.append(asked)
        return asked

    @override
    def engines(self) -> dict[str, EngineConfig]:
        writer = self.principles.writer
        return {} if writer is None else {"principles.writer": writer}

    @override
    def faults(self) -> Iterator[str]:
        try:
            assert self.baselines is not None
        except ConfigError as e:
            yield str(e).removeprefix("The ").removesuffix(".")
        yield from super().faults()
        engine, writer = self.sampling.engine, self.principles.writer
        batched = writer is not None and writer.answering.kind == "transformers"
        here = engine.answering.kind == "transformers" or batched
        if "batch_size" in self.principles.model_fields_set and not here:
            yield (
                "principles.batch_size has no effect: no engine of kind transformers is asked; "
                "unset it"
            )


class PrincipledPairs(Principled, Paired):
    """A method whose pairs are written under principles."""

    hygiene: PrincipledHygiene = PrincipledHygiene()
    sampling: PrincipledSampling = PrincipledSampling()
    training: PolicyTraining = PolicyTraining()

    pair: ClassVar[str] = (
        "The chosen one was written under a good principle and the rejected one under a bad one; "
        "the principles were then taken away ([Self-Steering Optimization]"
        "(https://arxiv.org/abs/2410.17131))"
    )
    bad_on_purpose: ClassVar[bool] = True

    @override
    def confirmed(self, plan: Plan, samples: Artifact, policy: Artifact, plain: float) -> Artifact:
        least = self.hygiene.min_contrast
        return samples if least is None else plan(KeepContrasting(samples, policy, least, plain))

    @override
    def faults(self) -> Iterator[str]:
        if self.principles.features == "none" and not self.hygiene.export_unsafe:
            yield (
                "hygiene.export_unsafe: false recognises pairs about Safety by their features, and "
                "with principles.features none there are none"
            )
        if self.sampling.contrast_bad and not self.bad_on_purpose:
            yield (
                f"sampling.contrast_bad has no effect with method {self.method}, which asks for no "
                "bad answers; remove it"
            )
        yield from super().faults()


def plain_pair(settings: PolicyTraining) -> Objective:
    """L(x; y+ ≻ y-): what every policy is trained on whose pairs are plain."""
    return named("pbaa", settings)


def named(name: str, settings: Generator | PolicyTraining) -> Objective:
    """The named objective with the constants that the settings hold."""
    return Objective.named(name, **settings.model_dump(include={"base", *CONSTANTS}))


def plain_queries(settings: Queries) -> Queries:
    """What of the settings decides which queries are read."""
    chosen = {
        n: getattr(settings, n) for n in Queries.model_fields if n in settings.model_fields_set
    }
    return Queries(**{n: v for n, v in chosen.items() if n != "ngram" or settings.against})


def reward_stage(recipe: Recipe, settings: Reward, own: tuple[str, Artifact] | None) -> TrainReward:
    """A reward model on the run's own preferences and on given ones."""
    given = tuple(RewardSet(d.label, d.weight, source=d.path) for d in settings.data)
    mine = (RewardSet(own[0], settings.own_weight, own[1]),) if own else ()
    start = Artifact(Path(resolve_path(settings.model or recipe.policy.model)))
    return TrainReward(
        (*mine, *given),
        start,
        settings.model_copy(update={"data": (), "model": None, "own_weight": 1.0}),
        of_policy=settings.model is None,
        lora=recipe.policy.lora,
        keep_checkpoints=recipe.keep.checkpoints,
    )
