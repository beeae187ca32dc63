"""``selfsteer judge``: what one or two judges say of stored preferences."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfsteer.errors import ArtifactError, ConfigError, DataError
from selfsteer.terminal import interval, out, table
from selfsteer.verbs.common import AsJson, Trust, aligning, check_trust, emit, named_judge

if TYPE_CHECKING:
    from selfsteer.data.records import Preference
    from selfsteer.recipe.sections import JudgeConfig


def judge(
    preferences: Annotated[
        Path,
        typer.Argument(help="a run folder, or preferences in a JSONL file or a folder of shards"),
    ],
    judges: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help="oracle, checks:FILE, chat:MODEL, reward:MODEL, principles:MODEL, human:FILE or "
            "YAML; one or two; default: the run's judge",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="judge a random subset of this size", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the subset and of the intervals")] = 0,
    iteration: Annotated[
        int | None, typer.Option(help="iteration of the run; default: the last one")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="judge the baseline's preferences")] = False,
    store: Annotated[
        Path | None, typer.Option(help="folder for the judges' answers; default: that of the run")
    ] = None,
    label_sheet: Annotated[
        Path | None,
        typer.Option(help="judge nothing: write the pairs to a file, to label them by hand"),
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Judge preferences: verdicts, accuracy, position bias and cost; agreement of two judges."""
    from selfsteer.methods import Paired
    from selfsteer.run.folder import RunFolder
    from selfsteer.run.sources import check_sources
    from selfsteer.view import RunView

    if label_sheet is not None and (judges or as_json or store):
        raise ConfigError("--label-sheet judges nothing; leave --judge, --store and --json out.")
    given = [named_judge(j) for j in judges or []]
    if len(given) > 2:
        raise ConfigError(f"Give one judge or two, found {len(given)}.")
    source, is_run = preferences, (preferences / "resolved.json").is_file()
    principles: dict[str, Any] = {}  # those of a run's pairs, which no longer hold them
    if is_run:
        run = RunView.open(preferences)
        own = aligning(run.recipe).judge
        if not isinstance(run.recipe, Paired):
            raise ConfigError(
                f"{preferences} holds no pairs to judge: method {run.recipe.method} makes none. "
                "Compare its models with selfsteer compare."
            )
        made = run.round(iteration, baseline=baseline)
        source = run.settled(made.folder / "preferences")
        principles = {t.id: t.principles.to_dict() for t in made.principles if t.principles}
        store = store or run.place("judgements")
        if not given and own is not None and label_sheet is None:
            check_trust(preferences, own, trust)
            check_sources(preferences, run.recipe, "judge.", refuse=False)
            given = [own]
    elif iteration is not None or baseline:
        raise ConfigError(
            f"{preferences} is not a run folder, which --iteration and --baseline need."
        )
    if not given and label_sheet is None:
        raise ConfigError(
            "Name a judge: --judge oracle, checks:FILE, chat:MODEL, reward:MODEL, principles:MODEL "
            "or human:PATH."
        )
    chosen = _chosen(source, limit, seed)
    if label_sheet is not None:
        write_label_sheet(chosen, label_sheet, seed)
        again = ["selfsteer", "judge", str(preferences), "--judge", f"human:{label_sheet}"]
        again += ["--iteration", str(iteration)] if iteration is not None else []
        again += ["--baseline"] if baseline else []
        out.print(
            f"{label_sheet}: {len(chosen):,} pairs. Set each verdict to first, second or tie, "
            f"then: {shlex.join(again)}"
        )
        return
    # answers are added to the run folder, so no other process may work in it
    with RunFolder(preferences).locked() if is_run else nullcontext():
        report = _judged(chosen, principles, given, store=store, seed=seed)
    emit(report, as_json, print_judges)


def _chosen(path: Path, limit: int | None, seed: int) -> "list[Preference]":
    """Preferences of a JSONL file or a folder of shards; at most ``limit``, whatever their order.

    Raises:
        DataError: a record is no preference, or there is none.
        ArtifactError: a folder without shards.
    """
    from selfsteer.data.digests import derive_seed
    from selfsteer.data.files import read_rows
    from selfsteer.data.reading import read
    from selfsteer.data.records import Preference

    if path.is_dir() and not any(path.glob("shard-*.jsonl")):
        raise ArtifactError(f"{path} has no preferences yet; run it first.")
    found = [p for _, p in read(read_rows(path), Preference.from_dict)]
    if not found:
        raise DataError(f"{path} holds no preference.")
    if limit is None or len(found) <= limit:
        return found
    chosen = sorted(found, key=lambda p: derive_seed(seed, "judge", p.id))[:limit]
    return sorted(chosen, key=lambda p: p.id)


