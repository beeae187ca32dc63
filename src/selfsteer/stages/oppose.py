"""Pairs that need no ranking: given answers over the policy's (SPIN), rewritten over first ones."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import override

from selfsteer.data.digests import derive_seed
from selfsteer.data.files import read_rows
from selfsteer.data.jsonl import dump_line, write_atomic
from selfsteer.data.reading import Drops, read
from selfsteer.data.records import Dropped, Message, Preference, Triple
from selfsteer.data.shapes import record
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Engine, Request
from selfsteer.errors import ConfigError, DataError
from selfsteer.recipe.sections import Sampling, WriterConfig, resolve_path
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult, run_shards
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import stored_triples
from selfsteer.stages.sample import check_budget, params_of
from selfsteer.terminal import progress_bar


def given_answers(path: str) -> dict[tuple[Message, ...], str]:
    """The answer that follows each query of a file; of preferences the chosen one.

    Raises:
        ConfigError: the path is no local file or folder.
        DataError: the file has no answers.
    """
    source = Path(resolve_path(path))
    if not source.exists():
        raise ConfigError(
            f"method spin reads the answers from the file of queries; {path} is not a file. Save "
            "the set as JSON Lines and give its path."
        )
    answers: dict[tuple[Message, ...], str] = {}
    for _, found in read(read_rows(source), record, Drops()):
        pair = found.record
        if isinstance(pair, Preference):
            pair = pair.to_triple()
        if isinstance(pair, Triple) and "good" in pair.responses:
            answers.setdefault(pair.messages, pair.responses["good"])
    if not answers:
        raise DataError(
            f"{path} has queries but no answers, and method spin sets the policy's answers against "
            "given ones. Give conversations that end in an answer, or preferences."
        )
    return answers


@dataclass(frozen=True)
class OpposeGiven(Stage):
    """SPIN's pairs (arXiv 2401.01335): the given answer is ``good``, the policy's own is ``bad``.

    A query without an answer is dropped as ``no_given_answer``.

    Args:
        samples: triples with a plain response.
        answers: the file that the queries were read from.
    """

    samples: Artifact
    answers: Artifact

    title = "opponents"
    makes = ("{name}.jsonl",)

    @override
    def run(self, run: RunFolder) -> StageResult:
        samples, given = stored_triples(self.samples.path), given_answers(str(self.answers.path))
        with run.drops(self.name) as drops:

            def pairs() -> Iterator[Triple]:
                for triple in samples:
                    if triple.messages not in given:
                        drops.add(Dropped(triple.id, "no_given_answer", triple))
                        continue
                    texts = {"good": given[triple.messages], "bad": triple.responses["plain"]}
                    yield replace(triple, responses=texts, finish_reasons=_own(triple))

            write_atomic(run / self.outputs[0], map(dump_line, pairs()))
        lost = drops.counts.total()
        return StageResult(len(samples), len(samples) - lost, drops.counts)


def _own(triple: Triple) -> dict[str, str]:
    """The finish reason of the policy's answer, which becomes the bad one."""
    return {"bad": triple.finish_reasons["plain"]} if triple.finish_reasons else {}


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


@dataclass(frozen=True)
class Improve(Stage):
    """SGPO's pairs (arXiv 2507.20181): the policy's answer, written again, is ``good``.

    The answer itself is ``bad``. The paper trains policy and improver as one model; here the given
    model rewrites, and nothing is trained for it. Dropped are ``unfinished`` unless the settings
    keep it, ``prompt_too_long`` and ``request_failed:REASON``; an unchanged answer is left to
    hygiene.

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
        from selfsteer.engines.load import check_engine

        if self.improver is not None:
            check_engine(self.improver)
            if not self.improver.base_url:
                budget = {"sampling.max_new_tokens": self.sampling.max_new_tokens}
                source = resolve_path(str(self.improver.model))
                yield from check_budget(source, self.loading, budget)

    @override
    def run(self, run: RunFolder) -> StageResult:
        from selfsteer.engines.load import Engines

        samples, folder, s = stored_triples(self.samples.path), run / self.name, self.sampling
        seed = derive_seed(self.seed, self.name)
        with Engines(run.path) as engines, progress_bar(self.title, len(samples)) as bar:

            def engine() -> Engine:
                if self.improver is None:
                    return engines.sampler(
                        s.engine, str(self.policy.path), self.loading, s.batch_size
                    )
                source = str(self.improver.model)
                source = source if self.improver.base_url else resolve_path(source)
                return engines.get(self.improver, source, self.loading, s.batch_size)

            def work(shard: int, part: Sequence[Triple]) -> tuple[list[Triple], list[Dropped]]:
                asked = [
                    Request(
                        t.id,
                        (
                            *t.messages,
                            Message("assistant", t.responses["plain"]),
                            Message("user", IMPROVE),
                        ),
                        derive_seed(seed, t.id, "good", 0),
                    )
                    for t in part
                ]
                store = folder / f"answers-{shard:05d}.good.jsonl"
                found = answers(engine(), asked, params_of(s), store=store, advance=bar.advance)
                kept, dropped = [], []
                for triple in part:
                    said = found[triple.id]
                    texts = {
                        "good": strip_announcement(said.text),
                        "bad": triple.responses["plain"],
                    }
                    cut_off = said.finish_reason == "length" and not s.keep_unfinished
                    if said.missing or cut_off:
                        reason = said.missing or "unfinished"
                        made = replace(triple, responses=texts, finish_reasons=_own(triple))
                        dropped.append(Dropped(triple.id, reason, made))
                        continue
                    reasons = {"good": said.finish_reason, **_own(triple)}
                    kept.append(replace(triple, responses=texts, finish_reasons=reasons))
                return kept, dropped

            result = run_shards(folder, samples, s.shard_size, work, bar.skip)
        result.notes |= engines.notes
        return result
