"""``report.html``, ``report.md`` and the figures' files of a run."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Preference
from selfsteer.methods import Aligning
from selfsteer.report import tables
from selfsteer.report.browser import embedded
from selfsteer.report.figures import Drawing, figures, picture, svg_inline
from selfsteer.report.logprobs import likelihoods
from selfsteer.report.page import render, render_text
from selfsteer.report.tables import about, compared, sentence, worse_rules
from selfsteer.terminal import duration, interval, progress_bar
from selfsteer.view import RunView

#: Section of the page: anchor, heading, figures.
SECTIONS = (
    ("result", "Result", ("results", "accuracy")),
    ("data", "The data", ("likelihood", "gaps", "funnel", "lengths")),
    (
        "training",
        "The trainings",
        ("selection", "loss", "kl", "margins", "reward-accuracies", "rewards"),
    ),
    ("cost", "Time", ("times",)),
)

#: Preferences shown as text.
SHOWN = 5


@dataclass(frozen=True)
class Written:
    """Where a report is, and why some figures are not in it."""

    html: Path
    markdown: Path
    figures: list[Path]
    not_drawn: list[str]


def write_report(folder: Path, out: Path | None = None) -> Written:
    """Writes the report of a run, finished or not.

    Args:
        folder: the run folder; nothing else is read.
        out: the HTML file; the others stand beside it under its name.

    Raises:
        ArtifactError: it is not a run folder, or the files cannot be written.
    """
    run = RunView.open(folder)
    path = out or run.place("report").with_suffix(".html")
    recipe = run.recipe_file.read_text("utf-8") if run.recipe_file.exists() else ""
    sets, missing = likelihoods(run)
    missing = [
        f"{x} leads out of the run by a link: it is not shown." for x in run.foreign
    ] + missing
    drawn, not_drawn = figures(run, sets)
    missing += not_drawn
    pictures, files, beside = dict[str, str](), list[Path](), path.with_suffix("")
    with progress_bar("figures", len(drawn)) as bar:
        for drawing in drawn:
            made = {suffix: picture(drawing, suffix) for suffix in ("svg", "png")}
            pictures[drawing.name] = svg_inline(drawing.name, made["svg"].decode())
            for suffix, data in made.items():
                files.append(beside / f"{drawing.name}.{suffix}")
                write_atomic(files[-1], data)
            bar.advance(1)
    for name in {n for _, _, names in SECTIONS for n in names} - pictures.keys():
        for suffix in ("svg", "png"):  # of an earlier state of the run
            (beside / f"{name}.{suffix}").unlink(missing_ok=True)
    if not any(beside.glob("*")):
        shutil.rmtree(beside, ignore_errors=True)
    values = content(run, drawn, missing)
    browser = embedded(run)
    page = render(
        "report.html.j2",
        pictures=pictures,
        scripts=("dom.js", "browser.js") if browser else (),
        browser=browser is not None,
        exhibit=run.exhibit,
        example=run.evaluation.example if run.evaluation else None,
        samples=_samples(run),
        recipe=recipe,
        **(browser or {}),
        **values,
    )
    write_atomic(path, page)
    markdown = path.with_suffix(".md")
    write_atomic(markdown, render_text("report.md.j2", folder=beside.name, **values))
    return Written(path, markdown, files, missing)


def _samples(run: RunView) -> list[Preference]:
    """A few preferences of the last round that has some, by a seeded choice."""
    for found in reversed(run.rounds_of(run.recipe.method)):
        every = sorted(found.preferences, key=lambda p: derive_seed("report", p.id))
        if every:
            return every[:SHOWN]
    return []


def content(run: RunView, drawn: Sequence[Drawing], missing: Sequence[str]) -> dict[str, Any]:
    """All that both forms of the report show."""
    sheets = {
        "result": [
            tables.results(run),
            tables.models(run),
            tables.rules(run),
            *tables.benchmarks(run),
            tables.warnings(run),
        ],
        "data": [
            tables.quality(run),
            tables.verdicts(run),
            tables.lengths(run),
            tables.tokens(run),
        ],
        "training": tables.reward(run),
        "cost": [tables.stages(run)],
    }
    sections = [
        {
            "anchor": anchor,
            "heading": heading,
            "drawings": [d for d in drawn if d.name in names],
            "sheets": [s for s in sheets[anchor] if s.rows],
        }
        for anchor, heading, names in SECTIONS
    ]
    versions = next((s.versions for s in reversed(run.stages) if s.versions), {})
    return {
        "title": f"{run.recipe.name}: {compared(run)}",
        "name": run.recipe.name,
        "subtitle": subtitle(run),
        "headline": headline(run),
        "state": state_sentence(run),
        "cards": cards(run),
        "sections": [s for s in sections if s["drawings"] or s["sheets"]],
        "missing": list(missing),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
    }


def subtitle(run: RunView) -> str:
    """What was run on what, in one line."""
    recipe = run.recipe
    if not isinstance(recipe, Aligning):
        return f"{about(run)}. A reward model from {recipe.reward.model or recipe.policy.model}."
    queries = run.stage("ReadQueries")
    many = f"{queries.n_out:,} queries" if queries and queries.done else "queries"
    return f"{about(run)}. Policy {recipe.policy.model}; {many} of {recipe.queries.path}."


def headline(run: RunView) -> str:
    """The result in one sentence, with its interval; what stands in its way otherwise."""
    if text := sentence(run):
        return text
    evaluation = run.evaluation
    if evaluation is None:
        held_out = run.reward.held_out if run.reward else None
        if held_out and held_out.accuracy and held_out.longer_is_chosen:
            return (
                f"The reward model ranks {interval(held_out.accuracy, '.3f')} of "
                f"{held_out.pairs:,} held-out pairs right; preferring the longer response would "
                f"score {interval(held_out.longer_is_chosen, '.3f')}."
            )
        if isinstance(run.recipe, Aligning) and run.recipe.evaluation:
            return "There is no result yet: the evaluation has not run."
        return "There is no result: the recipe has no evaluation."
    method = run.recipe.method
    (mine, _), (base, _) = run.last(method), run.last("base")
    parts = []
    if mine and base and mine.score and base.score:
        scores = interval(mine.score, ".3f"), interval(base.score, ".3f")
        parts.append(f"{method} scores {scores[0]} and base {scores[1]}")
    if mine and mine.win_rate:
        won = interval(mine.win_rate, ".3f")
        parts.append(f"{method} wins against base with {won} of its answers")
    if not parts:
        return "There is no result: no judge compared the answers to the held-out queries."
    said = f"On {evaluation.queries:,} held-out queries, {'; '.join(parts)}."
    return f"{said} {worse_rules(run)}".strip()


def state_sentence(run: RunView) -> str:
    """What is unfinished; nothing for a finished run."""
    begun = [s.name for s in run.stages if not s.done]
    where = f" in stage {begun[-1]}" if begun else ""
    if run.state == "working":
        return f"The run is under way{where}. This report shows what is there."
    if begun:
        return (
            f"The run stopped{where}. This report shows what is there; the same command continues "
            "it."
        )
    return "" if run.finished else "The run is not finished. This report shows what is there."


def cards(run: RunView) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the header."""
    out = []
    answers, pairs = run.last(run.recipe.method)
    both = {"Win rate against base": "win_rate", "Score": "score"}
    for label, figure in both.items():
        if value := getattr(answers, figure, None):
            shown = ", ".join(f"{b:.3f}" for b in value[1:] if b is not None)
            out.append((label, f"{value[0]:.3f}", f"95 %: {shown}" if shown else ""))
    if pairs and pairs.accuracy is not None:
        judge = next(r.quality.judge for r in reversed(run.rounds) if r.quality)
        assert judge is not None
        kind, colon, source = judge.partition(":")
        named = f"judge: {kind}{colon}{source.rstrip('/').rpartition('/')[2]}"  # without folders
        out.append(("Accuracy of the pairs", f"{pairs.accuracy:.3f}", named))
    if pairs:
        policyness = f"{pairs.on_policyness['both']:.3f}"
        out.append(("On-policyness", policyness, "mean probability per token"))
    done = [s for s in run.stages if s.done]
    begun = "" if len(done) == len(run.stages) else f" of {len(run.stages)} begun"
    out.append(("Time", duration(sum(s.seconds for s in done)), f"{len(done)} stages{begun}"))
    if tokens := response_tokens(run):
        out.append(("Response tokens", f"{tokens:,}", "of kept data and answers"))
    if used := run.usage:
        asked = f"{used['prompt_tokens']:,} tokens in, {used['completion_tokens']:,} out"
        asked += f", {used['retried']:,} retried" if used["retried"] else ""
        asked += f", cost {run.cost:,.4g}" if run.cost is not None else ""
        out.append(("Server requests", f"{used['requests']:,}", asked))
    return out


def response_tokens(run: RunView) -> int:
    """Tokens of the responses that were kept, from the measured means; 0 before any measuring."""
    sets = [f for r, kind, f in run.measured if kind == "triples" or not r.pairs_are_triples]
    total = sum(f.of * sum(f.tokens.values()) for f in sets)
    if run.evaluation:
        total += sum(run.evaluation.queries * m.tokens for m in run.evaluation.models.values())
    return round(total)
