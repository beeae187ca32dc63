"""SteeringTrainer: an objective's loss on transformers' Trainer.

transformers.Trainer minus labels: an example is one triple's sequences, the loss comes from
`steering_loss`, and the reference is a table of log-probs computed beforehand. One example::

    {"id": "q1", "sequences": {"good/good": EncodedSequence(…), "good/bad": …},
     "reference": {"good/good": tensor of per-token log-probs, …}}
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from selfsteer.config import Lora, Optimisation
from selfsteer.errors import ConfigError, NumericsError
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.loading import LoadedModel, add_lora, save_model
from selfsteer.models.logprobs import PaddedBatch, batch_logps, pack, sums_by_row
from selfsteer.models.tree import TreeRow
from selfsteer.objectives import Objective, steering_loss
from selfsteer.runs import disk_errors, write_atomic
from selfsteer.terminal import is_main_process, progress_bar, say, warn

#: Written last into a checkpoint; transformers takes a half-written folder for a whole one.
COMPLETE_MARK = "complete"


@dataclass(frozen=True)
class Example:
    """One triple, encoded, with the reference's per-token log-probs of each sequence."""

    id: str
    sequences: Mapping[str, EncodedSequence]
    reference: Mapping[str, Tensor] | None


class Examples(Dataset[Example]):
    """A list of examples that torch's loaders accept."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


@dataclass
class Collator:
    """Examples to one batch: sequence s of query q is number ``s · B + q``."""

    names: tuple[str, ...]
    layout: str
    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Ids, and what is known of each (sequence, query): reference sums and lengths."""
        flat = [e.sequences[name] for name in self.names for e in examples]
        batch: dict[str, Any] = {
            "packed": list(pack(flat, self.layout, self.pad_id)),
            "lengths": torch.tensor([len(s.response_ids) for s in flat]),
            "ids": [e.id for e in examples],
        }
        if examples[0].reference is not None:
            tokens = [e.reference[name] for name in self.names for e in examples if e.reference]
            batch["reference"] = torch.cat(tokens)
        return batch


