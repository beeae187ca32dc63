"""What the training stages do: examples, log-probs of the reference, training, what is kept."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsteer.data.digests import derive_seed, digest
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Triple
from selfsteer.engines.base import SamplingParams
from selfsteer.errors import DataError
from selfsteer.judges.load import load_judge
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.store import scored
from selfsteer.objectives import Objective, TokenObjective
from selfsteer.recipe.sections import Sampling
from selfsteer.run import ranks
from selfsteer.run.folder import Dropped, RunFolder, StageResult, logged
from selfsteer.stages.figures import stored_figures
from selfsteer.stages.inputs import stored_pairs
from selfsteer.stages.selector import Selector
from selfsteer.stages.teach import taught
from selfsteer.terminal import is_main_process, say, warn
from selfsteer.training.preference import DistilTask, Example, PreferenceTask
from selfsteer.training.select import FEWEST, hold_out
from selfsteer.training.trainer import RowBudget, Task, publish, train

if TYPE_CHECKING:
    from selfsteer.stages.train import Train, TrainReward


def fit(stage: "Train", run: RunFolder) -> StageResult:
    """Trains a policy or a generator, on every rank; writes its folder and its candidates' figures.

    Dropped are ``prompt_too_long``, ``held_out``: queries that its candidates answer, and
    ``no_targets`` or ``no_figures``: what the teacher, or `FigurePairs`, dropped.
    """
    start, settings, lora = str(stage.start.path), stage.settings, stage.lora
    triples = list(stored_pairs(stage.data.path))
    lessons = taught(stage.teacher.path) if stage.teacher else {}
    figures = stored_figures(stage.figures.path) if stage.figures else {}
    needed = lessons if stage.teacher else figures if stage.figures else None
    known = [t for t in triples if needed is None or t.id in needed]
    lacking = [t for t in triples if needed is not None and t.id not in needed]
    loaded = load_model(start, stage.loading, bits=lora.bits if lora else None)
    ranks.join(loaded.device.type)
    examples, dropped, truncated = encode(loaded, known, stage.objective, settings.max_length)
    dropped += [Dropped(t.id, "no_targets" if stage.teacher else "no_figures", t) for t in lacking]
    if not examples:
        return with_drops(stage, run, StageResult(len(triples), 0), dropped)
    began = time.monotonic()
    selector = None
    held_out = hold_out([e.id for e in examples], settings.selection, stage.seed)
    if held_out:
        kept_out = [t for t in triples if t.id in held_out]
        selector = _selector(stage, run, loaded, kept_out)
        dropped += [Dropped(t.id, "held_out", t) for t in kept_out]
        examples = [e for e in examples if e.id not in held_out]
    elif settings.selection.points:
        say(
            f"  no selection: a tenth of {len(examples):,} queries is fewer than {FEWEST}; the "
            "last step is kept"
        )
    reference = str(stage.reference.path)
    examples = with_reference(
        examples,
        stage.objective,
        lambda: loaded if reference == start else load_model(reference, stage.loading),
        run / "scores",
    )
    task: Task
    if isinstance(stage.objective, TokenObjective):
        with_lessons = [replace(e, lesson=lessons[e.id]) for e in examples]
        task = DistilTask(loaded, stage.objective, with_lessons)
    else:
        with_figures = [replace(e, figures=figures.get(e.id, {})) for e in examples]
        task = PreferenceTask(loaded, stage.objective, with_figures)
    last = train(
        loaded,
        task,
        settings,
        budget=RowBudget(settings.batch_size, settings.row_tokens),
        on_step=selector,
        **common(stage, run),
    )
    publish(run / stage.name)
    result = StageResult(len(triples), len(examples))
    result.notes = {"responses_truncated": truncated, "last": last}
    if selector and is_main_process():
        say(f"  {selector.sentence()}")
        for text in selector.warnings():
            warn(f"{stage.title}: {text}")
        # beside the model, whose folder is digested whole
        report = json.dumps(selector.report(), indent=1) + "\n"
        write_atomic(run / f"{stage.name}.selection.json", report)
        result.notes["selection"] = {
            "text": selector.sentence(),
            "chosen": selector.chosen.step,
            "steps": selector.steps,
            "stopped": selector.stopped,
            "warnings": selector.warnings(),
            "seconds": round(selector.seconds, 3),
            "share": round(selector.seconds / (time.monotonic() - began), 3),
        }
        if text := selector.collapse():
            result.notes["warnings"] = [text]
    return with_drops(stage, run, result, dropped)


def _selector(
    stage: "Train", run: RunFolder, loaded: LoadedModel, held_out: Sequence[Triple]
) -> Selector:
    """Measures candidates as the trained model will be sampled.

    People have not seen answers that are sampled now, so no labels of theirs judge them.
    """
    sampling, judge = stage.sampling or Sampling(), stage.judge
    if judge is not None and (judge.kind == "human" or not is_main_process()):
        judge = None
    return Selector(
        stage.settings.selection,
        loaded,
        held_out,
        load_start=lambda: load_model(str(stage.start.path), stage.loading, inference=True),
        contexts=stage.contexts,
        sampling=SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens),
        batch_size=sampling.batch_size,
        judge=load_judge(judge, run / "judgements") if judge else None,
        seed=derive_seed(stage.seed, stage.name, "selection"),
        label=stage.title,
    )


def common(stage: "Train | TrainReward", run: RunFolder) -> dict[str, Any]:
    """The arguments of `train` that are alike for all stages that train."""
    return {
        "output": run / stage.outputs[0],
        "label": stage.title,
        "seed": derive_seed(stage.seed, stage.name) % 2**31,
        "lora": stage.lora,
        "keep_checkpoints": stage.keep_checkpoints,
        "on_log": lambda line: run.append("metrics.jsonl", {"stage": stage.name, **line}),
        "on_start": lambda step: run.rewind("metrics.jsonl", stage.name, step),
    }


def with_drops(
    stage: "Train | TrainReward", run: RunFolder, result: StageResult, dropped: Sequence[Dropped]
) -> StageResult:
    """The result with what was dropped, which the first rank writes down."""
    if is_main_process():
        result.dropped += run.drop(stage.name, dropped)
        result.notes["logged"] = digest(logged(run / "metrics.jsonl").get(stage.name, []))
    return result


def encode(
    loaded: LoadedModel,
    triples: Sequence[Triple],
    objective: Objective | TokenObjective,
    max_length: int,
) -> tuple[list[Example], list[Dropped], int]:
    """Each triple's sequences; a triple whose prompt leaves no room for a response is dropped.

    Returns:
        Examples without a reference, the dropped, and how many responses were cut in one context
        or several.

    Raises:
        DataError: a sequence is longer than the model's own context.
    """
    examples, dropped, truncated, longest = [], [], 0, 0
    for triple in triples:
        whole = {name: loaded.chat.sequence(triple, name) for name in objective.sequences}
        if any(len(s.prompt_ids) >= max_length for s in whole.values()):
            dropped.append(Dropped(triple.id, "prompt_too_long", triple))
            continue
        cut = {
            n: replace(s, response_ids=s.response_ids[: max_length - len(s.prompt_ids)])
            for n, s in whole.items()
        }
        truncated += len({n.partition("/")[2] for n in whole if len(cut[n]) < len(whole[n])})
        longest = max(longest, *map(len, cut.values()))
        examples.append(Example(triple.id, cut))
    limit = loaded.context_length
    if limit is not None and longest > limit:
        raise DataError(
            f"The longest sequence has {longest} tokens, {loaded.source} was made for {limit}. "
            "Lower max_length."
        )
    return examples, dropped, truncated


def with_reference(
    examples: Sequence[Example],
    objective: Objective | TokenObjective,
    load_reference: Callable[[], LoadedModel],
    scores: Path,
) -> list[Example]:
    """The examples with the reference's log-probs, scored once and kept.

    Each rank scores its share and writes it down for the others.
    """
    if not objective.needs_reference:
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
