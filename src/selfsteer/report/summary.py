"""A run folder in the terminal: result table, stages, drops, where the models are.

Reads JSON only, so that showing a run takes no time.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfsteer.errors import ArtifactError
from selfsteer.evaluation.benchmark_table import markdown
from selfsteer.report.reward import print_reward
from selfsteer.run.folder import RunFolder
from selfsteer.terminal import interval

#: Contaminated pairs shown in the terminal; the file beside the output has all.
PAIRS_SHOWN = 10


def load(run: Path) -> dict[str, Any]:
    """What the folder says of itself.

    Raises:
        ArtifactError: it is not a run folder.
    """
    if not (run / "resolved.json").exists():
        raise ArtifactError(
            f"{run} is not a run folder: it has no resolved.json. Give the folder that "
            "'selfsteer run' wrote, for example runs/demo."
        )
    recipe = json.loads((run / "resolved.json").read_text("utf-8"))
    stages: dict[str, dict[str, Any]] = {}
    for entry in RunFolder(run).ledger():
        if entry["event"] == "superseded":
            stages.pop(entry["stage"], None)
        else:
            stages[entry["stage"]] = entry
    folders = {recipe["method"]: run}
    if recipe.get("baseline"):
        folders[recipe["baseline"]] = run / "baseline"
    quality = {
        method: [
            json.loads((folder / f"iteration-{k}" / "quality.json").read_text("utf-8"))
            for k in range(1, recipe["iterations"] + 1)
            if (folder / f"iteration-{k}" / "quality.json").exists()
        ]
        for method, folder in folders.items()
    }
    return {
        "run": str(run),
        "recipe": recipe,
        "stages": stages,
        "quality": quality,
        "evaluation": _json(run / "evaluation.json"),
        "benchmarks": _json(run / "benchmarks.json"),
        "exhibit": _json(run / "evaluation" / "exhibit.json"),
        "reward": _json(run / "reward.json"),
        "models": {m: str(p) for m, p in _models(run, recipe).items()},
    }


def is_finished(found: dict[str, Any]) -> bool:
    """Whether the run has come to what its recipe wants last, and nothing is half done."""
    recipe, entries = found["recipe"], found["stages"]
    last = f"iteration-{recipe['iterations']}/policy"
    wanted = [
        name
        for name, asked in (
            (last, recipe["method"] != "reward"),
            (f"baseline/{last}", recipe.get("baseline")),
            ("train_reward", recipe.get("reward")),
            ("evaluation", recipe.get("evaluation")),
            ("benchmarks", recipe.get("benchmarks")),
        )
        if asked
    ]
    done = all(e["event"] == "finish" for e in entries.values())
    return done and all(name in entries for name in wanted)


def within(run: Path, path: Path) -> bool:
    """Whether a file is the run's own; what a link brings in from elsewhere is not for showing."""
    return path.resolve().is_relative_to(run.resolve())


def recipe_file(run: Path) -> Path:
    """The recipe as it was given.

    Raises:
        ArtifactError: it is a link that leads out of the run.
    """
    path = run / "recipe.yaml"
    if not within(run, path):
        raise ArtifactError(
            f"{path} is a link that leads out of the run folder, and what it leads to may not be "
            "meant for a page. Put the recipe itself there."
        )
    return path


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _models(run: Path, recipe: dict[str, Any]) -> dict[str, Path]:
    found: dict[str, Path] = {"base": Path(recipe["policy"]["model"])}
    for k in range(1, recipe["iterations"] + 1):
        for label, path in (
            ("generator", run / f"iteration-{k}" / "generator"),
            ("generator/plus", run / f"iteration-{k}" / "generator" / "plus"),
            ("generator/minus", run / f"iteration-{k}" / "generator" / "minus"),
            ("policy", run / f"iteration-{k}" / "policy"),
            ("baseline", run / "baseline" / f"iteration-{k}" / "policy"),
        ):
            if any(path.glob("*.safetensors")):
                found[label] = path
    if any((run / "reward").glob("*.safetensors")):
        found["reward"] = run / "reward"
    return found


def seconds_of(found: dict[str, Any], method: str) -> float | None:
    """Wall time of a method's stages; principles count for both methods, as both need them."""
    entries = found["stages"]
    total = 0.0
    for name, entry in entries.items():
        if entry["event"] != "finish":
            return None
        mine = name.startswith("baseline/") == (method != found["recipe"]["method"])
        shared = name.endswith("/principles") or name in ("queries", "augment")
        if (mine or shared) and name != "evaluation":
            total += entry["seconds"]
    return total


