"""``selfsteer compare``: its tables and sentences; the figures are those of `comparing`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.errors import ConfigError, short
from selfsteer.terminal import interval, out, table, warn
from selfsteer.verbs.common import AsJson, aligning, emit, named_judge


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="run folders; of a single one, its own models are compared")
    ],
    judge: Annotated[
        str | None,
        typer.Option(
            help="oracle, checks:FILE, chat:MODEL, reward:MODEL or YAML; own: the runs' own judge, "
            "whatever it loads or asks; default: their own if it is the oracle, checks or people"
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="field of the evaluation queries that names their class")
    ] = None,
    examples: Annotated[
        int, typer.Option(help="number of queries to show where the answers differ most", min=0)
    ] = 3,
    baselines: Annotated[
        bool, typer.Option(help="also compare the base model and the baseline of each run")
    ] = False,
    seed: Annotated[int, typer.Option(help="seed of the intervals", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare runs: quality, curves, wins by feature and query class, largest differences."""
    from selfsteer.verbs import comparing

    found = comparing.entrants(runs, baselines=baselines)
    if judge not in (None, "own"):
        chosen = named_judge(judge)
    else:
        own = [aligning(e.run.recipe).judge for e in found]
        if any(j != own[0] for j in own):
            raise ConfigError(
                "These runs were judged by different judges, so their scores cannot be compared. "
                "Name one for all with --judge."
            )
        chosen = own[0]
        if judge is None and chosen is not None and chosen.kind not in comparing.HARMLESS:
            raise ConfigError(
                f"The judge that {found[0].run.folder} names is of kind {chosen.kind}: it loads a "
                "model or asks a server, as that folder says. If the folder is yours, add "
                "--judge own; if not, name a judge of your own with --judge."
            )
    report = comparing.compare(found, chosen, by=by, examples=examples, seed=seed)
    for label, (then, now) in report["rejudged"].items():
        warn(
            f"{label} was evaluated with a score of {then:.3f}, and the same judge now gives "
            f"{now:.3f}: its rules or its model have changed. Scores and accuracies here are what "
            "it says now."
        )
    for label, d in report["differences"].items():
        if made := d["made_differently"]:
            told = (f"{k} is {short(a)} and {short(b)}" for k, (a, b) in made.items())
            warn(
                f"{report['first']} and {label} were evaluated with other settings of how answers "
                f"are made ({'; '.join(told)}). A difference may come from these alone, so neither "
                "is called better. Evaluate both alike to compare their models."
            )
    emit(report, as_json, print_comparison)


def sentence(label: str, first: str, difference: Mapping[str, Any]) -> str:
    """One difference in words; undecided where the interval holds no difference.

    Where the answers were not made alike, it decides nothing.
    """
    from selfsteer.report.tables import decision

    scored = "score" in difference
    figure = difference.get("score") or difference.get("win_rate")
    if figure is None:
        return f"{label} - {first}: no judge has compared them."
    verdict = decision(label, first, figure, 0.0 if scored else 0.5)
    if difference["made_differently"]:
        verdict = "says nothing of the models, whose answers were made with other settings"
    what = "in score" if scored else "win rate"
    return f"{label} - {first}: {interval(figure)} {what}, paired by query: {verdict}."


def print_comparison(report: Mapping[str, Any]) -> None:
    """Entrants, differences, classes, features, curves and the queries that differ most."""
    first, entrants = report["first"], report["entrants"]
    own = (
        [
            label,
            interval(e.get("score"), ".3f"),
            f"{e['tokens']:.1f}",
            interval(e["seconds"], ".0f"),
        ]
        for label, e in entrants.items()
    )
    title = f"{report['queries']:,} evaluation queries that all answered"
    out.print(table(["model", "score", "tokens", "seconds"], own, title=title))
    pairs = [
        [label, *(interval(v, ".3f") for v in _of_pairs(e))]
        for label, e in entrants.items()
        if e["quality"]
    ]
    if pairs:
        names = ["model", "accuracy", "on-policy chosen", "rejected", "gap good", "gap bad"]
        out.print(table(names, pairs, title="\ntheir training pairs"))
    for label, d in report["differences"].items():
        out.print(f"\n{sentence(label, first, d)}", style="bold", markup=False)
        rate = f"win rate {interval(d['win_rate'], '.3f')}; " if d.get("win_rate") else ""
        out.print(f"{rate}tokens {interval(d['tokens'], '+.1f')}", markup=False)
        if "by_class" in d:
            classes = (
                (name, c["queries"], interval(c["difference"], missing="too few to say"))
                for name, c in d["by_class"].items()
            )
            out.print(table([report["class"], "queries", "difference"], classes))
        for example in d.get("examples", ()):
            out.print(
                f"\n{example['difference']:+.2f}  {example['query']}", style="bold", markup=False
            )
            for name in (first, label):
                out.print(f"  {name}: {example['answers'][name]}", markup=False)
    by_feature = {label: found for label, found in report["features"].items() if found}
    if by_feature:
        rows = (
            [name, *(interval(f.get(name, {}).get("accuracy"), ".3f") for f in by_feature.values())]
            for name in sorted(set().union(*by_feature.values()))
        )
        title = "\naccuracy of the training pairs by feature"
        out.print(table(["feature", *by_feature], rows, title=title))
    curves = [
        [label, name, *(f"{v:.3f}" for v in values)]
        for label, e in entrants.items()
        for name, values in e["curves"].items()
    ]
    if curves:
        names = ["model", "figure", "start", "25 %", "50 %", "75 %", "end"]
        title = "\nlast training of the policy, by its steps"
        out.print(table(names, curves, title=title, words=2))
    out.print(
        "accuracy, on-policy, gap: of the training pairs, see docs/method.md. [ ]: 95 % bootstrap "
        "over queries; training seeds vary more.",
        style="dim",
        markup=False,
    )


def _of_pairs(entrant: Mapping[str, Any]) -> list[float | None]:
    """Accuracy, on-policy-ness and steering gaps of the pairs that a model was trained on."""
    quality, gap = entrant["quality"], entrant["steering_gap"] or {}
    policyness = quality["on_policyness"]
    return [
        *(quality["accuracy"], policyness["chosen"], policyness["rejected"]),
        *(gap.get("good"), gap.get("bad")),
    ]
