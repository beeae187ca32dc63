"""The figures: one matplotlib drawing each, from which the page's SVG and the files are made.

In the page every colour is a variable of style.css, so that a figure follows light and dark; the
files beside it keep the light colours. What a reader counts (a point, a line, a bar) carries the
class ``mark``. Each figure has a caption that says what to see, and the table it was drawn from.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO, StringIO
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfsteer.judges.quality import steering_gaps
from selfsteer.judges.stats import WORTH, Interval, known_interval, mean_interval
from selfsteer.principles.contexts import CONTEXTS
from selfsteer.report.logprobs import Likelihoods
from selfsteer.report.page import asset
from selfsteer.report.tables import PAIR, Cell, Sheet
from selfsteer.terminal import duration
from selfsteer.view import RunView, StageView, is_finite

#: Points of a curve; of longer trainings each point is the mean of neighbouring steps.
POINTS = 200
#: Rows of the table behind a curve.
ROWS = 40
#: Inches; at this size the text stays legible on a phone.
WIDTH, HEIGHT = 4.2, 2.75


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption and the numbers behind it."""

    name: str
    title: str
    caption: str
    sheet: Sheet
    figure: Figure


class NothingToDrawError(Exception):
    """Why a figure is left out, as a sentence."""


# -- colours, type and files -----------------------------------------------------------------------


@cache
def palette() -> dict[str, str]:
    """Token of style.css → its light colour."""
    return dict(re.findall(r"--([\w-]+): light-dark\((#\w{6})", asset("style.css")))


@contextmanager
def drawing_style() -> Iterator[None]:
    """Colours and type of all figures."""
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
        yield


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


class Plot:
    """Panels below each other, and the marks that a reader counts in them."""

    def __init__(self, panels: int = 1, height: float = HEIGHT, **options: Any) -> None:
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        self.axes: list[Axes] = list(
            self.figure.subplots(panels, 1, squeeze=False, **options)[:, 0]
        )
        self._marks = 0

    def mark(self, artist: Artist) -> None:
        """An artist that is counted."""
        artist.set_gid(f"mark-{self._marks}")
        self._marks += 1

    def line(self, ax: Axes, x: Any, y: Any, *form: str, **style: Any) -> None:
        """A line, or a single point, that is counted."""
        self.mark(ax.plot(x, y, *form, **style)[0])


def rows_of(ax: Axes, labels: Sequence[str], top: float = 0.5) -> None:
    """Names the rows of a horizontal chart, the first one uppermost with so much room above."""
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", labelcolor=palette()["text"])
    ax.set_ylim(len(labels) - 0.5, -top)
    ax.grid(axis="y", visible=False)


def whole_numbers(ax: Axes) -> None:
    """Ticks at whole numbers only, and few of them."""
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def beside(
    ax: Axes, text: str, at: tuple[float, float], by: tuple[float, float], **style: Any
) -> None:
    """A text some points away from a place."""
    ax.annotate(text, at, by, textcoords="offset points", **{"va": "center", **style})


class Look(NamedTuple):
    """How a model or a method is drawn."""

    colour: str
    line: str
    marker: str


def looks(run: RunView) -> dict[str, Look]:
    """Of the base model and of the run's methods."""
    c = palette()
    all_of = (
        Look(c["base"], ":", "D"),
        Look(c["method-1"], "-", "o"),
        Look(c["method-2"], "--", "s"),
    )
    return dict(zip(("base", *run.methods), all_of, strict=False))


def figures(run: RunView, sets: Sequence[Likelihoods]) -> tuple[list[Drawing], list[str]]:
    """All that can be drawn of a run, in reading order, and why the rest cannot."""
    drawn, missing = list[Drawing](), list[str]()
    of_sets = (partial(likelihood, sets=sets), partial(gaps, sets=sets))
    curves = (partial(curve, spec=spec) for spec in CURVES)
    draws: tuple[Callable[[RunView], Drawing], ...]
    draws = (results, accuracy, *of_sets, selection, lengths, funnel, times, *curves)
    for draw in draws:
        with drawing_style():
            try:
                drawn.append(draw(run))
            except NothingToDrawError as e:
                if str(e) and str(e) not in missing:
                    missing.append(str(e))
    return drawn, missing