def result_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of base, baseline and method; none before evaluation."""
    evaluation = found["evaluation"]
    if evaluation is None:
        return []
    finals = evaluation["finals"]
    rows = [("base", "base", None)]
    rows += [(m, label, m) for m, label in reversed(list(finals.items()))]
    out = []
    for name, label, method in rows:
        figures = evaluation["models"][label]
        quality = found["quality"].get(method) if method else None
        last = quality[-1]["preferences"] if quality else None
        out.append(
            {
                "model": name,
                "score": figures.get("score"),
                "win_rate": figures.get("win_rate"),
                "accuracy": last["accuracy"] if last else None,
                "on_policyness": last["on_policyness"] if last else {},
                "tokens": figures["tokens"],
                "seconds": seconds_of(found, method) if method else None,
            }
        )
    return out


def result_table(found: dict[str, Any]) -> Table | None:
    """Base, baseline and method, one row each, with 95 % intervals; None before evaluation."""
    evaluation = found["evaluation"]
    if evaluation is None:
        return None
    table = Table(
        title=f"{evaluation['queries']:,} held-out queries", box=None, padding=(0, 1, 0, 0)
    )
    table.title_justify = "left"
    for column, justify in (
        ("model", "left"),
        ("score", "left"),
        ("win rate\nvs base", "left"),
        ("\naccuracy", "right"),
        ("on-policy\nchosen rejected", "right"),
        ("tokens", "right"),
        ("seconds", "right"),
    ):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in result_rows(found):
        policyness = row["on_policyness"]
        table.add_row(
            row["model"],
            _interval(row["score"]),
            _interval(row["win_rate"]),
            _number(row["accuracy"]),
            f"{policyness['chosen']:.3f}    {policyness['rejected']:.3f}" if policyness else "",
            f"{row['tokens']:.1f}",
            f"{row['seconds']:.0f}" if row["seconds"] is not None else "",
        )
    return table


def _interval(value: Any) -> str:
    if not value:
        return ""
    mean, low, high = value
    if low is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} [{low:.2f}, {high:.2f}]".replace("[0.", r"\[.").replace(", 0.", ", .")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def iteration_table(found: dict[str, Any]) -> Table | None:
    """Score, data accuracy and lengths per iteration; None for runs of a single one."""
    recipe, evaluation = found["recipe"], found["evaluation"]
    if recipe["iterations"] == 1 or evaluation is None:
        return None
    table = Table(title="\nby iteration", title_justify="left", box=None, padding=(0, 1))
    for column in ("model", "score", "tokens", "accuracy", "tokens chosen", "rejected"):
        table.add_column(column, justify="left" if column in ("model", "score") else "right")
    for label, figures in evaluation["models"].items():
        method, _, k = label.partition("/iteration-")
        quality = found["quality"].get(method, []) if k else []
        last = quality[int(k) - 1]["preferences"] if k and len(quality) >= int(k) else None
        table.add_row(
            label,
            _interval(figures.get("score")),
            f"{figures['tokens']:.1f}",
            _number(last["accuracy"]) if last else "",
            f"{last['tokens']['chosen']:.1f}" if last else "",
            f"{last['tokens']['rejected']:.1f}" if last else "",
        )
    return table


def sentence(found: dict[str, Any]) -> str:
    """The result in one sentence, with its interval; says so when it cannot be told apart."""
    evaluation = found["evaluation"]
    difference = evaluation.get("difference") if evaluation else None
    if not difference:
        return ""
    mean, low, high = difference["score"]
    mine, _, theirs = difference["of"].partition(" - ")
    if low is None:
        return f"{mine} - {theirs}: {mean:+.3f} in score: one query decides nothing."
    verdict = f"{mine} is better" if low > 0 else f"{theirs} is better" if high < 0 else "undecided"
    return (
        f"{mine} - {theirs}: {interval(difference['score'])} in score, paired by query: "
        f"{verdict} on this seed. The interval is over queries; training seeds vary more."
    )


def print_result(found: dict[str, Any], console: Console) -> None:
    """The closing summary of a run."""
    table = result_table(found)
    if table is not None:
        console.print(table)
        by_iteration = iteration_table(found)
        if by_iteration is not None:
            console.print(by_iteration)
        text = sentence(found)
        if text:
            console.print(f"\n{escape(text)}")
        console.print(
            f"score: {escape(found['evaluation'].get('score_scale') or 'none')}. on-policy: mean "
            "probability per token of the training pairs under the policy before training. "
            "[ ]: 95 % bootstrap.",
            style="dim",
        )
    if found["reward"]:
        print_reward(found["reward"], console)
    if found["benchmarks"]:
        console.print(f"\n{markdown(found['benchmarks'])}", markup=False, end="")
    _print_exhibit(found, console)


def _print_exhibit(found: dict[str, Any], console: Console) -> None:
    if not found["exhibit"]:
        return
    shown = found["exhibit"]
    principles = shown["principles"]
    table = Table(title=f"\nWhat steering looks like: {escape(shown['query'])}", show_lines=True)
    table.title_justify = "left"
    table.add_column("context")
    for name in shown["responses"]:
        table.add_column(name, ratio=1)
    for context in ("plain", "good", "bad"):
        table.add_row(context, *(escape(r[context]) for r in shown["responses"].values()))
    console.print(table)
    console.print(f"good principle: {escape(principles['good'])}", style="dim")
    console.print(f"bad principle:  {escape(principles['bad'])}", style="dim")


def print_show(found: dict[str, Any], console: Console) -> None:
    """Stages, counts, drops by reason, quality, models."""
    recipe = found["recipe"]
    console.print(
        f"[bold]{escape(found['run'])}[/bold]  method {recipe['method']}"
        + (f", baseline {recipe['baseline']}" if recipe.get("baseline") else "")
        + f", {recipe['iterations']} iteration(s), seed {recipe['seed']}"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column, justify in (
        ("stage", "left"),
        ("in", "right"),
        ("out", "right"),
        ("dropped", "left"),
        ("seconds", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, entry in found["stages"].items():
        if entry["event"] == "finish":
            drops = ", ".join(f"{n:,} {reason}" for reason, n in entry["dropped"].items())
            table.add_row(
                name,
                f"{entry['n_in']:,}",
                f"{entry['n_out']:,}",
                drops,
                f"{entry['seconds']:.1f}",
            )
        else:
            table.add_row(name, "", "", "[yellow]unfinished[/yellow]", "")
    console.print(table)
    augmented = found["stages"].get("augment", {}).get("notes", {})
    for name, figures in augmented.get("diversity", {}).items():
        shown = ", ".join(f"{k.replace('_', '-')} {v:.3f}" for k, v in figures.items())
        console.print(f"diversity of the queries {name} augmentation: {shown}")
    for name, entry in found["stages"].items():
        if name.endswith("/principles") and entry["event"] == "finish":
            console.print(f"{name}: {_principles(entry['notes'])}", markup=False)
    for name, entry in found["stages"].items():
        chosen = entry.get("notes", {}).get("selection")
        if chosen:
            console.print(escape(f"{name}: {chosen['text']}"))
            for text in chosen["warnings"]:
                console.print(escape(f"warning: {text}"), style="yellow")
    quality = Table(
        title="data quality, under the policy before the iteration", box=None, padding=(0, 1)
    )
    quality.title_justify = "left"
    for column in ("set", "pairs", "accuracy", "on-policy", "steering gap", "tokens"):
        quality.add_column(column, justify="left" if column == "set" else "right", no_wrap=True)
    quality.add_row("", "", "", "chosen rejected", "good   bad", "chosen rejected", style="dim")
    for method, iterations in found["quality"].items():
        for k, figures in enumerate(iterations, 1):
            for kind in ("triples", "preferences"):
                if kind in figures:
                    label = "triples" if kind == "triples" else "pairs"
                    quality.add_row(f"{method} {k} {label}", *_quality_cells(figures[kind]))
    if quality.row_count > 1:  # below the row of headings
        console.print(quality)
    for extra in (verdict_table(found), length_table(found)):
        if extra is not None:
            console.print(extra)
    for name, steps in _survivors(found):
        console.print(f"{escape(name)}: {steps}")
    for label, path in found["models"].items():
        console.print(f"{label:>16}  {escape(path)}")
    print_result(found, console)


def _principles(notes: dict[str, Any]) -> str:
    """What became of the writer's answers, try by try, and where the principles come from."""
    kinds = (("first_try", "first try"), ("retry", "retry"), ("sources", "in the end"))
    return "; ".join(
        f"{label} " + ", ".join(f"{n:,} {what}" for what, n in notes[kind].items())
        for kind, label in kinds
        if kind in notes
    )


