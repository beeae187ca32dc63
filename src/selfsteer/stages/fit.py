"""What the training stages do: examples, log-probs of the reference, training, what is kept."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsteer.data.digests import derive_seed, digest
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Triple
from selfsteer.engines.base import SamplingParams
from selfsteer.errors import DataError, RefusedConversation
from selfsteer.judges.load import load_judge
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.store import open_scores
from selfsteer.objectives import Objective, TokenObjective
from selfsteer.recipe.sections import Sampling
from selfsteer.run import ranks
from selfsteer.run.folder import Dropped, RunFolder, StageResult, logged
from selfsteer.stages.figures import stored_figures
from selfsteer.stages.inputs import stored_pairs
from selfsteer.stages.selector import Selector
from selfsteer.stages.teach import taught
from selfsteer.terminal import is_main_process, say, warn
from selfsteer.training.examples import Examples
from selfsteer.training.parts import in_step, load_to_train
from selfsteer.training.preference import DistilTask, PreferenceTask
from selfsteer.training.select import FEWEST, hold_out
from selfsteer.training.trainer import RowBudget, Task, publish, train

if TYPE_CHECKING:
    from selfsteer.stages.train import Train, TrainReward


def fit(stage: "Train", run: RunFolder) -> StageResult:
    """Trains a policy or a generator, on every rank; writes its folder and its candidates' figures.

    Dropped are ``prompt_too_long``, ``template_refuses``, ``held_out``: queries that its candidates
    answer, and ``no_targets`` or ``no_figures``: what the teacher, or `FigurePairs`, dropped.
    """
    start, settings, lora = str(stage.start.path), stage.settings, stage.lora
    triples = stored_pairs(stage.data.path)
    lessons = taught(stage.teacher.path) if stage.teacher else {}
    figures = stored_figures(stage.figures.path) if stage.figures else {}
    needed = lessons if stage.teacher else figures if stage.figures else None
    known = (t for t in triples if needed is None or t.id in needed)
    loaded = load_to_train(start, stage.loading, lora)
    ranks.join(loaded.device.type)
    objective, longest = stage.objective, settings.max_length
    examples, reasons, truncated = encode(loaded, known, objective, longest, run.path)
    if needed is not None:
        reason = "no_targets" if stage.teacher else "no_figures"
        reasons |= {t.id: reason for t in triples if t.id not in needed}

    def dropped() -> Iterator[Dropped]:
        return (Dropped(t.id, reasons[t.id], t) for t in triples if t.id in reasons)

    if not examples:
        return with_drops(stage, run, StageResult(len(triples), 0), dropped())
    began = time.monotonic()
    selector = None
    held_out = hold_out(examples.ids, settings.selection, stage.seed)
    if held_out:
        selector = _selector(stage, run, loaded, [t for t in triples if t.id in held_out])
        reasons |= dict.fromkeys(held_out, "held_out")
        examples = examples.without(held_out)
    elif settings.selection.points:
        say(
            f"  no selection: a tenth of {len(examples):,} queries is fewer than {FEWEST}; the "
            "last step is kept"
        )
    reference = str(stage.reference.path)
    refer(
        examples,
        objective,
        lambda: loaded if reference == start else load_to_train(reference, stage.loading),
        run / "scores",
    )
    examples.lessons, examples.figures = lessons, figures
    task: Task
    if isinstance(objective, TokenObjective):
        task = DistilTask(loaded, objective, examples)
    else:
        task = PreferenceTask(loaded, objective, examples)
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
    return with_drops(stage, run, result, dropped())


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
    stage: "Train | TrainReward", run: RunFolder, result: StageResult, dropped: Iterable[Dropped]
) -> StageResult:
    """The result with what was dropped, which the first rank writes down."""
    if is_main_process():
        result.dropped += run.drop(stage.name, dropped)
        result.notes["logged"] = digest(logged(run / "metrics.jsonl").get(stage.name, []))
    return result


def encode(
    loaded: LoadedModel,
    triples: Iterable[Triple],
    objective: Objective | TokenObjective,
    max_length: int,
    folder: Path,
) -> tuple[Examples, dict[str, str], int]:
    """Each triple's sequences; one whose prompt leaves no room for a response is dropped.

    Args:
        loaded: the model, whose chat format encodes.
        triples: N records.
        objective: says which sequences are read.
        max_length: tokens of prompt and response; the response's end is cut.
        folder: on the disk that holds the token ids.

    Returns:
        Examples without a reference, the ids of those that are dropped with their reason, and how
        many responses were cut in one context or several.

    Raises:
        DataError: a sequence is longer than the model's own context.
    """
    examples, dropped = Examples(objective.sequences, folder), dict[str, str]()
    truncated = longest = 0
    for triple in triples:
        try:
            whole = {name: loaded.chat.sequence(triple, name) for name in objective.sequences}
        except RefusedConversation:
            dropped[triple.id] = "template_refuses"
            continue
        if any(len(s.prompt_ids) >= max_length for s in whole.values()):
            dropped[triple.id] = "prompt_too_long"
            continue
        cut = {
            n: replace(s, response_ids=s.response_ids[: max_length - len(s.prompt_ids)])
            for n, s in whole.items()
        }
        truncated += len({n.partition("/")[2] for n in whole if len(cut[n]) < len(whole[n])})
        longest = max(longest, *map(len, cut.values()))
        examples.append(triple.id, cut)
    limit = loaded.context_length
    if limit is not None and longest > limit:
        raise DataError(
            f"The longest sequence has {longest} tokens, {loaded.source} was made for {limit}. "
            "Lower max_length."
        )
    return examples, dropped, truncated


def refer(
    examples: Examples,
    objective: Objective | TokenObjective,
    load_reference: Callable[[], LoadedModel],
    scores: Path,
) -> None:
    """Gives examples the reference's log-probs, scored once and kept, where they are needed.

    Each rank scores its share and writes it down for the others.
    """
    if not objective.needs_reference:
        return
    label, flat, loaded = "reference: scoring", examples.flat(), load_reference()
    # the layout is settled before they are shared out: all ranks must choose the same
    store = open_scores(scores, loaded, flat)
    if ranks.size() > 1:
        with in_step(loaded):
            store.fill(loaded, examples.flat(ranks.number(), ranks.size()), label=label)
        ranks.barrier()
        store = open_scores(scores, loaded, flat)
    store.fill(loaded, flat, label=label)
    examples.refer(lambda part: [v for v in store.find(part) if v is not None])
