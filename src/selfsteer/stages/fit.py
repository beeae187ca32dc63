"""Triples to a generator, triples or preferences to a policy: the two training stages."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Triple
from selfsteer.engines.base import SamplingParams
from selfsteer.errors import DataError
from selfsteer.judges.base import load_judge
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.store import scored
from selfsteer.objectives import Objective
from selfsteer.recipe.sections import (
    Generator,
    JudgeConfig,
    Loading,
    Lora,
    PolicyTraining,
    Sampling,
)
from selfsteer.run import ranks
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.stages.selector import Selector
from selfsteer.terminal import is_main_process, say, warn
from selfsteer.training.preference import Example, PreferenceTask
from selfsteer.training.select import FEWEST, hold_out
from selfsteer.training.trainer import RowBudget, publish, train

#: Name of the file with all candidates' figures, behind the model's own.
SELECTION = ".selection.json"


def train_on(
    triples: Sequence[Triple],
    objective: Objective,
    settings: Generator | PolicyTraining,
    *,
    sampling: Sampling,
    judge: JudgeConfig | None,
    loading: Loading,
    lora: Lora | None,
    seed: int,
    keep_checkpoints: int,
    contexts: tuple[str, ...],
    start: str,
    reference: str,
    output: Path,
    scores: Path,
    stage: str,
    run: RunFolder,
) -> tuple[StageResult, list[tuple[str, str]]]:
    """Trains ``start`` on an objective and writes it to ``output``.

    Args:
        triples: with the responses and principles that the objective needs.
        objective: what to minimise.
        settings: optimiser, schedule, and which step is kept.
        sampling: how the trained model will answer.
        judge: decides which step is kept; people have not seen answers that are sampled now.
        loading: of all models.
        lora: train adapters instead of all weights.
        seed: the run's.
        keep_checkpoints: complete checkpoints kept while training.
        contexts: in which the trained model will answer; what it is selected by.
        start: the model to train.
        reference: the frozen model whose log-probs the base loss compares with.
        output: folder for the trained model.
        scores: folder of the shared log-probs.
        stage: the stage's name, part of the seed.
        run: gets every log line in its ``metrics.jsonl``.

    Returns:
        The counts, and (id, reason) of each triple that was not trained on.
    """
    label = stage.rpartition("/")[2]
    loaded = load_model(start, loading, bits=lora.bits if lora else None)
    ranks.join(loaded.device.type)
    examples, dropped, truncated = encode(loaded.chat, triples, objective, settings.max_length)
    if not examples:
        return StageResult(len(triples), 0, Counter(reason for _, reason in dropped)), dropped
    check_length(loaded, examples)
    begin = time.monotonic()
    selector = None
    held_out = hold_out([e.id for e in examples], settings.selection, seed)
    if held_out:
        judged = is_main_process() and judge is not None and judge.kind != "human"
        selector = Selector(
            settings.selection,
            loaded,
            [t for t in triples if t.id in held_out],
            load_start=lambda: load_model(start, loading, inference=True),
            contexts=contexts,
            sampling=SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens),
            batch_size=sampling.batch_size,
            judge=load_judge(judge, run / "judgements") if judged and judge else None,
            seed=derive_seed(seed, stage, "selection"),
            label=label,
        )
        dropped += [(e.id, "held_out") for e in examples if e.id in held_out]
        examples = [e for e in examples if e.id not in held_out]
    elif settings.selection.points:
        say(
            f"  no selection: a tenth of {len(examples):,} queries is fewer than {FEWEST}; the "
            "last step is kept"
        )
    examples = with_reference(
        examples,
        objective,
        lambda: loaded if reference == start else load_model(reference, loading),
        scores,
    )
    last = train(
        loaded,
        PreferenceTask(loaded, objective, examples),
        settings,
        output=output,
        budget=RowBudget(settings.batch_size, settings.row_tokens),
        label=label,
        seed=derive_seed(seed, stage) % 2**31,
        lora=lora,
        keep_checkpoints=keep_checkpoints,
        on_log=lambda line: run.append("metrics.jsonl", {"stage": stage, **line}),
        on_start=lambda step: run.rewind("metrics.jsonl", stage, step),
        on_step=selector,
    )
    publish(output)
    result = StageResult(len(triples), len(examples), Counter(reason for _, reason in dropped))
    result.notes = {"responses_truncated": truncated, "last": last}
    if selector and is_main_process():
        say(f"  {selector.sentence()}")
        for text in selector.warnings():
            warn(text)
        # beside the model, whose folder is digested whole
        path = output.with_name(f"{output.name}{SELECTION}")
        write_atomic(path, json.dumps(selector.report(), indent=1) + "\n")
        result.notes["selection"] = {
            "text": selector.sentence(),
            "chosen": selector.chosen.step,
            "steps": selector.steps,
            "stopped": selector.stopped,
            "warnings": selector.warnings(),
            "seconds": round(selector.seconds, 3),
            "share": round(selector.seconds / (time.monotonic() - begin), 3),
        }
    return result, dropped


def encode(
    chat: ChatFormat, triples: Sequence[Triple], objective: Objective, max_length: int
) -> tuple[list[Example], list[tuple[str, str]], int]:
    """Each triple's sequences; a triple whose prompt leaves no room for a response is dropped.

    Returns:
        Examples without a reference, (id, reason) of the dropped, and how many responses were cut
        in one context or several.
    """
    examples, dropped, truncated = [], [], 0
    for triple in triples:
        whole = {name: chat.sequence(triple, name) for name in objective.sequences}
        if any(len(s.prompt_ids) >= max_length for s in whole.values()):
            dropped.append((triple.id, "prompt_too_long"))
            continue
        cut = {
            n: EncodedSequence(s.prompt_ids, s.response_ids[: max_length - len(s.prompt_ids)])
            for n, s in whole.items()
        }
        truncated += len({n.partition("/")[2] for n in whole if len(cut[n]) < len(whole[n])})
        examples.append(Example(triple.id, cut))
    return examples, dropped, truncated


def check_length(loaded: LoadedModel, examples: Sequence[Example]) -> None:
    """Refuses sequences beyond the model's own context.

    Raises:
        DataError: one is longer; says how long.
    """
    longest = max(len(s) for e in examples for s in e.sequences.values())
    limit = loaded.context_length
    if limit is not None and longest > limit:
        raise DataError(
            f"The longest sequence has {longest} tokens, {loaded.source} was made for {limit}. "
            "Lower max_length."
        )


def with_reference(
    examples: Sequence[Example],
    objective: Objective,
    load_reference: Callable[[], LoadedModel],
    scores: Path,
) -> list[Example]:
    """The examples with the reference's log-probs, scored once and kept.

    Each rank scores its share and writes it down for the others.
    """
    if not objective.base.needs_reference:
        return list(examples)
    label = "reference: scoring"
    flat = [s for e in examples for s in e.sequences.values()]
    loaded = load_reference()
    loaded.settle(flat)  # before they are shared out: all ranks must choose the same layout
    if ranks.size() > 1:
        mine = [s for e in examples[ranks.number() :: ranks.size()] for s in e.sequences.values()]
        scored(scores, loaded, mine, label)
        ranks.barrier()
    values = iter(scored(scores, loaded, flat, label))
    return [replace(e, reference={n: next(values) for n in e.sequences}) for e in examples]