def verdict_table(found: dict[str, Any]) -> Table | None:
    """Every verdict class of every judged set, unparseable included; None without a judge."""
    rows: list[tuple[str, dict[str, int]]] = []
    for method, iterations in found["quality"].items():
        for k, figures in enumerate(iterations, 1):
            for kind, label in (("triples", "triples"), ("preferences", "pairs")):
                if figures.get(kind, {}).get("verdicts"):
                    rows.append((f"{method} {k} {label}", figures[kind]["verdicts"]))
    for label, figures in (found["evaluation"] or {"models": {}})["models"].items():
        if figures.get("verdicts"):
            rows.append((f"{label} against base", figures["verdicts"]))
    if not rows:
        return None
    title = "\nverdicts; first is the chosen response, or the model's against base's"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    table.add_column("set")
    for name in rows[0][1]:
        table.add_column(name, justify="right")
    for label, counts in rows:
        table.add_row(label, *(f"{n:,}" for n in counts.values()))
    return table


def length_table(found: dict[str, Any]) -> Table | None:
    """Lengths of pairs before and after hygiene's length settings; None where none were used."""
    table = Table(
        title="\nlengths of pairs, tokens", title_justify="left", box=None, padding=(0, 1)
    )
    for column in ("stage", "", "pairs", "chosen", "rejected", "chosen longer", "rejected longer"):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for name, entry in found["stages"].items():
        lengths = entry.get("notes", {}).get("lengths", {})
        if lengths.get("before") == lengths.get("after"):
            continue
        for when, f in lengths.items():
            means = [f"{f[k]:.1f}" if f[k] else "" for k in ("chosen", "rejected")]
            shares = [_number(f[k]) for k in ("longer_chosen", "longer_rejected")]
            table.add_row(name, when, f"{f['pairs']:,}", *means, *shares)
    return table if table.row_count else None


