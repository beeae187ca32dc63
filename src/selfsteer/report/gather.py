"""What the figures are drawn from: a run folder alone, whole, unfinished or failed.

Everything is read, nothing is computed by a model: log-probs are those that the run kept. Sets
larger than SAMPLE are drawn from a seeded subset, and the report says so.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import read_jsonl, read_shards
from selfsteer.data.records import Preference, Principles, Triple
from selfsteer.errors import SelfsteerError
from selfsteer.judges.quality import GAP_SEQUENCES, PLAIN_SEQUENCES, on_policyness
from selfsteer.models.chat import ChatFormat
from selfsteer.models.load import load_chat
from selfsteer.models.store import NOT_WHOLE, read_chunk, sequence_key
from selfsteer.recipe.sections import Policy, resolve_path
from selfsteer.report import summary
from selfsteer.run.progress import progress_of
from selfsteer.terminal import progress_bar

#: Records per set whose log-probs are drawn.
SAMPLE = 1000
#: Preferences shown as text.
SHOWN = 5


@dataclass(frozen=True)
class Likelihoods:
    """Mean log-probs per token under the policy before an iteration, of one stored set.

    Args:
        where: the iteration's folder, ``iteration-1``.
        kind: ``triples`` or ``preferences``.
        means: ``context/response`` → (N,) nats per token; a record without one has no row.
        features: of each record, as its principles name them.
        size: records of the set.
    """

    where: str
    kind: str
    means: dict[str, np.ndarray]
    features: list[tuple[str, ...]]
    size: int

    @property
    def rows(self) -> int:
        """Records drawn."""
        return len(self.features)


@dataclass
class Gathered:
    """All that a report shows.

    ``found`` is `summary.load`'s. ``missing`` says in whole sentences what could not be read.
    """

    run: Path
    found: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    selections: dict[str, dict[str, Any]]
    likelihoods: list[Likelihoods]
    usage: dict[str, int]
    samples: list[Preference]
    state: str
    missing: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe."""
        recipe: dict[str, Any] = self.found["recipe"]
        return recipe

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The newest ledger entry of each stage."""
        stages: dict[str, dict[str, Any]] = self.found["stages"]
        return stages


def gather(run: Path, sample: int = SAMPLE) -> Gathered:
    """Reads a run folder.

    Args:
        run: made by ``selfsteer run``; it may be unfinished.
        sample: most records per set whose log-probs are read.

    Raises:
        ArtifactError: it is not a run folder.
    """
    found = summary.load(run)
    missing: list[str] = []
    if not summary.within(run, run / "evaluation" / "exhibit.json"):
        found["exhibit"] = None
        missing.append("The example of steering leads out of the run by a link: it is not shown.")
    selections = {
        stage: json.loads(path.read_text("utf-8"))
        for stage in found["stages"]
        if (path := run / f"{stage}.selection.json").exists()
    }
    return Gathered(
        run,
        found,
        _metrics(run),
        selections,
        _likelihoods(run, found, sample, missing),
        _usage(run),
        _samples(run, found, missing),
        _state(run, found),
        missing,
    )


def _state(run: Path, found: dict[str, Any]) -> str:
    """``finished``, ``running`` or ``unfinished``; the recipe says what would come last."""
    # not by its lock: a run that starts while a reader tries it would be refused
    if (progress_of(run) or {}).get("state") == "working":
        return "running"
    return "finished" if summary.is_finished(found) else "unfinished"


def _metrics(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Training stage → its log lines in order; a line cut short is left out."""
    path, out = run / "metrics.jsonl", dict[str, list[dict[str, Any]]]()
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "stage" in entry and "step" in entry:
            out.setdefault(entry["stage"], []).append(entry)
    return out


def _usage(run: Path) -> dict[str, int]:
    """What servers were asked, over all tries; empty where none was."""
    total: dict[str, int] = {}
    for path in sorted((run / "usage").glob("*.json")):
        counts = json.loads(path.read_text("utf-8"))
        for name in ("requests", "retried", "prompt_tokens", "completion_tokens"):
            total[name] = total.get(name, 0) + counts[name]
    return total


def _seeded(ids: Sequence[str]) -> list[int]:
    """Positions in an order that depends on nothing but the ids."""
    return sorted(range(len(ids)), key=lambda i: derive_seed("report", ids[i]))


def _samples(run: Path, found: dict[str, Any], missing: list[str]) -> list[Preference]:
    """A few preferences of the last iteration that has some."""
    for k in range(found["recipe"]["iterations"], 0, -1):
        folder = run / f"iteration-{k}" / "preferences"
        if not all(summary.within(run, p) for p in folder.glob("shard-*.jsonl")):
            missing.append(f"{folder} leads out of the run by a link: its texts are not shown.")
            continue
        rows = list(read_shards(folder))
        if rows:
            order = _seeded([str(r.get("id")) for r in rows])
            return [Preference.from_dict(rows[i]) for i in order[:SHOWN]]
    return []


# -- log-probs ------------------------------------------------------------------------------------


class StoredMeans:
    """Mean log-prob per token of every sequence in one folder of ``scores/``."""

    def __init__(self, folder: Path, advance: Any = None) -> None:
        self.folder = folder
        keys, means = [np.empty(0, np.uint64)], [np.empty(0)]
        for path in sorted(folder.glob("scores-*.npz")):
            with suppress(*NOT_WHOLE):
                found, values = read_chunk(path)
                # half of the 16 bytes tells a billion sequences apart well enough
                keys.append(np.frombuffer(b"".join(k[:8] for k in found), np.uint64))
                means.append(np.array([v.mean(dtype=np.float64) for v in values]))
            if advance:
                advance(1)
        every = np.concatenate(keys)
        order = np.argsort(every)
        self._keys, self._means = every[order], np.concatenate(means)[order]

    def of(self, keys: Sequence[bytes]) -> np.ndarray:
        """(N,) mean log-probs of sequences with these keys; NaN where there is none."""
        if not len(self._keys) or not keys:
            return np.full(len(keys), np.nan)
        wanted = np.frombuffer(b"".join(k[:8] for k in keys), np.uint64)
        at = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self._means[at], np.nan)


