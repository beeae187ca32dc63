"""Pairs that need no ranking: given answers over the policy's (SPIN), rewritten over first ones.

A judge may say which of the two it is (`Relabel`).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from typing_extensions import override

from selfsteer.data.files import read_rows
from selfsteer.data.jsonl import dump_line, write_atomic
from selfsteer.data.reading import Drops, read
from selfsteer.data.records import Dropped, Message, Preference, Triple, Verdict
from selfsteer.data.shapes import record, unfolded
from selfsteer.engines.base import Completion
from selfsteer.errors import ConfigError, DataError
from selfsteer.judges.base import Pair
from selfsteer.judges.load import load_judge
from selfsteer.recipe.sections import JudgeConfig, Sampling, WriterConfig, resolve_path
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult, run_shards
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import renamed, stored_triples
from selfsteer.stages.sample import Asking, Wanted, check_writer, with_answers
from selfsteer.terminal import progress_bar, say, warn


class GivenAnswer(NamedTuple):
    """An answer that came with a query, and what is known of it."""

    text: str
    finish_reason: str | None = None
    reasoning: str | None = None


def given_answers(
    path: str, columns: Mapping[str, str] | None = None
) -> dict[tuple[Message, ...], GivenAnswer]:
    """The answer that follows each query of a file; of preferences the chosen one.

    Args:
        path: a file or folder.
        columns: new names of its columns.

    Raises:
        ConfigError: the path is no local file or folder, or a column is not there.
        DataError: the file has no answers.
    """
    source = Path(resolve_path(path))
    if not source.exists():
        raise ConfigError(
            f"Given answers are read from the file of queries; {path} is not a file. Save the set "
            "as JSON Lines and give its path."
        )
    answers: dict[tuple[Message, ...], GivenAnswer] = {}
    unread = 0
    for _, found in read(unfolded(read_rows(source, rename=columns)), record, Drops()):
        pair = found.record
        if isinstance(pair, Preference):
            pair = pair.to_triple()
        if isinstance(pair, Triple) and "good" in pair.responses:
            beside = found.lost | pair.extra.keys()
            unread += not beside.isdisjoint(("finish_reason", "finish_reasons"))
            known = (of.get("good") for of in (pair.finish_reasons, pair.reasoning))
            answers.setdefault(pair.messages, GivenAnswer(pair.responses["good"], *known))
    if unread:
        warn(
            f"{path}: {unread:,} answers say how they ended in a way that is not read, and count "
            'as ended by themselves. Write finish_reasons: {"good": "length"} beside a '
            'conversation, {"chosen": "length"} beside a pair.'
        )
    if not answers:
        raise DataError(
            f"{path} has queries but no answers, and this recipe needs given ones. Give "
            "conversations that end in an answer, or preferences."
        )
    return answers


@dataclass(frozen=True)
class OpposeGiven(Stage):
    """SPIN's pairs (arXiv 2401.01335): the given answer is ``good``, the policy's own is ``bad``.

    A query without an answer is dropped as ``no_given_answer``, one whose answer was cut off as
    ``unfinished`` unless the settings keep it.

    Args:
        samples: triples with a plain response.
        answers: the file that the queries were read from.
        sampling: whether answers that were cut off, and thoughts, are kept.
        columns: new names of its columns.
    """

    samples: Artifact
    answers: Artifact
    sampling: Sampling
    columns: Mapping[str, str] = field(default_factory=dict)

    title = "opponents"
    makes = ("{name}.jsonl",)

    @override
    def run(self, run: RunFolder) -> StageResult:
        samples = stored_triples(self.samples.path)
        given = given_answers(str(self.answers.path), self.columns)
        with run.drops(self.name) as drops:

            def pairs() -> Iterator[Triple]:
                for triple in samples:
                    made = _opposed(triple, given.get(triple.messages), self.sampling)
                    if isinstance(made, Triple):
                        yield made
                    else:
                        drops.add(made)

            write_atomic(run / self.outputs[0], map(dump_line, pairs()))
        kept = len(samples) - drops.counts.total()
        return StageResult(len(samples), kept, drops.counts)


def _opposed(triple: Triple, answer: GivenAnswer | None, sampling: Sampling) -> Triple | Dropped:
    """The given answer over the policy's own, each with what is known of it."""
    if answer is None:
        return Dropped(triple.id, "no_given_answer", triple)
    pair = _own_as_bad(triple, {"good": answer.text, "bad": triple.responses["plain"]})
    reasons, thoughts = dict(pair.finish_reasons), dict(pair.reasoning)
    if answer.finish_reason:
        reasons["good"] = answer.finish_reason
    if answer.reasoning and sampling.reasoning == "keep":
        thoughts["good"] = answer.reasoning
    pair = replace(pair, finish_reasons=reasons, reasoning=thoughts)
    if pair.finished("good") or sampling.keep_unfinished:
        return pair
    return Dropped(triple.id, "unfinished", pair)


def _own_as_bad(triple: Triple, texts: Mapping[str, str]) -> Triple:
    """The pair of these texts; what is known of the policy's answer holds of the bad one."""
    reasons, thoughts = (
        renamed(of, {"plain": "bad"}) for of in (triple.finish_reasons, triple.reasoning)
    )
    return replace(triple, responses=texts, finish_reasons=reasons, reasoning=thoughts)


