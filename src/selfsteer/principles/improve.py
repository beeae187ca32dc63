"""A beam search for a better fixed good principle, without training (after DRPO).

At each step every principle of the beam, and what was written from it, is tried on the next few
queries; a judge rates the answers, and a model writes new principles from what went wrong. DRPO
(arXiv 2411.08733) tries one query a step, rates the aspects that a model finds to matter for it and
drops a principle once it is rewritten; here the judge gives one rating, and the old principle
stays a candidate, so that no rewriting can make the beam worse.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from selfsteer.data.curate import words
from selfsteer.data.records import Message, Query
from selfsteer.principles.writer import MAX_GUIDELINE_CHARS

#: How many of the latest principles of a path a writer is shown (DRPO's 5).
SHOWN = 5


@dataclass(frozen=True)
class Rated:
    """An answer under a principle, with its rating; higher is better."""

    query: Query
    answer: str
    rating: float


@dataclass(frozen=True)
class Path:
    """The principles tried one after the other, a step each, and how their answers were rated."""

    texts: tuple[str, ...]
    ratings: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """What paths compete by: the mean of their ratings."""
        return fmean(self.ratings)


#: Each step's queries and principles → each principle's answers, of which there may be none.
Rate = Callable[[Sequence[Query], Sequence[str]], Mapping[str, Sequence[Rated]]]

#: A path and its last principle's worst answer, for several paths → new principles for each.
Rewrite = Callable[[Sequence[tuple[Path, Rated]]], Sequence[Sequence[str]]]


def improve(
    start: str,
    stream: Sequence[Sequence[Query]],
    *,
    rate: Rate,
    rewrite: Rewrite,
    beam: int = 2,
    good_enough: float | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Path]:
    """The best paths from a principle along a stream of queries, the best one first.

    Args:
        start: the principle to begin with.
        stream: the queries of each step.
        rate: answers each query under each principle; a principle without answers is given up.
        rewrite: writes new principles.
        beam: paths kept after each step (DRPO: 2); of equals the earlier one.
        good_enough: a principle with at least this mean rating in a step is not rewritten after
            it; None: all are.
        done: called after each step.

    Returns:
        At most ``beam`` paths, as many principles in each as there are steps; none if no answer
        could be rated.
    """
    paths = [Path((start,))]
    for step, queries in enumerate(stream, 1):
        found = rate(queries, list(dict.fromkeys(p.texts[-1] for p in paths)))
        tried = [
            Path(p.texts, (*p.ratings, fmean(r.rating for r in found[p.texts[-1]])))
            for p in paths
            if found[p.texts[-1]]
        ]
        paths = sorted(tried, key=lambda p: -p.mean)[:beam]
        done()
        if step == len(stream) or not paths:
            break
        poor = [p for p in paths if good_enough is None or p.ratings[-1] < good_enough]
        worst = [min(found[p.texts[-1]], key=lambda r: r.rating) for p in poor]
        written = dict(zip(poor, rewrite(list(zip(poor, worst, strict=True))), strict=True))
        paths = [
            Path((*p.texts, text), p.ratings)
            for p in paths
            for text in dict.fromkeys([p.texts[-1], *written.get(p, ())])
        ]
    return paths


def rewrite_prompt(path: Path, worst: Rated, scale: str) -> list[Message]:
    """Asks for a better principle.

    Args:
        path: the principles so far, of which the last ones are shown with their ratings.
        worst: what went wrong under the last one.
        scale: what the ratings mean.
    """
    tried = zip(path.texts[-SHOWN:], path.ratings[-SHOWN:], strict=True)
    shown = "\n".join(f"{rating:.3g}: {text}" for text, rating in dict(tried).items())
    return [
        Message(
            "user",
            "An assistant follows one instruction whatever it is asked. Improve the instruction, "
            "so that its answers are rated higher. It must suit any query.\n\n"
            f"Instructions so far, each after the mean rating of its answers ({scale}):\n{shown}"
            f"\n\nA query:\n{worst.query.transcript}\n\nThe answer under the last instruction, "
            f"rated {worst.rating:.3g}:\n{worst.answer}\n\n"
            "Write the improved instruction in one to three sentences, and nothing else.",
        )
    ]


def read_rewritten(text: str, finish_reason: str, path: Path) -> tuple[str, str]:
    """A new principle and ``ok``; or nothing, and why the writer's answer is of no use.

    Args:
        text: what the writer said.
        finish_reason: ``stop``, ``length``, or why there is no answer.
        path: the principles so far.

    >>> read_rewritten('"Be brief."', "stop", Path(("Be kind.",)))
    ('Be brief.', 'ok')
    >>> read_rewritten("Be KIND.", "stop", Path(("Be kind.",)))
    ('', 'unchanged')
    """
    new = text.strip()
    if new[:1] == new[-1:] and new[:1] in "\"'":  # a mark at its end alone belongs to its last word
        new = new[1:-1].strip()
    faults = {
        finish_reason: finish_reason not in ("stop", "length"),
        "unfinished": finish_reason == "length",
        "empty": not new,
        "too_long": len(new) > MAX_GUIDELINE_CHARS,
        "unchanged": any(words(new) == words(old) for old in path.texts),
    }
    why = next((name for name, applies in faults.items() if applies), "ok")
    return (new if why == "ok" else "", why)
