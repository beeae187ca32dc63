"""Plain answers, ranked: sample n per query, score them, keep the best and the worst as a pair.

Ranking is apart from sampling: `rank` scores answers that exist, `to_preference` makes a pair of
them. The sampled answers are kept beside the pairs. One candidates record::

    {"id": "q1", "messages": [{"role": "user", "content": "What does the bee eat?"}],
     "answers": ["The bee eats nectar.", "Nectar.", "The bee eats bricks."]}

and the preference made of it carries ``"scores": [1.9, 0.4, -2.1]``, one per answer.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, groupby
from pathlib import Path
from typing import Any

from typing_extensions import override

from selfsteer.data.jsonl import Stored
from selfsteer.data.records import Dropped, Preference, Query, Verdict
from selfsteer.engines.base import Completion
from selfsteer.judges.base import Judge, Pair, Scorer, ScoringJudge, ends, turned
from selfsteer.judges.load import load_judge
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.judges.stats import accuracy
from selfsteer.recipe.sections import LOADED, JudgeConfig, Loading, Order, Sampling
from selfsteer.run.cost import Cost, Scale, scoring
from selfsteer.run.folder import RunFolder, StageResult, read_dropped, run_shards
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import stored_queries
from selfsteer.stages.sample import Asking, Wanted, check_sampler, thoughts_kept
from selfsteer.stages.train import TrainReward
from selfsteer.terminal import progress_bar

#: Sums of the same parts in another order differ by this at most.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Candidates:
    """A query and the answers that compete; equal answers stand once.

    ``reasoning`` has the thoughts that are trained on with each answer; empty where none is.
    """

    query: Query
    answers: tuple[str, ...]
    reasoning: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSONL line."""
        thoughts = {"reasoning": list(self.reasoning)} if self.reasoning else {}
        return {**self.query.to_dict(), "answers": list(self.answers), **thoughts}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Candidates":
        """Reads the JSONL form."""
        rest = dict(value)
        answers, thoughts = (tuple(rest.pop(n, ())) for n in ("answers", "reasoning"))
        return cls(Query.from_dict(rest), answers, thoughts)


def rank(judge: Scorer, query: Query, answers: Sequence[str]) -> list[float | None]:
    """One score per answer, higher is better; None where the judge has none (too long)."""
    return judge.score_all([(query, answer) for answer in answers])


def rank_all(judge: Scorer, found: Sequence[Candidates]) -> list[list[float | None]]:
    """`rank` of many queries in one go, so that a model's batches are full."""
    scores = iter(judge.score_all([(c.query, a) for c in found for a in c.answers]))
    return [[next(scores) for _ in c.answers] for c in found]


def best_and_worst(
    scores: Sequence[float | None], tie_margin: float = 0.0
) -> tuple[int, int] | None:
    """Places of the highest and the lowest score, the first of equals; None if all are equal.

    Scores that differ by no more than ``tie_margin`` or rounding are equal.

    >>> best_and_worst([0.1, None, 0.9, -2.0, 0.9])
    (2, 3)
    >>> best_and_worst([0.5, 0.5]) is None
    True
    """
    known = [(s, i) for i, s in enumerate(scores) if s is not None]
    if len(known) < 2 or max(known)[0] - min(known)[0] <= max(tie_margin, ROUNDING):
        return None
    best = max(known, key=lambda pair: (pair[0], -pair[1]))
    return best[1], min(known)[1]


def competing(query: Query, said: Sequence[Completion], sampling: Sampling) -> Candidates | Dropped:
    """The answers that ended by themselves, each once; dropped where there are fewer than two."""
    ended: dict[str, Completion] = {}
    for c in said:
        if c.finish_reason == "stop" and not c.missing:
            ended.setdefault(c.text, c)
    thoughts = thoughts_kept(ended, sampling)
    made = Candidates(query, tuple(ended), tuple(thoughts.get(t, "") for t in ended if thoughts))
    missing = next((c.missing for c in said if c.missing), "too_few_answers")
    return made if len(ended) > 1 else Dropped(query.id, missing, made)