# -- results ---------------------------------------------------------------------------------------


def results(run: RunView) -> Drawing:
    """Score of each model on held-out queries, with intervals."""
    evaluation = run.evaluation
    if evaluation is None:
        raise NothingToDrawError("There is no evaluation, so models are not compared.")
    scored = evaluation.models["base"].score is not None
    rows: list[tuple[str, Interval]] = []
    for name in ("base", *reversed(run.methods)):
        answers = evaluation.models.get(evaluation.finals.get(name, name))
        figure = answers and (answers.score if scored else answers.win_rate)
        if figure:
            rows.append((name, figure))
    if not rows:
        raise NothingToDrawError(
            "The evaluation has no judge that can compare answers, so models are not compared."
        )
    plot = Plot(height=0.75 + 0.35 * len(rows))
    (ax,) = plot.axes
    for y, (name, (mean, low, high)) in enumerate(rows):
        look = looks(run)[name]
        if low is not None and high is not None:
            ax.hlines(y, low, high, color=look.colour, lw=2)
        plot.line(ax, [mean], [y], look.marker, color=look.colour)
        beside(ax, f"{mean:.3f}", (mean, y), (0, 5), ha="center", va="bottom")
    rows_of(ax, [name for name, _ in rows], top=0.75)
    ax.margins(x=0.12)
    what = "Score" if scored else "Win rate against base"
    ax.set_xlabel((scored and evaluation.score_scale) or what)
    return Drawing(
        "results",
        f"{what} on held-out queries",
        f"{what} of the last policy of each method on {evaluation.queries:,} held-out queries; "
        "a line is the 95 % bootstrap interval. Where lines of two models overlap widely, look at "
        "the paired difference above, which is sharper.",
        Sheet("", ("model", "mean", "low", "high"), [(name, *figure) for name, figure in rows]),
        plot.figure,
    )


def accuracy(run: RunView) -> Drawing:
    """Accuracy of the pairs by on-policyness: SSO v2, figure 3."""
    rows: list[Sequence[Cell]] = []
    plot = Plot()
    (ax,) = plot.axes
    several = run.recipe.last_round > 1
    for of, kind, figures in run.measured:
        if figures.accuracy is None or (kind == "triples" and of.pairs_are_triples):
            continue
        look, own = looks(run)[of.method], kind == "triples"
        counted = figures.verdicts or {}
        wins = [w for verdict, w in WORTH.items() for _ in range(counted.get(verdict, 0))]
        _, low, high = mean_interval(wins, np.random.default_rng(0), 1000)
        x, y = figures.on_policyness["both"], figures.accuracy
        if low is not None and high is not None:
            ax.vlines(x, low, high, color=look.colour, lw=1)
        face = palette()["surface"] if own else look.colour
        plot.line(ax, [x], [y], look.marker, color=look.colour, mfc=face, mew=1.5, ms=7)
        label = ("policy's own" if own else of.method) + (f" {of.k}" if several else "")
        away = (9, -10 if of.is_baseline else 10)
        beside(ax, label, (x, y), away, color=look.colour)
        rows.append((of.method, of.k, kind, x, y, low, high))
    if not rows:
        raise NothingToDrawError(
            "No pairs were judged (the recipe has no judge, or the quality stage has not run), so "
            "accuracy is not drawn against on-policyness."
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
        Sheet("", ("method", "iteration", "set", "on-policyness", "accuracy", "low", "high"), rows),
        plot.figure,
    )


# -- the data --------------------------------------------------------------------------------------

SHAPES = {
    "plain/plain": ("plain", "plain", ":"),
    "plain/good": ("chosen", "good", "-"),
    "plain/bad": ("rejected", "bad", "--"),
}


