"""``report.html``, ``report.md`` and the figures' files of a run."""

import html
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import write_atomic
from selfsteer.evaluation.benchmark_table import notes, tables
from selfsteer.report import summary
from selfsteer.report.figures import Cell, Drawing, figures, png_file, svg_file, svg_inline
from selfsteer.report.gather import Gathered, gather
from selfsteer.report.page import render
from selfsteer.report.rows import embedded
from selfsteer.run.folder import RunFolder
from selfsteer.terminal import duration, interval, progress_bar

#: Section of the page: anchor, heading, figures.
SECTIONS = (
    ("result", "Result", ("results", "accuracy")),
    ("data", "The data", ("likelihood", "gaps", "funnel", "lengths")),
    (
        "training",
        "The trainings",
        ("selection", "loss", "margins", "reward-accuracies", "rewards"),
    ),
    ("cost", "Time", ("times",)),
)


@dataclass(frozen=True)
class Sheet:
    """A table: cells are shown by `show_cell`, columns of numbers stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers and nothing else but gaps."""
        cells = [row[column] for row in self.rows if row[column] not in (None, "")]
        return bool(cells) and not any(isinstance(cell, str) for cell in cells)


def show_cell(value: Cell | Sequence[float | None]) -> str:
    """A cell as text: three decimals, thousands, intervals; nothing for None.

    >>> show_cell(0.5), show_cell(1326), show_cell([0.6, 0.5, 0.7]), show_cell(None)
    ('0.500', '1,326', '0.600 [0.500, 0.700]', '')
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return interval(value, ".3f")


@dataclass(frozen=True)
class Written:
    """Where a report is, and why some figures are not in it."""

    html: Path
    markdown: Path
    figures: list[Path]
    not_drawn: list[str]


def write_report(run: Path, out: Path | None = None) -> Written:
    """Writes the report of a run, finished or not.

    Args:
        run: the run folder; nothing else is read.
        out: the HTML file; ``report.md`` and the folder of figures get its name, beside it.
            Default: ``report.html`` in the run folder.

    Raises:
        ArtifactError: it is not a run folder, or the files cannot be written.
    """
    path = out or run / "report.html"
    folder = path.with_suffix("")
    g = gather(run)
    drawn, missing = figures(g)
    files = []
    with progress_bar("figures", len(drawn)) as bar:
        pictures: dict[str, str] = {}
        for drawing in drawn:
            picture = svg_file(drawing)
            pictures[drawing.name] = svg_inline(drawing.name, picture)
            for suffix, data in (("svg", picture), ("png", png_file(drawing))):
                files.append(folder / f"{drawing.name}.{suffix}")
                write_atomic(files[-1], data)
            bar.advance(1)
    for name in {n for _, _, names in SECTIONS for n in names} - pictures.keys():
        for suffix in ("svg", "png"):  # of an earlier state of the run
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    if not any(folder.glob("*")):
        shutil.rmtree(folder, ignore_errors=True)
    values = content(g, drawn, missing)
    browser = embedded(run)
    page = render(
        "report.html.j2",
        pictures=pictures,
        show=show_cell,
        scripts=("dom.js", "browser.js") if browser else (),
        browser=browser is not None,
        **(browser or {}),
        **values,
    )
    write_atomic(path, page)
    markdown = path.with_suffix(".md")
    write_atomic(markdown, to_markdown(values, folder.name))
    return Written(path, markdown, files, missing)


def content(g: Gathered, drawn: Sequence[Drawing], missing: Sequence[str]) -> dict[str, Any]:
    """All that both forms of the report show."""
    by_name = {d.name: d for d in drawn}
    tables = {
        "result": [
            ("", result_sheet(g)),
            ("Every model", models_sheet(g)),
            *benchmark_sheets(g),
        ],
        "data": [
            ("Quality of the data, under the policy before the iteration", quality_sheet(g)),
            ("Verdicts; first is the chosen response, or the model's against base's", verdicts(g)),
        ],
        "training": [("Reward model, on held-out pairs", reward_sheet(g))],
        "cost": [("Stages", stages_sheet(g))],
    }
    sections = [
        {
            "anchor": anchor,
            "heading": heading,
            "drawings": [by_name[n] for n in names if n in by_name],
            "tables": [(t, s) for t, s in tables.get(anchor, []) if s.rows],
        }
        for anchor, heading, names in SECTIONS
    ]
    return {
        "title": f"{g.recipe['name']}: {title_of(g)}",
        "name": g.recipe["name"],
        "subtitle": subtitle(g),
        "headline": headline(g),
        "state": state_sentence(g),
        "cards": cards(g),
        "sheets": {d.name: Sheet(d.columns, d.rows) for d in drawn},
        "sections": [s for s in sections if s["drawings"] or s["tables"]],
        "exhibit": g.found["exhibit"],
        "samples": g.samples,
        "missing": list(missing),
        "recipe": _recipe_text(g),
        "versions": _versions(g),
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
    }


def title_of(g: Gathered) -> str:
    """``sso against pbaa``."""
    baseline = g.recipe.get("baseline")
    return g.recipe["method"] + (f" against {baseline}" if baseline else "")


def subtitle(g: Gathered) -> str:
    """What was run on what, in one line."""
    recipe = g.recipe
    model = recipe["policy"]["model"]
    if recipe["method"] == "reward":
        return f"reward model, seed {recipe['seed']}, from {recipe['reward']['model'] or model}."
    iterations = recipe["iterations"]
    queries = g.stages.get("queries", {}).get("n_out")
    many = f"{queries:,} queries of " if queries else "queries of "
    return (
        f"{title_of(g)}, {iterations} iteration{'s' if iterations > 1 else ''}, seed "
        f"{recipe['seed']}. Policy {model}; {many}{recipe['queries']['path']}."
    )


def headline(g: Gathered) -> str:
    """The result in one sentence, with its interval; what stands in its way otherwise."""
    text = summary.sentence(g.found)
    if text:
        return text
    evaluation, reward = g.found["evaluation"], g.found["reward"]
    if g.recipe["method"] == "reward" and reward and reward["held_out"]["pairs"]:
        held_out = reward["held_out"]
        return (
            f"The reward model ranks {interval(held_out['accuracy'], '.3f')} of "
            f"{held_out['pairs']:,} held-out pairs right; preferring the longer response would "
            f"score {interval(held_out['longer_is_chosen'], '.3f')}."
        )
    if evaluation is None:
        wanted = g.recipe.get("evaluation")
        return (
            "There is no result yet: the evaluation has not run."
            if wanted
            else "There is no result: the recipe has no evaluation."
        )
    method = g.recipe["method"]
    models = evaluation["models"]
    mine, base = models[evaluation["finals"][method]], models["base"]
    parts = []
    if mine.get("score") and base.get("score"):
        parts.append(
            f"scores {interval(mine['score'], '.3f')}, base {interval(base['score'], '.3f')}"
        )
    if mine.get("win_rate"):
        parts.append(f"wins against base in {interval(mine['win_rate'], '.3f')} of its answers")
    if not parts:
        return "There is no result: no judge compared the answers to the held-out queries."
    return f"{method} {' and '.join(parts)}, on {evaluation['queries']:,} held-out queries."


def state_sentence(g: Gathered) -> str:
    """What is unfinished; nothing for a finished run."""
    if g.state == "finished":
        return ""
    begun = [name for name, e in g.stages.items() if e["event"] != "finish"]
    where = f" in stage {begun[-1]}" if begun else ""
    if g.state == "running":
        return f"The run is under way{where}. This report shows what is there."
    if begun:
        return (
            f"The run stopped{where}. This report shows what is there; the same command goes on "
            "from there."
        )
    return "The run has not come to its end. This report shows what is there."


def cards(g: Gathered) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the header."""
    evaluation, recipe = g.found["evaluation"], g.recipe
    out = []
    if evaluation and recipe["method"] in evaluation["finals"]:
        mine = evaluation["models"][evaluation["finals"][recipe["method"]]]
        for key, label in (("win_rate", "Win rate against base"), ("score", "Score")):
            if mine.get(key):
                mean, *bounds = mine[key]
                shown = ", ".join(f"{b:.3f}" for b in bounds if b is not None)
                out.append((label, f"{mean:.3f}", f"95 %: {shown}" if shown else ""))
    quality = g.found["quality"][recipe["method"]]
    if quality:
        last = quality[-1]["preferences"]
        if last["accuracy"] is not None:
            judge = f"judge: {quality[-1]['judge']}"
            out.append(("Accuracy of the pairs", f"{last['accuracy']:.3f}", judge))
        out.append(
            ("On-policyness", f"{last['on_policyness']['both']:.3f}", "mean probability per token")
        )
    finished = [e for e in g.stages.values() if e["event"] == "finish"]
    spent = sum(e["seconds"] for e in finished)
    all_done = len(finished) == len(g.stages)
    done = f"{len(finished)} stages" + ("" if all_done else f" of {len(g.stages)} begun")
    out.append(("Time", duration(spent), done))
    tokens = response_tokens(g)
    if tokens:
        out.append(("Response tokens", f"{tokens:,}", "of kept data and answers"))
    if g.usage:
        out.append(
            (
                "Server requests",
                f"{g.usage['requests']:,}",
                f"{g.usage['prompt_tokens']:,} tokens in, {g.usage['completion_tokens']:,} out"
                + (f", {g.usage['retried']:,} retried" if g.usage["retried"] else ""),
            )
        )
    return out


