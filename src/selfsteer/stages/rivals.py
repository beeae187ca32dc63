"""What the rivals of docs/methods.md do differently: who ranks, what is opposed to what.

Training, measuring and evaluation are those of every other method.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, groupby
from pathlib import Path

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records, dump_line, write_atomic
from selfsteer.data.records import Message, Preference, Query, Triple, Verdict
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Engine, Request, SamplingParams
from selfsteer.errors import ConfigError, DataError
from selfsteer.formats import import_records
from selfsteer.judges.base import Judge, Pair, Scorer, ScoringJudge, accuracy, load_judge
from selfsteer.recipe.sections import JudgeConfig, Recipe, resolve_path
from selfsteer.run.folder import StageResult, run_shards, scratch_of
from selfsteer.terminal import progress_bar

#: What a verdict says of the second of two answers.
TURNED = {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST}


class Tournament:
    """A judge that only compares, as one that scores: each answer of a query meets each other.

    A score is the share of comparisons won, ties and inconsistent verdicts half (Copeland's
    count). Scores of different queries mean nothing beside each other.
    """

    scale = "share of comparisons won among the answers to one query"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.name = judge.name

    def score_all(self, answers: Sequence[tuple[Query, str]]) -> list[float | None]:
        """See `Scorer.score_all`; None where no comparison of the answer could be read."""
        meetings = list(_meetings([query.id for query, _ in answers]))
        pairs = [Pair(answers[i][0], answers[i][1], answers[j][1]) for i, j in meetings]
        said: defaultdict[int, list[Verdict]] = defaultdict(list)
        for (i, j), judgement in zip(meetings, self.judge.compare_all(pairs), strict=True):
            verdict = judgement.verdict
            said[i].append(verdict)
            said[j].append(TURNED.get(verdict, verdict))
        return [accuracy(said[i]) for i in range(len(answers))]


def _meetings(ids: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of places whose query is the same; answers to one query stand together.

    >>> list(_meetings(["a", "a", "a", "b", "b"]))
    [(0, 1), (0, 2), (1, 2), (3, 4)]
    """
    for _, group in groupby(range(len(ids)), key=lambda i: ids[i]):
        yield from combinations(list(group), 2)


def ranker(settings: JudgeConfig, folder: Path) -> Scorer:
    """Who scores the answers to a query; a judge that only compares holds a tournament."""
    judge = load_judge(settings, folder)
    assert judge is not None
    return judge if isinstance(judge, ScoringJudge) else Tournament(judge)


def policy_as_judge(recipe: Recipe, policy: str) -> JudgeConfig:
    """The policy, asked with the chat judge's question (self-rewarding, arXiv 2401.10020).

    The paper's own prompt adds up five points for one answer; ours compares two in both orders.
    The policy answers in process, whoever samples.
    """
    p = recipe.policy
    return JudgeConfig(
        kind="chat",
        model=policy,
        batch_size=recipe.sampling.batch_size,
        dtype=p.dtype,
        device=p.device,
        trust_remote_code=p.trust_remote_code,
        allow_pickle=p.allow_pickle,
    )


def given_answers(path: str) -> dict[tuple[Message, ...], str]:
    """The answer that stands behind each query of a file; of preferences the chosen one.

    Raises:
        ConfigError: the path is no local file or folder.
        DataError: the file has no answers.
    """
    source = Path(resolve_path(path))
    if not source.exists():
        raise ConfigError(
            f"method spin reads the answers from the file of queries, and {path} is none. Save the "
            "set as JSON Lines and give its path."
        )
    answers: dict[tuple[Message, ...], str] = {}
    for record in import_records(source).records:
        pair = record.to_triple() if isinstance(record, Preference) else record
        if isinstance(pair, Triple) and "good" in pair.responses:
            answers.setdefault(pair.messages, pair.responses["good"])
    if not answers:
        raise DataError(
            f"{path} has queries but no answers, and method spin sets the policy's answers against "
            "given ones. Give conversations that end in an answer, or preferences."
        )
    return answers