def likelihood(run: RunView, sets: Sequence[Likelihoods]) -> Drawing:
    """Distributions of log-prob under the plain context: why SSO."""
    if not sets:
        raise NothingToDrawError("")
    c = palette()
    every = np.concatenate([s.means[n] for s in sets for n in SHAPES if n in s.means])
    low = float(np.quantile(every, 0.005))
    edges = np.linspace(low, max(float(every.max()), 0.0), 41)
    plot = Plot(len(sets), 0.55 + 1.15 * len(sets), sharex=True)
    rows: list[Sequence[Cell]] = []
    trained = any(s.round.has_generator for s in sets)
    for ax, s in zip(plot.axes, sets, strict=True):
        writer = "generator" if s.kind == "preferences" and s.round.has_generator else "policy"
        where = f", iteration {s.round.k}" if len({s.round.k for s in sets}) > 1 else ""
        ax.set_title(f"written by the {writer}{where}")
        plain = next((o.means["plain/plain"] for o in sets
                      if o.round.k == s.round.k and "plain/plain" in o.means), None)  # fmt: skip
        for name, (label, token, line) in SHAPES.items():
            means = s.means.get(name, plain if name == "plain/plain" else None)
            if means is None:
                continue
            share, _ = np.histogram(means.clip(edges[0], edges[-1]), edges)
            heights = share / len(means)
            if name == "plain/plain":
                ax.stairs(heights, edges, fill=True, color=c[token], alpha=0.22)
            quantiles = np.quantile(means, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
            text = f"{label}, median {quantiles[2]:.2f}".replace("-", "−")
            plot.mark(ax.stairs(heights, edges, color=c[token], ls=line, lw=1.6, label=text))
            rows.append((writer, s.round.k, label, len(means), *quantiles))
        ax.set_yticks([])
        ax.set_ylim(0, 1.15 * ax.get_ylim()[1])
        ax.legend(loc="upper left")
    plot.axes[-1].set_xlabel("mean log-probability per token, given the query alone")
    drawn = "; ".join(f"{s.rows:,} of {s.size:,} {s.kind}" for s in sets)
    caption = (
        "How probable the policy finds each response when it sees the query without a principle. "
        "A rejected response far to the left is one the policy would never write, and teaches it "
        "little. "
    )
    if trained:
        caption += (
            "A trained generator should move the rejected responses to the right, towards the "
            "plain ones, and leave the chosen ones where they are. "
        )
    columns = ("written by", "iteration", "response", "n", "5 %", "25 %", "median", "75 %", "95 %")
    return Drawing(
        "likelihood",
        "Why a generator is trained" if trained else "How likely the responses are",
        caption + f"Drawn from {drawn}; the leftmost bin holds all that is further left.",
        Sheet("", columns, rows),
        plot.figure,
    )


def gaps(run: RunView, sets: Sequence[Likelihoods]) -> Drawing:
    """Steering gap by feature."""
    s = next((s for s in sets if "good/good" in s.means), None)
    if s is None:
        raise NothingToDrawError(
            "Log-probs under the principles are not kept, so the steering gap is not drawn by "
            "feature."
            if sets
            else ""
        )
    rows = []
    for feature in sorted({f for features in s.features for f in features}):
        has = np.array([feature in features for features in s.features])
        for side, values in steering_gaps(s.means).items():
            found = known_interval(values[has], np.random.default_rng(0), 500)
            if found:
                rows.append((feature, int((~np.isnan(values[has])).sum()), side, *found))
    if not rows:
        raise NothingToDrawError("No record names its features, so there is no gap by feature.")
    largest = {name: max(r[3] for r in rows if r[0] == name) for name, *_ in rows}
    shown = sorted(largest, key=lambda name: -largest[name])
    plot = Plot(height=1.0 + 0.26 * len(shown))
    (ax,) = plot.axes
    for side, marker, aside in (("good", "o", -0.14), ("bad", "X", 0.14)):
        style: dict[str, Any] = {"color": palette()[side], "ms": 5.5}
        ax.plot([], [], marker, label=f"{side} response", **style)
        for feature, _, _, mean, low, high in (r for r in rows if r[2] == side):
            y = shown.index(feature) + aside
            if low is not None and high is not None:
                ax.hlines(y, low, high, color=style["color"], lw=1.2)
            plot.line(ax, [mean], [y], marker, **style)
    ax.axvline(0, color=palette()["muted"], lw=0.8)
    rows_of(ax, shown)
    plot.figure.legend(loc="outside upper left", ncols=2)
    ax.set_xlabel("steering gap, nats per token")
    return Drawing(
        "gaps",
        "Which principles the policy follows",
        "How much more probable a response is under its own principle than under the opposite one, "
        "by the features that the principle names. At zero the principle changes nothing and the "
        f"pair is noise. {s.rows:,} of {s.size:,} {s.kind} of iteration {s.round.k}; lines are "
        "95 % intervals.",
        Sheet("", ("feature", "n", "response", "gap", "low", "high"), rows),
        plot.figure,
    )


def label_of(run: RunView, stage: StageView) -> str:
    """A stage's name, as short as it can be in a figure."""
    if run.recipe.last_round > 1 or stage.round is None:
        return stage.name.replace("iteration-", "")
    return f"baseline/{stage.title}" if is_baseline(run, stage) else stage.title


def is_baseline(run: RunView, stage: StageView) -> bool:
    """Whether it serves the recipe's baseline alone."""
    return stage.method not in (None, run.recipe.method)


def funnel(run: RunView) -> Drawing:
    """From queries to what the policy is trained on."""
    # what is not on a record's way to the policy stands aside
    aside = ("MeasureQuality", "Evaluate", "RunBenchmarks")
    steps = [s for s in run.stages if s.done and s.kind not in aside and not is_baseline(run, s)]
    cut = len(steps) > 16
    if cut:
        steps = [s for s in steps if s.round in (None, run.recipe.last_round)]
    if not steps:
        raise NothingToDrawError("No stage has finished, so there is nothing to count.")
    c = palette()
    plot = Plot(height=0.6 + 0.42 * len(steps))
    (ax,) = plot.axes
    rows: list[Sequence[Cell]] = []
    top = 0
    for y, s in enumerate(steps):
        plot.mark(ax.barh(y, s.n_out, 0.5, color=c["method-1" if s.method else "plain"])[0])
        # queries that nobody wanted would dwarf the rest; they are only named
        lost = sum(n for reason, n in s.dropped.items() if reason != "over_limit")
        top = max(top, s.n_out + lost)
        if lost:
            style: dict[str, Any] = {"facecolor": c["grid"], "edgecolor": c["muted"], "lw": 0.5}
            ax.barh(y, lost, 0.5, left=s.n_out, hatch="////", **style)
        reasons = sorted(s.dropped.items(), key=lambda x: -x[1])
        said = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in reasons[:2]]
        said += [f"{sum(n for _, n in reasons[2:]):,} others"] if len(reasons) > 2 else []
        text = f"{s.n_out:,}" + (f"  −{', '.join(said)}" if said else "")
        beside(ax, text, (0, y), (3, 13), color=c["muted"])
        rows += [(s.name, s.n_in, s.n_out, *pair) for pair in reasons or [("", 0)]]
    rows_of(ax, [label_of(run, s) for s in steps], top=0.9)
    ax.set_xlim(0, top * 1.04)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlabel("records")
    return Drawing(
        "funnel",
        "From queries to preferences",
        "Records that each stage handed on (solid) and dropped (hatched), with the two most common "
        "reasons; queries over the recipe's limit are only named. A training keeps some queries "
        "back to choose its checkpoint by: held out. The generator may be trained on a subset."
        + (f" Only iteration {run.recipe.last_round} is drawn." if cut else ""),
        Sheet("", ("stage", "in", "out", "dropped because", "n"), rows),
        plot.figure,
    )


