"""``selfsteer judge``: what one or two judges say of stored preferences."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import interval, out, table
from selfsteer.verbs.common import AsJson, aligning, emit, load_recipe, named_judge


def judge(
    preferences: Annotated[
        Path,
        typer.Argument(help="a run folder, or preferences in a JSONL file or a folder of shards"),
    ],
    judges: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help="oracle, chat:MODEL, reward:MODEL, human:FILE or YAML; one or two; default: "
            "the run's judge",
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
    as_json: AsJson = False,
) -> None:
    """Judge preferences: verdicts, accuracy, position bias and cost; agreement of two judges."""
    from selfsteer.run.folder import RunFolder

    if label_sheet is not None and (judges or as_json or store):
        raise ConfigError("--label-sheet judges nothing; leave --judge, --store and --json out.")
    given = [named_judge(j) for j in judges or []]
    if len(given) > 2:
        raise ConfigError(f"Give one judge or two, found {len(given)}.")
    source, is_run = preferences, (preferences / "recipe.yaml").is_file()
    if is_run:
        recipe = aligning(load_recipe(str(preferences), [])[0])
        k = recipe.iterations if iteration is None else iteration
        source = RunFolder(preferences).iteration(k, baseline=baseline) / "preferences"
        store = store or preferences / "judgements"
        given = given or ([recipe.judge] if recipe.judge else [])
    elif iteration is not None or baseline:
        raise ConfigError(
            f"{preferences} is not a run folder, which --iteration and --baseline need."
        )
    if not given and label_sheet is None:
        raise ConfigError("Name a judge: --judge oracle, chat:MODEL, reward:MODEL or human:PATH.")
    from selfsteer.verbs.judging import judge_preferences, load_preferences, pick, write_label_sheet

    chosen = pick(load_preferences(source), limit, seed)
    if label_sheet is not None:
        count = write_label_sheet(chosen, label_sheet, seed)
        out.print(
            f"{label_sheet}: {count:,} pairs. Set each verdict to first, second or tie, then: "
            f"selfsteer judge {preferences} --judge human:{label_sheet}"
        )
        return
    # answers are added to the run folder, so no other process may work in it
    with RunFolder(preferences).locked() if is_run else nullcontext():
        report = judge_preferences(chosen, given, store, seed)
    emit(report, as_json, print_judges)


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
