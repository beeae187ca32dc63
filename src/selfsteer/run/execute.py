"""Runs what of a recipe's plan is not done yet: read this after `selfsteer.methods`.

queries ─► principles ─► triples ─► generator ─► preferences ─► policy ─► evaluation
x         p+, p-      y+, y-, yo   (trained)     (x, y+, y-)   (trained)  (judged)
"""

import gc
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import yaml

from selfsteer import stopping
from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import digest, hub_commit, is_hub_id, split_revision
from selfsteer.data.jsonl import write_atomic
from selfsteer.errors import ConfigError, short
from selfsteer.run import ranks
from selfsteer.run.folder import (
    REDO,
    RunFolder,
    StageResult,
    by_reason,
    refuse,
    refuse_absent,
    refuse_outdated,
)
from selfsteer.run.progress import reported
from selfsteer.run.sources import note_sources
from selfsteer.run.stage import Stage
from selfsteer.run.sums import SMALL_BYTES
from selfsteer.run.tracking import Tracker
from selfsteer.terminal import duration, is_main_process, say

#: Where a run keeps the commits of models of the hub.
MODELS = "models.json"


class Planned(Protocol):
    """A recipe, as far as running it goes."""

    @property
    def folder(self) -> Path: ...  # noqa: D102
    @property
    def tracking(self) -> tuple[Any, ...]: ...  # noqa: D102

    def plan(self) -> list[Stage]: ...  # noqa: D102

    def model_dump_json(  # noqa: D102
        self, *, indent: int | None = None, exclude_unset: bool = False
    ) -> str: ...

    def with_models(self, named: Callable[[str], str]) -> Self: ...  # noqa: D102


AnyPlanned = TypeVar("AnyPlanned", bound=Planned)


def pinned(recipe: AnyPlanned) -> tuple[AnyPlanned, dict[str, str]]:
    """A recipe with its hub ids at the commits that its run began with.

    A hub id that is new to the run gets its commit of today, or stays where that is not known.

    Returns:
        The recipe, and the commit of each hub id, for ``models.json`` of the run folder.

    Raises:
        ArtifactError: models.json is damaged.
    """
    path = recipe.folder / MODELS
    commits: dict[str, str] = {}
    if path.exists():
        commits = read_json(
            dict[str, str],
            path,
            "It holds the commits of the models that the run began with: restore it from a copy, "
            "or move the run folder away and begin again.",
        )

    def at_commit(name: str) -> str:
        if not is_hub_id(name):
            return name
        commit = commits.get(name) or hub_commit(name)
        if commit is None:
            return name
        commits[name] = commit
        return f"{split_revision(name)[0]}@{commit}"

    return recipe.with_models(at_commit), commits


def select(stages: list[Stage], until: str | None) -> list[Stage]:
    """The stages up to and with the first one called ``until``.

    Raises:
        ConfigError: no stage is called that.
    """
    if until is None:
        return stages
    for i, stage in enumerate(stages):
        if until in (stage.name, stage.name.partition("/")[2], stage.name.rpartition("/")[2]):
            return stages[: i + 1]
    names = list(dict.fromkeys(s.title for s in stages))
    raise ConfigError(f"There is no stage {short(until)}; stages are {', '.join(names)}.")


