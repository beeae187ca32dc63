"""Answers that say nothing: empty, all the same, going round in circles, never ending, ever longer.

Most of them pass every filter, and a training on them teaches the model to give more. They are
noticed in what is sampled anyway. The thresholds, and why they are quiet on healthy models:

- empty, 0.1: a model that works practically never ends its turn at once.
- the same text, 0.5; short texts 0.95: refusals recur to the letter, but not for half of all
  queries. Yes/no answers, labels and numbers recur, so only where 19 of 20 agree there is nothing
  to learn.
- in circles, 0.2: at the temperatures that sampling uses, about 1 answer in 100 of a healthy model
  does. An answer of fewer than 19 words never does.
- cut off, 0.5: half of the data is lost. Where unfinished answers are kept it is no sign.
- longer, 1.5: at least three trained steps, each longer than the one before; noise seldom does it,
  and not so far.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

#: Fewer answers than this, or fewer with a sign, decide nothing.
FEWEST, FEWEST_SIGNS = 16, 4

#: Characters up to which an answer is short: a word, a label or a number may recur.
SHORT = 24

#: An answer goes in circles if this share of its 4-grams stood in it before, of at least so many.
CIRCLES, GRAMS = 0.5, 16

#: By how much answers must grow over a training.
LONGER = 1.5

#: sign → share, what is seen, what usually causes it, what to change.
_SIGNS: Mapping[str, tuple[float, str, str, str]] = {
    "empty": (
        0.1,
        "are empty",
        "the chat template does not fit the model, or its training went too far",
        "Run selfsteer check, or lower the learning rate of the training that made the model.",
    ),
    "same": (
        0.5,
        "to different queries are the same text",
        "the model refuses what the principle asks for, or its training went too far",
        "Read some answers; change the principles, or lower the learning rate of the training that "
        "made the model.",
    ),
    "same_short": (
        0.95,
        "to different queries are the same text",
        "all queries have one answer, or the model's training went too far",
        "Read some answers; use other queries, or lower the learning rate of the training that "
        "made the model.",
    ),
    "circles": (
        0.2,
        "go in circles",
        "the temperature is too low for a model of this size, or its training went too far",
        "Raise sampling.temperature or sampling.top_p, or lower the learning rate of the training "
        "that made the model.",
    ),
    "cut_off": (
        0.5,
        "do not end within the budget",
        "the budget is too small, or the model no longer ends its turn",
        "Raise sampling.max_new_tokens, or ask for short answers in the principle.",
    ),
}


class Said(NamedTuple):
    """An answer and whether the budget cut it off."""

    text: str
    cut_off: bool


def shown(text: str) -> str:
    """An answer in about 60 characters, on one line."""
    flat = " ".join(text[:400].split())
    return f"{flat[:60]}…" if len(flat) > 60 else flat


def in_circles(text: str) -> bool:
    """Whether an answer repeats itself: by words, or by characters where it has no spaces.

    >>> in_circles("the cat eats fish and " * 8), in_circles("!" * 80)
    (True, True)
    >>> in_circles("The bee eats nectar and pollen, which it finds in flowers of many kinds.")
    False
    """
    words = text.split()
    units: Sequence[str] = words if len(text) < 20 * len(words) else text
    grams = [tuple(units[i : i + 4]) for i in range(len(units) - 3)]
    return len(grams) >= GRAMS and len(set(grams)) <= (1 - CIRCLES) * len(grams)


def signs(response: str, answers: Iterable[Sequence[Said]]) -> Counter[str]:
    """Counts of one batch of answers, which add up over batches: `collapsed` reads them.

    Args:
        response: which one they are, for example ``good``.
        answers: those to each query; equal ones to the same query count once as the same text.
    """
    found, texts = Counter[str](), Counter[str]()
    for said in answers:
        for text, cut_off in said:
            found[f"{response}|answers"] += 1
            found[f"{response}|empty"] += not text
            found[f"{response}|cut_off"] += cut_off
            if in_circles(text):
                found[f"{response}|circles"] += 1
                if not any(key.startswith(f"{response}|circles|") for key in found):
                    found[f"{response}|circles|{shown(text)}"] = 1
        texts.update({text for text, _ in said if text})
    # one text a batch: what half of all answers say stands at the top of every batch
    for text, count in texts.most_common(1):
        kind = "same_short" if len(text) <= SHORT else "same"
        if count > 1:
            found[f"{response}|{kind}|{shown(text)}"] = count
    return +found


def collapsed(counts: Mapping[str, int], *, unfinished_count: bool = True) -> str:
    """The worst sign in one sentence, its usual cause and what to change; empty where none is.

    Args:
        counts: sums of `signs`.
        unfinished_count: whether answers that are cut off are a sign.
    """
    worst = max(_found(counts, unfinished_count), default=None)
    if worst is None:
        return ""
    _, sign, response, count, answers, example = worst
    _, seen, cause, change = _SIGNS[sign]
    quoted = f' ("{example}")' if example else ""
    return (
        f"{count / answers:.0%} of {answers:,} {response} answers {seen}{quoted}. "
        f"Usual cause: {cause}. {change}"
    )


def _found(
    counts: Mapping[str, int], unfinished_count: bool
) -> Iterator[tuple[float, str, str, int, int, str]]:
    for key, answers in counts.items():
        response, _, kind = key.partition("|")
        if kind != "answers" or answers < FEWEST:
            continue
        for sign, (share, *_) in _SIGNS.items():
            prefix = f"{response}|{sign}|"
            examples = {k[len(prefix) :]: n for k, n in counts.items() if k.startswith(prefix)}
            example = max(examples, key=lambda text: examples[text], default="")
            count = examples.get(example, 0) if "same" in sign else counts.get(prefix[:-1], 0)
            if sign == "cut_off" and not unfinished_count:
                continue
            if count >= max(share * answers, FEWEST_SIGNS):
                yield count / answers / share, sign, response, count, answers, example


def growing(lengths: Sequence[float]) -> str:
    """The sentence of answers that get ever longer, as `collapsed`; empty where they do not.

    Args:
        lengths: mean tokens at the start and after each trained step that was measured.

    >>> growing([30.0, 31.0, 38.0, 52.0])[:63]
    'answers get ever longer: 30, 31, 38, 52 tokens. Usual cause: wh'
    >>> growing([30.0, 33.0, 29.0, 52.0]), growing([30.0, 31.0, 32.0, 33.0])
    ('', '')
    """
    rising = all(a < b for a, b in pairwise(lengths))
    if len(lengths) < 4 or not rising or lengths[-1] < LONGER * max(lengths[0], 1.0):
        return ""
    shown_lengths = ", ".join(f"{n:.0f}" for n in lengths)
    return (
        f"answers get ever longer: {shown_lengths} tokens. Usual cause: what is preferred is "
        "longer. Set hygiene.match_lengths, or a base that divides by the length (simpo)."
    )
