"""Log-probs that a run kept, found again by the text that they belong to; no model is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records
from selfsteer.data.records import Triple
from selfsteer.errors import DataError, SelfsteerError
from selfsteer.judges.quality import GAP_SEQUENCES, PLAIN_SEQUENCES
from selfsteer.methods.contrast import Distilled
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.objectives import ContrastObjective
from selfsteer.recipe.sections import resolve_path
from selfsteer.run.sources import check_sources
from selfsteer.run.sums import SMALL_BYTES
from selfsteer.stages.teach import taught
from selfsteer.terminal import progress_bar
from selfsteer.view import RoundView, RunView

if TYPE_CHECKING:
    from selfsteer.models.store import ScoreStore
    from selfsteer.models.teacher import Lesson

#: Records per set whose log-probs are drawn.
SAMPLE = 1000


def tokenizer(run: RunView) -> ChatFormat | None:
    """That of one of the run's own models, or else of the base model, if it is on this machine.

    Its files are read as they are: no code of a model is run, and no hub is asked.
    """
    from selfsteer.models.load import read_chat

    base, *own = run.models.values()
    for source in [*own, resolve_path(base)]:
        if Path(source).is_dir():
            run.check(Path(source), most=SMALL_BYTES)
            try:
                if source not in own:
                    check_sources(run.folder, run.recipe, "policy.model")
                return read_chat(source, run.loading)
            except SelfsteerError:
                continue
    return None


class LogProbs:
    """Per-token log-probs under the policy at the start of a round.

    ``why_not`` says in a sentence why there are none. ``clip`` is where the contrast of tokens that
    a teacher read ends, nats; None: nowhere.
    """

    def __init__(self, of: RoundView) -> None:
        folder, self.why_not = of.scores, ""
        self.chat: ChatFormat | None = None
        self._store: ScoreStore | None = None
        self.clip, self._taught = _taught(of)
        if folder is None and not self._taught:
            self.why_not = "the run has not scored these responses under its policy yet"
            return
        self.chat = tokenizer(of.run)
        if self.chat is None:
            self.why_not = "the policy's tokenizer is not on this machine"
            return
        if folder is not None:
            from selfsteer.models import store

            self._store = store.ScoreStore(folder.parent, folder.name)

    def of(self, triples: Sequence[Triple], name: str) -> list[np.ndarray | None]:
        """Log-probs of each triple's ``context/response``; None where the run has not scored it."""
        if self.chat is None or self._store is None:
            return [None] * len(triples)
        sequences = [_sequence(self.chat, t, name) for t in triples]
        found = iter(self._store.find([s for s in sequences if s is not None]))
        values = [None if s is None else next(found) for s in sequences]
        return [None if v is None else v.numpy() for v in values]

    def means(self, triples: Sequence[Triple], name: str) -> np.ndarray:
        """(N,) means per token, nats; NaN where there is none."""
        values = self.of(triples, name)
        return np.array([np.nan if v is None else v.mean(dtype=np.float64) for v in values])

    def contrasts(self, triples: Sequence[Triple], response: str) -> list[np.ndarray | None]:
        """The contrast log π(y_t|x+) − log π(y_t|x-) of each token of a response, (R,) nats.

        None where the run did not keep it; what a teacher kept goes to ±``clip``.
        """
        good, bad = (self.of(triples, f"{context}/{response}") for context in ("good", "bad"))
        found = [None if x is None or y is None else x - y for x, y in zip(good, bad, strict=True)]
        if response == "plain":
            for i, triple in enumerate(triples):
                if (lesson := self._taught.get(triple.id)) and self.chat is not None:
                    found[i] = lesson.reward().numpy()
        return found

    def tokens(self, triples: Sequence[Triple], response: str) -> list[dict[str, list[Any]] | None]:
        """Of a response: ``chars``, the characters of each token, and what is kept of it.

        That is ``logps`` under the plain context and ``contrast``; None where there is neither. The
        end-of-turn token has none of the text; nor has a token whose character another one ends.
        """
        kinds = {
            "logps": self.of(triples, f"plain/{response}"),
            "contrast": self.contrasts(triples, response),
        }
        found = []
        for i, triple in enumerate(triples):
            known = {name: v for name, values in kinds.items() if (v := values[i]) is not None}
            found.append(self._tokens(triple, response, known) if known else None)
        return found

    def _tokens(
        self, triple: Triple, response: str, known: Mapping[str, np.ndarray]
    ) -> dict[str, list[Any]] | None:
        assert self.chat is not None
        if triple.reasoning.get(response):
            self.why_not = "thoughts were scored before the answers, and are not shown"
            return None
        text = triple.responses[response]
        if not self.chat.tokenizer.is_fast:
            self.why_not = "the tokenizer does not say where its tokens stand in a text"
            return None
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        found = self.chat.tokenizer(text, **options)
        if tuple(found["input_ids"]) != self.chat.response_ids(text, finished=False):
            return None  # a special token's text was read as text
        length = min(map(len, known.values()))
        ends = [end for _, end in found["offset_mapping"]][:length]
        chars = np.diff([0, *np.maximum.accumulate(np.array(ends, dtype=int))]).tolist()
        chars += [0] * (length - len(chars))
        rounded = {name: [round(float(v), 2) for v in values] for name, values in known.items()}
        return {"chars": chars, **{name: values[:length] for name, values in rounded.items()}}