def lengths(run: RunView) -> Drawing:
    """Length drift by iteration: answers of the policies, and the pairs they learnt from."""
    rows: list[tuple[str, str, int, float]] = []
    models = run.evaluation.models if run.evaluation else {}
    for method in run.methods:
        rounds = run.rounds_of(method)
        answers = {0: models.get("base"), **{r.k: models.get(r.label) for r in rounds}}
        rows += [(method, "answers", k, a.tokens) for k, a in answers.items() if a]
        pairs = {r.k: r.quality.preferences.tokens for r in rounds if r.quality}
        rows += [(method, side, k, tokens[side]) for k, tokens in pairs.items() for side in PAIR]
    if not rows:
        raise NothingToDrawError("Nothing was measured yet, so length drift is not drawn.")
    panels = {"answers to held-out queries": ("answers",), "pairs trained on": PAIR[::-1]}
    panels = {title: of for title, of in panels.items() if any(row[1] in of for row in rows)}
    plot = Plot(len(panels), 0.6 + 1.3 * len(panels), sharex=True)
    for ax, (title, kinds) in zip(plot.axes, panels.items(), strict=True):
        for method, kind in ((m, kind) for m in run.methods for kind in kinds):
            mine = [(k, tokens) for m, of, k, tokens in rows if (m, of) == (method, kind)]
            if not mine:
                continue
            look = looks(run)[method]
            x, y = np.array(mine).T
            x = x + (0.02 if method == run.recipe.method else -0.02)  # equal ones would hide
            shape: dict[str, Any] = {"ls": look.line, "mfc": look.colour}
            if kind == "rejected":
                shape = {"ls": ":", "ms": 8, "mfc": palette()["surface"]}
            shape["label"] = method if kind == "answers" else f"{method} {kind}"
            plot.line(ax, x, y, color=look.colour, marker=look.marker, **shape)
        ax.set_title(title)
        ax.set_ylabel("tokens")
        low, high = ax.get_ylim()
        middle, half = (low + high) / 2, max((high - low) / 2, 0.1 * high)
        ax.set_ylim(max(middle - 1.4 * half, 0), middle + 1.4 * half)
        ax.legend(loc="upper left", ncols=2, columnspacing=1)
    whole_numbers(plot.axes[-1])
    plot.axes[-1].set_xlim(-0.3, run.recipe.last_round + 0.3)
    plot.axes[-1].set_xlabel("iteration (0: the base model)")
    return Drawing(
        "lengths",
        "Do answers drift in length?",
        "Mean tokens of the models' answers and of the pairs they were trained on. Chosen "
        "responses much longer than rejected ones teach length, and answers that grow from "
        "iteration to iteration show that it was learnt.",
        Sheet("", ("method", "of", "iteration", "tokens"), rows),
        plot.figure,
    )


