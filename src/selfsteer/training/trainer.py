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
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from selfsteer.data.jsonl import disk_errors, write_atomic
from selfsteer.errors import ConfigError, EngineError, NumericsError
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.head import with_collisions
from selfsteer.models.load import LoadedModel
from selfsteer.models.save import add_lora, disable_dropout, save_model
from selfsteer.models.score import batch_scores, pack, sums_by_row
from selfsteer.objectives import Objective, SteeringLoss, steering_loss, wpo_weights
from selfsteer.recipe.sections import Lora, Optimisation, Schedule
from selfsteer.run import ranks
from selfsteer.stages.selector import Selector
from selfsteer.terminal import is_main_process, progress_bar, say, warn
from selfsteer.training.batches import StepSampler, fill_rows
from selfsteer.training.sharding import check_sharded, full, shard_on_cpu, whole

#: Written last into a checkpoint; transformers takes a half-written folder for a whole one.
COMPLETE_MARK = "complete"


@dataclass(frozen=True)
class Example:
    """One triple, encoded, with the reference's per-token log-probs of each sequence."""

    id: str
    sequences: Mapping[str, EncodedSequence]
    reference: Mapping[str, Tensor] | None

    def tokens(self) -> int:
        """Tokens of the sequences, each prompt counted once."""
        prompts = {s.prompt_ids for s in self.sequences.values()}
        return sum(map(len, prompts)) + sum(len(s.response_ids) for s in self.sequences.values())


@dataclass(frozen=True)
class RowBudget:
    """How many queries an optimiser step takes, and how much of it one forward."""

    #: Queries per optimiser step, over all ranks.
    queries: int
    #: Most tokens of one forward.
    row_tokens: int
    #: Most queries of one forward; None: as many as fit.
    row_queries: int | None = None


#: Sum and weight by name; the weights are queries, or tokens.
Metrics = dict[str, tuple[Any, Any]]


def merge_metrics(into: Metrics, more: Metrics) -> None:
    """Adds sums and weights."""
    for name, (total, count) in more.items():
        old_total, old_count = into.get(name, (0.0, 0.0))
        into[name] = (old_total + total, old_count + count)


def row_costs(examples: Sequence[Example], layout: str) -> list[int]:
    """Tokens that each query takes in a row; padding to the step's longest where it is padded."""
    if layout == "tree":
        return [e.tokens() for e in examples]
    longest = max(len(s) for e in examples for s in e.sequences.values())
    return [longest * len(e.sequences) for e in examples]