class SteeringTrainer(Trainer):
    """Trains a policy, or a generator, on an objective.

    The loss of an optimiser step is the mean over its queries, however they are spread over
    micro-batches and ranks.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: Any,
        objective: Objective,
        examples: Sequence[Example],
        args: TrainingArguments,
        on_log: Callable[[dict[str, float]], None],
        keep_checkpoints: int,
    ) -> None:
        pad_id = loaded.chat.tokenizer.pad_token_id
        super().__init__(
            model=model,
            args=args,
            train_dataset=Examples(examples),
            data_collator=Collator(
                objective.sequences, loaded.layout, 0 if pad_id is None else pad_id
            ),
        )
        self.objective: Objective = objective
        self.precision = loaded.precision
        self.layout = loaded.layout
        self.on_log = on_log
        self.keep_checkpoints = keep_checkpoints
        self.loss_is_scaled_for_ga = True
        self._metric_sums: dict[str, Tensor] = {}
        self._metric_count = 0

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        queries = torch.tensor(sum(len(b["ids"]) for b in batch_samples), device=device)
        return self.accelerator.reduce(queries) if self.args.world_size > 1 else queries

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum over this micro-batch's queries, divided by all queries of the optimiser step.

        Raises:
            NumericsError: the loss is not finite; names the triples.
        """
        kind = TreeRow if self.layout == "tree" else PaddedBatch
        batch = kind(*inputs["packed"])
        names, size = self.objective.sequences, len(inputs["ids"])
        with self.precision():
            logps = batch_logps(model, batch)
        policy = sums_by_row(logps, batch.row, len(names) * size).view(len(names), size)
        lengths = inputs["lengths"].view(len(names), size)
        reference = None
        if "reference" in inputs:
            reference = sums_by_row(inputs["reference"], batch.row, policy.numel()).view_as(policy)
        out = steering_loss(
            self.objective,
            dict(zip(names, policy, strict=True)),
            None if reference is None else dict(zip(names, reference, strict=True)),
            dict(zip(names, lengths, strict=True)),
        )
        if not torch.isfinite(out.loss):
            broken = [
                i for i, v in zip(inputs["ids"], out.per_query.tolist(), strict=True)
                if not math.isfinite(v)
            ]  # fmt: skip
            raise NumericsError(
                f"The loss became {out.loss.item()} at step {self.state.global_step + 1} on the "
                f"triples {', '.join(broken[:8])}. Checkpoints from before are kept. Lower the "
                "learning rate, or remove these triples."
            )
        self._add_metrics(out.metrics, size)
        total = size if num_items_in_batch is None else num_items_in_batch
        loss = out.per_query.sum() / total * self.args.world_size
        return (loss, out) if return_outputs else loss

    def _add_metrics(self, metrics: dict[str, Tensor], size: int) -> None:
        for name, value in metrics.items():
            previous = self._metric_sums.get(name, torch.zeros_like(value))
            self._metric_sums[name] = previous + value.detach() * size
        self._metric_count += size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log, averaged over queries and ranks."""
        if self._metric_count and "loss" in logs:
            names = sorted(self._metric_sums)
            values = torch.stack(
                [self._metric_sums[n].double() for n in names]
                + [
                    torch.tensor(float(self._metric_count), dtype=torch.float64).to(
                        self.args.device
                    )
                ]
            )
            if self.args.world_size > 1:
                values = self.accelerator.reduce(values)
                logs["loss"] = float(
                    self.accelerator.reduce(torch.tensor(logs["loss"], device=self.args.device))
                    / self.args.world_size
                )
            for name, value in zip(names, values[:-1], strict=True):
                logs[name] = float(value / values[-1])
            self._metric_sums.clear()
            self._metric_count = 0
            if is_main_process():
                self.on_log({"step": self.state.global_step, **logs})
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(str(self.args.output_dir))
            write_atomic(folder / f"checkpoint-{self.state.global_step}" / COMPLETE_MARK, "")
            for old in complete_checkpoints(folder)[: -self.keep_checkpoints]:
                discard_checkpoint(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    marked = [p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE_MARK}")]
    return sorted(marked, key=lambda p: int(re.sub(r"\D", "", p.name)))


def discard_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; its mark goes first, it must not outlive what it vouches for."""
    (folder / COMPLETE_MARK).unlink(missing_ok=True)
    shutil.rmtree(folder)