# -- the trainings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A figure of logged metrics; of two metrics the second is dashed."""

    name: str
    title: str
    metrics: tuple[str, ...]
    caption: str


CURVES = (
    Curve(
        "loss",
        "Loss",
        ("loss",),
        "It should fall, and settle. A DPO term (base sigmoid) starts at log 2 = 0.69; trainings "
        "with several terms start at their weighted sum.",
    ),
    Curve(
        "margins",
        "Margins by term",
        ("rewards/margins",),
        "β times how far the model has moved apart the preferred and the other response, by the "
        "context of the term. It starts at zero; one that stays there is not learnt.",
    ),
    Curve(
        "reward-accuracies",
        "Pairs ranked right, by term",
        ("rewards/accuracies",),
        "Share of the pairs of a step whose preferred response gained more probability than the "
        "other. At 1 from early on, the pairs are too easy; at one half nothing is learnt.",
    ),
    Curve(
        "rewards",
        "Where the margin comes from",
        ("rewards/chosen", "rewards/rejected"),
        "Solid: the preferred response, dashed: the other. Both falling together is the well-known "
        "way in which DPO loses probability of everything; the preferred one should not sink far.",
    ),
)

Lines = Mapping[tuple[str, str], np.ndarray]


def _lines(run: RunView, metric: str) -> dict[str, Lines]:
    """Kind of training → (method, context) → (step, value) rows; iterations one after another."""
    raw: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {}
    steps = Counter[tuple[str, str]]()  # of earlier iterations
    for stage in run.stages:
        method, (kind, _, half) = stage.method or run.recipe.method, stage.title.partition("/")
        entries = run.curves.get(stage.name, ())
        for entry in entries:
            for name, value in entry.items():
                term = name.removeprefix(metric)
                # the loss of a single term is in the log, but not drawn
                wanted = name == metric or (term.startswith("/") and metric != "loss")
                if wanted and is_finite(value):
                    line = raw.setdefault(kind, {}).setdefault((method, term[1:] or half), [])
                    line.append((steps[method, stage.title] + entry["step"], float(value)))
        steps[method, stage.title] += max((e["step"] for e in entries), default=0)
    return {
        kind: {name: _thin(np.array(points)) for name, points in lines.items()}
        for kind, lines in raw.items()
    }