def response_tokens(g: Gathered) -> int:
    """Tokens of the responses that were kept, from the measured means; 0 before any measuring."""
    total = 0.0
    for method, iterations in g.found["quality"].items():
        for measured in iterations:
            # online, the preferences are the triples
            kinds = ("triples",) if method == "sso-online" else ("triples", "preferences")
            for f in (measured[k] for k in kinds if k in measured):
                total += f["of"] * sum(f["tokens"].values())
    evaluation = g.found["evaluation"]
    for f in evaluation["models"].values() if evaluation else ():
        total += evaluation["queries"] * f["tokens"]
    return round(total)


# -- tables ---------------------------------------------------------------------------------------


def result_sheet(g: Gathered) -> Sheet:
    """Base, baseline, method."""
    columns = ("model", "score", "win rate vs base", "accuracy of pairs", "on-policy chosen",
               "on-policy rejected", "tokens", "seconds")  # fmt: skip
    return Sheet(
        columns,
        [
            (
                row["model"],
                row["score"],
                row["win_rate"],
                row["accuracy"],
                row["on_policyness"].get("chosen"),
                row["on_policyness"].get("rejected"),
                row["tokens"],
                row["seconds"] and round(row["seconds"]),
            )
            for row in summary.result_rows(g.found)
        ],
    )