class _FiniteGradients(TrainerCallback):
    """Stops before a gradient that is not finite reaches the weights."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            raise NumericsError(
                f"The gradient became {norm.item()} at step {state.global_step + 1}, though the "
                "loss is finite. Checkpoints from before are kept. Lower the learning rate, or "
                "compute in float32."
            )


class _Progress(TrainerCallback):
    def __init__(self, bar: Any, done: int) -> None:
        self.bar = bar
        bar.advance(done)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance(state.global_step - self.bar.done)


def accumulation(settings: Optimisation, world_size: int) -> tuple[int, int]:
    """(queries per forward and rank, forwards per optimiser step).

    Raises:
        ConfigError: the batch size cannot be split over the ranks like that.
    """
    per_rank, rest = divmod(settings.batch_size, world_size)
    micro = settings.micro_batch_size
    if rest or per_rank == 0 or per_rank % micro:
        raise ConfigError(
            f"batch_size {settings.batch_size} cannot be split into {world_size} ranks × "
            f"micro-batches of {micro}; choose a multiple of {world_size * micro}"
        )
    return micro, per_rank // micro


def train(
    loaded: LoadedModel,
    objective: Objective,
    examples: Sequence[Example],
    settings: Optimisation,
    *,
    output: Path,
    label: str,
    seed: int,
    lora: Lora | None = None,
    keep_checkpoints: int = 1,
    on_log: Callable[[dict[str, float]], None] = lambda logs: None,
    on_start: Callable[[int], None] = lambda step: None,
    also_save: Callable[[dict[str, float]], Mapping[str, str]] = lambda logs: {},
    per_step: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Trains and writes the model to ``output``; resumes from the last complete checkpoint.

    Args:
        loaded: the starting model; its weights are changed.
        objective: what to minimise.
        examples: encoded triples, with reference log-probs where the base needs them.
        settings: optimiser, schedule and batch.
        output: folder for the trained model; ``output`` + ``.partial`` holds checkpoints.
        label: what the progress bar calls it.
        seed: order of the data.
        lora: train adapters instead; merged when saved.
        keep_checkpoints: complete checkpoints kept while training.
        on_log: gets every log line.
        on_start: told after which step the training (re)starts.
        also_save: last log line → texts by file name, put into the model's folder with it.
        per_step: (queries per forward, forwards per step) instead of what settings imply.

    Returns:
        The last logged metrics.
    """
    work = output.with_name(f"{output.name}.partial")
    set_seed(seed)
    loaded.settle([s for e in examples[:16] for s in e.sequences.values()])
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    for leftover in work.glob("checkpoint-*"):
        if not (leftover / COMPLETE_MARK).exists() and is_main_process():
            shutil.rmtree(leftover)
    if lora and settings.learning_rate < 1e-6:
        warn(
            f"a learning rate of {settings.learning_rate:.0e} hardly moves LoRA adapters; 1e-5 to "
            "1e-4 is usual"
        )
    args = _arguments(loaded, settings, work, seed)
    micro, accumulate = per_step or accumulation(settings, args.world_size)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = micro, accumulate
    args._n_gpu = min(args.n_gpu, 1)  # one process drives one device; no DataParallel
    model = add_lora(loaded.model, lora) if lora else loaded.model
    model.train()
    logs: list[dict[str, float]] = []

    def log(line: dict[str, float]) -> None:
        logs.append(line)
        on_log(line)

    steps = math.ceil(len(examples) / (micro * args.world_size * accumulate) * settings.epochs)
    # rounded down: transformers rounds a share up, and a training of one step would do nothing
    args.warmup_steps = int(steps * settings.warmup)
    trainer = SteeringTrainer(loaded, model, objective, examples, args, log, keep_checkpoints)
    trainer.remove_callback(PrinterCallback)  # the bar and metrics.jsonl say it better
    checkpoints = complete_checkpoints(work)
    done = 0
    if checkpoints:
        state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
        done = int(state["global_step"])
        say(f"  {label}: resuming after step {done}")
    if is_main_process():
        on_start(done)
    with progress_bar(label, steps) as bar, disk_errors(work):
        trainer.add_callback(_Progress(bar, done))
        trainer.add_callback(_FiniteGradients())
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    model.eval()
    if args.should_save:
        with disk_errors(output):
            finished = work / "model"
            shutil.rmtree(finished, ignore_errors=True)
            save_model(trainer.accelerator.unwrap_model(model), loaded.chat, finished, loaded.dtype)
            for name, text in also_save(logs[-1] if logs else {}).items():
                write_atomic(finished / name, text)
            if output.exists():  # what an earlier try at this very training left
                shutil.rmtree(output)
            finished.replace(output)
            for old in complete_checkpoints(work):
                discard_checkpoint(old)
            shutil.rmtree(work)
    trainer.accelerator.wait_for_everyone()
    return logs[-1] if logs else {}


def _arguments(
    loaded: LoadedModel, settings: Optimisation, work: Path, seed: int
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        seed=seed,
        data_seed=seed,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.gradient_checkpointing,
        use_cpu=loaded.device.type == "cpu",
        save_strategy="steps",
        save_steps=settings.save_every_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a NaN; the loss is checked before backward
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=loaded.device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
