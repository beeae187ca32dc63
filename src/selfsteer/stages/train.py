"""Triples to a generator, triples or preferences to a policy, preferences to a reward model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from typing_extensions import override

from selfsteer.data.digests import digest_path
from selfsteer.data.jsonl import write_atomic
from selfsteer.errors import ConfigError
from selfsteer.judges.load import load_judge
from selfsteer.objectives import Objective, TokenObjective
from selfsteer.recipe.sections import (
    Generator,
    JudgeConfig,
    Loading,
    Lora,
    PolicyStage,
    Reward,
    Sampling,
)
from selfsteer.run import cost, ranks
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import COSTS_ONLY, Artifact, Stage
from selfsteer.run.sums import REMOVED
from selfsteer.stages.inputs import preferences_of
from selfsteer.terminal import is_main_process


@dataclass(frozen=True)
class Train(Stage):
    """A policy, or a generator, trained on an objective.

    Args:
        data: triples, or preferences.
        start: the model to train.
        reference: the frozen model whose log-probs the base loss compares with.
        objective: what to minimise.
        settings: optimiser, schedule, and which step is kept.
        contexts: in which the trained model will answer; what its steps are selected by.
        sampling: how its candidates answer; None where no step is selected.
        judge: of the candidates.
        lora: train adapters instead of all weights.
        keep_checkpoints: resumable ones kept while training.
        keep: whether the weights stay once the run is finished.
        teacher: targets of the data, for an objective of tokens.
        figures: weights or margins of the data, where the objective has them computed beforehand.
        title: its name within its round.
    """

    data: Artifact
    start: Artifact
    reference: Artifact
    objective: Objective | TokenObjective
    settings: Generator | PolicyStage
    contexts: tuple[str, ...] = ("plain",)
    sampling: Sampling | None = None
    judge: JudgeConfig | None = None
    lora: Lora | None = None
    keep_checkpoints: int = field(default=1, metadata=COSTS_ONLY)
    keep: bool = field(default=True, metadata=COSTS_ONLY)
    teacher: Artifact | None = None
    figures: Artifact | None = None
    title: str = field(default="policy", kw_only=True)

    # checkpoints while it works, then its candidates' figures
    leaves = ("{name}.partial", "{name}.selection.json")
    on_ranks = True

    @property
    def section(self) -> str:
        """The section of the recipe that its settings are."""
        return "generator" if isinstance(self.settings, Generator) else "training"

    @property
    def plain(self) -> bool:
        """Whether it sees plain contexts only."""
        return all(name.startswith("plain/") for name in self.objective.sequences)

    @override
    def cost(self, scale: Scale) -> Cost:
        return cost.training(self.data.texts, self.objective, self.settings, self.records(scale))

    @override
    def check(self) -> Iterator[str]:
        check_device(self.loading, self.lora, self.start)
        if ranks.sharding() == "zero3" and self.settings.selection.points:
            raise ConfigError(
                "Checkpoint selection lets the model answer on one rank, which under ZeRO-3 holds "
                "no whole weights. Use the profile fsdp2 or zero2, or set "
                f"{self.section}.selection.points: 0."
            )
        # people have not seen what candidates answer: their labels judge none
        judge = self.judge if self.judge and self.judge.kind != "human" else None
        if is_main_process() and (loaded := load_judge(judge)):
            loaded.check(())
        yield from ()

    @override
    def run(self, run: RunFolder) -> StageResult:
        from selfsteer.stages.fit import fit

        return fit(self, run)

    @override
    def tidy(self, run: RunFolder) -> None:
        """The folder stays as a record."""
        for weights in () if self.keep else list((run / self.name).rglob("*.safetensors")):
            # first, so that a kill between leaves no weights that are gone without a reason
            write_atomic(weights.with_name(REMOVED), "keep.generator was false\n")
            weights.unlink()


def check_device(loading: Loading, lora: Lora | None, start: Artifact) -> None:
    """Fails now if the device is not there, or cannot train what the recipe says."""
    from selfsteer.models.load import check_bits, check_trainable, resolve_device

    device = resolve_device(loading.device)
    if lora:
        check_bits(lora.bits, device)
    if start.maker is None:
        check_trainable(str(start.path), loading, lora)


class RewardSet(NamedTuple):
    """One preference set of a reward model's mixture: the run's own, or one from elsewhere."""

    name: str
    weight: float
    own: Artifact | None = None
    #: A file or folder of preferences, or a run folder.
    source: str = ""

    @property
    def path(self) -> Path:
        """Where the preferences are."""
        return self.own.path if self.own else preferences_of(self.source)

    @property
    def identity(self) -> tuple[str, float, str]:
        """What a reward model depends on."""
        content = self.own.fingerprint if self.own else digest_path(self.path)
        return self.name, self.weight, content


@dataclass(frozen=True)
class TrainReward(Stage):
    """A Bradley-Terry reward model on preference sets, mixed by weight.

    Args:
        sets: the mixture.
        start: chat model, or reward model to train further.
        settings: schedule, margin, held-out share.
        of_policy: whether ``start`` has the policy's chat template, and takes its variables.
        lora: train adapters and the head instead of all weights.
        keep_checkpoints: resumable ones kept while training.
    """

    sets: tuple[RewardSet, ...] = field(
        metadata={"identity": lambda sets: [s.identity for s in sets]}
    )
    start: Artifact
    settings: Reward
    of_policy: bool = True
    lora: Lora | None = None
    keep_checkpoints: int = field(default=1, metadata=COSTS_ONLY)

    title = "train_reward"
    makes = ("reward", "reward.json")
    leaves = ("reward.partial",)
    one_process = True

    @property
    def start_loading(self) -> Loading:
        """How ``start`` is loaded."""
        other = self.loading.model_copy(update={"chat_template_kwargs": {}})
        return self.loading if self.of_policy else other

    @override
    def cost(self, scale: Scale) -> Cost:
        return Cost(unknown=(self.name,))

    @override
    def check(self) -> Iterator[str]:
        from selfsteer.models.load import load_chat

        check_device(self.loading, self.lora, self.start)
        load_chat(str(self.start.path), self.start_loading)
        for one in self.sets:
            if one.own is None:
                preferences_of(one.source)
        yield from ()

    @override
    def run(self, run: RunFolder) -> StageResult:
        from selfsteer.stages.fit_reward import fit_reward

        return fit_reward(self, run)