@dataclass(frozen=True)
class Relabel(Stage):
    """DNPO's labels (arXiv 2502.05400): a judge says which answer of a pair is the chosen one.

    Where it prefers the bad one, the two change places; the note ``swapped`` counts them. Pairs
    without a verdict are dropped as ``tie``, ``inconsistent`` or ``unparseable``.

    Args:
        pairs: triples with a good and a bad response.
        judge: who compares them.
        shard_size: pairs per shard.
    """

    pairs: Artifact
    judge: JudgeConfig
    shard_size: int

    title = "relabelled"
    passes_on = True

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        return Cost(n, judged=n)

    @override
    def check(self) -> Iterator[str]:
        if judge := load_judge(self.judge):
            judge.check(())
        yield from ()

    @override
    def run(self, run: RunFolder) -> StageResult:
        pairs, judge = stored_triples(self.pairs.path), load_judge(self.judge, run / "judgements")
        assert judge is not None
        swapped = Counter[str]()
        with progress_bar(f"{self.title}: judging", len(pairs)) as bar:

            def work(store: Path, part: Sequence[Triple]) -> Iterator[Triple | Dropped]:
                asked = list(map(Pair.of, part))
                said = [judgement.verdict for judgement in judge.compare_all(asked)]
                bar.advance(len(part))
                for triple, verdict in zip(part, said, strict=True):
                    swapped["swapped"] += verdict is Verdict.SECOND
                    yield _labelled(triple, verdict)

            folder, size = run / self.name, self.shard_size
            result = run_shards(
                folder, pairs, size, work, bar.skip, swapped, at_once=self.judge.engine.batch
            )
        result.notes = dict(swapped)
        say(f"  {swapped['swapped']:,} of {result.n_out:,} pairs changed places")
        return result


def _labelled(triple: Triple, verdict: Verdict) -> Triple | Dropped:
    """The pair in the order that a verdict on good and bad gives."""
    if verdict is Verdict.FIRST:
        return triple
    if verdict is not Verdict.SECOND:
        return Dropped(triple.id, verdict, triple)
    responses, reasons, thoughts = (
        renamed(of, {"good": "bad", "bad": "good"})
        for of in (triple.responses, triple.finish_reasons, triple.reasoning)
    )
    return replace(triple, responses=responses, finish_reasons=reasons, reasoning=thoughts)


#: What an improver is asked, as the turn after the answer.
IMPROVE = (
    "Write your last answer again, better: correct what is wrong, add what is missing, leave out "
    "what does not help, and keep what is good. Reply with the new answer alone, without a word "
    "about the changes."
)
#: Only the writer of an improver's examples reads this, not the improver itself.
LEAN = "Lean on this answer without copying it:\n\n"
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


def to_improve(triple: Triple, response: str) -> tuple[Message, ...]:
    """The conversation in which that response is to be written again."""
    said = Message("assistant", triple.responses[response])
    return (*triple.messages, said, Message("user", IMPROVE))


@dataclass(frozen=True)
class Improve(Stage):
    """SGPO's pairs (arXiv 2507.20181): the policy's answer, written again, is ``good``.

    The answer itself is ``bad``. Dropped are ``unfinished`` unless the settings keep it,
    ``prompt_too_long`` and ``request_failed:REASON``; an unchanged answer is left to hygiene.

    Args:
        samples: triples with a plain response.
        policy: rewrites where there is no improver.
        improver: who rewrites.
        sampling: how.
    """

    samples: Artifact
    policy: Artifact
    improver: WriterConfig | None
    sampling: Sampling

    title = "improved"

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        return Cost(n, answers=Counter(plain=n))

    @override
    def check(self) -> Iterator[str]:
        budget = {"sampling.max_new_tokens": self.sampling.max_new_tokens}
        yield from check_writer(self.improver, self.loading, budget)

    @override
    def run(self, run: RunFolder) -> StageResult:
        def prompt(triple: Triple, response: str) -> Sequence[Message]:
            return to_improve(triple, "plain")

        def make(triple: Triple, said: Sequence[Completion]) -> Triple | Dropped:
            (new,) = said
            texts = {"good": strip_announcement(new.text), "bad": triple.responses["plain"]}
            return with_answers(_own_as_bad(triple, texts), {"good": new}, self.sampling)

        samples = stored_triples(self.samples.path)
        asking = Asking[Triple]([Wanted("good", str(self.policy.path))], prompt, make)
        return asking.of_stage(self, run, samples, self.sampling, writer=self.improver)


@dataclass(frozen=True)
class LeanOnGiven(Stage):
    """Examples for SGPO's improver: own answers, written again by a policy that sees given ones.

    An example is the conversation that asks for a better answer, without the given one, and the new
    answer as ``good``. Dropped are ``improver_no_change`` (empty, the old answer or the given one)
    and what `Improve` drops.

    Args:
        pairs: triples of a given answer, ``good``, and the policy's own, ``bad``.
        policy: rewrites.
        sampling: how.
    """

    pairs: Artifact
    policy: Artifact
    sampling: Sampling

    title = "rewrites"

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        return Cost(n, answers=Counter(plain=n))

    @override
    def run(self, run: RunFolder) -> StageResult:
        def prompt(triple: Triple, response: str) -> Sequence[Message]:
            *before, _ = to_improve(triple, "bad")
            asked = f"{IMPROVE}\n\n{LEAN}{triple.responses['good']}"
            return *before, Message("user", asked)

        def make(triple: Triple, said: Sequence[Completion]) -> Triple | Dropped:
            new = replace(said[0], text=strip_announcement(said[0].text))
            bare = Triple(triple.id, to_improve(triple, "bad"), extra=triple.extra)
            made = with_answers(bare, {"good": new}, self.sampling)
            if isinstance(made, Triple) and new.text in ("", *triple.responses.values()):
                return Dropped(triple.id, "improver_no_change", made)
            return made

        pairs = stored_triples(self.pairs.path)
        asking = Asking[Triple]([Wanted("good", str(self.policy.path))], prompt, make)
        return asking.of_stage(self, run, pairs, self.sampling)