def _taught(of: RoundView) -> "tuple[float | None, dict[str, Lesson]]":
    """Where a teacher's contrast ends, nats, and where it is kept, by the id of the answer."""
    if not isinstance(of.recipe, Distilled):
        return None, {}
    objective, _ = of.recipe.target
    stage = next((s for s in of.stages if s.kind == "Teach"), None)
    if stage is None or not isinstance(objective, ContrastObjective):
        return None, {}
    return objective.clip, taught(stage.run / stage.outputs[0])


def _sequence(chat: ChatFormat, triple: Triple, name: str) -> EncodedSequence | None:
    try:
        return chat.sequence(triple, name)
    except DataError:
        return None


@dataclass(frozen=True)
class Likelihoods:
    """Mean log-probs per token under the policy before a round, of one stored set.

    Args:
        round: whose records they are.
        kind: ``triples`` or ``preferences``.
        means: ``context/response`` → (N,) nats per token; a record without one has no row.
        features: of each record, as its principles name them.
        size: records of the set.
    """

    round: RoundView
    kind: str
    means: dict[str, np.ndarray]
    features: list[tuple[str, ...]]
    size: int

    @property
    def rows(self) -> int:
        """Records drawn."""
        return len(self.features)


def likelihoods(run: RunView, sample: int = SAMPLE) -> tuple[list[Likelihoods], list[str]]:
    """Those of the first and the last round of the recipe's method; what is missing, in sentences.

    Args:
        run: nothing of it is computed.
        sample: most records per set, a seeded subset of those that were scored.
    """
    found, missing = list[Likelihoods](), list[str]()
    rounds = run.rounds_of(run.recipe.method)
    if rounds and not any(r.scores for r in rounds):
        why = "The run has kept no log-probs of pairs, so their distributions are not drawn."
        return [], [] if isinstance(run.recipe, Distilled) else [why]  # which makes no pairs
    for k in sorted({r.k for r in (rounds[0], rounds[-1])}) if rounds else ():
        of = run.round(k)
        store = LogProbs(of)
        for kind, records in _sets(of).items():
            with progress_bar(f"log-probs of {kind}", None):
                drawn = _drawn(store, of, kind, records, sample)
            if drawn:
                found.append(drawn)
            else:
                missing.append(
                    f"No kept log-prob belongs to the {kind} of iteration {k}: their distributions "
                    "are not drawn. The stage that scores them has not run, or the tokenizer that "
                    "they were scored with is no longer there."
                )
    return found, missing


def _sets(of: RoundView) -> dict[str, Records[Triple]]:
    """The records of a round, with principles; preferences where they are not its triples."""
    found: dict[str, Records[Triple]] = {"triples": of.triples}
    if not of.pairs_are_triples:
        principles = {t.id: t.principles for t in of.principles}
        pairs = [p.to_triple() for p in of.preferences]
        found["preferences"] = [replace(t, principles=principles.get(t.id)) for t in pairs]
    return {kind: records for kind, records in found.items() if len(records)}


def _drawn(
    store: LogProbs, of: RoundView, kind: str, records: Records[Triple], sample: int
) -> Likelihoods | None:
    # log-probs of a subset alone may be there: so many are looked at until enough are found
    every = sorted(records, key=lambda t: derive_seed("report", t.id))
    probe = every[: 4 * sample]
    plain = [*PLAIN_SEQUENCES, *(["plain/plain"] if kind == "triples" else [])]
    means = {name: store.means(probe, name) for name in plain}
    rows = np.flatnonzero(~np.isnan(np.stack(list(means.values()))).any(axis=0))[:sample]
    if not rows.size:
        return None
    chosen = [probe[i] for i in rows]
    means = {name: values[rows] for name, values in means.items()}
    if all(t.principles for t in chosen):
        means |= {name: store.means(chosen, name) for name in GAP_SEQUENCES}
    features = [tuple(t.principles.features) if t.principles else () for t in chosen]
    return Likelihoods(of, kind, means, features, len(every))
