"""A Bradley-Terry reward model: TRL's RewardTrainer on token ids that our own chat format made.

The loss of a pair is −log σ(r(x, y⁺) − r(x, y⁻) − margin) (Bradley & Terry 1952; the margin is that
of Llama 2, arXiv 2307.09288, eq. 2). Added to TRL: checkpoints with a completion mark, so that a
training killed at any instant goes on and ends the same; gradients checked before they reach the
weights; adapters merged on saving. One example::

    RewardPair("q1", "sso", chosen_ids=(4, 9, 7, 1), rejected_ids=(4, 9, 8, 1), margin=0.0)
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, Trainer
from trl import RewardConfig, RewardTrainer

from selfsteer.data.jsonl import disk_errors, write_atomic
from selfsteer.models.load import LoadedModel
from selfsteer.models.save import add_lora, save_model
from selfsteer.recipe.sections import Lora, Reward
from selfsteer.terminal import progress_bar, say, warn
from selfsteer.training.trainer import (
    COMPLETE_MARK,
    FiniteGradients,
    Progress,
    complete_checkpoints,
    discard_checkpoint,
    trainer_arguments,
)


@dataclass(frozen=True)
class RewardPair:
    """One preference as token ids: conversation and answer, as the template ends it."""

    id: str
    source: str
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    margin: float = 0.0


class _Trainer(RewardTrainer):  # type: ignore[misc]
    """TRL's, with our checkpoints and our log."""

    keep_checkpoints: int
    on_log: Callable[[dict[str, float]], None]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # past TRL's own, which writes a model card of an unfinished model
        Trainer._save_checkpoint(self, model, trial)
        folder = Path(str(self.args.output_dir))
        write_atomic(folder / f"checkpoint-{self.state.global_step}" / COMPLETE_MARK, "")
        for old in complete_checkpoints(folder)[: -self.keep_checkpoints]:
            discard_checkpoint(old)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs:
            self.on_log({"step": self.state.global_step, **_line(logs)})


def _line(logs: dict[str, float]) -> dict[str, float]:
    """Without TRL's count of tokens, which begins at zero after a resumption."""
    return {k: v for k, v in logs.items() if k != "num_tokens"}


def train_reward_model(
    loaded: LoadedModel,
    pairs: Sequence[RewardPair],
    settings: Reward,
    work: Path,
    *,
    label: str,
    seed: int,
    lora: Lora | None = None,
    keep_checkpoints: int = 1,
    on_log: Callable[[dict[str, float]], None] = lambda line: None,
    on_start: Callable[[int], None] = lambda step: None,
) -> tuple[Path, dict[str, float]]:
    """Trains a classifier with one label; goes on behind the last complete checkpoint.

    Args:
        loaded: from `load_reward_start`; its weights are changed.
        pairs: N, in a fixed order; one that counts twice stands twice.
        settings: schedule and memory.
        work: folder of checkpoints; gets the finished model as ``model``.
        label: what the progress bar calls it.
        seed: order of the data.
        lora: train adapters and the head instead of all weights; merged when saved.
        keep_checkpoints: complete checkpoints kept while training.
        on_log: gets every log line.
        on_start: told after which step the training (re)starts.

    Returns:
        The finished model's folder, inside ``work``, and the last logged metrics.

    Raises:
        NumericsError: a gradient is not finite.
    """
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        for leftover in work.glob("checkpoint-*"):
            if not (leftover / COMPLETE_MARK).exists():
                shutil.rmtree(leftover)
    if lora and settings.learning_rate < 1e-5:
        warn(
            f"a learning rate of {settings.learning_rate:.0e} hardly moves LoRA adapters; 1e-5 to "
            "1e-4 is usual"
        )
    accumulate = settings.batch_size // settings.forward_pairs
    per_epoch = math.ceil(math.ceil(len(pairs) / settings.forward_pairs) / accumulate)
    steps = math.ceil(per_epoch * settings.epochs)
    args = trainer_arguments(
        RewardConfig,
        loaded,
        settings,
        work,
        seed,
        per_device_train_batch_size=settings.forward_pairs,
        gradient_accumulation_steps=accumulate,
        warmup_steps=int(steps * settings.warmup),
        bf16=str(loaded.dtype) == "torch.bfloat16",
        gradient_checkpointing=False,  # the arguments' own setting does it
        max_length=None,  # whoever made the pairs has looked
        center_rewards_coefficient=settings.center or None,
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process drives one device; no DataParallel
    rows = {
        "chosen_ids": [list(p.chosen_ids) for p in pairs],
        "rejected_ids": [list(p.rejected_ids) for p in pairs],
        **({"margin": [p.margin for p in pairs]} if settings.margin else {}),
    }
    model = add_lora(loaded.model, lora, "SEQ_CLS") if lora else loaded.model
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=loaded.chat.tokenizer,
    )
    trainer.keep_checkpoints, trainer.on_log = keep_checkpoints, on_log
    trainer.remove_callback(PrinterCallback)  # the bar and metrics.jsonl say it better
    checkpoints = complete_checkpoints(work)
    done = 0
    if checkpoints:
        done = int(json.loads((checkpoints[-1] / "trainer_state.json").read_text())["global_step"])
        say(f"  {label}: resuming after step {done}")
    on_start(done)
    model.train()
    with progress_bar(label, steps) as bar, disk_errors(work):
        trainer.add_callback(Progress(bar, done))
        trainer.add_callback(FiniteGradients())
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    finished = work / "model"
    with disk_errors(finished):
        shutil.rmtree(finished, ignore_errors=True)
        save_model(trainer.accelerator.unwrap_model(model), loaded.chat, finished, loaded.dtype)
    history = [line for line in trainer.state.log_history if "loss" in line]
    return finished, _line(history[-1]) if history else {}
