"""A judge of your own: any Python that says which of two answers is better, on a finished run.

`Grounded` prefers the answer that repeats more of the question's own words. A judge is a class with
a `name`, `check` and `compare_all`; what is below then works with it: the win rate of the trained
model over its base, the accuracy of the pairs, the agreement with another judge.

    python examples/custom_judge.py

Inside a run, only the kinds of docs/judges.md judge. Bring yours there as rules
(`judge: checks:FILE`), as a server that answers like a chat model (`judge: {kind: chat, …}`), or as
a kind of its own: docs/house.md, "How to add a judge".
"""

import re
import sys
from collections.abc import Sequence

import numpy as np

from selfsteer import Query, RunView, execute, load_recipe
from selfsteer.judges.base import Judgement, Pair, by_scores
from selfsteer.judges.oracle import OracleJudge
from selfsteer.judges.stats import accuracy, agreement, known_interval, worths


class Grounded:
    """The answer that repeats more of the question's words, of those that it could."""

    name = "grounded"

    def check(self, queries: Sequence[Query]) -> None:
        """Can judge answers to any query."""

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement per pair, in their order; equal shares are a tie."""
        return [
            Judgement(by_scores(*(self.score(p.query, text) for text in (p.first, p.second))))
            for p in pairs
        ]

    def score(self, query: Query, answer: str) -> float | None:
        """Share of the question's words that the answer has; None if there is nothing to read."""
        asked, said = ({*re.findall(r"\w+", t.lower())} for t in (query.text, answer))
        return len(asked & said) / len(asked) if said else None


def main() -> None:
    """Runs PBAA on the tiny world, then asks the judge; arguments are KEY=VALUE."""
    own = ["name=judged", "method=pbaa", "baseline=null", "generator=null", "queries.limit=240"]
    recipe = load_recipe("demo", [*own, *sys.argv[1:]])
    execute(recipe)
    run, judge, rng = RunView.open(recipe.folder), Grounded(), np.random.default_rng(0)

    before, after = (run.answers(label) for label in ("base", "pbaa/iteration-1"))
    answered = [
        Pair(mine.query, mine.text, before[name].text)
        for name, mine in after.items()
        if name in before
    ]
    rate = known_interval(worths(judge, answered), rng)
    print(f"{judge.name}: win rate over base {rate[0]:.3f} [{rate[1]:.3f}, {rate[2]:.3f}]")

    pairs = [Pair(p.query, p.chosen, p.rejected) for p in run.round().preferences]
    mine, oracle = (j.compare_all(pairs) for j in (judge, OracleJudge()))
    print(
        f"accuracy of {len(pairs)} pairs: {accuracy(j.verdict for j in mine):.3f} by {judge.name}"
    )
    print(f"same verdict as the oracle: {agreement(mine, oracle, rng)['same']:.3f}")


if __name__ == "__main__":
    main()