#: What an improver is asked, as the turn after the answer.
IMPROVE = (
    "Write your last answer again, better: correct what is wrong, add what is missing, leave out "
    "what does not help, and keep what is good. Reply with the new answer alone, without a word "
    "about the changes."
)
#: A policy that is trained on answers that begin so learns to begin so, and nothing else.
_ANNOUNCED = re.compile(
    r"\A\W*(?:(?:sure|certainly|of course)\W+)?(?:here(?:'s| is)\s+)?(?:(?:a|an|my|the)\s+)?"
    r"(?:better|improved|new|revised|rewritten|updated)\s+(?:answer|response|version)"
    r"(?:\s+to [^:\n]{1,80})?\W*:[\s*_]*",
    re.IGNORECASE,
)


def strip_announcement(text: str) -> str:
    """Cuts off what an improver says before the new answer.

    >>> strip_announcement("Here is the improved answer: The bee eats nectar.")
    'The bee eats nectar.'
    >>> strip_announcement("A better answer is hard to find.")
    'A better answer is hard to find.'
    """
    return _ANNOUNCED.sub("", text)


def improve(
    sampled: Records[Triple],
    recipe: Recipe,
    engine: Callable[[], Engine],
    folder: Path,
    stage: str,
) -> StageResult:
    """SGPO's pairs (arXiv 2507.20181): the policy's answer, written again, is ``good``.

    The answer itself is ``bad``. The paper trains policy and improver as one model; here whoever
    is given rewrites, and nothing is trained for it. Writes shards of triples.

    Args:
        sampled: triples with a plain response, in a fixed order.
        recipe: sampling settings and seed.
        engine: makes the improver's engine.
        folder: where the shards go.
        stage: the stage's name, part of every seed.

    Returns:
        Counts; dropped are ``unfinished`` unless the recipe keeps it, ``prompt_too_long`` and
        ``request_failed:REASON``. An answer that came back unchanged is left to hygiene.
    """
    s = recipe.sampling
    params = SamplingParams(s.temperature, s.top_p, s.max_new_tokens)
    with progress_bar(stage.rpartition("/")[2], len(sampled)) as bar:

        def work(shard: int, part: Sequence[Triple]) -> tuple[list[Triple], Counter[str]]:
            asked = [
                Request(
                    t.id,
                    (
                        *t.messages,
                        Message("assistant", t.responses["plain"]),
                        Message("user", IMPROVE),
                    ),
                    derive_seed(recipe.seed, stage, t.id, "good", 0),
                )
                for t in part
            ]
            store = scratch_of(folder, shard) / "improved.jsonl"
            said = answers(engine(), asked, params, store=store, advance=bar.advance)
            kept, dropped = [], Counter[str]()
            for triple in part:
                answer = said[triple.id]
                cut_off = answer.finish_reason == "length" and not s.keep_unfinished
                if answer.missing or cut_off:
                    dropped[answer.missing or "unfinished"] += 1
                    continue
                new = strip_announcement(answer.text)
                reasons = {"good": answer.finish_reason}
                if triple.finish_reasons:
                    reasons["bad"] = triple.finish_reasons["plain"]
                responses = {"good": new, "bad": triple.responses["plain"]}
                kept.append(replace(triple, responses=responses, finish_reasons=reasons))
            return kept, dropped

        return run_shards(folder, sampled, s.shard_size, work, bar.skip)


def against_given(sampled: Records[Triple], recipe: Recipe, output: Path) -> StageResult:
    """SPIN's pairs (arXiv 2401.01335): the given answer is ``good``, the policy's own is ``bad``.

    Writes triples with these two responses. A query without an answer is dropped as
    ``no_given_answer``.
    """
    answers = given_answers(recipe.queries.path)
    result = StageResult(len(sampled), 0)

    def pairs() -> Iterator[Triple]:
        for triple in sampled:
            given = answers.get(triple.messages)
            if given is None:
                result.dropped["no_given_answer"] += 1
                continue
            responses = {"good": given, "bad": triple.responses["plain"]}
            reasons = {"bad": triple.finish_reasons["plain"]} if triple.finish_reasons else {}
            result.n_out += 1
            yield replace(triple, responses=responses, finish_reasons=reasons)

    write_atomic(output, map(dump_line, pairs()))
    return result
