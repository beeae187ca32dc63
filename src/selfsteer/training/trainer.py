"""One training loop for every loss: exact steps, rows of tokens, checkpoints that resume.

transformers.Trainer minus labels and micro-batches: a `Task` holds the examples and computes the
loss of a few of them; a step takes a fixed number of examples, cut into rows that fit into memory.
`train` writes the model into ``OUTPUT.partial/model``, and `publish` puts it in its place.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from selfsteer import stopping
from selfsteer.data.artifacts import read_json
from selfsteer.data.jsonl import disk_errors, write_atomic
from selfsteer.errors import ArtifactError, ConfigError, EngineError, NumericsError, named
from selfsteer.models.finite import broken_weight
from selfsteer.models.save import add_lora, as_umask, disable_dropout, full, save_model
from selfsteer.run import ranks
from selfsteer.run.sums import SMALL_BYTES, fault_of, sums_of
from selfsteer.terminal import is_main_process, progress_bar, say, warn
from selfsteer.training.batches import StepSampler, fill_rows
from selfsteer.training.sharding import accelerator_of, check_sharded, own_part, reshard, whole

if TYPE_CHECKING:
    from selfsteer.models.load import LoadedModel
    from selfsteer.recipe.sections import Lora, Schedule

#: Written last into a checkpoint; transformers takes a half-written folder for a whole one.
COMPLETE_MARK = "complete"

#: What transformers calls gradient checkpointing: 5.17 only knows the older name, of which later
#: releases warn.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


@dataclass(frozen=True)
class _Mark:
    """What `COMPLETE_MARK` holds; of files over `SMALL_BYTES` the sums are sizes alone."""

    sharding: str
    ranks: int
    sums: dict[str, list[int | str]]


#: Sum and weight by name; the weights are examples, or tokens. Names in ``min_`` and ``max_`` have
#: the smallest or the largest value in place of a sum, and weight 1.
Metrics = dict[str, tuple[Any, Any]]

#: How names are logged that are no means: where they start from, and what two of them make.
EXTREMES: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
    "min_": (math.inf, torch.minimum),
    "max_": (-math.inf, torch.maximum),
}

#: A line of the log: ``step``, ``loss``, ``grad_norm``, ``learning_rate`` and the task's metrics.
Line = dict[str, float]


class Task(Protocol):
    """What is learnt: examples, each with an ``id`` and ``tokens()``, and their loss."""

    examples: Sequence[Any]
    #: What peft calls it: CAUSAL_LM, or SEQ_CLS, whose head is trained whole.
    adapters: str

    def costs(self, examples: Any) -> list[int]:
        """Tokens that each of these takes in a row, were they in one."""

    def loss(self, model: Any, examples: Any) -> tuple[Tensor, Metrics]:
        """Of a row of B examples: the loss of each, (B,), and metrics without gradient."""


class OnStep(Protocol):
    """Looks at the model while it is trained, may end the training, and chooses what is kept."""

    #: The step at which it ended the training.
    stopped: int | None

    def begin(self, model: Any, work: Path, steps: int) -> None:
        """Before the first step, also of a resumed training: the weights are still the start's.

        Args:
            model: what is trained: the loaded model, or peft's wrapper around it.
            work: the training's work folder.
            steps: optimiser steps.
        """

    def visit(self, step: int) -> bool:
        """After each step, on every rank; True ends the training."""

    def is_due(self, step: int) -> bool:
        """Whether `visit` would look at the model after this step, and has not."""

    def restore(self) -> None:
        """After the last step, on every rank: puts the weights to keep into the model."""


@dataclass(frozen=True)
class RowBudget:
    """How many examples an optimiser step takes, and how much of it one forward."""

    #: Examples per optimiser step, over all ranks.
    queries: int
    #: Most tokens of one forward.
    row_tokens: int
    #: Most examples of one forward; None: as many as fit.
    row_queries: int | None = None


def merge_metrics(into: Metrics, more: Metrics, share: float = 1.0) -> None:
    """Adds sums and weights, and takes extremes; a share of 0 adds the names alone."""
    for name, (total, count) in more.items():
        if name[:4] in EXTREMES:
            none, pick = EXTREMES[name[:4]]
            old, new = into.get(name, (none,))[0], total if share else none
            into[name] = (pick(torch.as_tensor(old), torch.as_tensor(new)), 1)
            continue
        old_total, old_count = into.get(name, (0.0, 0.0))
        into[name] = (old_total + total * share, old_count + count * share)


class RowTrainer(Trainer):
    """Trains on a task.

    An optimiser step takes exactly ``budget.queries`` examples over all ranks, in rows of at most
    ``budget.row_tokens`` tokens; its loss is the mean over them, however they are spread. Every
    rank holds all examples and works on its share of a step.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        task: Task,
        settings: Schedule,
        *,
        budget: RowBudget,
        work: Path,
        seed: int,
        lora: Lora | None = None,
        keep_checkpoints: int = 1,
        on_log: Callable[[Line], None] = lambda line: None,
    ) -> None:
        self.task, self.budget = task, budget
        self.keep_checkpoints, self.on_log = keep_checkpoints, on_log
        self.steps = math.ceil(math.ceil(len(task.examples) / budget.queries) * settings.epochs)
        self._metrics: Metrics = {}
        #: Of the examples that the last step took.
        self.step_ids: list[str] = []
        checkpointing: dict[str, Any] = {CHECKPOINTING: settings.gradient_checkpointing}
        args = TrainingArguments(
            output_dir=str(work),
            seed=seed,
            data_seed=seed,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            # rounded down: a share would be rounded up, and a training of one step do nothing
            warmup_steps=int(self.steps * settings.warmup),
            weight_decay=settings.weight_decay,
            adam_beta2=settings.adam_beta2,
            max_grad_norm=settings.max_grad_norm,
            **checkpointing,
            use_cpu=loaded.device.type == "cpu",
            save_strategy="steps",
            save_steps=settings.save_every_steps,
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would hide a NaN; losses are checked before backward
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=loaded.device.type == "cuda",
            ddp_find_unused_parameters=False,
        )
        if ranks.sharding() == "fsdp" and loaded.device.type == "cpu":
            accelerator_of(loaded.device)
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one device; no DataParallel
        disable_dropout(loaded.model)
        reshard(loaded.model)  # the optimiser takes weights as it finds them
        model = loaded.model
        if lora:
            model = add_lora(model, lora, task.adapters, loaded.source)
        super().__init__(model=model.train(), args=args, train_dataset=task.examples)  # type: ignore[arg-type]
        if isinstance(loaded.model, FSDPModule):  # accelerate would look for layers to shard
            self.accelerator.state.fsdp_plugin.auto_wrap_policy = None
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)  # the bar and metrics.jsonl say it better

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole optimiser steps; not sharded, each rank takes its rows from every step."""
        costs = [e.tokens() for e in self.task.examples]
        return DataLoader(
            self.task.examples,  # type: ignore[arg-type]
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
            EngineError: not even a row of one example fits, or one rank of several ran out.
        """
        check_sharded(model)
        model.train()
        examples: list[Any] = inputs["examples"]
        self.step_ids = [e.id for e in examples]
        costs = self.task.costs(examples)
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
        self, model: Any, examples: Sequence[Any], rows: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Metrics]:
        loss = torch.zeros((), dtype=torch.float64, device=self.args.device)
        metrics: Metrics = {}
        for number, row in enumerate(rows, 1):
            last = number == len(rows)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                # a rank without work in this row still walks through the model with the others
                chosen = [examples[i] for i in row or [0]]
                losses, found = self.task.loss(model, chosen)
                fine = torch.isfinite(losses).tolist()
                bad = [e.id for e, is_fine in zip(chosen, fine, strict=True) if not is_fine]
                if bad:
                    raise self.diverged(f"The loss became {losses.mean().item()}", bad)
                share = 1.0 if row else 0.0
                part = losses.sum() / len(examples) * share
                # the ranks' gradients are averaged, their shares of the loss must be added
                self.accelerator.backward(part * self.args.world_size)
            loss += part.detach()
            # every rank must know every metric's name: they are added over the ranks
            merge_metrics(metrics, found, share)
        # what the Trainer logs is averaged over the ranks as well
        return loss * self.args.world_size, metrics

    def diverged(self, what: str, records: Iterable[str] = (), *, done: bool = False) -> Exception:
        """The error of a number that is not finite.

        Args:
            what: which.
            records: whose; nothing: all of the step.
            done: whether the step has been counted already.
        """
        step = self.state.global_step + (not done)
        return NumericsError(
            f"{what} at step {step} on {named(records or self.step_ids)}. Checkpoints from before "
            "are kept. Lower the learning rate, set policy.dtype: float32 if it is another, or "
            "remove these records."
        )

    def _halve(self, tokens: int, longest: int, error: Exception) -> None:
        alone = self.args.world_size == 1
        if tokens <= longest or not alone:
            advice = "Set gradient_checkpointing: true, lower max_length, or train with policy.lora"
            if tokens > longest:  # the other ranks are past this row and cannot turn back
                advice = f"Set row_tokens below {tokens:,}"
            raise EngineError(
                f"The GPU's memory is too small for a row of {tokens:,} tokens. {advice}; then the "
                "same command resumes from the last checkpoint."
            ) from error
        self.budget = replace(self.budget, row_tokens=max(tokens // 2, 1))
        warn(
            f"the GPU's memory is too small for a row of {tokens:,} tokens; retrying with "
            f"row_tokens: {self.budget.row_tokens}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log: means over examples (tokens), or extremes."""
        if self._metrics and "loss" in logs:
            names = sorted(self._metrics)
            pairs = [[torch.as_tensor(v).double() for v in self._metrics[n]] for n in names]
            values = torch.tensor(pairs, dtype=torch.float64, device=self.args.device)
            total: Metrics = {}
            # rank after rank
            for found in self.accelerator.gather(values).view(-1, len(names), 2):
                merge_metrics(total, dict(zip(names, found, strict=True)))
            logs |= {name: float(value / count) for name, (value, count) in total.items()}
            self._metrics.clear()
            # gradients whose norm overflows are clipped to nothing: no later check sees them
            for name, value in logs.items():
                if not math.isfinite(value):
                    raise self.diverged(f"{name} became {value}", done=True)
            if is_main_process():
                self.on_log({"step": self.state.global_step, **logs})
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        learnt = ((n, own_part(p)) for n, p in model.named_parameters() if p.requires_grad)
        if broken := broken_weight(learnt):
            raise self.diverged(f"{broken} became NaN or infinite", done=True)
        super()._save_checkpoint(model, trial)
        ranks.barrier()  # each has written its part
        if self.args.should_save:
            folder = Path(str(self.args.output_dir))
            saved = folder / f"checkpoint-{self.state.global_step}"
            as_umask(saved)
            sums = sums_of(saved, ["."], most=SMALL_BYTES)
            mark = _Mark(sharding=ranks.sharding(), ranks=ranks.size(), sums=sums)
            write_atomic(saved / COMPLETE_MARK, json.dumps(asdict(mark)))
            for old in complete_checkpoints(folder)[: -self.keep_checkpoints]:
                discard_checkpoint(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    marked = [p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE_MARK}")]
    return sorted(marked, key=lambda p: int(re.sub(r"\D", "", p.name)))


def _last_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; others are removed."""
    for checkpoint in reversed(complete_checkpoints(folder)):
        try:
            fault = fault_of(checkpoint, read_json(_Mark, checkpoint / COMPLETE_MARK).sums)
        except ArtifactError as e:
            fault = str(e)
        if fault is None:
            return checkpoint
        warn(f"{fault}; an earlier checkpoint is used, or the training begins again")
        discard_checkpoint(checkpoint)
    return None


def discard_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; its mark goes first, it must not outlive what it vouches for."""
    (folder / COMPLETE_MARK).unlink(missing_ok=True)
    shutil.rmtree(folder)


class _Watch(TrainerCallback):
    """Each step: no gradient that is not finite reaches the weights, the bar moves, `OnStep`.

    A process that was asked to stop saves a checkpoint after its step and ends the training.
    """

    def __init__(self, trainer: RowTrainer, label: str, bar: Any, on_step: OnStep | None) -> None:
        self.trainer, self.label, self.bar, self.on_step = trainer, label, bar, on_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = full(torch.nn.utils.get_total_norm(grads))
        if not torch.isfinite(norm):
            raise self.trainer.diverged(
                f"The loss is finite, but the gradient became {norm.item()}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance(state.global_step - self.bar.done)
        if self.on_step and not stopping.asked() and self._drifted(self.on_step, state.global_step):
            warn(f"{self.label}: stopped at step {state.global_step}, drift is too large")
            control.should_training_stop = True
        if stopping.asked():
            control.should_save = control.should_training_stop = True

    def _drifted(self, on_step: OnStep, step: int) -> bool:
        """What `visit` says; a signal ends it, as it may take minutes and can begin again."""
        try:
            with stopping.interruptible():
                return on_step.visit(step)
        except KeyboardInterrupt:
            stopping.if_asked()  # for the second time
            if not stopping.asked():
                raise
            return False


def train(
    loaded: LoadedModel,
    task: Task,
    settings: Schedule,
    *,
    output: Path,
    budget: RowBudget,
    label: str,
    seed: int,
    lora: Lora | None = None,
    keep_checkpoints: int = 1,
    on_log: Callable[[Line], None] = lambda line: None,
    on_start: Callable[[int], None] = lambda step: None,
    on_step: OnStep | None = None,
) -> Line:
    """Trains and saves a model for `publish`; resumes from the last complete checkpoint.

    Args:
        loaded: the starting model; its weights are changed.
        task: the examples and their loss.
        settings: optimiser and schedule.
        output: where the model will be; ``output`` + ``.partial`` holds checkpoints, and then the
            finished model as ``model``.
        budget: how steps and rows are filled.
        label: what the progress bar calls it.
        seed: order of the data.
        lora: train adapters instead; merged when saved.
        keep_checkpoints: complete checkpoints kept while training.
        on_log: gets every log line.
        on_start: told after which step the training (re)starts.
        on_step: called after each step; None: the last step's weights are kept.

    Returns:
        The last log line.

    Raises:
        NumericsError: a loss, a gradient, a metric or a weight is not finite; names the records
            of the step. Complete checkpoints stay.
        ConfigError: the checkpoint to resume was made with another sharding.
        KeyboardInterrupt: the process was asked to stop; a checkpoint of its last step is there.
    """
    work = work_folder(output)
    set_seed(seed)
    if is_main_process():
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
    trainer = RowTrainer(
        loaded,
        task,
        settings,
        budget=budget,
        work=work,
        seed=seed,
        lora=lora,
        keep_checkpoints=keep_checkpoints,
        on_log=on_log,
    )
    model: Any = trainer.model
    found = _last_whole(work) if is_main_process() else None
    checkpoint: str | None = ranks.broadcast(str(found) if found else None)
    done, history = 0, trainer.state.log_history
    if checkpoint:
        _check_resumable(Path(checkpoint))
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        done, history = int(state["global_step"]), state["log_history"]
        say(f"  {label}: resuming after step {done}")
    if is_main_process():
        on_start(done)
    if on_step:
        on_step.begin(model, work, trainer.steps)
        if checkpoint and ranks.broadcast(on_step.is_due(done)):  # stopped before it was visited
            trainer._load_from_checkpoint(checkpoint)
            on_step.visit(done)
    if not (on_step and on_step.stopped and done >= on_step.stopped):
        with progress_bar(label, trainer.steps) as bar, disk_errors(work), stopping.deferred():
            bar.skip(done)
            trainer.add_callback(_Watch(trainer, label, bar, on_step))
            trainer.train(resume_from_checkpoint=checkpoint)
        history = trainer.state.log_history
    if on_step:
        on_step.restore()
    # peft merges whole weights only
    merges = lora is not None or ranks.sharding() == "zero3"
    with whole(model) if merges else nullcontext():
        model.eval()
        if is_main_process():
            with disk_errors(work):
                shutil.rmtree(work / "model", ignore_errors=True)
                save_model(model, loaded.chat, work / "model", loaded.dtype)
        elif not merges:
            save_model(model, loaded.chat, work / "model", loaded.dtype, writes=False)
        ranks.barrier()
    return next((line for line in reversed(history) if "loss" in line), {})


def work_folder(output: Path) -> Path:
    """Where a training keeps what it resumes from."""
    return output.with_name(f"{output.name}.partial")


def publish(output: Path) -> None:
    """Puts what `train` saved in its place and removes its checkpoints; on the first rank only."""
    if not is_main_process():
        return
    work = work_folder(output)
    with disk_errors(output):
        if output.exists():  # what an earlier try at this very training left
            shutil.rmtree(output)
        (work / "model").replace(output)
        for old in complete_checkpoints(work):
            discard_checkpoint(old)
        shutil.rmtree(work)


def _check_resumable(checkpoint: Path) -> None:
    """Refuses a checkpoint that is in parts of another kind.

    One of plain or fully sharded weights is right with any number of ranks, as the queries of a
    step do not depend on it.

    Raises:
        ConfigError: it was written with another sharding, or by another number of DeepSpeed's.
    """
    mark = read_json(_Mark, checkpoint / COMPLETE_MARK)
    sharding, count = ranks.sharding(), ranks.size()
    fits = mark.ranks == count or not sharding.startswith("zero")
    if mark.sharding != sharding or not fits:
        alone = " on two ranks or more (--nproc)" if count == 1 else ""
        raise ConfigError(
            f"{checkpoint} was written by {mark.ranks} ranks with sharding {mark.sharding}; "
            f"it cannot be resumed by {count} with sharding {sharding}. Use the profile it was "
            f"begun with{alone}, or remove {checkpoint.parent} to train from the start."
        )