def to_preference(
    found: Candidates, scores: Sequence[float | None], tie_margin: float = 0.0
) -> Preference | Dropped:
    """Best over worst, all scores beside them.

    Dropped are ``no_score`` (fewer than two answers have one) and ``all_equal``.
    """
    places = best_and_worst(scores, tie_margin)
    if places is None:
        reason = "all_equal" if sum(s is not None for s in scores) > 1 else "no_score"
        return Dropped(found.query.id, reason, found)
    chosen, rejected = (found.answers[i] for i in places)
    kept = {k: v for k, v in found.query.extra.items() if k != "principles"}
    sides = zip(("chosen", "rejected"), places, strict=True)
    thoughts = {side: found.reasoning[i] for side, i in sides if found.reasoning}
    return Preference(
        found.query.id,
        found.query.messages,
        chosen,
        rejected,
        extra={**kept, "scores": list(scores)},
        reasoning={side: text for side, text in thoughts.items() if text},
    )


class Tournament:
    """A judge that only compares, as one that scores: each answer of a query meets each other.

    A score is the share of comparisons won, ties and inconsistent verdicts half (Copeland's
    count). Scores of different queries mean nothing beside each other.
    """

    scale = "share of comparisons won among the answers to one query"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.name = judge.name

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        """See `Scorer.score_all`; None where no comparison of the answer could be read."""
        meetings = list(_meetings([query.id for query, _ in answers]))
        pairs = [_pair(answers, ends(answers, finished), i, j) for i, j in meetings]
        said: defaultdict[int, list[Verdict]] = defaultdict(list)
        for (i, j), judgement in zip(meetings, self.judge.compare_all(pairs), strict=True):
            said[i].append(judgement.verdict)
            said[j].append(turned(judgement.verdict))
        return [accuracy(said[i]) for i in range(len(answers))]


class Climb:
    """A judge that only compares, as one that scores: a champion meets one answer after another.

    After IPR (arXiv 2411.05875), of which we know the abstract: n − 1 comparisons of n answers in
    place of n (n − 1)/2. The champion scores 1, the last answer that it or an earlier one beat 0;
    the others have no score, as they were not compared with all. Ties and inconsistent verdicts
    beat no answer; where no answer is beaten, those with such verdicts score ½.
    """

    scale = "1 for the champion, 0 for the last answer that was beaten"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.name = judge.name

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        """See `Scorer.score_all`; answers to one query stand together.

        All queries go one answer further at a time, so that a judge's batches are full.
        """
        ended = ends(answers, finished)
        scores: list[float | None] = [None] * len(answers)
        groups = [list(g) for _, g in groupby(range(len(answers)), lambda i: answers[i][0].id)]
        champions, beaten = [group[0] for group in groups], dict[int, int]()
        for turn in range(1, max(map(len, groups), default=0)):
            open_ = [n for n, group in enumerate(groups) if turn < len(group)]
            meetings = [(n, champions[n], groups[n][turn]) for n in open_]
            pairs = [_pair(answers, ended, i, j) for _, i, j in meetings]
            for (n, i, j), judgement in zip(meetings, self.judge.compare_all(pairs), strict=True):
                if judgement.verdict is Verdict.FIRST:
                    beaten[n] = j
                elif judgement.verdict is Verdict.SECOND:
                    champions[n], beaten[n] = j, i
                elif judgement.verdict is not Verdict.UNPARSEABLE:
                    scores[i] = scores[j] = 0.5
        for n, worst in beaten.items():
            scores[groups[n][0] : groups[n][-1] + 1] = [None] * len(groups[n])
            scores[champions[n]], scores[worst] = 1.0, 0.0
        return scores


def _pair(answers: Sequence[tuple[Query, str]], ended: Sequence[bool], i: int, j: int) -> Pair:
    """Two answers to a query by their places."""
    (query, first), (_, second) = answers[i], answers[j]
    return Pair(query, first, second, (ended[i], ended[j]))