def models_sheet(g: Gathered) -> Sheet:
    """Every evaluated model, where there are more than the result's."""
    evaluation = g.found["evaluation"] or {"models": {}, "finals": {}}
    models = evaluation["models"].items()
    rows = [
        (label, f.get("score"), f.get("win_rate"), f["tokens"], f["unfinished"])
        for label, f in models
    ]
    more = len(rows) > len(evaluation["finals"]) + 1
    return Sheet(("model", "score", "win rate", "tokens", "unfinished"), rows if more else [])


def benchmark_sheets(g: Gathered) -> list[tuple[str, Sheet]]:
    """What ``benchmarks.md`` holds, under the notes it is to be read with."""
    report = g.found["benchmarks"]
    if not report:
        return []
    headings = (f"Benchmarks ({'; '.join(notes(report))})", "Differences between models")
    return [
        (h, Sheet(head, rows)) for h, (head, *rows) in zip(headings, tables(report), strict=False)
    ]


def quality_sheet(g: Gathered) -> Sheet:
    """Quality of every measured set."""
    rows = []
    for label, f in _measured(g):
        gap = f["steering_gap"] or {}
        rows.append(
            [label, f["of"], f["pairs"] if f["pairs"] != f["of"] else None, f["accuracy"]]
            + [f["on_policyness"][r] for r in ("chosen", "rejected")]
            + [gap.get(r) for r in ("good", "bad")]
            + [f["tokens"][r] for r in ("chosen", "rejected")]
        )
    columns = ("set", "records", "measured", "accuracy", "on-policy chosen", "rejected",
               "gap good", "bad", "tokens chosen", "rejected")  # fmt: skip
    if all(row[2] is None for row in rows):  # all of every set was measured
        return Sheet([*columns[:2], *columns[3:]], [[*row[:2], *row[3:]] for row in rows])
    return Sheet(columns, rows)


