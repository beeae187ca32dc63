"""Plain answers to targets: what the frozen start would say at each of their tokens."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from selfsteer.data.jsonl import batched, write_atomic
from selfsteer.data.records import Dropped, Triple
from selfsteer.objectives import TokenObjective
from selfsteer.recipe.sections import Distillation
from selfsteer.run.cost import Cost, Scale, scoring
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import stored_triples
from selfsteer.terminal import Bar, progress_bar, warn

if TYPE_CHECKING:
    from torch import Tensor

    from selfsteer.models.chat import EncodedSequence
    from selfsteer.models.teacher import Lesson, Teacher

#: Answers of one file, the unit of resumption.
ANSWERS = 64

#: Share of tokens with too few entries that is worth a warning.
SHORT = 0.05


@dataclass(frozen=True)
class Teach(Stage):
    """Targets of every token of the plain answers, cut off or not.

    Dropped are answers that are ``empty``, and those that do not fit the model's context beside a
    principle, as ``prompt_too_long``.

    Args:
        answers: triples with principles and a plain response.
        teacher: the frozen start.
        objective: what target.
        settings: how much of it is kept.
        bits: of the teacher's quantised weights, those of the policy under its adapters; None: it
            is not quantised.
    """

    answers: Artifact
    teacher: Artifact
    objective: TokenObjective
    settings: Distillation
    bits: int | None = None

    title = "teacher"

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        return Cost(records=n, scores=scoring(self.answers.texts, self.objective.read, n))

    @override
    def run(self, run: RunFolder) -> StageResult:
        from selfsteer.models.load import load_model
        from selfsteer.models.teacher import Teacher

        triples = stored_triples(self.answers.path)
        source = str(self.teacher.path)
        loaded = load_model(source, self.loading, inference=True, bits=self.bits)
        s, sums, needed, n_out = self.settings, Counter[str](), Counter[int](), 0
        teacher = Teacher(loaded, self.objective, s.top_k, s.coverage)
        with run.drops(self.name) as drops, progress_bar("teacher", len(triples)) as bar:
            for number, part in enumerate(batched(triples, ANSWERS)):
                path = run / self.name / f"targets-{number:05d}.safetensors"
                read = [self._read(teacher, t) for t in part]
                for one in read:
                    if isinstance(one, Dropped):
                        drops.add(one)
                kept = {
                    t.id: r for t, r in zip(part, read, strict=True) if not isinstance(r, Dropped)
                }
                bar.advance(len(part) - len(kept))
                if kept:
                    found = _targets(path, teacher, kept, bar)
                    needed.update(found["needed"].tolist())
                    sums.update(_sums(found, s.coverage))
                    sums["bytes"] += path.stat().st_size
                n_out += len(kept)
        tokens = max(sums["tokens"], 1)
        notes = {k: sums[k] / tokens for k in ("entries", "covered", "short", "reward")}
        if notes["short"] > SHORT:
            warn(_too_few(s, notes["short"], notes["covered"], needed))
        notes |= {k: sums[k] for k in ("tokens", "bytes")}
        return StageResult(len(triples), n_out, drops.counts, notes=notes)

    def _read(self, teacher: "Teacher", triple: Triple) -> "list[EncodedSequence] | Dropped":
        """The answer in all contexts, or why it is of no use."""
        limit = teacher.loaded.context_length
        if not triple.responses["plain"]:
            return Dropped(triple.id, "empty", triple)
        if teacher.loaded.chat.refuses(triple, self.objective.read):
            return Dropped(triple.id, "template_refuses", triple)
        found = [teacher.loaded.chat.sequence(triple, name) for name in self.objective.read]
        if limit is not None and max(map(len, found)) > limit:
            return Dropped(triple.id, "prompt_too_long", triple)
        return found


def _targets(
    path: Path, teacher: "Teacher", answers: "Mapping[str, list[EncodedSequence]]", bar: Bar
) -> "dict[str, Tensor]":
    """A file of targets, which is made where it is not there yet.

    Raises:
        KeyboardInterrupt: the process was asked to stop; what is finished of the file is kept.
    """
    from safetensors.torch import load_file, save

    if path.exists() and _ids(path) == list(answers):
        bar.skip(len(answers))
        return load_file(path)
    about, part = {"ids": json.dumps(list(answers))}, path.with_suffix(".part")
    known: dict[int, dict[str, Tensor]] = {}
    if part.exists() and _ids(part) == list(answers):
        for key, value in load_file(part).items():
            number, _, name = key.partition(".")
            known.setdefault(int(number), {})[name] = value
    try:
        found = teacher.teach(list(answers.values()), bar.advance, known)
    except KeyboardInterrupt:
        flat = {f"{i}.{name}": value for i, made in known.items() for name, value in made.items()}
        write_atomic(part, save(flat, about))
        raise
    write_atomic(path, save(found, about))
    part.unlink(missing_ok=True)
    return found


def _sums(found: "Mapping[str, Tensor]", coverage: float) -> dict[str, float]:
    """Sums over the tokens of a file."""
    covered = found["covered"]
    return {
        "tokens": len(covered),
        "entries": len(found["index"]),
        "covered": float(covered.sum()),
        "short": int((covered < coverage).sum()),
        "reward": float(found["reward"].sum()),
    }


def _too_few(s: Distillation, short: float, covered: float, needed: Counter[int]) -> str:
    """What to say where this share of the tokens has too few entries.

    >>> _too_few(Distillation(top_k=9), 0.5, 0.954, Counter([20, 10, 40, 30])).split(". ")[1]
    'Set top_k 40, enough for 95% of the tokens, or lower coverage'
    """
    enough = sorted(needed.elements())[int(needed.total() * (1 - SHORT / short))]
    return (
        f"{short:.0%} of the tokens need more than top_k {s.top_k:,} entries to cover "
        f"{s.coverage:g} of the mass; on average {covered:.3g} is covered. "
        + (
            f"Set top_k {enough}, enough for {1 - SHORT:.0%} of the tokens, or lower coverage. "
            "Disk and the time of the teacher grow with top_k."
            if enough > s.top_k
            else "That is the whole vocabulary: lower coverage."
        )
    )


def _ids(path: Path) -> list[str]:
    """The records whose targets a file holds, in its order."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found: list[str] = json.loads(file.metadata()["ids"])
    return found


def taught(folder: Path) -> "dict[str, Lesson]":
    """Where the targets of each record lie, by its id."""
    from selfsteer.models.teacher import lessons

    found: dict[str, Lesson] = {}
    for path in sorted(folder.glob("targets-*.safetensors")):
        found.update(zip(_ids(path), lessons(path), strict=True))
    return found