def _survivors(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What each step of a filter left, for runs that filter."""
    out = []
    for name, entry in found["stages"].items():
        steps = entry.get("notes", {}).get("survivors", {})
        if len(steps) > 3:
            out.append((name, ", ".join(f"{n:,} {step}" for step, n in steps.items())))
    return out


def print_curated(found: dict[str, Any], console: Console) -> None:
    """What became of a query set: counts by reason, contaminated pairs, files."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{found['read']:,}", "read")
    for reason, count in found["dropped"].items():
        table.add_row(f"-{count:,}", reason.replace("_", " "), style="dim")
    for side in ("queries", "holdout"):
        if side in found["files"]:
            table.add_row(f"{found[side]:,}", escape(found["files"][side]), style="bold")
    console.print(table)
    if found["not_compared"]:
        rest = ", ".join(f"{n:,} {reason}" for reason, n in found["not_compared"].items())
        console.print(f"rows of evaluation sets without a query to compare with: {rest}")
    if found["answers_cut"]:
        console.print(f"{found['answers_cut']:,} kept queries had an answer behind them, cut off")
    pairs = found["contaminated"]
    if not pairs:
        return
    table = Table(title="\nshared with evaluation sets", title_justify="left", box=None)
    for column in ("query", "evaluation query", "of", "shared words"):
        table.add_column(column, overflow="fold" if column == "shared words" else "ellipsis")
    for pair in pairs[:PAIRS_SHOWN]:
        table.add_row(*(escape(str(pair[k])) for k in ("id", "evaluation_id", "against", "shared")))
    console.print(table)
    more = len(pairs) - PAIRS_SHOWN
    where = escape(found["files"]["contaminated"])
    console.print(f"{f'{more:,} more pairs in' if more > 0 else 'all of them in'} {where}")


def _quality_cells(figures: dict[str, Any]) -> list[str]:
    policyness, gap, tokens = figures["on_policyness"], figures["steering_gap"], figures["tokens"]
    return [
        f"{figures['pairs']:,}",
        _number(figures["accuracy"]) or "-",
        f"{policyness['chosen']:.3f}    {policyness['rejected']:.3f}",
        f"{gap['good']:+.2f} {gap['bad']:+.2f}" if gap else "",
        f"{tokens['chosen']:.1f}     {tokens['rejected']:.1f}",
    ]