def _measured(g: Gathered) -> list[tuple[str, dict[str, Any]]]:
    """``sso 1 triples`` and the like with their figures."""
    return [
        (f"{method} {k} {kind}", figures[kind])
        for method, iterations in g.found["quality"].items()
        for k, figures in enumerate(iterations, 1)
        for kind in ("triples", "preferences")
        if kind in figures
    ]


def verdicts(g: Gathered) -> Sheet:
    """Every verdict class of every judged set."""
    sets = [(label, f["verdicts"]) for label, f in _measured(g) if f.get("verdicts")]
    evaluation = g.found["evaluation"] or {"models": {}}
    sets += [
        (f"{label} against base", f["verdicts"])
        for label, f in evaluation["models"].items()
        if f.get("verdicts")
    ]
    names = list(sets[0][1]) if sets else []
    return Sheet(("set", *names), [(label, *(v[n] for n in names)) for label, v in sets])


def reward_sheet(g: Gathered) -> Sheet:
    """Held-out accuracy of the run's reward model, by set and by length."""
    held_out = (g.found["reward"] or {}).get("held_out", {"pairs": 0})
    columns = ("of", "pairs", "accuracy")
    if not held_out["pairs"]:
        return Sheet(columns, [])
    parts = {"all": held_out, **held_out["by_source"], **held_out["by_length"]}
    return Sheet(columns, [(name, f["pairs"], f["accuracy"]) for name, f in parts.items()])


def stages_sheet(g: Gathered) -> Sheet:
    """Every stage with its counts."""
    rows: list[tuple[Any, ...]] = []
    for name, e in g.stages.items():
        if e["event"] == "finish":
            drops = ", ".join(f"{n:,} {reason}" for reason, n in e["dropped"].items())
            rows.append((name, e["n_in"], e["n_out"], drops, round(e["seconds"], 1)))
        else:
            rows.append((name, None, None, "unfinished", None))
    return Sheet(("stage", "in", "out", "dropped", "seconds"), rows)


def _recipe_text(g: Gathered) -> str:
    path = summary.recipe_file(g.run)
    return path.read_text("utf-8") if path.exists() else ""


def _versions(g: Gathered) -> str:
    entries = [e for e in RunFolder(g.run).ledger() if "versions" in e]
    return ", ".join(f"{k} {v}" for k, v in entries[-1]["versions"].items()) if entries else ""


# -- markdown -------------------------------------------------------------------------------------


def to_markdown(values: dict[str, Any], folder: str) -> str:
    """The report for a repository: tables, and links to the pictures in ``folder``."""
    lines = [f"# {_inline(values['name'])}", "", _inline(values["subtitle"]), ""]
    lines += [f"**{_inline(values['headline'])}**", ""]
    if values["state"]:
        lines += [_inline(values["state"]), ""]
    lines += ["; ".join(f"{a.lower()} {_inline(b)}" for a, b, _ in values["cards"]) + ".", ""]
    for section in values["sections"]:
        lines += [f"## {section['heading']}", ""]
        for heading, sheet in section["tables"]:
            lines += [*([f"### {_inline(heading)}", ""] if heading else []), *_table(sheet), ""]
        for d in section["drawings"]:
            lines += [f"### {d.title}", "", f"![{_inline(d.title)}]({folder}/{d.name}.png)", ""]
            lines += [_inline(d.caption), ""]
    if values["missing"]:
        lines += ["## Not drawn", "", *(f"- {_inline(m)}" for m in values["missing"]), ""]
    return "\n".join([*lines, f"Made {values['made']} with {values['versions']}.", ""])


def _inline(text: str) -> str:
    # nor are pictures and links of a foreign name loaded where somebody reads the file
    escaped = html.escape(" ".join(text.split()), quote=False)
    return escaped.replace("|", "\\|").replace("](", "]\\(")


def _table(sheet: Sheet) -> list[str]:
    right = [sheet.is_number(i) for i in range(len(sheet.columns))]
    rows = [[_inline(show_cell(cell)) for cell in row] for row in sheet.rows]
    return [
        "| " + " | ".join(map(_inline, sheet.columns)) + " |",
        "|" + "|".join("---:" if r else "---" for r in right) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