def _meetings(ids: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of places whose query is the same; answers to one query stand together.

    >>> list(_meetings(["a", "a", "a", "b", "b"]))
    [(0, 1), (0, 2), (1, 2), (3, 4)]
    """
    for _, group in groupby(range(len(ids)), key=lambda i: ids[i]):
        yield from combinations(list(group), 2)


def ranker(settings: JudgeConfig, folder: Path, order: Order = "tournament") -> Scorer:
    """Who scores the answers to a query; a judge that only compares does it in this order."""
    judge = load_judge(settings, folder)
    assert judge is not None
    if isinstance(judge, ScoringJudge):
        return judge
    return Climb(judge) if order == "climb" else Tournament(judge)


def policy_as_judge(policy: str, loading: Loading, batch_size: int) -> JudgeConfig:
    """The policy, asked with the chat judge's question (self-rewarding, arXiv 2401.10020).

    The paper's own prompt adds up five points for one answer; ours compares two in both orders.
    The policy answers in process, whoever samples.
    """
    return JudgeConfig(
        kind="chat",
        model=policy,
        batch_size=batch_size,
        **loading.model_dump(include=LOADED),
    )


def trained_judge(reward: Artifact, batch_size: int) -> JudgeConfig:
    """A reward model that the run itself trains, loaded as its training loaded it."""
    assert isinstance(reward.maker, TrainReward)
    return JudgeConfig(
        kind="reward",
        model=str(reward.path),
        batch_size=batch_size,
        **reward.maker.start_loading.model_dump(include=LOADED),
    )


@dataclass(frozen=True)
class RankAnswers(Stage):
    """n plain answers per query, the best over the worst as a preference.

    The answers come first, into ``candidates``, so that the sampling model has left memory when the
    judge's is loaded. Both halves resume after their last finished shard. Dropped are
    ``too_few_answers`` (fewer than two different answers that ended by themselves),
    ``prompt_too_long``, ``request_failed:REASON``, ``unfinished_reasoning`` and ``no_answer`` where
    answers are missing for that reason,
    ``no_score`` and ``all_equal``.

    Args:
        queries: of the run.
        policy: who answers.
        samples: answers per query, 2 or more.
        judge: who scores them; None: the policy itself.
        sampling: how.
        clip: None: the policy is asked; a number: it is not, and `PrincipleContrast` with this
            clip scores answers to queries that hold principles.
        reward: the run's own reward model, which scores in the judge's place; None: none.
        order: which answers a judge that only compares compares.
    """

    queries: Artifact
    policy: Artifact
    samples: int
    judge: JudgeConfig | None
    sampling: Sampling
    clip: float | None = None
    reward: Artifact | None = None
    order: Order = "tournament"

    title = "ranked"

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        judged = self.samples
        if self.clip is not None:
            scores = scoring(self.name, PrincipleContrast.read, self.samples * n)
            return Cost(n, answers=Counter(plain=self.samples * n), scores=scores)
        compares = self.judge is None or self.judge.only_compares
        if compares and self.reward is None:
            judged -= 1
            if self.order == "tournament":
                judged = self.samples * judged // 2
        return Cost(n, answers=Counter(plain=self.samples * n), judged=judged * n)

    @override
    def check(self) -> Iterator[str]:
        yield from check_sampler(self.sampling, (self.policy,), self.loading)
        if self.judge is not None and (judge := load_judge(self.judge)):
            judge.check(())

    @override
    def run(self, run: RunFolder) -> StageResult:
        queries, folder = stored_queries(self.queries.path), run / self.name
        policy, sampling = str(self.policy.path), self.sampling
        wanted = [Wanted("plain", policy, number) for number in range(self.samples)]
        asking = Asking[Query](
            wanted,
            lambda query, response: query.messages,
            lambda query, said: competing(query, said, sampling),
        )
        sampled = asking.of_stage(self, run, queries, sampling, folder=f"{self.name}/candidates")
        found = Stored(folder / "candidates", Candidates.from_dict)
        settings = self.judge or policy_as_judge(policy, self.loading, sampling.batch_size)
        if self.reward is not None:
            settings = trained_judge(self.reward, sampling.batch_size)
        judge: Scorer
        if self.clip is None:
            judge = ranker(settings, run / "judgements", self.order)
        else:
            judge = PrincipleContrast(policy, self.loading, clip=self.clip, folder=run / "scores")
        with progress_bar(f"{self.title}: ranking", len(found)) as bar:

            def work(store: Path, part: Sequence[Candidates]) -> list[Preference | Dropped]:
                scores = rank_all(judge, part)
                bar.advance(len(part))
                return [
                    to_preference(c, s, settings.tie_margin)
                    for c, s in zip(part, scores, strict=True)
                ]

            ranked = run_shards(
                folder,
                found,
                sampling.shard_size,
                work,
                bar.skip,
                at_once=self.clip is None and settings.engine.batch,
            )
        # one file of drops for both halves
        halves = (folder / "candidates.dropped.jsonl", run / f"{self.name}.dropped.jsonl")
        dropped = run.drop(self.name, chain.from_iterable(map(read_dropped, halves)))
        notes = {**sampled.notes, "answers": sum(len(c.answers) for c in found)}
        return StageResult(len(queries), ranked.n_out, dropped, notes=notes)
