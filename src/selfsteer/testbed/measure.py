"""Measures a testbed checkpoint: quality per context, lengths, and its skill as a writer.

All on questions of the splits ``tune`` and ``align``, which the model was not trained on, with
the sampling that the pipeline uses (temperature 0.7, top-p 0.8).
"""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from selfsteer.data.records import Message
from selfsteer.principles import catalogue, writer
from selfsteer.principles.contexts import CONTEXTS, context_messages
from selfsteer.testbed import knowledge, oracle, world
from selfsteer.testbed.corpus import as_query, choosable

if TYPE_CHECKING:
    from rich.progress import Progress

TEMPERATURE, TOP_P = 0.7, 0.8
MAX_NEW_TOKENS = 128
#: Questions per task; tasks count equally, however many questions they have.
PER_TASK = 60
BATCH_SIZE = 105


def measure(
    folder: Path, *, seed: int = 0, per_task: int = PER_TASK, bar: "Progress | None" = None
) -> dict[str, Any]:
    """Samples from the checkpoint and scores what it says.

    Returns:
        Per context: the oracle's ``total`` (also per task and per feature), ``unparsed`` sentences
        and ``tokens`` per response. For the writer: the shares of feature answers with exactly
        two known names, and with two that apply to the question, and of principles that parse and
        say what the catalogue says.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(seed)
    asked = _sample_questions(per_task, rng)
    named = [writer.complete_features(tuple(rng.sample(choosable(q), 2)), 2, rng) for q in asked]
    progress = bar.add_task("measuring", total=5) if bar else None

    def answers(prompts: Sequence[Sequence[Message]]) -> list[tuple[str, int]]:
        out = sample(model, tokenizer, prompts, seed=seed)
        if bar and progress is not None:
            bar.advance(progress)
        return out

    out: dict[str, Any] = {"questions": len(asked)}
    for context in CONTEXTS:
        prompts = [
            context_messages(as_query(q).messages, writer.picked(f), context)
            for q, f in zip(asked, named, strict=True)
        ]
        out[context] = _quality(asked, answers(prompts))
    chosen = answers([writer.feature_prompt(as_query(q), 2) for q in asked])
    names = [writer.parse_features(answer) for answer, _ in chosen]
    out["features_ok"] = _share(len(found) == 2 for found in names)
    out["features_apply"] = _share(
        len(found) == 2 and set(found) <= set(q.features)
        for q, found in zip(asked, names, strict=True)
    )
    written = answers(
        [writer.principle_prompt(as_query(q), f) for q, f in zip(asked, named, strict=True)]
    )
    out["principles_ok"] = _share(
        _says_catalogue(f, a) for f, (a, _) in zip(named, written, strict=True)
    )
    return out


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Message]], *, seed: int
) -> list[tuple[str, int]]:
    """One response per prompt with its length in tokens, the end-of-turn token included."""
    import torch

    ids = [
        list(
            tokenizer.apply_chat_template(
                [m.to_dict() for m in messages], add_generation_prompt=True
            )["input_ids"]
        )
        for messages in prompts
    ]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out: list[tuple[str, int]] = [("", 0)] * len(ids)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            made = model.generate(
                **batch,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            width = batch["input_ids"].shape[1]
            for i, row in zip(rows, made[:, width:].tolist(), strict=True):
                kept = [t for t in row if t != tokenizer.pad_token_id]
                out[i] = tokenizer.decode(kept, skip_special_tokens=True), len(kept)
    return out


def _sample_questions(per_task: int, rng: random.Random) -> list[world.Question]:
    unseen = [*world.questions("tune"), *world.questions("align")]
    out: list[world.Question] = []
    for task in knowledge.TASK_FEATURES:
        out += rng.sample([q for q in unseen if q.task == task], per_task)
    return out


def _quality(asked: Sequence[world.Question], said: Sequence[tuple[str, int]]) -> dict[str, Any]:
    scores = [oracle.score(q.text, text) for q, (text, _) in zip(asked, said, strict=True)]
    by_task: dict[str, list[float]] = {}
    by_feature: dict[str, list[float]] = {}
    for q, score in zip(asked, scores, strict=True):
        by_task.setdefault(q.task, []).append(score.total)
        for feature, value in score.features.items():
            by_feature.setdefault(feature, []).append(value)
    return {
        "total": round(fmean(s.total for s in scores), 4),
        "unparsed": round(fmean(s.unparsed for s in scores), 4),
        "tokens": round(fmean(length for _, length in said), 2),
        "distinct": round(len({text for text, _ in said}) / len(said), 4),
        "tasks": {name: round(fmean(values), 4) for name, values in by_task.items()},
        "features": {name: round(fmean(values), 4) for name, values in by_feature.items()},
    }


def _share(hits: Iterable[bool]) -> float:
    return round(fmean(map(float, hits)), 4)


def _says_catalogue(features: tuple[str, ...], answer: str) -> bool:
    outcome, good, bad = writer.parse_principles(answer)
    wanted = tuple(catalogue.BUILT_IN.guidelines(features, good=side) for side in (True, False))
    return outcome is writer.Outcome.OK and (good, bad) == wanted
