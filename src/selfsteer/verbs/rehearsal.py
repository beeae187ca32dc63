"""The checks of a recipe that need its model: a small rehearsal of the first stages.

Each function fills in one `Line` of `selfsteer check` and returns what the next ones need; an
error raised is that line's failure.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed
from selfsteer.data.records import RESPONSES, Query, Triple, Verdict
from selfsteer.engines.answers import answers
from selfsteer.engines.base import PROMPT_TOO_LONG, Completion, Engine, Request, SamplingParams
from selfsteer.errors import ArtifactError, DataError, EngineError
from selfsteer.judges.base import Judge, Pair
from selfsteer.judges.quality import GAP_SEQUENCES, PLAIN_SEQUENCES, quality, steering, strangers
from selfsteer.judges.stats import above, verdict_counts
from selfsteer.models import tree
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.score import settle_layout, tree_difference
from selfsteer.models.store import scored
from selfsteer.principles.catalogue import load_catalogue
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import Hygiene, Loading, Sampling
from selfsteer.stages.filter import Left
from selfsteer.stages.sample import answer, collect, params_of
from selfsteer.stages.train import Train
from selfsteer.terminal import interval, progress_bar

#: Shares above which something ordinary becomes a warning.
UNFINISHED, EQUAL, UNPARSEABLE = 0.2, 0.2, 0.2

#: Good answers this many times as long as bad ones, or the reverse, teach length.
LENGTH_RATIO = 2.0

#: Queries and new tokens of the engine's first words.
PROBES, PROBE_TOKENS = 4, 64


@dataclass
class Line:
    """What one check found."""

    name: str
    status: str = "ok"
    found: str = ""
    todo: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def warn(self, todo: str) -> None:
        """Makes it a warning, with one more thing to know or to do."""
        self.status = "warning"
        self.todo.append(todo)


def first_words(
    line: Line,
    engine: Engine,
    sampling: Sampling,
    chat: ChatFormat,
    queries: Sequence[Query],
    seed: int,
) -> list[EncodedSequence]:
    """Answers some queries under two seeds; returns what was answered, as sequences.

    Raises:
        EngineError: nothing but empty answers.
    """
    s = sampling
    params = SamplingParams(s.temperature, s.top_p, min(s.max_new_tokens, PROBE_TOKENS))
    prompts = [q.messages for q in queries[:PROBES]]
    first, second = (
        list(
            answers(
                engine,
                [
                    Request(str(i), tuple(p), derive_seed(seed, "check/engine", i, k))
                    for i, p in enumerate(prompts)
                ],
                params,
            ).values()
        )
        for k in range(2)
    )
    answered = [a for a in (*first, *second) if a.completion_tokens]
    if not any(a.text for a in answered):
        reasons = ", ".join(f"{n} {r}" for r, n in _reasons([*first, *second]).items())
        raise EngineError(
            f"The policy answers nothing: {len(first) + len(second)} answers, all empty "
            f"({reasons}). Look at what it says with another chat template, or choose another "
            "model."
        )
    differ = sum(a.text != b.text for a, b in zip(first, second, strict=True))
    line.figures = {"probes": len(prompts), "differ": differ, "temperature": s.temperature}
    empty = sum(not a.text for a in (*first, *second))
    if s.temperature == 0:
        line.found = "answers; greedy, as temperature is 0"
    else:
        line.found = f"answers; {differ} of {len(prompts)} change with the seed"
        if not differ:
            line.warn(
                f"It ignores temperature {s.temperature:g}, or is certain of every token: "
                "good, bad and plain answers will hardly differ."
            )
    if empty:
        line.warn(f"{empty} of {2 * len(prompts)} answers are empty; those are dropped.")
    sequences = []
    for prompt, a, b in zip(prompts, first, second, strict=True):
        ids = chat.prompt_ids(prompt)
        texts = (chat.response_ids(x.text) for x in (a, b) if x.completion_tokens)
        sequences += [EncodedSequence(ids, t) for t in texts]
    return sequences


def settle(line: Line, loaded: LoadedModel, sequences: Sequence[EncodedSequence]) -> str:
    """The layout that the model settles on; the sequences should share prompts."""
    asked = loaded.layout
    with loaded.precision():
        reason = tree.obstacle(loaded.model)
        layout = settle_layout(loaded.model, asked, sequences, loaded.dtype)
        line.figures = {"asked": asked, "layout": layout}
        line.found = layout if asked == layout else f"{asked} settles on {layout}"
        if layout == "tree":
            difference = tree_difference(loaded.model, sequences)
            line.figures["difference"] = difference
            line.found += f", {difference:.1g} nats from padded on {len(sequences)} sequences"
    if asked == "auto" and layout == "padded":
        line.warn(
            f"Trees cannot be used: {reason}. Training is slower, its result the same."
            if reason
            else "Trees give other numbers on this model (see above), so they are not used."
        )
    return layout


def fit(
    line: Line,
    trainings: Sequence[Train],
    new: int,
    chat: ChatFormat,
    limit: int | None,
    queries: Sequence[Query],
    triples: Sequence[Triple],
) -> None:
    """Longest prompts, with what the principles add, against context and ``max_length``.

    Raises:
        DataError: no query fits.
    """
    plain = []
    with progress_bar("tokens", len(queries)) as bar:
        for query in queries:
            plain.append(len(chat.prompt_ids(query.messages)))
            bar.advance(1)
    added = max(
        len(chat.prompt_ids(context_messages(t.messages, t.principles, context)))
        - len(chat.prompt_ids(t.messages))
        for t in triples
        for context in ("good", "bad")
    )
    steered = np.array(plain) + added
    bounds = {
        f"{t.section}.max_length": (
            t.settings.max_length,
            np.array(plain) if t.plain else steered,
        )
        for t in trainings
    }
    too_long = int((steered + new > limit).sum()) if limit else 0
    line.figures = {
        "longest_prompt": max(plain),
        "principles_add": added,
        "max_new_tokens": new,
        "context": limit,
        PROMPT_TOO_LONG: too_long,
        "dropped_by": {k: int((n >= bound).sum()) for k, (bound, n) in bounds.items()},
        "cut_by": {k: int((n + new > bound).sum()) for k, (bound, n) in bounds.items()},
    }
    whole = int(steered.max()) + new
    line.found = (
        f"longest prompt {max(plain):,} tokens, principles {added:,}, answers {new:,}: {whole:,}"
        + (f" of {limit:,}" if limit else "")
    )
    if too_long == len(queries):
        raise DataError(
            f"No query fits: a prompt of {min(plain):,} tokens and more, principles of {added:,} "
            f"and sampling.max_new_tokens {new:,} exceed the context of {limit:,}. Lower "
            "sampling.max_new_tokens, or choose a model with a longer context."
        )
    if too_long:
        line.warn(
            f"{too_long:,} of {len(queries):,} queries would be dropped as prompt_too_long. Lower "
            "sampling.max_new_tokens or leave long queries out."
        )
    for key, (bound, lengths) in bounds.items():
        dropped, cut = int((lengths >= bound).sum()), int((lengths + new > bound).sum())
        if dropped:
            line.warn(f"{dropped:,} of {len(queries):,} prompts do not fit {key} {bound:,}.")
        elif cut:
            line.warn(
                f"Answers that fill their budget would be cut in training for {cut:,} of "
                f"{len(queries):,} queries: {key} is {bound:,}."
            )


def sample_some(
    line: Line,
    engine: Engine,
    triples: Sequence[Triple],
    sampling: Sampling,
    hygiene: Hygiene,
    catalogue: str | None,
    *,
    seed: int,
) -> tuple[list[Triple], dict[str, float]]:
    """The answered triples, and per response the seconds of one answer.

    Raises:
        ArtifactError: no triple is left.
    """
    models = dict.fromkeys(RESPONSES, "policy")
    start = time.monotonic()
    with progress_bar("sampling", len(triples) * len(models)) as bar:
        found = answer(
            triples,
            models,
            lambda source: engine,
            params_of(sampling),
            seed=derive_seed(seed, "check"),
            store=None,
            advance=bar.advance,
        )
    elapsed = time.monotonic() - start
    tokens = {r: sum(found[t.id, r].completion_tokens for t in triples) for r in models}
    total = max(sum(tokens.values()), 1)
    reasons = _reasons(list(found.values()))
    unfinished = reasons["length"] / len(found)
    kept, lost = collect(triples, tuple(models), found, keep_unfinished=sampling.keep_unfinished)
    usable = Left(kept, hygiene, load_catalogue(catalogue)).sift()
    dropped = Counter(d.reason for d in lost) + usable.reasons
    same = [len(set(t.responses.values())) < len(models) for t in kept]
    line.figures = {
        "answers": len(found),
        "tokens_per_second": total / elapsed,
        "mean_tokens": {r: n / len(triples) for r, n in tokens.items()},
        "unfinished": unfinished,
        "equal": float(np.mean(same)) if same else None,
        "usable": len(usable),
        "dropped": dict(dropped),
    }
    budget = sampling.max_new_tokens
    if len(kept) < 2:
        left = f"{len(kept)} of {len(triples)} triples left{drops(dropped)}"
        if unfinished:
            raise ArtifactError(
                f"{left}: {unfinished:.0%} of the answers do not end within "
                f"sampling.max_new_tokens {budget:,}. Raise it."
            )
        raise ArtifactError(
            f"{left}, and steering cannot be measured on fewer than 2. "
            + ("See why answers are missing." if len(triples) > 1 else "Give more queries.")
        )
    line.found = (
        f"{len(found):,} answers at {total / elapsed:,.0f} tokens/s, {unfinished:.0%} unfinished; "
        f"{len(usable)} of {len(triples)} triples usable{drops(dropped)}"
    )
    if unfinished > UNFINISHED:
        line.warn(
            f"{unfinished:.0%} of the answers do not end within sampling.max_new_tokens "
            f"{budget:,}. Raise it, or they are "
            + ("kept as they are." if sampling.keep_unfinished else "dropped.")
        )
    if np.mean(same) > EQUAL:
        line.warn(
            f"{np.mean(same):.0%} of the queries get the same answer in two contexts. Raise "
            "sampling.temperature, or choose a model that follows instructions."
        )
    return kept, {r: elapsed * n / total / len(triples) for r, n in tokens.items()}


def measure(
    line: Line,
    policy: str,
    loading: Loading,
    triples: Sequence[Triple],
    judge: Judge | None,
    scratch: Path,
    *,
    seed: int,
) -> tuple[float, float | None]:
    """Puts the steering figures into the line.

    Returns:
        The seconds of scoring one sequence, and of judging one pair if there is a judge.
    """
    loaded = load_model(policy, loading)
    chat = loaded.chat
    own = (*PLAIN_SEQUENCES, "plain/plain", *GAP_SEQUENCES)
    flat = [chat.sequence(t, name) for name in own for t in triples]
    principles = [t.principles for t in triples if t.principles is not None]
    lent = strangers(principles)
    for name in ("good/good", "bad/bad"):
        flat += [
            chat.sequence(replace(t, principles=p), name)
            for t, p in zip(triples, lent, strict=True)
        ]
    names = (*own, "stranger-good/good", "stranger-bad/bad")
    start = time.monotonic()
    values = scored(scratch / "scores", loaded, flat, "scoring")
    per_forward = (time.monotonic() - start) / len(flat)
    del loaded  # the judge's model may need the room
    grid = np.array([float(v.double().sum()) for v in values]).reshape(len(names), -1)
    size = np.array([len(v) for v in values]).reshape(len(names), -1)
    sums, lengths = dict(zip(names, grid, strict=True)), dict(zip(names, size, strict=True))
    figures = quality(triples, {n: sums[n] for n in own}, {n: lengths[n] for n in own}, judge=None)
    verdicts, per_judged = None, None
    if judge is not None:
        verdicts, per_judged = _judged(judge, triples)
    rng = np.random.default_rng(derive_seed(seed, "check/steering"))
    means = {n: sums[n] / lengths[n] for n in names}
    found = steering(triples, means, verdicts, rng)
    alike = lent == principles
    line.figures = {
        **found,
        "one_principle_for_all": alike,
        "verdicts": None if verdicts is None else verdict_counts(verdicts),
        "on_policyness": figures["on_policyness"],
        "tokens": figures["tokens"],
    }
    right, policyness = found["accuracy"], figures["on_policyness"]
    missing = "judge" if judge is None else "verdict"
    line.found = (
        f"{'steers' if found['steers'] else 'does not steer'} on {len(triples)} queries"
        + (f"; accuracy {interval(right, '.2f')}" if right else f"; no {missing}")
        + f"; on-policyness good {policyness['chosen']:.2f}, bad {policyness['rejected']:.2f}"
    )
    _advise(line, found, figures["tokens"], alike)
    lost = (verdicts or []).count(Verdict.UNPARSEABLE)
    if lost > UNPARSEABLE * len(triples):
        line.warn(
            f"{lost} of {len(triples)} pairs are unparseable for the judge: they do not count."
        )
    return per_forward, per_judged


def _judged(judge: Judge, triples: Sequence[Triple]) -> tuple[list[Verdict], float]:
    """Verdicts on good against bad, and seconds of one pair, without those of loading a model."""
    pairs = [
        Pair(Query(t.id, t.messages), t.responses["good"], t.responses["bad"]) for t in triples
    ]
    first = judge.compare_all(pairs[:1])
    start = time.monotonic()
    found = [*first, *judge.compare_all(pairs[1:])]
    return [j.verdict for j in found], (time.monotonic() - start) / len(pairs[1:])


def _advise(line: Line, found: dict[str, Any], tokens: dict[str, float], alike: bool) -> None:
    for half in ("good", "bad"):
        if not above(found["gap"][half], 0):
            line.warn(
                f"The {half} principle changes nothing: its gap is not above 0 beyond chance."
            )
        elif not above(found["net_gap"][half], 0):
            line.warn(
                f"Answers react to the wording of the {half} principle, not to what it asks for."
            )
    accuracy = found["accuracy"]
    if accuracy and not above(accuracy, 0.5):
        line.warn("The judge cannot tell good answers from bad ones, or prefers the bad ones.")
    if not found["steers"]:
        line.warn(
            "A run would learn noise. Use a model that follows a system message, or simpler "
            "principles (principles.mode=picked principles.features_per_query=1)."
        )
    if alike:
        line.warn("All queries have the same principles, so the net gap is only the gap.")
    longer, shorter = sorted((tokens["chosen"], tokens["rejected"]), reverse=True)
    if longer > LENGTH_RATIO * shorter:
        line.warn(
            f"Good answers have {tokens['chosen']:.0f} tokens, bad ones {tokens['rejected']:.0f}: "
            "training on them teaches length."
        )
    for feature, figures in found["features"].items():
        if figures["steers"] is False and found["steers"]:
            line.warn(
                f"{feature}: adds {interval(figures['adds'])}, does not steer on "
                f"{figures['triples']} queries; consider dropping it."
            )


def drops(dropped: Counter[str]) -> str:
    """`` (5 unfinished, 4 equals_plain)``, or nothing."""
    return f" ({', '.join(f'{n:,} {r}' for r, n in dropped.most_common())})" if dropped else ""


def _reasons(answers: Sequence[Completion]) -> Counter[str]:
    return Counter(a.finish_reason for a in answers)
