"""Triples to a generator, triples or preferences to a policy: the two training stages."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Triple
from selfsteer.engines.base import SamplingParams
from selfsteer.errors import DataError
from selfsteer.judges.base import Judge, load_judge
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.store import scored
from selfsteer.objectives import Objective
from selfsteer.recipe.sections import CONSTANTS, Generator, Optimisation, Recipe, Training
from selfsteer.run import ranks
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.stages.selector import Selector
from selfsteer.terminal import is_main_process, say, warn
from selfsteer.training.select import FEWEST, hold_out
from selfsteer.training.trainer import Example, train

#: Name of the file with all candidates' figures, behind the model's own.
SELECTION = ".selection.json"


def objective_from(name: str, settings: Optimisation) -> Objective:
    """The named objective with the constants that the settings hold."""
    return Objective.named(name, **settings.model_dump(include={"base", *CONSTANTS}))


def encode(
    chat: ChatFormat, triples: Sequence[Triple], objective: Objective, max_length: int
) -> tuple[list[dict[str, EncodedSequence]], list[Triple], Counter[str], int]:
    """Each triple's sequences; a triple whose prompt leaves no room for a response is dropped.

    Returns:
        Sequences, the triples they belong to, drops by reason, responses that were cut in one
        context or several.
    """
    encoded, kept, dropped, truncated = [], [], Counter[str](), 0
    for triple in triples:
        whole = {name: chat.sequence(triple, name) for name in objective.sequences}
        if any(len(s.prompt_ids) >= max_length for s in whole.values()):
            dropped["prompt_too_long"] += 1
            continue
        cut = {
            n: EncodedSequence(s.prompt_ids, s.response_ids[: max_length - len(s.prompt_ids)])
            for n, s in whole.items()
        }
        truncated += len({n.partition("/")[2] for n in whole if len(cut[n]) < len(whole[n])})
        encoded.append(cut)
        kept.append(triple)
    return encoded, kept, dropped, truncated


def train_on(
    triples: Sequence[Triple],
    objective: Objective,
    settings: Generator | Training,
    recipe: Recipe,
    *,
    contexts: tuple[str, ...],
    start: str,
    reference: str,
    output: Path,
    scores: Path,
    stage: str,
    run: RunFolder,
) -> StageResult:
    """Trains ``start`` on an objective and writes it to ``output``.

    Args:
        triples: with the responses and principles that the objective needs.
        objective: what to minimise.
        settings: the optimisation part of the recipe.
        recipe: for the model's settings, sampling, judge and the seed.
        contexts: in which the trained model will answer; what it is selected by.
        start: the model to train.
        reference: the frozen model whose log-probs the base loss compares with.
        output: folder for the trained model.
        scores: folder of the shared log-probs.
        stage: the stage's name, part of the seed.
        run: gets every log line in its ``metrics.jsonl``.
    """
    bits = recipe.policy.lora.bits if recipe.policy.lora else None
    loaded = load_model(start, recipe.policy, bits=bits)
    ranks.join(loaded.device.type)
    encoded, kept, dropped, truncated = encode(loaded.chat, triples, objective, settings.max_length)
    if not kept:
        return StageResult(len(triples), 0, dropped)
    check_length(loaded, encoded)
    begin = time.monotonic()
    selector = None
    held_out = hold_out([t.id for t in kept], settings.selection, recipe.seed)
    if held_out:
        selector = Selector(
            settings.selection,
            loaded,
            lambda: load_model(start, recipe.policy, inference=True),
            [t for t in kept if t.id in held_out],
            contexts,
            SamplingParams(
                recipe.sampling.temperature,
                recipe.sampling.top_p,
                recipe.sampling.max_new_tokens,
            ),
            recipe.sampling.batch_size,
            _judge(recipe, run) if is_main_process() else None,
            derive_seed(recipe.seed, stage, "selection"),
            stage.rpartition("/")[2],
        )
        dropped["held_out"] = len(held_out)
        chosen = [i for i, t in enumerate(kept) if t.id not in held_out]
        kept, encoded = [kept[i] for i in chosen], [encoded[i] for i in chosen]
    elif settings.selection.points:
        say(
            f"  no selection: a tenth of {len(kept):,} queries is fewer than {FEWEST}; the last "
            "step is kept"
        )
    result = StageResult(len(triples), len(kept), dropped)
    judge = loaded if reference == start else None
    examples = with_reference(
        kept,
        encoded,
        objective,
        lambda: judge or load_model(reference, recipe.policy),
        scores,
        "reference: scoring",
    )
    logs = train(
        loaded,
        objective,
        examples,
        settings,
        output=output,
        label=stage.rpartition("/")[2],
        seed=derive_seed(recipe.seed, stage) % 2**31,
        lora=recipe.policy.lora,
        keep_checkpoints=recipe.keep.checkpoints,
        on_log=lambda logs: run.append("metrics.jsonl", {"stage": stage, **logs}),
        on_start=lambda step: run.rewind("metrics.jsonl", stage, step),
        selector=selector,
    )
    result.notes = {"responses_truncated": truncated, "last": logs}
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
            "steps": selector.total,
            "stopped": selector.stopped,
            "warnings": selector.warnings(),
            "seconds": round(selector.seconds, 3),
            "share": round(selector.seconds / (time.monotonic() - begin), 3),
        }
    return result


def _judge(recipe: Recipe, run: RunFolder) -> Judge | None:
    """The recipe's judge; people have not seen answers that are sampled now."""
    if recipe.judge is None or recipe.judge.kind == "human":
        return None
    return load_judge(recipe.judge, run / "judgements")


def with_reference(
    triples: Sequence[Triple],
    encoded: Sequence[dict[str, EncodedSequence]],
    objective: Objective,
    reference: Callable[[], LoadedModel],
    scores: Path,
    label: str,
) -> list[Example]:
    """Joins each triple's sequences with the reference's log-probs, scored once and kept.

    Each rank scores its share and writes it down for the others.
    """
    if not objective.base.needs_reference:
        return [Example(t.id, e, None) for t, e in zip(triples, encoded, strict=True)]
    names = objective.sequences
    flat = [e[name] for e in encoded for name in names]
    loaded = reference()
    loaded.settle(flat)  # before they are shared out: all ranks must choose the same layout
    size = len(names)
    if ranks.size() > 1:
        mine = [s for e in encoded[ranks.number() :: ranks.size()] for s in e.values()]
        scored(scores, loaded, mine, label)
        ranks.meet()
    values = scored(scores, loaded, flat, label)
    return [
        Example(t.id, e, dict(zip(names, values[i * size : (i + 1) * size], strict=True)))
        for i, (t, e) in enumerate(zip(triples, encoded, strict=True))
    ]


def check_length(loaded: LoadedModel, encoded: Sequence[dict[str, EncodedSequence]]) -> None:
    """Refuses sequences beyond the model's own context.

    Raises:
        DataError: one is longer; says how long.
    """
    longest = max(len(s) for e in encoded for s in e.values())
    limit = loaded.context_length
    if limit is not None and longest > limit:
        raise DataError(
            f"The longest sequence has {longest} tokens, {loaded.source} was made for {limit}. "
            "Lower max_length."
        )