def _likelihoods(
    run: Path, found: dict[str, Any], sample: int, missing: list[str]
) -> list[Likelihoods]:
    """Of the first and the last iteration of the recipe's method."""
    folders = [f for f in sorted((run / "scores").glob("*")) if f.is_dir()]
    if not folders:
        missing.append("The run has kept no log-probs yet, so their distributions are not drawn.")
        return []
    files = sum(1 for f in folders for _ in f.glob("scores-*.npz"))
    with progress_bar("reading log-probs", files) as bar:
        stores = [StoredMeans(f, bar.advance) for f in folders]
    recipe = found["recipe"]
    out: list[Likelihoods] = []
    for k in sorted({1, recipe["iterations"]}):
        for kind in ("triples", "preferences"):
            records = list(_records(run / f"iteration-{k}", kind, recipe["method"]))
            if not records:
                continue
            quality = found["quality"][recipe["method"]]
            known = quality[k - 1].get(kind) if len(quality) >= k else None
            with progress_bar(f"tokens of {kind}", None) as bar:
                drawn = _read_set(
                    found, stores, f"iteration-{k}", kind, records, known, sample, bar.advance
                )
            if drawn is None:
                missing.append(
                    f"No kept log-prob belongs to the {kind} of iteration {k}: their distributions "
                    "are not drawn. The stage that scores them has not run, or the tokenizer that "
                    "they were scored with is no longer there."
                )
            else:
                out.append(drawn)
    return out


def _records(folder: Path, kind: str, method: str) -> Iterator[Triple]:
    """Stored records of an iteration, principles joined by id."""
    if kind == "triples":
        path = folder / "filtered.jsonl"
        if path.exists():
            yield from map(Triple.from_dict, _lines(path))
    elif method != "sso-online":  # whose preferences are its triples
        path, principles = folder / "principles.jsonl", dict[str, Principles | None]()
        if path.exists():
            principles = {t.id: t.principles for t in map(Triple.from_dict, _lines(path))}
        for value in read_shards(folder / "preferences"):
            t = Preference.from_dict(value).to_triple()
            yield Triple(
                t.id, t.messages, principles.get(t.id), t.responses, dict(t.finish_reasons)
            )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (value for _, value in read_jsonl(path))


def _read_set(
    found: dict[str, Any],
    stores: Sequence[StoredMeans],
    where: str,
    kind: str,
    records: Sequence[Triple],
    known: dict[str, Any] | None,
    sample: int,
    advance: Callable[[int], None],
) -> Likelihoods | None:
    def keys_of(chat: ChatFormat, name: str, triples: Sequence[Triple]) -> list[bytes]:
        found = [sequence_key(chat.sequence(t, name)) for t in triples]
        advance(len(triples))
        return found

    order = _seeded([t.id for t in records])
    plain = [*PLAIN_SEQUENCES, *(["plain/plain"] if kind == "triples" else [])]
    for chat in tokenizers(found):
        # log-probs of a subset alone may be there: so many are looked at until enough are found
        best: tuple[float, StoredMeans] | None = None
        probe = [records[i] for i in order[: 4 * sample]]
        keys = {name: keys_of(chat, name, probe) for name in plain}
        for store in stores:
            means = {name: store.of(k) for name, k in keys.items()}
            whole = ~np.isnan(np.stack(list(means.values()))).any(axis=0)
            if whole.any():
                off = _distance({n: m[whole] for n, m in means.items()}, int(whole.sum()), known)
                if best is None or off < best[0]:
                    best = (off, store)
        if best is None:
            continue
        means = {name: best[1].of(k) for name, k in keys.items()}
        whole = ~np.isnan(np.stack(list(means.values()))).any(axis=0)
        rows = np.flatnonzero(whole)[:sample]
        chosen = [probe[i] for i in rows]
        out = {name: m[rows] for name, m in means.items()}
        if all(t.principles is not None for t in chosen):
            for name in GAP_SEQUENCES:
                out[name] = best[1].of(keys_of(chat, name, chosen))
        features = [t.principles.features if t.principles else () for t in chosen]
        return Likelihoods(where, kind, out, features, len(records))
    return None


def _distance(means: dict[str, np.ndarray], count: int, known: dict[str, Any] | None) -> float:
    """How far a store's values are from what ``quality.json`` says of the policy they belong to.

    Several models may have scored a set: the reference, the policy. Without the stage's figures
    the store that has most of the set counts.
    """
    if known is None:
        return -float(count)
    names = {"plain/good": "chosen", "plain/bad": "rejected"}
    return sum(
        abs(on_policyness(means[n]) - known["on_policyness"][label]) for n, label in names.items()
    )


def tokenizers(found: dict[str, Any]) -> Iterator[ChatFormat]:
    """Those of the run's own models, then the base model's, if they are on this machine.

    No code of a model is run.
    """
    own = [path for label, path in found["models"].items() if label != "base"]
    for source in [*own, resolve_path(found["recipe"]["policy"]["model"])]:
        if not Path(source).is_dir():
            continue
        try:
            yield load_chat(source, Policy(model=source))
        except SelfsteerError:
            continue