class Examples(Dataset[Example]):
    """A list of examples that torch's loaders accept."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class SteeringTrainer(Trainer):
    """Trains a policy, or a generator, on an objective.

    An optimiser step takes exactly ``batch_size`` queries over all ranks, in rows of at most
    ``row_tokens`` tokens; its loss is the mean over those queries, however they are spread. Every
    rank holds all examples and works on its share of a step.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: Any,
        objective: Objective,
        examples: Sequence[Example],
        args: TrainingArguments,
        budget: RowBudget,
        on_log: Callable[[dict[str, float]], None],
        keep_checkpoints: int,
    ) -> None:
        self.examples = Examples(examples)
        super().__init__(model=model, args=args, train_dataset=self.examples)
        pad_id = loaded.chat.tokenizer.pad_token_id
        self.pad_id = 0 if pad_id is None else pad_id
        self.objective: Objective = objective
        self.precision = loaded.precision
        self.layout = loaded.layout
        self.budget = budget
        self.on_log = on_log
        self.keep_checkpoints = keep_checkpoints
        self.loss_is_scaled_for_ga = True
        self._metrics: Metrics = {}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole optimiser steps; not sharded, each rank takes its rows from every step."""
        costs = [e.tokens() for e in self.examples.examples]
        return DataLoader(
            self.examples,
            batch_sampler=StepSampler(costs, self.budget.queries, int(self.args.seed)),
            collate_fn=lambda step: {"examples": step},
        )

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of all rows of the step; returns this rank's share of the loss.

        Where the GPU's memory is too small for a row, the rows are halved and the step begins
        again; what it had added to the gradients is dropped.

        Raises:
            EngineError: not even a row of one query fits, or one rank of several ran out.
        """
        check_sharded(model)
        model.train()
        examples: list[Example] = inputs["examples"]
        costs = row_costs(examples, self.layout)
        while True:
            rows = fill_rows(
                costs, self.args.world_size, self.budget.row_tokens, self.budget.row_queries
            )[self.args.process_index]
            try:
                loss, metrics = self._accumulate(model, examples, rows)
            except torch.OutOfMemoryError as e:
                self._halve(max(sum(costs[i] for i in row) for row in rows), max(costs), e)
            else:
                merge_metrics(self._metrics, metrics)
                return loss
            # only here is the error gone, whose traceback held on to the row's tensors
            model.zero_grad()
            torch.cuda.empty_cache()

    def _accumulate(
        self, model: Any, examples: Sequence[Example], rows: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Metrics]:
        loss = torch.zeros((), dtype=torch.float64, device=self.args.device)
        metrics: Metrics = {}
        for number, row in enumerate(rows, 1):
            last = number == len(rows)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                # a rank without work in this row still walks through the model with the others
                out, found = self.row_loss(model, [examples[i] for i in row or [0]])
                share = 1.0 if row else 0.0
                part = out.per_query.sum() / len(examples) * share
                # the ranks' gradients are averaged, their shares of the loss must be added
                self.accelerator.backward(part * self.args.world_size)
            loss += part.detach()
            # every rank must know every metric's name: they are added over the ranks
            merge_metrics(metrics, {n: (t * share, w * share) for n, (t, w) in found.items()})
        # what the Trainer logs is averaged over the ranks as well
        return loss * self.args.world_size, metrics

    def _halve(self, tokens: int, longest: int, error: Exception) -> None:
        alone = self.args.world_size == 1
        if tokens <= longest or not alone:
            advice = "Set gradient_checkpointing: true, lower max_length, or train with policy.lora"
            if tokens > longest:  # the other ranks are past this row and cannot turn back
                advice = f"Set row_tokens below {tokens:,}"
            raise EngineError(
                f"The GPU's memory is too small for a row of {tokens:,} tokens. {advice}; then the "
                "same command goes on from the last checkpoint."
            ) from error
        self.budget = replace(self.budget, row_tokens=max(tokens // 2, 1))
        warn(
            f"the GPU's memory is too small for a row of {tokens:,} tokens; going on with "
            f"row_tokens: {self.budget.row_tokens}"
        )

    def row_loss(self, model: Any, examples: Sequence[Example]) -> tuple[SteeringLoss, Metrics]:
        """The objective on one row of queries.

        Raises:
            NumericsError: the loss is not finite; names the triples.
        """
        names, size = self.objective.sequences, len(examples)
        flat = [e.sequences[name] for name in names for e in examples]
        batch = pack(flat, self.layout, self.pad_id).to(self.args.device)
        weighted = self.objective.weighting is not None
        with self.precision(), with_collisions() if weighted else nullcontext():
            scores = batch_scores(model, batch)
        policy = sums_by_row(scores.logps, batch.row, len(flat)).view(len(names), size)
        lengths = torch.tensor([len(s.response_ids) for s in flat], device=policy.device)
        reference = None
        if self.objective.base.needs_reference:
            tokens = [e.reference[name] for name in names for e in examples if e.reference]
            known = torch.cat(tokens).to(policy.device)
            reference = sums_by_row(known, batch.row, len(flat)).view_as(policy)
        weights = None
        if scores.collisions is not None:
            collisions = sums_by_row(scores.collisions, batch.row, len(flat)).view_as(policy)
            # objective pbaa: the rows are plain/good and plain/bad
            weights = wpo_weights(policy, collisions, lengths.view_as(policy))
        out = steering_loss(
            self.objective,
            dict(zip(names, policy, strict=True)),
            None if reference is None else dict(zip(names, reference, strict=True)),
            dict(zip(names, lengths.view_as(policy), strict=True)),
            weights=weights,
        )
        if not torch.isfinite(out.loss):
            broken = [
                e.id for e, v in zip(examples, out.per_query.tolist(), strict=True)
                if not math.isfinite(v)
            ]  # fmt: skip
            raise NumericsError(
                f"The loss became {out.loss.item()} at step {self.state.global_step + 1} on the "
                f"triples {', '.join(broken[:8])}. Checkpoints from before are kept. Lower the "
                "learning rate, or remove these triples."
            )
        metrics = {name: (value.detach() * size, size) for name, value in out.metrics.items()}
        if scores.sampled is not None:
            entropy, hits, count = scores.sampled
            metrics |= {"entropy": (entropy, count), "mean_token_accuracy": (hits, count)}
        return out, metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log, averaged over queries (tokens) and ranks."""
        if self._metrics and "loss" in logs:
            names = sorted(self._metrics)
            pairs = [[torch.as_tensor(v).double() for v in self._metrics[n]] for n in names]
            values = torch.tensor(pairs, dtype=torch.float64, device=self.args.device)
            if self.args.world_size > 1:
                values = self.accelerator.reduce(values)
            for name, (total, count) in zip(names, values.tolist(), strict=True):
                logs[name] = total / count
            self._metrics.clear()
            if is_main_process():
                self.on_log({"step": self.state.global_step, **logs})
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        ranks.meet()  # each has written its part
        if self.args.should_save:
            folder = Path(str(self.args.output_dir))
            mark = json.dumps({"sharding": ranks.sharding(), "ranks": ranks.size()})
            write_atomic(folder / f"checkpoint-{self.state.global_step}" / COMPLETE_MARK, mark)
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


class FiniteGradients(TrainerCallback):
    """Stops before a gradient that is not finite reaches the weights."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`; raises NumericsError."""
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = full(torch.nn.utils.get_total_norm(grads))
        if not torch.isfinite(norm):
            raise NumericsError(
                f"The gradient became {norm.item()} at step {state.global_step + 1}, though the "
                "loss is finite. Checkpoints from before are kept. Lower the learning rate, or "
                "compute in float32."
            )


class Progress(TrainerCallback):
    """Moves a bar with the optimiser's steps, those of an earlier try included."""

    def __init__(self, bar: Any, done: int) -> None:
        self.bar = bar
        bar.skip(done)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self.bar.advance(state.global_step - self.bar.done)


class _Selection(TrainerCallback):
    def __init__(self, selector: Selector) -> None:
        self.selector = selector

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.selector.visit(state.global_step):
            warn(f"{self.selector.label}: stopped at step {state.global_step}, drift is too large")
            control.should_training_stop = True


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
    budget: RowBudget | None = None,
    selector: Selector | None = None,
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
        budget: how steps and rows are filled, instead of what the settings say.
        selector: which step's weights are written; None: the last.

    Returns:
        The last logged metrics.
    """
    work = output.with_name(f"{output.name}.partial")
    set_seed(seed)
    loaded.settle([s for e in examples[:16] for s in e.sequences.values()])
    if is_main_process():
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        for leftover in work.glob("checkpoint-*"):
            if not (leftover / COMPLETE_MARK).exists():
                shutil.rmtree(leftover)
    if lora and settings.learning_rate < 1e-6:
        warn(
            f"a learning rate of {settings.learning_rate:.0e} hardly moves LoRA adapters; 1e-5 to "
            "1e-4 is usual"
        )
    if selector and ranks.sharding() == "zero3":
        raise ConfigError(
            "Checkpoint selection lets the model answer on one rank, which under ZeRO-3 holds no "
            "whole weights. Use the profile fsdp2 or zero2, or set selection.points: 0."
        )
    args = trainer_arguments(TrainingArguments, loaded, settings, work, seed)
    if ranks.sharding() == "fsdp" and loaded.device.type == "cpu":
        shard_on_cpu()
    budget = budget or RowBudget(settings.batch_size, settings.row_tokens)
    args._n_gpu = min(args.n_gpu, 1)  # one process drives one device; no DataParallel
    disable_dropout(loaded.model)
    model = add_lora(loaded.model, lora) if lora else loaded.model
    model.train()
    logs: list[dict[str, float]] = []

    def log(line: dict[str, float]) -> None:
        logs.append(line)
        on_log(line)

    steps = math.ceil(math.ceil(len(examples) / budget.queries) * settings.epochs)
    # rounded down: transformers rounds a share up, and a training of one step would do nothing
    args.warmup_steps = int(steps * settings.warmup)
    trainer = SteeringTrainer(
        loaded, model, objective, examples, args, budget, log, keep_checkpoints
    )
    trainer.remove_callback(PrinterCallback)  # the bar and metrics.jsonl say it better
    found = complete_checkpoints(work)
    checkpoint: str | None = ranks.share(str(found[-1]) if found else None)
    done = 0
    if checkpoint:
        _check_resumable(Path(checkpoint))
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        done = int(state["global_step"])
        say(f"  {label}: resuming after step {done}")
    if is_main_process():
        on_start(done)
    if selector:
        selector.begin(model, work, steps)
        trainer.add_callback(_Selection(selector))
    with progress_bar(label, steps) as bar, disk_errors(work):
        trainer.add_callback(Progress(bar, done))
        trainer.add_callback(FiniteGradients())
        if not (selector and selector.stopped and done >= selector.stopped):
            trainer.train(resume_from_checkpoint=checkpoint)
    with whole(model):
        if selector:
            selector.restore()
        model.eval()
        if is_main_process():
            texts = also_save(logs[-1] if logs else {})
            _finish(model, loaded, output, work, texts)
        ranks.meet()
    return logs[-1] if logs else {}


def _check_resumable(checkpoint: Path) -> None:
    """Refuses a checkpoint that is in parts of another kind.

    One of plain or fully sharded weights is right with any number of ranks, as the queries of a
    step do not depend on it.

    Raises:
        ConfigError: it was written with another sharding, or by another number of DeepSpeed's.
    """
    mark = json.loads((checkpoint / COMPLETE_MARK).read_text("utf-8"))
    sharding, count = ranks.sharding(), ranks.size()
    fits = mark["ranks"] == count or not sharding.startswith("zero")
    if mark["sharding"] != sharding or not fits:
        raise ConfigError(
            f"{checkpoint} was written by {mark['ranks']} ranks with sharding {mark['sharding']}; "
            f"it cannot be resumed by {count} with sharding {sharding}. Use the profile it was "
            f"begun with, or remove {checkpoint.parent} to train from the start."
        )


def _finish(
    model: Any, loaded: LoadedModel, output: Path, work: Path, texts: Mapping[str, str]
) -> None:
    with disk_errors(output):
        finished = work / "model"
        shutil.rmtree(finished, ignore_errors=True)
        save_model(model, loaded.chat, finished, loaded.dtype)
        for name, text in texts.items():
            write_atomic(finished / name, text)
        if output.exists():  # what an earlier try at this very training left
            shutil.rmtree(output)
        finished.replace(output)
        for old in complete_checkpoints(work):
            discard_checkpoint(old)
        shutil.rmtree(work)


Arguments = TypeVar("Arguments", bound=TrainingArguments)


def trainer_arguments(
    kind: type[Arguments],
    loaded: LoadedModel,
    settings: Schedule,
    work: Path,
    seed: int,
    **more: Any,
) -> Arguments:
    """A Trainer's arguments: the recipe's schedule, one checkpoint rule and one log for all."""
    return kind(
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
        **more,
    )
