"""The figures: one matplotlib drawing each, out of which come the page's SVG and the files.

In the page every colour is a variable of style.css, so that a figure follows light and dark; the
files beside it keep the light colours. What a reader counts (a point, a line, a bar) carries the
class ``mark``. Each figure has a caption that says what to see, and the table it was drawn from.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO, StringIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfsteer.judges.stats import WORTH, mean_interval
from selfsteer.principles.contexts import CONTEXTS
from selfsteer.report.gather import Gathered, Likelihoods
from selfsteer.report.page import asset
from selfsteer.terminal import duration

#: Points of a curve; of longer trainings each point is the mean of neighbouring steps.
POINTS = 200
#: Rows of the table behind a curve.
ROWS = 40
#: Inches; at this size the text stays legible on a phone.
WIDTH, HEIGHT = 4.2, 2.75

Cell = str | int | float | None


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption and the numbers behind it."""

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    figure: Figure


class NothingToDrawError(Exception):
    """Why a figure is left out, as a sentence."""


@cache
def palette() -> dict[str, str]:
    """Token of style.css → its light colour."""
    return dict(re.findall(r"--([\w-]+): light-dark\((#\w{6})", asset("style.css")))


@contextmanager
def drawing_style() -> Iterator[dict[str, str]]:
    """Colours and type of all figures; gives the palette."""
    c = palette()
    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 8,
        "axes.labelcolor": c["muted"],
        "axes.titlecolor": c["text"],
        "axes.edgecolor": c["line"],
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "grid.color": c["grid"],
        "grid.linewidth": 0.7,
        "text.color": c["text"],
        "xtick.color": c["muted"],
        "ytick.color": c["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.5,
        "lines.markersize": 6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.handlelength": 2.2,
        "figure.facecolor": c["surface"],
        "hatch.linewidth": 0.6,
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "selfsteer",
    }
    with rc_context(settings):
        yield c


def svg_file(drawing: Drawing) -> str:
    """A file that stands alone, in light colours."""
    with drawing_style():
        out = StringIO()
        drawing.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        drawing.figure.set_layout_engine("none")  # found once, it need not be found again
    return out.getvalue()


def png_file(drawing: Drawing) -> bytes:
    """The same picture, 840 pixels wide."""
    with drawing_style():
        out = BytesIO()
        drawing.figure.savefig(out, format="png", dpi=200, metadata={"Software": None})
    return out.getvalue()


def svg_inline(name: str, file: str) -> str:
    """A file's drawing for a page: colours are variables, ids start with its name."""
    text = re.sub(r"<metadata>.*?</metadata>", "", file[file.index("<svg") :], flags=re.DOTALL)
    for token, colour in palette().items():
        text = text.replace(colour, f"var(--{token})")
    text = re.sub(r'id="(mark-\d+)"', rf'class="mark" id="{name}-\1"', text)
    text = re.sub(rf'(?<= )id="(?!{name}-)', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"<]*", r"font-size: \1px", text)
    text = re.sub(r"(; )?font-family: [^;\"<]*", "", text)
    return re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        rf'<svg \1 role="img" aria-labelledby="{name}-title" xmlns="http://www.w3.org/2000/svg" '
        r'xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )


class Marks:
    """Numbers what is counted."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, artist: Artist) -> Any:
        """The artist, to be counted."""
        artist.set_gid(f"mark-{self.count}")
        self.count += 1
        return artist


def figures(g: Gathered) -> tuple[list[Drawing], list[str]]:
    """All that can be drawn of a run, in reading order, and why the rest cannot."""
    drawn, missing = [], list(g.missing)
    for draw in ALL:
        with drawing_style() as c:
            try:
                drawn.append(draw(g, c))
            except NothingToDrawError as e:
                if str(e) and str(e) not in missing:
                    missing.append(str(e))
    return drawn, missing


def canvas(rows: int = 1, height: float = HEIGHT, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels below each other."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, **options)
    return figure, list(axes[:, 0])


def roles(g: Gathered) -> dict[str, tuple[str, str, str]]:
    """Model or method → (colour token, line style, marker)."""
    out = {"base": ("base", ":", "D"), g.recipe["method"]: ("method-1", "-", "o")}
    if g.recipe.get("baseline"):
        out[g.recipe["baseline"]] = ("method-2", "--", "s")
    return out


# -- results --------------------------------------------------------------------------------------


def results(g: Gathered, c: dict[str, str]) -> Drawing:
    """Score of each model on held-out queries, with intervals."""
    evaluation = g.found["evaluation"]
    if evaluation is None:
        raise NothingToDrawError("There is no evaluation, so models are not compared.")
    key = "score" if "score" in evaluation["models"]["base"] else "win_rate"
    rows: list[tuple[str, str, list[float]]] = []
    labels = {"base": "base"} | {label: m for m, label in evaluation["finals"].items()}
    for label, method in labels.items():
        if figures := evaluation["models"][label].get(key):
            rows.append((method, label, figures))
    if not rows:
        raise NothingToDrawError(
            "The evaluation has no judge that can compare answers, so models are not compared."
        )
    order = {"base": 0, g.recipe.get("baseline") or "": 1, g.recipe["method"]: 2}
    rows.sort(key=lambda r: order[r[0]])
    figure, (ax,) = canvas(height=0.75 + 0.35 * len(rows))
    mark = Marks()
    for y, (method, _, figures) in enumerate(reversed(rows)):
        token, _, marker = roles(g)[method]
        mean, low, high = figures
        if low is not None:
            ax.hlines(y, low, high, color=c[token], lw=2)
        mark(ax.plot([mean], [y], marker, color=c[token])[0])
        ax.annotate(
            f"{mean:.3f}", (mean, y), (0, 5), textcoords="offset points", ha="center", va="bottom"
        )
    ax.set_yticks(range(len(rows)), [r[0] for r in reversed(rows)])
    ax.tick_params(axis="y", labelcolor=c["text"])
    ax.set_ylim(-0.5, len(rows) - 0.25)
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    what = "Score" if key == "score" else "Win rate against base"
    ax.set_xlabel(evaluation.get("score_scale") or what if key == "score" else what)
    return Drawing(
        "results",
        f"{what} on held-out queries",
        f"{what} of the last policy of each method on {evaluation['queries']:,} held-out queries; "
        "a line is the 95 % bootstrap interval. Where lines of two models overlap widely, look at "
        "the paired difference above, which is sharper.",
        ("model", "mean", "low", "high"),
        [(method, *figures) for method, _, figures in rows],
        figure,
    )


def accuracy(g: Gathered, c: dict[str, str]) -> Drawing:
    """Accuracy of the pairs by on-policyness: SSO v2, figure 3."""
    points: list[tuple[str, int, str, dict[str, Any], float | None, float | None]] = []
    for method, iterations in g.found["quality"].items():
        for k, measured in enumerate(iterations, 1):
            for kind in ("triples", "preferences"):
                figures = measured.get(kind)
                if not figures or figures["accuracy"] is None:
                    continue
                if kind == "triples" and g.recipe["method"] == "sso-online":
                    continue  # the same records as its preferences
                wins = [w for v, w in WORTH.items() for _ in range(figures["verdicts"][v])]
                _, low, high = mean_interval(wins, np.random.default_rng(0), 1000)
                points.append((method, k, kind, figures, low, high))
    if not points:
        raise NothingToDrawError(
            "No pairs were judged (the recipe has no judge, or the quality stage has not run), so "
            "accuracy is not drawn against on-policyness."
        )
    figure, (ax,) = canvas()
    mark = Marks()
    several = g.recipe["iterations"] > 1
    for method, k, kind, figures, low, high in points:
        token, _, marker = roles(g)[method]
        x, y = figures["on_policyness"]["both"], figures["accuracy"]
        if low is not None and high is not None:
            ax.vlines(x, low, high, color=c[token], lw=1)
        face = c["surface"] if kind == "triples" else c[token]
        mark(ax.plot([x], [y], marker, color=c[token], mfc=face, mew=1.5, ms=7)[0])
        label = f"{method}{f' {k}' if several else ''}"
        if kind == "triples":
            label = "policy's own" + (f" {k}" if several else "")
        side = -1 if method != g.recipe["method"] else 1
        ax.annotate(
            label, (x, y), (9, 10 * side), textcoords="offset points", color=c[token], va="center"
        )
    ax.margins(0.28, 0.3)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("on-policyness: mean probability per token")
    ax.set_ylabel("accuracy of the pairs")
    return Drawing(
        "accuracy",
        "Are the pairs right, and could the policy have written them?",
        "Each point is a set of pairs: how often the judge prefers the chosen response, by how "
        "probable both responses are under the policy. Up and to the right is better data. "
        "Hollow: the policy's own triples, before a generator was trained. Vertical lines are 95 % "
        "intervals over pairs. Compare figure 3 of the SSO paper.",
        ("method", "iteration", "set", "on-policyness", "accuracy", "low", "high"),
        [
            (m, k, kind, f["on_policyness"]["both"], f["accuracy"], low, high)
            for m, k, kind, f, low, high in points
        ],
        figure,
    )


# -- the data -------------------------------------------------------------------------------------

SHAPES = {
    "plain/plain": ("plain", "plain", ":"),
    "plain/good": ("chosen", "good", "-"),
    "plain/bad": ("rejected", "bad", "--"),
}


def likelihood(g: Gathered, c: dict[str, str]) -> Drawing:
    """Distributions of log-prob under the plain context: why SSO."""
    sets = g.likelihoods
    if not sets:
        raise NothingToDrawError("")
    several = len({s.where for s in sets}) > 1
    every = np.concatenate([s.means[n] for s in sets for n in SHAPES if n in s.means])
    low = float(np.quantile(every, 0.005))
    edges = np.linspace(low, 0.0 if every.max() <= 0 else float(every.max()), 41)
    figure, axes = canvas(len(sets), 0.55 + 1.15 * len(sets), sharex=True)
    mark = Marks()
    rows: list[Sequence[Cell]] = []
    for ax, s in zip(axes, sets, strict=True):
        writer = "generator" if s.kind == "preferences" and _has_generator(g) else "policy"
        where = f", {s.where.replace('-', ' ')}" if several else ""
        ax.set_title(f"written by the {writer}{where}")
        beside = _plain_of(sets, s)
        for name, (label, token, line) in SHAPES.items():
            means = s.means.get(name, beside if name == "plain/plain" else None)
            if means is None:
                continue
            share, _ = np.histogram(means.clip(edges[0], edges[-1]), edges)
            heights, middle = share / len(means), float(np.median(means))
            fill = name == "plain/plain"
            if fill:
                ax.stairs(heights, edges, fill=True, color=c[token], alpha=0.22)
            text = f"{label}, median {middle:.2f}".replace("-", "−")
            mark(ax.stairs(heights, edges, color=c[token], ls=line, lw=1.6, label=text))
            rows.append((writer, s.where, label, len(means), *_quartiles(means)))
        ax.set_yticks([])
        ax.set_ylim(0, 1.15 * ax.get_ylim()[1])
        ax.legend(loc="upper left")
    axes[-1].set_xlabel("mean log-probability per token, given the query alone")
    drawn = "; ".join(f"{s.rows:,} of {s.size:,} {s.kind}" for s in sets)
    caption = (
        "How probable the policy finds each response when it sees the query without a principle. "
        "A rejected response far to the left is one the policy would never write, and teaches it "
        "little. "
    )
    if _has_generator(g):
        caption += (
            "A trained generator should move the rejected responses to the right, towards the "
            "plain ones, and leave the chosen ones where they are. "
        )
    return Drawing(
        "likelihood",
        "Why a generator is trained" if _has_generator(g) else "How likely the responses are",
        caption + f"Drawn from {drawn}; the leftmost bin holds all that is further left.",
        ("written by", "iteration", "response", "n", "5 %", "25 %", "median", "75 %", "95 %"),
        rows,
        figure,
    )


def _plain_of(sets: Sequence[Likelihoods], mine: Likelihoods) -> np.ndarray | None:
    """Plain responses of the same iteration, for comparison."""
    same = (s.means.get("plain/plain") for s in sets if s.where == mine.where)
    return next((m for m in same if m is not None), None)


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(q) for q in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])]


def _has_generator(g: Gathered) -> bool:
    return bool(g.recipe["method"] == "sso")


def gaps(g: Gathered, c: dict[str, str]) -> Drawing:
    """Steering gap by feature."""
    steered = [s for s in g.likelihoods if "good/good" in s.means]
    if not steered:
        raise NothingToDrawError(
            ""
            if not g.likelihoods
            else "Log-probs under the principles are not kept, so the "
            "steering gap is not drawn by feature."
        )
    s = steered[0]
    sides = {
        "good": s.means["good/good"] - s.means["bad/good"],
        "bad": s.means["bad/bad"] - s.means["good/bad"],
    }
    names = sorted({f for features in s.features for f in features})
    rows: list[tuple[str, int, str, float, float | None, float | None]] = []
    for feature in names:
        has = np.array([feature in features for features in s.features])
        for side, values in sides.items():
            known = values[has][~np.isnan(values[has])]
            if known.size:
                found = mean_interval(known.tolist(), np.random.default_rng(0), 500)
                rows.append((feature, int(known.size), side, *found))
    if not rows:
        raise NothingToDrawError("No record names its features, so there is no gap by feature.")
    order = {n: max(r[3] for r in rows if r[0] == n) for n in {r[0] for r in rows}}
    shown = sorted(order, key=lambda n: order[n])
    figure, (ax,) = canvas(height=1.0 + 0.26 * len(shown))
    mark = Marks()
    for feature, _, side, mean, low, high in rows:
        y = shown.index(feature) + (0.14 if side == "good" else -0.14)
        if low is not None and high is not None:
            ax.hlines(y, low, high, color=c[side], lw=1.2)
        marker = "o" if side == "good" else "X"
        mark(ax.plot([mean], [y], marker, color=c[side], ms=5.5)[0])
    ax.axvline(0, color=c["muted"], lw=0.8)
    ax.set_yticks(range(len(shown)), shown)
    ax.set_ylim(-0.5, len(shown) - 0.5)
    ax.tick_params(axis="y", labelcolor=c["text"])
    ax.grid(axis="y", visible=False)
    for side, marker in (("good", "o"), ("bad", "X")):
        ax.plot([], [], marker, color=c[side], ms=5.5, label=f"{side} response")
    figure.legend(loc="outside upper left", ncols=2)
    ax.set_xlabel("steering gap, nats per token")
    return Drawing(
        "gaps",
        "Which principles the policy follows",
        "How much more probable a response is under its own principle than under the opposite one, "
        "by the features that the principle names. At zero the principle changes nothing and the "
        f"pair is noise. {s.rows:,} of {s.size:,} {s.kind} of {s.where.replace('-', ' ')}; lines "
        "are 95 % intervals.",
        ("feature", "n", "response", "gap", "low", "high"),
        rows,
        figure,
    )


def funnel(g: Gathered, c: dict[str, str]) -> Drawing:
    """From queries to what the policy is trained on."""
    steps = []
    for name, entry in g.stages.items():
        end = name.rpartition("/")[2]
        # evaluation, quality and what is not a record's way to the policy stand aside
        if name.startswith("baseline/") or entry["event"] != "finish":
            continue
        if end in ("evaluation", "quality"):
            continue
        steps.append((name, entry))
    last = f"iteration-{g.recipe['iterations']}"
    cut = len(steps) > 16
    if cut:
        keep = ("queries", "augment")
        steps = [(n, e) for n, e in steps if n in keep or n.startswith(last)]
    if not steps:
        raise NothingToDrawError("No stage has finished, so there is nothing to count.")
    several = g.recipe["iterations"] > 1
    figure, (ax,) = canvas(height=0.6 + 0.42 * len(steps))
    mark, rows = Marks(), []
    # queries that nobody wanted would dwarf the rest; they are only named
    drops = [sum(n for r, n in e["dropped"].items() if r != "over_limit") for _, e in steps]
    top = max(e["n_out"] + lost for (_, e), lost in zip(steps, drops, strict=True))
    for y, ((name, entry), lost) in enumerate(zip(steps, drops, strict=True)):
        token = "plain" if name.startswith(("queries", "augment")) else "method-1"
        mark(ax.barh(y, entry["n_out"], 0.5, color=c[token])[0])
        if lost:
            ax.barh(
                y,
                lost,
                0.5,
                left=entry["n_out"],
                facecolor=c["grid"],
                edgecolor=c["muted"],
                hatch="////",
                lw=0.5,
            )
        reasons = sorted(entry["dropped"].items(), key=lambda x: -x[1])
        shown = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in reasons[:2])
        more = f", {sum(n for _, n in reasons[2:]):,} others" if len(reasons) > 2 else ""
        text = f"{entry['n_out']:,}" + (f"  −{shown}{more}" if reasons else "")
        ax.annotate(
            text, (0, y), (3, 13), textcoords="offset points", va="center", color=c["muted"]
        )
        rows += [(name, entry["n_in"], entry["n_out"], reason, n) for reason, n in reasons]
        if not reasons:
            rows.append((name, entry["n_in"], entry["n_out"], "", None))
    labels = [n.replace("iteration-", "") if several else n.rpartition("/")[2] for n, _ in steps]
    ax.set_yticks(range(len(steps)), labels)
    ax.tick_params(axis="y", labelcolor=c["text"])
    ax.set_ylim(len(steps) - 0.5, -0.9)
    ax.set_xlim(0, top * 1.04)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("records")
    return Drawing(
        "funnel",
        "From queries to preferences",
        "Records that each stage handed on (solid) and dropped (hatched), with the two most common "
        "reasons; queries over the recipe's limit are only named. A training keeps some queries "
        "back to choose its checkpoint by: held out. The generator may be trained on a subset."
        + (f" Only {last.replace('-', ' ')} is drawn." if cut else ""),
        ("stage", "in", "out", "dropped because", "n"),
        rows,
        figure,
    )


def lengths(g: Gathered, c: dict[str, str]) -> Drawing:
    """Length drift by iteration: answers of the policies, and the pairs they learnt from."""
    rows: list[tuple[str, str, int, float]] = []
    evaluation = g.found["evaluation"]
    for method in g.found["quality"]:
        models = evaluation["models"] if evaluation else {}
        if models:
            rows.append((method, "answers", 0, models["base"]["tokens"]))
        for k in range(1, g.recipe["iterations"] + 1):
            if f"{method}/iteration-{k}" in models:
                tokens = models[f"{method}/iteration-{k}"]["tokens"]
                rows.append((method, "answers", k, tokens))
        for k, measured in enumerate(g.found["quality"][method], 1):
            for response, tokens in measured["preferences"]["tokens"].items():
                if response in ("chosen", "rejected"):
                    rows.append((method, response, k, tokens))
    if not rows:
        raise NothingToDrawError("Nothing was measured yet, so length drift is not drawn.")
    panels = [p for p in (("answers",), ("rejected", "chosen")) if any(r[1] in p for r in rows)]
    figure, axes = canvas(len(panels), 0.6 + 1.3 * len(panels), sharex=True)
    mark = Marks()
    for ax, kinds in zip(axes, panels, strict=True):
        for method in g.found["quality"]:
            token, line, marker = roles(g)[method]
            for kind in kinds:
                mine = [(k, tokens) for m, name, k, tokens in rows if (m, name) == (method, kind)]
                if not mine:
                    continue
                hollow = kind == "rejected"
                x, y = zip(*mine, strict=True)
                aside = 0.02 if method == g.recipe["method"] else -0.02
                x = tuple(k + aside for k in x)  # equal lengths would hide each other
                face = c["surface"] if hollow else c[token]
                label = method if kind == "answers" else f"{method} {kind}"
                shape: dict[str, Any] = {"ls": ":", "ms": 8} if hollow else {"ls": line}
                shape |= {"marker": marker, "mfc": face, "label": label}
                mark(ax.plot(x, y, color=c[token], **shape)[0])
        answers = kinds == ("answers",)
        ax.set_title("answers to held-out queries" if answers else "pairs trained on")
        ax.set_ylabel("tokens")
        low, high = ax.get_ylim()
        middle, half = (low + high) / 2, max((high - low) / 2, 0.1 * high)
        ax.set_ylim(max(middle - 1.4 * half, 0), middle + 1.4 * half)
        ax.legend(loc="upper left", ncols=2, columnspacing=1)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlim(-0.3, g.recipe["iterations"] + 0.3)
    axes[-1].set_xlabel("iteration (0: the base model)")
    return Drawing(
        "lengths",
        "Do answers drift in length?",
        "Mean tokens of the models' answers and of the pairs they were trained on. Chosen "
        "responses much longer than rejected ones teach length, and answers that grow from "
        "iteration to iteration show that it was learnt.",
        ("method", "of", "iteration", "tokens"),
        rows,
        figure,
    )


# -- the trainings --------------------------------------------------------------------------------


def _half(stage: str) -> str:
    """``generator``, ``policy``, ``train_reward`` …, whatever the iteration."""
    return re.sub(r"^(baseline/)?(iteration-\d+/)?", "", stage)


def _curves(g: Gathered, key: str) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    """Kind of training → (method, context) → (steps, value) rows; iterations one after another."""
    raw: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {}
    offsets: dict[tuple[str, str], int] = {}
    for stage, entries in g.metrics.items():
        baseline = stage.startswith("baseline/")
        method = g.recipe["baseline"] if baseline else g.recipe["method"]
        kind, _, half = _half(stage).partition("/")
        start = offsets.get((method, _half(stage)), 0)
        for entry in entries:
            for name, value in entry.items():
                metric, _, context = name.partition(key)
                if metric or not name.startswith(key) or value is None:
                    continue
                if context and not context.startswith("/"):
                    continue
                if key == "loss" and context:
                    continue
                line = raw.setdefault(kind, {}).setdefault((method, context.strip("/") or half), [])
                line.append((start + entry["step"], float(value)))
        offsets[method, _half(stage)] = start + max(e["step"] for e in entries)
    return {
        kind: {name: _thin(np.array(points)) for name, points in lines.items()}
        for kind, lines in raw.items()
    }


def _thin(points: np.ndarray) -> np.ndarray:
    """At most POINTS rows, each the mean of its neighbours."""
    size = -(-len(points) // POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return np.array([p.mean(axis=0) for p in parts])


def _curve_drawing(
    g: Gathered, c: dict[str, str], name: str, title: str, keys: Sequence[str], caption: str
) -> Drawing:
    found = {key: _curves(g, key) for key in keys}
    kinds = sorted({kind for curves in found.values() for kind in curves})
    if not kinds:
        raise NothingToDrawError(
            "There are no training metrics (metrics.jsonl), so trainings are not drawn."
        )
    figure, axes = canvas(len(kinds), 0.5 + 1.5 * len(kinds))
    mark = Marks()
    rows: list[Sequence[Cell]] = []
    thinned = False
    for ax, kind in zip(axes, kinds, strict=True):
        ax.set_title(kind.replace("_", " "))
        methods = {m for key in keys for m, _ in found[key].get(kind, {})}
        for i, key in enumerate(keys):
            for (method, context), points in found[key].get(kind, {}).items():
                token, line, _ = roles(g)[method]
                if kind == "generator" or len(found[key][kind]) > 2:
                    token = {"good": "good", "plus": "good", "bad": "bad", "minus": "bad"}.get(
                        context, token
                    )
                    line = {"bad": "--", "minus": "--"}.get(context, line)
                words = [method] if len(methods) > 1 else []
                words += [f"{context} context" if context in CONTEXTS else context]
                if len(keys) > 1:
                    line = ("-", "--")[i]
                    words.append(("preferred", "other")[i])
                label = " ".join(filter(None, words)) or method
                x, y = points.T
                thinned |= bool(len(points) > 1 and x[1] - x[0] > 1)
                alone: dict[str, Any] = {"marker": "o", "ms": 3} if len(x) == 1 else {}
                mark(ax.plot(x, y, line, color=c[token], label=label, **alone)[0])
                stride = -(-len(points) // ROWS)
                rows += [
                    (kind, label, int(a) if a.is_integer() else float(a), float(b))
                    for a, b in points[::stride].tolist()
                ]
        if len(ax.lines) > 3:
            low, high = ax.get_ylim()
            ax.set_ylim(low - 0.4 * (high - low), high)
            ax.legend(loc="lower left", ncols=2, fontsize=7, columnspacing=1)
        else:
            ax.legend(loc="best")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.margins(x=0.02)
    axes[-1].set_xlabel("step")
    if thinned:
        caption += " Each point is the mean of neighbouring steps."
    if g.recipe["iterations"] > 1:
        caption += " Iterations follow one another."
    return Drawing(name, title, caption, ("training", "line", "step", "value"), rows, figure)


def loss(g: Gathered, c: dict[str, str]) -> Drawing:
    """Loss of every training."""
    caption = "It should fall, and settle."
    trainings = [g.recipe["training"], *([g.recipe["generator"]] if _has_generator(g) else [])]
    if all(t["base"] == "sigmoid" for t in trainings):
        caption += (
            " A DPO term starts at log 2 = 0.69; trainings with several terms start at their "
            "weighted sum."
        )
    return _curve_drawing(g, c, "loss", "Loss", ("loss",), caption)


def margins(g: Gathered, c: dict[str, str]) -> Drawing:
    """Reward margins by term."""
    return _curve_drawing(
        g,
        c,
        "margins",
        "Margins by term",
        ("rewards/margins",),
        "β times how far the model has moved apart the preferred and the other response, by the "
        "context of the term. It starts at zero; one that stays there is not learnt.",
    )


def reward_accuracies(g: Gathered, c: dict[str, str]) -> Drawing:
    """Share of pairs ranked right, by term."""
    return _curve_drawing(
        g,
        c,
        "reward-accuracies",
        "Pairs ranked right, by term",
        ("rewards/accuracies",),
        "Share of the pairs of a step whose preferred response gained more probability than the "
        "other. At 1 from early on, the pairs are too easy; at one half nothing is learnt.",
    )


def rewards(g: Gathered, c: dict[str, str]) -> Drawing:
    """Rewards of both sides: is the margin made by pushing down?"""
    return _curve_drawing(
        g,
        c,
        "rewards",
        "Where the margin comes from",
        ("rewards/chosen", "rewards/rejected"),
        "Solid: the preferred response, dashed: the other. Both falling together is the well-known "
        "way in which DPO loses probability of everything; the preferred one should not sink far.",
    )


def selection(g: Gathered, c: dict[str, str]) -> Drawing:
    """What each candidate step was measured to be, and which was kept."""
    if not g.selections:
        raise NothingToDrawError(
            "No checkpoint was selected (too few queries, or selection is off, or no training has "
            "finished): the last step of each training is kept."
        )
    several = g.recipe["iterations"] > 1
    rows: list[Sequence[Cell]] = []
    scored, policied = [], []
    for stage, chosen in g.selections.items():
        baseline = stage.startswith("baseline/")
        method = g.recipe["baseline"] if baseline else g.recipe["method"]
        label = f"{method} {_half(stage)}"
        if several:
            label += f" {stage.partition('iteration-')[2].partition('/')[0]}"
        is_generator = _half(stage).startswith("generator")
        wins = [c.get("wins_mean") for c in chosen["candidates"]]
        for candidate, mean in zip(chosen["candidates"], wins, strict=True):
            policyness = candidate.get("on_policyness") or {}
            rows.append(
                (
                    label,
                    candidate["step"],
                    "kept" if candidate["step"] == chosen["chosen"] else "",
                    *(mean or (None, None, None)),
                    policyness.get("chosen"),
                    policyness.get("rejected"),
                    max(candidate["excess"].values()) if candidate.get("excess") else None,
                )
            )
        measured = [
            (x["step"], *w)
            for x, w in zip(chosen["candidates"], wins, strict=True)
            if w is not None
        ]
        if measured:
            scored.append((label, method, is_generator, chosen, measured))
        if is_generator:
            policied.append((label, chosen))
    panels = [bool(scored), bool(policied)]
    if not any(panels):
        raise NothingToDrawError("Selection had no judge, so candidates are not drawn.")
    figure, axes = canvas(sum(panels), 0.5 + 1.6 * sum(panels), sharex=False)
    mark = Marks()
    if scored:
        ax = axes[0]
        measures = sorted({chosen["wins"] for _, _, _, chosen, _ in scored})
        ax.set_title(" or ".join(measures) + " on held-back queries")
        for label, method, is_generator, chosen, measured in scored:
            token, line, marker = roles(g)[method]
            token = "good" if is_generator else token
            x, y, low, high = (np.array(v, dtype=float) for v in zip(*measured, strict=True))
            ax.vlines(x, low, high, color=c[token], lw=1, alpha=0.6)
            marker = "^" if is_generator else marker
            mark(ax.plot(x, y, line + marker, color=c[token], ms=4.5, label=label)[0])
            kept = x == chosen["chosen"]
            ax.plot(x[kept], y[kept], "o", mfc="none", color=c["text"], ms=11, mew=1.2)
        ax.legend(loc="best")
    for label, chosen in policied:
        ax = axes[-1]
        ax.set_title("on-policyness of what the generator writes")
        for side, token, line in (("chosen", "good", "-"), ("rejected", "bad", "--")):
            known = [x for x in chosen["candidates"] if x.get("on_policyness")]
            steps = [x["step"] for x in known]
            values = [x["on_policyness"][side] for x in known]
            text = side if len(policied) == 1 else f"{label} {side}"
            mark(ax.plot(steps, values, line + "o", color=c[token], ms=4, label=text)[0])
        ax.axvline(chosen["chosen"], color=c["text"], lw=1, ls=":")
        ax.legend(loc="best")
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[-1].set_xlabel("step")
    return Drawing(
        "selection",
        "Which step is kept",
        "Candidates of each training, measured on queries that it did not see; step 0 is its "
        "start. The ring and the dotted line mark the kept step. A generator should become more "
        "on-policy without losing accuracy; a policy should win more often against its start.",
        ("training", "step", "", "wins", "low", "high", "on-policy chosen", "rejected", "drift"),
        rows,
        figure,
    )


def times(g: Gathered, c: dict[str, str]) -> Drawing:
    """Wall time of every finished stage."""
    rows = [(n, e["seconds"]) for n, e in g.stages.items() if e["event"] == "finish"]
    if not rows:
        raise NothingToDrawError("No stage has finished, so there are no times.")
    total = sum(s for _, s in rows)
    shown = rows
    if len(rows) > 18:
        sums: dict[str, float] = {}
        for name, seconds in rows:
            kind = re.sub(r"iteration-\d+/", "", name)
            sums[kind] = sums.get(kind, 0.0) + seconds
        shown = list(sums.items())
    figure, (ax,) = canvas(height=0.6 + 0.23 * len(shown))
    mark = Marks()
    top = max(max(s for _, s in shown), 1e-9)
    for y, (name, seconds) in enumerate(shown):
        token = "method-2" if name.startswith("baseline/") else "method-1"
        shared = name in ("queries", "augment", "evaluation") or name.endswith("principles")
        mark(ax.barh(y, seconds, 0.6, color=c["plain" if shared else token])[0])
        text = duration(seconds) if seconds >= 1 else "< 1 s"
        ax.annotate(
            text, (seconds, y), (3, 0), textcoords="offset points", va="center", color=c["muted"]
        )
    several = g.recipe["iterations"] > 1
    labels = [n if several else n.replace("iteration-1/", "") for n, _ in shown]
    ax.set_yticks(range(len(shown)), labels)
    ax.tick_params(axis="y", labelcolor=c["text"])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlim(0, top * 1.2)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("seconds")
    summed = "" if shown is rows else " Stages of the same name are added over the iterations."
    return Drawing(
        "times",
        "Where the time went",
        f"Wall time of each stage's last, finishing try; {duration(total)} together.{summed} Grey "
        "stages serve both methods.",
        ("stage", "seconds"),
        rows,
        figure,
    )


ALL: Sequence[Callable[[Gathered, dict[str, str]], Drawing]] = (
    results,
    accuracy,
    likelihood,
    gaps,
    selection,
    lengths,
    funnel,
    times,
    loss,
    margins,
    reward_accuracies,
    rewards,
)