def _judged(
    preferences: "Sequence[Preference]",
    principles: dict[str, Any],
    judges: "Sequence[JudgeConfig]",
    *,
    store: Path | None,
    seed: int,
) -> dict[str, Any]:
    """What one or two judges say of chosen against rejected, and how far two of them agree."""
    import numpy as np

    from selfsteer.judges.base import Pair
    from selfsteer.judges.load import load_judge
    from selfsteer.judges.stats import agreement, judge_report

    pairs = []
    for p in preferences:
        held = {"principles": principles[p.id]} if p.id in principles else {}
        query = replace(p.query, extra={**p.extra, **held})
        ended = (p.finished("chosen"), p.finished("rejected"))
        pairs.append(Pair(query, p.chosen, p.rejected, ended))
    report: dict[str, Any] = {"pairs": len(pairs), "judges": []}
    found = []
    for settings in judges:
        judge = load_judge(settings, store)
        assert judge is not None
        judge.check([p.query for p in pairs])
        found.append(judge.compare_all(pairs))
        report["judges"].append({"name": judge.name, **judge_report(found[-1])})
    if len(found) == 2:
        report["agreement"] = agreement(found[0], found[1], np.random.default_rng(seed))
    return report


def write_label_sheet(preferences: "Sequence[Preference]", path: Path, seed: int) -> None:
    """Writes pairs to label by hand: blind, in a random order of place, ``verdict`` null.

    Filled in, the file is what a judge of kind ``human`` reads.

    Raises:
        ArtifactError: the file is there already and may hold labels.
    """
    from selfsteer.data.digests import derive_seed
    from selfsteer.data.jsonl import dump_lines, write_atomic

    if path.exists():
        raise ArtifactError(f"{path} is there already and may hold labels; choose another name.")
    lines = []
    for p in preferences:
        turned = derive_seed(seed, "label", p.id) % 2
        first, second = (p.rejected, p.chosen) if turned else (p.chosen, p.rejected)
        prompt = [m.to_dict() for m in p.prompt]
        lines.append(
            {"id": p.id, "prompt": prompt, "first": first, "second": second, "verdict": None}
        )
    write_atomic(path, dump_lines(lines))


def print_judges(report: dict[str, Any]) -> None:
    """Verdict classes, accuracy, position bias and cost of each judge; agreement of two."""
    judges = report["judges"]
    names = [judge["name"] for judge in judges]
    reasons = sorted({reason for j in judges for reason in j["unparseable_because"]})
    biases = [j["position"] and j["position"]["shown_first_wins"] for j in judges]
    rows = [
        *([v, *(f"{j['verdicts'][v]:,}" for j in judges)] for v in judges[0]["verdicts"]),
        *([f"  {r}", *(j["unparseable_because"].get(r, 0) for j in judges)] for r in reasons),
        ["accuracy", *(_share(j["accuracy"]) for j in judges)],
        ["shown first wins", *map(_share, biases)],
        ["tokens in", *(f"{j['cost']['prompt_tokens']:,}" for j in judges)],
        ["tokens out", *(f"{j['cost']['completion_tokens']:,}" for j in judges)],
        ["seconds", *(f"{j['cost']['seconds']:,.1f}" for j in judges)],
    ]
    title = f"{report['pairs']:,} pairs, first is the chosen response"
    out.print(table(["", *names], rows, title=title))
    out.print(
        "accuracy: (first + ½ (tie + inconsistent)) / all but unparseable; shown first wins: of "
        "the showings with a winner, 0.5 is no bias; -: none.",
        style="dim",
    )
    if "agreement" in report:
        _print_agreement(report["agreement"], *names)


def _share(value: float | None) -> str:
    return interval(value, ".3f", missing="-")


def _print_agreement(found: dict[str, Any], rows: str, columns: str) -> None:
    counts = ([name, *row] for name, row in zip(found["classes"], found["table"], strict=True))
    title = f"\nrows {rows}, columns {columns}"
    out.print(table(["", *found["classes"]], counts, title=title))
    undefined = "undefined (one class alone leaves nothing to agree on beyond chance)"
    both = found["parsed"]
    kappa, parsed = (interval(f["kappa"], ".3f", undefined) for f in (found, both))
    out.print(
        f"same verdict {_share(found['same'])}; Cohen's kappa {kappa}; over the "
        f"{both['pairs']:,} pairs that both judged {parsed}",
        markup=False,
    )
    out.print("[ ]: 95 % bootstrap over pairs.", style="dim", markup=False)