def _thin(points: np.ndarray) -> np.ndarray:
    """At most POINTS rows, each the mean of its neighbours."""
    size = -(-len(points) // POINTS)
    return np.array([points[i : i + size].mean(axis=0) for i in range(0, len(points), size)])


def curve(run: RunView, spec: Curve) -> Drawing:
    """Metrics of every training, by its terms."""
    found = [_lines(run, metric) for metric in spec.metrics]
    kinds = sorted({kind for lines in found for kind in lines})
    if not kinds:
        raise NothingToDrawError(
            "There are no training metrics (metrics.jsonl), so trainings are not drawn."
        )
    plot = Plot(len(kinds), 0.5 + 1.5 * len(kinds))
    rows: list[Sequence[Cell]] = []
    caption, thinned = spec.caption, False
    for ax, kind in zip(plot.axes, kinds, strict=True):
        ax.set_title(kind.replace("_", " "))
        methods = {m for lines in found for m, _ in lines.get(kind, {})}
        for i, lines in enumerate(found):
            by_context = kind == "generator" or len(lines.get(kind, ())) > 2
            for (method, context), points in lines.get(kind, {}).items():
                colour, line, _ = looks(run)[method]
                side = {"plus": "good", "minus": "bad"}.get(context, context)
                if by_context and side in ("good", "bad"):
                    colour, line = palette()[side], "--" if side == "bad" else line
                words = [method] if len(methods) > 1 else []
                words += [f"{context} context" if context in CONTEXTS else context]
                if len(found) > 1:
                    line = ("-", "--")[i]
                    words.append(("preferred", "other")[i])
                label = " ".join(filter(None, words)) or method
                x, y = points.T
                thinned |= bool(len(x) > 1 and x[1] - x[0] > 1)
                alone: dict[str, Any] = {"marker": "o", "ms": 3} if len(x) == 1 else {}
                plot.line(ax, x, y, line, color=colour, label=label, **alone)
                kept = points[:: -(-len(points) // ROWS)].tolist()
                rows += [(kind, label, int(a) if a.is_integer() else a, b) for a, b in kept]
        legend: dict[str, Any] = {"loc": "best"}
        if len(ax.lines) > 3:
            low, high = ax.get_ylim()
            ax.set_ylim(low - 0.4 * (high - low), high)
            legend = {"loc": "lower left", "ncols": 2, "fontsize": 7, "columnspacing": 1}
        ax.legend(**legend)
        whole_numbers(ax)
        ax.margins(x=0.02)
    plot.axes[-1].set_xlabel("step")
    caption += " Each point is the mean of neighbouring steps." if thinned else ""
    caption += " Iterations follow one another." if run.recipe.last_round > 1 else ""
    sheet = Sheet("", ("training", "line", "step", "value"), rows)
    return Drawing(spec.name, spec.title, caption, sheet, plot.figure)


def selection(run: RunView) -> Drawing:
    """What each candidate step was measured to be, and which was kept."""
    trainings = [(s, s.selection) for s in run.stages if s.selection]
    if not trainings:
        raise NothingToDrawError(
            "No checkpoint was selected (too few queries, or selection is off, or no training has "
            "finished): the last step of each training is kept."
        )
    rows: list[Sequence[Cell]] = []
    scored = {found.wins for _, found in trainings if any(x.wins_mean for x in found.candidates)}
    generators = [s for s, _ in trainings if s.title.startswith("generator")]
    panels = bool(scored) + bool(generators)
    if not panels:
        raise NothingToDrawError("Selection had no judge, so candidates are not drawn.")
    c = palette()
    plot = Plot(panels, 0.5 + 1.6 * panels, sharex=False)
    if scored:
        plot.axes[0].set_title(" or ".join(sorted(filter(None, scored))) + " on held-back queries")
    if generators:
        plot.axes[-1].set_title("on-policyness of what the generator writes")
    for stage, found in trainings:
        method, of = stage.method or run.recipe.method, found.candidates
        label = f"{method} {stage.title}" + (f" {stage.round}" if run.recipe.last_round > 1 else "")
        for x in of:
            kept = "kept" if x.step == found.chosen else ""
            wins: Sequence[Cell] = x.wins_mean or (None, None, None)
            policyness = map((x.on_policyness or {}).get, PAIR)
            drift = max(x.excess.values()) if x.excess else None
            rows.append((label, x.step, kept, *wins, *policyness, drift))
        colour, line, marker = looks(run)[method]
        if stage in generators:
            colour, marker = c["good"], "^"
            known = [(x.step, x.on_policyness) for x in of if x.on_policyness]
            for side, token, dash in (("chosen", "good", "-"), ("rejected", "bad", "--")):
                values = [p[side] for _, p in known]
                style: dict[str, Any] = {"color": c[token], "ms": 4}
                style["label"] = side if len(generators) == 1 else f"{label} {side}"
                plot.line(plot.axes[-1], [step for step, _ in known], values, f"{dash}o", **style)
            plot.axes[-1].axvline(found.chosen, color=c["text"], lw=1, ls=":")
        measured = [(x.step, *x.wins_mean) for x in of if x.wins_mean]
        if measured:
            steps, y, low, high = np.array(measured, dtype=float).T
            plot.axes[0].vlines(steps, low, high, color=colour, lw=1, alpha=0.6)
            plot.line(plot.axes[0], steps, y, line + marker, color=colour, ms=4.5, label=label)
            ring = steps == found.chosen
            style = {"mfc": "none", "color": c["text"], "ms": 11, "mew": 1.2}
            plot.axes[0].plot(steps[ring], y[ring], "o", **style)
    for ax in plot.axes:
        ax.legend(loc="best")
        whole_numbers(ax)
    plot.axes[-1].set_xlabel("step")
    columns = (
        "training",
        "step",
        "",
        "wins",
        "low",
        "high",
        "on-policy chosen",
        "rejected",
        "drift",
    )
    return Drawing(
        "selection",
        "Which step is kept",
        "Candidates of each training, measured on queries that it did not see; step 0 is its "
        "start. The ring and the dotted line mark the kept step. A generator should become more "
        "on-policy without losing accuracy; a policy should win more often against its start.",
        Sheet("", columns, rows),
        plot.figure,
    )


def times(run: RunView) -> Drawing:
    """Wall time of every finished stage."""
    done = [s for s in run.stages if s.done]
    if not done:
        raise NothingToDrawError("No stage has finished, so there are no times.")
    c = palette()
    summed = len(done) > 18
    bars = dict[str, tuple[str, float]]()
    for s in done:
        label = f"{'baseline/' * is_baseline(run, s)}{s.title}" if summed else label_of(run, s)
        token = "plain" if s.method is None else "method-2" if is_baseline(run, s) else "method-1"
        bars[label] = (token, bars.get(label, ("", 0.0))[1] + s.seconds)
    plot = Plot(height=0.6 + 0.23 * len(bars))
    (ax,) = plot.axes
    for y, (token, seconds) in enumerate(bars.values()):
        plot.mark(ax.barh(y, seconds, 0.6, color=c[token])[0])
        text = duration(seconds) if seconds >= 1 else "< 1 s"
        beside(ax, text, (seconds, y), (3, 0), color=c["muted"])
    rows_of(ax, list(bars), top=0.6)
    ax.set_xlim(0, 1.2 * max(*(seconds for _, seconds in bars.values()), 1e-9))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("seconds")
    total = duration(sum(s.seconds for s in done))
    added = " Stages of the same name are added over the iterations." if summed else ""
    return Drawing(
        "times",
        "Where the time went",
        f"Wall time of each stage's last, finishing try; {total} together.{added} Grey stages "
        "serve both methods.",
        Sheet("", ("stage", "seconds"), [(s.name, s.seconds) for s in done]),
        plot.figure,
    )
