"""Preferences to a reward model: mixed by weight, some queries kept out and measured on."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import is_number, write_atomic
from selfsteer.data.reading import import_records
from selfsteer.data.records import Preference, Triple, content_id
from selfsteer.errors import DataError, RefusedConversation, short
from selfsteer.evaluation.reward_quality import ScoredPair, reward_quality
from selfsteer.judges.base import Scorer
from selfsteer.judges.reward import RewardJudge
from selfsteer.models.chat import ChatFormat
from selfsteer.models.load import load_reward_start
from selfsteer.recipe.sections import LOADED, JudgeConfig
from selfsteer.run.folder import Dropped, RunFolder, StageResult
from selfsteer.stages.fit import common, with_drops
from selfsteer.stages.inputs import renamed
from selfsteer.terminal import progress_bar, say
from selfsteer.training.reward import RewardPair, RewardTask
from selfsteer.training.trainer import RowBudget, publish, train, work_folder

if TYPE_CHECKING:
    from selfsteer.stages.train import TrainReward

#: Part of the seeds.
STAGE = "train_reward"


def fit_reward(stage: "TrainReward", run: RunFolder) -> StageResult:
    """Trains ``reward/`` and writes ``reward.json`` with its figures on the held-out pairs.

    Returns:
        Counts of pairs over all sets (two labelled answers are one): dropped are what the import
        drops (docs/formats.md), ``no_pair``, ``equal``, ``bad_margin``, ``too_long``, ``held_out``
        and ``left_by_weight``. ``n_out`` is how many different pairs were trained on.

    Raises:
        DataError: a set cannot be read, or no record has the margin that the recipe names.
    """
    settings, seed, loading = stage.settings, stage.seed, stage.start_loading
    sets = [(s.name, s.weight, *read_pairs(s.path)) for s in stage.sets]
    start = str(stage.start.path)
    loaded = load_reward_start(start, loading, derive_seed(seed, stage.name, "head"))
    limit = min(settings.max_length, loaded.context_length or settings.max_length)
    dropped: list[Dropped] = []
    pairs: list[RewardPair] = []
    test: list[tuple[Preference, RewardPair]] = []
    table: dict[str, dict[str, Any]] = {}
    unread: Counter[str] = Counter()
    for name, weight, preferences, unreadable in sets:
        encoded, lost = encode_pairs(loaded.chat, name, preferences, settings.margin, limit)
        kept_out = [(p, pair) for p, pair in encoded if held_out(p, settings.holdout, seed)]
        mine = [pair for p, pair in encoded if not held_out(p, settings.holdout, seed)]
        taken = by_weight(mine, weight, seed)
        used = {p.id for p in taken}
        lost += [Dropped(p.id, "held_out") for p, _ in kept_out]
        lost += [Dropped(p.id, "left_by_weight") for p in mine if p.id not in used]
        test += kept_out
        table[name] = {
            "read": len(preferences) + unreadable.total(),
            "weight": weight,
            "trained": len(used),
            "shown_per_epoch": len(taken),
            "dropped": dict(sorted((unreadable + Counter(d.reason for d in lost)).items())),
        }
        unread += unreadable
        dropped += lost
        pairs += taken
    n_in, n_out = (sum(row[key] for row in table.values()) for key in ("read", "trained"))
    result = StageResult(n_in, n_out, unread)
    if not pairs:
        return with_drops(stage, run, result, dropped)
    if settings.margin and not any(p.margin for p in pairs):
        raise DataError(
            f"reward.margin is {short(settings.margin)}, but no pair to train on has a number "
            "other than 0 under that key. Name the right key, or remove reward.margin."
        )
    chat, output = loaded.chat, run / stage.outputs[0]
    # rows of so many pairs, however long they are
    longest = 2 * settings.forward_pairs * settings.max_length
    last = train(
        loaded,
        RewardTask(loaded, pairs, settings.center),
        settings,
        budget=RowBudget(settings.batch_size, longest, settings.forward_pairs),
        **common(stage, run),
    )
    del loaded  # what is measured is the model as it was saved
    saved = JudgeConfig(
        kind="reward",
        model=str(work_folder(output) / "model"),
        **loading.model_dump(include=LOADED),
    )
    quality = reward_quality(score_pairs(RewardJudge(saved), chat, test))
    report = {
        "start": start,
        "limit_tokens": limit,
        "margin": settings.margin,
        "sources": table,
        "held_out": quality,
        "last": last,
    }
    write_atomic(run / "reward.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    publish(output)
    if test:
        accuracy, ece = quality["accuracy"][0], quality["calibration"]["ece"]
        say(f"  {len(test):,} held-out pairs: accuracy {accuracy:.3f}, calibration error {ece:.3f}")
    result.notes = {"last": last}
    return with_drops(stage, run, result, dropped)  # last: it digests what the training logged


def read_pairs(path: Path) -> tuple[list[Preference], Counter[str]]:
    """The pairs of a set, and drops by reason; of triples y+ ≻ y-, ``no_pair`` without both.

    Raises:
        DataError: unreadable, or nothing in it is a pair.
    """
    found = import_records(path)
    dropped, pairs = found.dropped.copy(), []
    for record in found.records:
        if isinstance(record, Preference):
            pairs.append(record)
        elif isinstance(record, Triple) and {"good", "bad"} <= record.responses.keys():
            good, bad = record.responses["good"], record.responses["bad"]
            named = {"good": "chosen", "bad": "rejected"}
            ended = renamed(record.finish_reasons, named)
            pairs.append(Preference(record.id, record.messages, good, bad, ended, record.extra))
        else:
            dropped["no_pair"] += 1
    if not pairs:
        raise DataError(
            f"{path} holds no pair of a better and a worse answer, but {found.shape}. A reward "
            "model learns from such pairs alone."
        )
    return pairs, dropped


def encode_pairs(
    chat: ChatFormat, name: str, pairs: Sequence[Preference], margin: str | None, limit: int
) -> tuple[list[tuple[Preference, RewardPair]], list[Dropped]]:
    """Token ids of the pairs that can be learned from.

    Args:
        chat: makes the ids.
        name: of the set.
        pairs: N of it.
        margin: key of each record's margin; one without it has a margin of 0.
        limit: tokens of conversation and answer.

    Returns:
        Those that are left, and the others: ``equal``, ``bad_margin``, ``too_long`` or
        ``template_refuses``.
    """
    found, dropped = [], []
    with progress_bar(f"reading {name}", len(pairs)) as bar:
        for p in pairs:
            bar.advance(1)
            value = p.extra.get(margin, 0.0) if margin else 0.0
            try:
                chosen, rejected = (chat.exchange_ids(p.prompt, x) for x in (p.chosen, p.rejected))
            except RefusedConversation:
                dropped.append(Dropped(p.id, "template_refuses", p))
                continue
            faults = {
                "bad_margin": isinstance(value, bool) or not is_number(value),
                "equal": p.chosen == p.rejected,
                "too_long": max(len(chosen), len(rejected)) > limit,
            }
            reason = next((fault for fault, applies in faults.items() if applies), None)
            if reason:
                dropped.append(Dropped(p.id, reason, p))
            else:
                found.append((p, RewardPair(p.id, name, chosen, rejected, float(value))))
    return found, dropped


def held_out(preference: Preference, share: float, seed: int) -> bool:
    """Whether its query is kept out of training; all pairs of a query are, in whatever set."""
    return derive_seed(seed, STAGE, "holdout", content_id(preference.prompt)) < share * 2**63


def by_weight(pairs: Sequence[RewardPair], weight: float, seed: int) -> list[RewardPair]:
    """Each pair as often as the weight says; of its fraction a seeded choice, whatever the order.

    Args:
        pairs: N of one set.
        weight: 2.5 is every pair twice and round(N / 2) of them once more.
        seed: the run's.
    """
    whole = int(weight)
    count = round((weight - whole) * len(pairs))
    chosen = sorted(pairs, key=lambda p: derive_seed(seed, STAGE, "weight", p.source, p.id))
    once_more = {p.id for p in chosen[:count]}
    return [*list(pairs) * whole, *(p for p in pairs if p.id in once_more)]


def score_pairs(
    judge: Scorer, chat: ChatFormat, pairs: Sequence[tuple[Preference, RewardPair]]
) -> list[ScoredPair]:
    """What a judge gives to both responses of each pair; lengths are of the responses alone."""
    answers = [(p.query, text) for p, _ in pairs for text in (p.chosen, p.rejected)]
    scores = judge.score_all(answers)
    found = []
    for (p, pair), a, b in zip(pairs, scores[::2], scores[1::2], strict=True):
        assert a is not None  # none of them is too long
        assert b is not None
        sides = ((p.chosen, p.finished("chosen")), (p.rejected, p.finished("rejected")))
        lengths = chat.response_lengths(sides)
        found.append(ScoredPair(pair.source, a, b, lengths[0], lengths[1]))
    return found