def execute(
    recipe: Planned,
    given: Mapping[str, Any] | None = None,
    *,
    until: str | None = None,
    redo: bool = False,
    heading: str = "",
    way_on: str | None = None,
    otherwise: str = REDO,
) -> int:
    """Runs what of a recipe is not done yet; returns how many stages it ran.

    Of several ranks the first does the work; the others join where a stage is for all of them.

    Args:
        recipe: checked and complete.
        given: the recipe as the user gave it, overrides merged; kept as ``recipe.yaml``. None:
            what is set in ``recipe``.
        until: stop after this stage.
        redo: replace work that was made with other settings, or is damaged (it moves to
            ``superseded/``).
        heading: what runs, said at the start where something does.
        way_on: the command that resumes it, for a person who stops it; None: the same one.
        otherwise: what may be done about work of other settings but to choose another name.

    Raises:
        SelfsteerError: see the errors' own texts; finished stages and shards stay.
    """
    run = RunFolder(recipe.folder)
    if given is None:
        given = json.loads(recipe.model_dump_json(exclude_unset=True))
    recipe, commits = pinned(recipe)
    whole = recipe.plan()
    stages = select(whole, until)
    alone = next((s for s in stages if s.one_process and not run.is_done(s)), None)
    if ranks.size() > 1 and alone:
        raise ConfigError(
            f"{alone.title} works in one process. Stop the ranks before it with --until, then run "
            "the same recipe without --nproc."
        )
    if not is_main_process():
        for stage in stages:
            if stage.on_ranks and not run.is_done(stage):
                list(stage.check())
        follow(stages, run)
        return 0
    with run.locked(), run.on_its_day(), ranks.leading() as call:
        stale = run.stale(whole)
        if stale:
            refuse_absent(run, whole)
        if stale and not redo:
            refuse(run, stale, otherwise)
        outdated = [e for e in run.outdated(whole) if e not in stale]
        if outdated and not redo:
            refuse_outdated(run, outdated, otherwise)
        broken = run.damaged(whole, most=None if redo else SMALL_BYTES)
        if broken and not redo:
            raise broken[0][1]
        gone = [*stale, *outdated]
        gone += [entry for entry, _ in broken if entry not in gone]
        todo = to_do(run, stages, {entry["stage"] for entry in gone})
        with (
            reported(run, [s.name for s in todo]) as reporter,
            closing(Tracker(recipe.tracking if todo else (), run.path)) as tracker,
        ):
            run.watch = tracker.note
            for note in dict.fromkeys(note for stage in todo for note in stage.check()):
                say(note)
            # first, so that what a kill leaves is never taken for work of the old recipe
            _write_recipe(run, recipe, given)
            note_sources(run.path, recipe)
            run.supersede(gone)
            if any((run.last(s.name) or {}).get("event") == "finish" for s in todo):
                run.put_reports_aside()  # what was deleted may come out differently
            if commits:
                write_atomic(run / MODELS, json.dumps(commits, indent=1) + "\n")
            stopping.way_on = way_on
            if todo and heading:
                done = f", {n} of them done" if (n := len(stages) - len(todo)) else ""
                say(f"{heading}: {len(stages)} stages{done}, in {run.path}")
                place = shlex.quote(str(run.path))
                say(f"to watch: selfsteer view {place}; Ctrl-C stops, the same command resumes")
            ran = 0
            while len(todo) > ran:
                stage, ran = todo[ran], ran + 1
                say(f"[{ran}/{len(todo)}] {stage.name}", "bold")
                reporter.stage(stage.name)
                for maker in stage.makers:
                    run.check(maker)
                if stage.on_ranks:
                    call(stage.name, stage.fingerprint)
                begin = time.monotonic()
                result = run.execute(stage)
                stopping.if_asked()
                _free_memory()
                say(f"  {summary_line(result)}; {duration(time.monotonic() - begin)}")
                if outdated := run.outdated(whole):
                    if not redo:
                        refuse_outdated(run, outdated, otherwise)
                    run.supersede(outdated)
                    rest = {s.name for s in todo[ran:]} | {e["stage"] for e in outdated}
                    todo[ran:] = [s for s in stages if s.name in rest]
                    reporter.write(todo=[s.name for s in todo])
        if until is None:
            for stage in whole:
                stage.tidy(run)
    return len(todo)


def to_do(run: RunFolder, stages: Sequence[Stage], again: Container[str] = ()) -> list[Stage]:
    """The stages that are not done, and those whose weights one of them needs and are removed.

    Args:
        run: the folder.
        stages: in the order they run.
        again: names of those that are done, and are to be done again.
    """
    names = {s.name for s in stages if s.name in again or not run.is_done(s)}
    for stage in reversed(stages):
        if stage.name in names:
            names |= {m.name for m in stage.depends_on if run.has_lost_weights(m)}
    return [s for s in stages if s.name in names]


def follow(stages: Sequence[Stage], run: RunFolder) -> None:
    """What the other ranks do: they work where the first one calls them, and write no ledger."""
    known = {s.name: s for s in stages}
    for name, fingerprint in ranks.following():
        if name not in known or known[name].fingerprint != fingerprint:
            ranks.refuse_stage(name)
        with run.on_its_day():
            known[name].run(run)
        _free_memory()


def _free_memory() -> None:
    """Gives back what a stage's models held of a GPU: the next engine may be another process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def summary_line(result: StageResult) -> str:
    """``1,400 in, 1,391 out, dropped 9 (5 unfinished, 4 equals_plain)``."""
    lost = result.dropped.total()
    tail = f", dropped {lost:,} ({by_reason(result.dropped)})" if lost else ""
    return f"{result.n_in:,} in, {result.n_out:,} out{tail}"


def _but_place(resolved: str) -> list[str]:
    """The lines of a recipe but those that say where the run lies."""
    place = (' "name": ', ' "runs_dir": ')
    return [line for line in resolved.splitlines() if not line.startswith(place)]


def _write_recipe(run: RunFolder, recipe: Planned, given: Mapping[str, Any]) -> None:
    resolved = recipe.model_dump_json(indent=1) + "\n"
    path = run / "resolved.json"
    if path.exists():
        old = path.read_text("utf-8")
        if old == resolved:
            return
        moved = _but_place(old) == _but_place(resolved)
        for name in () if moved else ("resolved.json", "recipe.yaml"):
            target = run / "superseded" / f"recipe-{digest(old)}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (run / name).exists() and not target.exists():
                shutil.copy2(run / name, target)
    text = yaml.safe_dump(dict(given), sort_keys=False, allow_unicode=True)
    write_atomic(run / "recipe.yaml", text)
    write_atomic(path, resolved)
