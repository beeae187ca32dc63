"""The figures: one matplotlib drawing each, from which the page's SVG and the files are made.

In the page every colour is a variable of style.css, so that a figure follows light and dark; the
files beside it keep the light colours. What a reader counts (a point, a line, a bar) carries the
class ``mark``. Each figure has a caption that says what to see, and the table it was drawn from.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from io import BytesIO
from itertools import cycle, product
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfsteer.data.jsonl import is_number
from selfsteer.judges.quality import steering_gaps
from selfsteer.judges.stats import WORTH, Interval, known_interval, mean_interval
from selfsteer.methods.base import Paired, Principled
from selfsteer.methods.contrast import Distilled
from selfsteer.objectives import REFERENCE_FREE
from selfsteer.principles.contexts import CONTEXTS
from selfsteer.recipe.sections import Optimisation
from selfsteer.report.logprobs import Likelihoods
from selfsteer.report.page import asset
from selfsteer.report.tables import PAIR, Cell, Sheet
from selfsteer.stages.train import Train
from selfsteer.terminal import duration
from selfsteer.view import RunView, StageView

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


def picture(drawing: Drawing, suffix: str) -> bytes:
    """A file that stands alone, in light colours: ``svg``, or ``png``, 840 pixels wide."""
    names = {"svg": ("Date", "Creator"), "png": ("Software",)}[suffix]
    metadata: dict[str, Any] = dict.fromkeys(names)
    with drawing_style(), BytesIO() as out:
        drawing.figure.savefig(out, format=suffix, dpi=200, metadata=metadata)
        drawing.figure.set_layout_engine("none")  # found once, it need not be found again
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


class Look(NamedTuple):
    """How a model or a method is drawn."""

    color: str
    ls: str
    marker: str


def looks(run: RunView) -> dict[str, Look]:
    """Of the base model and of the run's methods."""
    c = palette()
    # three colours, four lines, five marks: no two of sixty methods look the same
    colors = cycle(c[f"method-{n}"] for n in (1, 2, 3))
    of_methods = zip(
        run.methods, colors, cycle(("-", "--", "-.", ":")), cycle("os^vP"), strict=False
    )
    return {"base": Look(c["base"], ":", "D")} | {name: Look(*look) for name, *look in of_methods}


class Chart:
    """Panels below each other, and the marks that a reader counts in them.

    Args:
        titles: of the panels.
        height: inches.
        rows: names of the rows of a horizontal chart, the first one uppermost.
        room: above the first row, in rows.
        xlabel: of the lowest panel.
        options: of matplotlib's ``subplots``.
    """

    def __init__(
        self,
        *titles: str,
        height: float = HEIGHT,
        rows: Sequence[str] = (),
        room: float = 0.5,
        xlabel: str = "",
        **options: Any,
    ) -> None:
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        count = len(titles) or 1
        self.axes: list[Axes] = list(self.figure.subplots(count, 1, squeeze=False, **options)[:, 0])
        for ax, title in zip(self.axes, titles, strict=False):
            ax.set_title(title)
        self.axes[-1].set_xlabel(xlabel)
        if rows:
            ax = self.axes[0]
            ax.set_yticks(range(len(rows)), rows)
            ax.tick_params(axis="y", labelcolor=palette()["text"])
            ax.set_ylim(len(rows) - 0.5, -room)
            ax.grid(axis="y", visible=False)
        self._marks = 0

    def mark(self, artist: Artist) -> None:
        """An artist that is counted."""
        artist.set_gid(f"mark-{self._marks}")
        self._marks += 1

    def line(self, x: Any, y: Any, *form: str, panel: int = 0, **style: Any) -> None:
        """A line, or a single point, that is counted."""
        self.mark(self.axes[panel].plot(x, y, *form, **style)[0])

    def bounds(self, at: float, value: Interval, *, upright: bool = False, **style: Any) -> None:
        """An interval, if there is one, across or upright."""
        _, low, high = value
        if low is not None and high is not None:
            (self.axes[0].vlines if upright else self.axes[0].hlines)(at, low, high, **style)

    def text(
        self, text: str, at: tuple[float, float], by: tuple[float, float], **style: Any
    ) -> None:
        """A text some points away from a place."""
        style = {"va": "center", "textcoords": "offset points", **style}
        self.axes[0].annotate(text, at, by, **style)

    def ticks(self, count: int = 5, *, integer: bool = True) -> None:
        """Few ticks on each panel, by default at whole numbers."""
        for ax in self.axes:
            ax.xaxis.set_major_locator(MaxNLocator(count, integer=integer))


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
                missing += [str(e)] if str(e) else []
    return drawn, list(dict.fromkeys(missing))


# -- results ---------------------------------------------------------------------------------------


def results(run: RunView) -> Drawing:
    """Score of each model on held-out queries, with intervals."""
    evaluation = run.evaluation
    if evaluation is None:
        raise NothingToDrawError("There is no evaluation, so models are not compared.")
    key = "score" if evaluation.models["base"].score else "win_rate"
    names = ("base", *reversed(run.methods))
    every = {name: getattr(run.last(name)[0], key, None) for name in names}
    rows: dict[str, Interval] = {name: value for name, value in every.items() if value}
    if not rows:
        raise NothingToDrawError(
            "The evaluation has no judge that can compare answers, so models are not compared."
        )
    what = "Score" if key == "score" else "Win rate against base"
    label = (key == "score" and evaluation.score_scale) or what
    chart = Chart(height=0.75 + 0.35 * len(rows), rows=[*rows], room=0.75, xlabel=label)
    for y, (name, value) in enumerate(rows.items()):
        look = looks(run)[name]
        chart.bounds(y, value, color=look.color, lw=2)
        chart.line([value[0]], [y], look.marker, color=look.color)
        chart.text(f"{value[0]:.3f}", (value[0], y), (0, 5), ha="center", va="bottom")
    chart.axes[0].margins(x=0.12)
    return Drawing(
        "results",
        f"{what} on held-out queries",
        f"{what} of the last policy of each method on {evaluation.queries:,} held-out queries; "
        "a line is the 95 % bootstrap interval. Where lines of two models overlap widely, the "
        "paired difference is sharper: `selfsteer compare` prints it.",
        Sheet("", ("model", "mean", "low", "high"), [(n, *value) for n, value in rows.items()]),
        chart.figure,
    )


def accuracy(run: RunView) -> Drawing:
    """Accuracy of the pairs by on-policyness: SSO v2, figure 3."""
    rows: list[Sequence[Cell]] = []
    chart = Chart(xlabel="on-policyness: mean probability per token")
    number = " {}" if run.recipe.last_round > 1 else ""
    for of, kind, figures in run.measured:
        if figures.accuracy is None or (kind == "triples" and of.pairs_are_triples):
            continue
        (color, _, marker), own = looks(run)[of.method], kind == "triples"
        wins = [w for v, w in WORTH.items() for _ in range((figures.verdicts or {}).get(v, 0))]
        value = mean_interval(wins, np.random.default_rng(0), 1000)
        x, y = figures.on_policyness["both"], figures.accuracy
        chart.bounds(x, value, upright=True, color=color, lw=1)
        face = palette()["surface"] if own else color
        chart.line([x], [y], marker, color=color, mfc=face, mew=1.5, ms=7)
        label = ("policy's own" if own else of.method) + number.format(of.k)
        chart.text(label, (x, y), (9, -10 if of.is_baseline else 10), color=color)
        rows.append((of.method, of.k, kind, x, y, *value[1:]))
    if not rows:
        why = (
            "No pairs were judged (the recipe has no judge, or the quality stage has not run)"
            if isinstance(run.recipe, Paired)
            else f"Method {run.recipe.method} makes no pairs"
        )
        raise NothingToDrawError(f"{why}, so accuracy is not drawn against on-policyness.")
    chart.axes[0].margins(0.28, 0.3)
    chart.axes[0].yaxis.set_major_locator(MaxNLocator(5))
    chart.axes[0].set_ylabel("accuracy of the pairs")
    hollow = any(kind == "triples" for _, _, kind, *_ in rows)
    return Drawing(
        "accuracy",
        "Are the pairs right, and could the policy have written them?",
        "Each point is a set of pairs: how often the judge prefers the chosen response, by how "
        "probable both responses are under the policy. Up and to the right is better data. "
        + ("Hollow: the policy's own triples, before a generator was trained. " if hollow else "")
        + "Vertical lines are 95 % intervals over pairs. Compare figure 3 of the SSO paper.",
        Sheet("", ("method", "iteration", "set", "on-policyness", "accuracy", "low", "high"), rows),
        chart.figure,
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
    every = np.concatenate([s.means[n] for s in sets for n in SHAPES if n in s.means])
    edges = np.linspace(np.quantile(every, 0.005), max(float(every.max()), 0.0), 41)
    trained = any(s.round.has_generator for s in sets)
    where = ", iteration {}" if len({s.round.k for s in sets}) > 1 else ""
    writers = [
        "generator" if s.kind == "preferences" and s.round.has_generator else "policy" for s in sets
    ]
    chart = Chart(
        *(
            f"written by the {w}{where}".format(s.round.k)
            for w, s in zip(writers, sets, strict=True)
        ),
        height=0.55 + 1.15 * len(sets),
        xlabel="mean log-probability per token, given the query alone",
        sharex=True,
    )
    rows: list[Sequence[Cell]] = []
    plain = {s.round.k: s.means["plain/plain"] for s in sets if "plain/plain" in s.means}
    for ax, s, writer in zip(chart.axes, sets, writers, strict=True):
        beside = {"plain/plain": plain[s.round.k]} if s.round.k in plain else {}
        for name, means in (beside | s.means).items():
            if name not in SHAPES:
                continue
            label, token, line = SHAPES[name]
            color = palette()[token]
            share, _ = np.histogram(means.clip(edges[0], edges[-1]), edges)
            heights = share / len(means)
            if name == "plain/plain":
                ax.stairs(heights, edges, fill=True, color=color, alpha=0.22)
            quantiles = np.quantile(means, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
            text = f"{label}, median {quantiles[2]:.2f}".replace("-", "−")
            chart.mark(ax.stairs(heights, edges, color=color, ls=line, lw=1.6, label=text))
            rows.append((writer, s.round.k, label, len(means), *quantiles))
        ax.set_yticks([])
        ax.set_ylim(0, 1.15 * ax.get_ylim()[1])
        ax.legend(loc="best")
    drawn = "; ".join(f"{s.rows:,} of {s.size:,} {s.kind}" for s in sets)
    moved = (
        "A trained generator should move the rejected responses to the right, towards the plain "
        "ones, and leave the chosen ones where they are. "
    )
    columns = ("written by", "iteration", "response", "n", "5 %", "25 %", "median", "75 %", "95 %")
    return Drawing(
        "likelihood",
        "Why a generator is trained" if trained else "How likely the responses are",
        "How probable the policy finds each response when it sees the query without a principle. "
        "A rejected response far to the left is one the policy would never write, and teaches it "
        f"little. {moved if trained else ''}Drawn from {drawn}; the leftmost bin holds all that is "
        "further left.",
        Sheet("", columns, rows),
        chart.figure,
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
    rows: list[tuple[str, int, str, Interval]] = []
    for feature in sorted({f for features in s.features for f in features}):
        has = np.array([feature in features for features in s.features])
        for side, values in steering_gaps(s.means).items():
            value = known_interval(values[has], np.random.default_rng(0), 500)
            if value:
                rows.append((feature, int((~np.isnan(values[has])).sum()), side, value))
    if not rows:
        raise NothingToDrawError("No record names its features, so there is no gap by feature.")
    largest = {name: max(r[3][0] for r in rows if r[0] == name) for name, *_ in rows}
    shown = sorted(largest, key=lambda name: -largest[name])
    height = 1.0 + 0.26 * len(shown)
    chart = Chart(height=height, rows=shown, xlabel="steering gap, nats per token")
    for side, marker, aside in (("good", "o", -0.14), ("bad", "X", 0.14)):
        style: dict[str, Any] = {"color": palette()[side], "ms": 5.5}
        chart.axes[0].plot([], [], marker, label=f"{side} response", **style)
        for feature, _, _, value in (r for r in rows if r[2] == side):
            y = shown.index(feature) + aside
            chart.bounds(y, value, color=style["color"], lw=1.2)
            chart.line([value[0]], [y], marker, **style)
    chart.axes[0].axvline(0, color=palette()["muted"], lw=0.8)
    chart.figure.legend(loc="outside upper left", ncols=2)
    return Drawing(
        "gaps",
        "Which principles the policy follows",
        "How much more probable a response is under its own principle than under the opposite one, "
        "by the features that the principle names. At zero the principle changes nothing and the "
        f"pair is noise. {s.rows:,} of {s.size:,} {s.kind} of iteration {s.round.k}; lines are "
        "95 % intervals.",
        Sheet(
            "",
            ("feature", "n", "response", "gap", "low", "high"),
            [(name, n, side, *value) for name, n, side, value in rows],
        ),
        chart.figure,
    )


def label_of(run: RunView, stage: StageView) -> str:
    """A stage's name, as short as it can be in a figure."""
    if run.recipe.last_round > 1 or stage.round is None:
        return stage.name.replace("iteration-", "")
    return f"{home_of(run, stage)}{stage.title}"


def home_of(run: RunView, stage: StageView) -> str:
    """The folder of a baseline, where the stage serves that alone."""
    home = run.recipe.homes.get(stage.method or "")
    return f"{home}/" if home else ""


def funnel(run: RunView) -> Drawing:
    """From queries to what the policy is trained on."""
    # what is not on a record's way to the policy stands aside
    aside = ("MeasureQuality", "Evaluate", "RunBenchmarks")
    steps = [s for s in run.stages if s.done and s.kind not in aside and not home_of(run, s)]
    cut = len(steps) > 16
    if cut:
        steps = [s for s in steps if s.round in (None, run.recipe.last_round)]
    if not steps:
        raise NothingToDrawError("No stage has finished, so there is nothing to count.")
    c = palette()
    names = [label_of(run, s) for s in steps]
    generated = any(s.title.startswith("generator") for s in steps)
    chart = Chart(height=0.6 + 0.42 * len(steps), rows=names, room=0.9, xlabel="records")
    hatched: dict[str, Any] = {"facecolor": c["grid"], "edgecolor": c["muted"], "lw": 0.5}
    rows: list[Sequence[Cell]] = []
    for y, s in enumerate(steps):
        bars = chart.axes[0].barh(y, s.n_out, 0.5, color=c["method-1" if s.method else "plain"])
        chart.mark(bars[0])
        # queries over the limit would dwarf the rest; they are only named
        lost = sum(n for reason, n in s.dropped.items() if reason != "over_limit")
        if lost:
            chart.axes[0].barh(y, lost, 0.5, left=s.n_out, hatch="////", **hatched)
        reasons = sorted(s.dropped.items(), key=lambda x: -x[1])
        said = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in reasons[:2]]
        said += [f"{sum(n for _, n in reasons[2:]):,} others"] if len(reasons) > 2 else []
        text = f"{s.n_out:,}" + (f"  −{', '.join(said)}" if said else "")
        chart.text(text, (0, y), (3, 13), color=c["muted"])
        rows += [(s.name, s.n_in, s.n_out, *pair) for pair in reasons or [("", 0)]]
    chart.axes[0].margins(x=0.04)
    chart.ticks(4)
    return Drawing(
        "funnel",
        f"From queries to {'answers' if isinstance(run.recipe, Distilled) else 'preferences'}",
        "Records that each stage handed on (solid) and dropped (hatched), with the two most common "
        "reasons; queries over the recipe's limit are only named. A training keeps some queries "
        "back to choose its checkpoint by: held out."
        + (" The generator may be trained on a subset." if generated else "")
        + (f" Only iteration {run.recipe.last_round} is drawn." if cut else ""),
        Sheet("", ("stage", "in", "out", "dropped because", "n"), rows),
        chart.figure,
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
    titles = {"answers": "answers to held-out queries", "pairs": "pairs trained on"}
    panels = sorted({"answers" if of == "answers" else "pairs" for _, of, *_ in rows})
    chart = Chart(
        *(titles[panel] for panel in panels),
        height=0.6 + 1.3 * len(panels),
        xlabel="iteration (0: the base model)",
        sharex=True,
    )
    lines = dict.fromkeys((m, of) for m, of, *_ in rows)
    for method, of in sorted(lines, key=lambda x: (run.methods.index(x[0]), x[1] == "chosen")):
        look = looks(run)[method]
        x, y = np.array([(k, tokens) for m, name, k, tokens in rows if (m, name) == (method, of)]).T
        x = x + 0.02 - 0.04 * run.methods.index(method)  # equal ones would hide
        style: dict[str, Any] = {**look._asdict(), "mfc": look.color}
        if of == "rejected":
            style |= {"ls": ":", "ms": 8, "mfc": palette()["surface"]}
        label = method if of == "answers" else f"{method} {of}"
        panel = 0 if of == "answers" else len(panels) - 1
        chart.line(x, y, panel=panel, label=label, **style)
    for ax in chart.axes:
        ax.set_ylabel("tokens")
        low, high = ax.get_ylim()
        middle, half = (low + high) / 2, max((high - low) / 2, 0.1 * high)
        ax.set_ylim(max(middle - 1.4 * half, 0), middle + 1.4 * half)
        ax.legend(loc="upper left", ncols=2, columnspacing=1)
    chart.ticks()
    chart.axes[-1].set_xlim(-0.3, run.recipe.last_round + 0.3)
    return Drawing(
        "lengths",
        "Do answers drift in length?",
        "Mean tokens of the models' answers"
        + (
            " and of the pairs they were trained on. Chosen responses much longer than rejected "
            "ones teach length, and answers that grow from iteration to iteration show that it "
            "was learnt."
            if "pairs" in panels
            else "; those of the base model stand at iteration 0."
        ),
        Sheet("", ("method", "of", "iteration", "tokens"), rows),
        chart.figure,
    )


# -- the trainings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A figure of logged metrics; of two metrics the second is dashed.

    ``free`` is its caption where the base loss compares with no reference; ``told`` holds what is
    added where a training logged that metric.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    caption: str
    free: str = ""
    told: Mapping[str, str] = field(default_factory=dict)


CURVES = (
    Curve(
        "loss",
        "Loss",
        ("loss",),
        "It should fall, and settle.",
        told={
            "rewards/margins": " A DPO term (base sigmoid) starts at log 2 = 0.69 where its "
            "reference is the model that is trained; trainings with several terms start at their "
            "weighted sum.",
            "kl": " That of a distillation is the divergence from its target, see there.",
        },
    ),
    Curve(
        "margins",
        "Margins by term",
        ("rewards/margins",),
        "β times how far the model has moved apart the preferred and the other response, by the "
        "context of the term. It starts at zero; one that stays there is not learnt.",
        "β times how much likelier per token the preferred response is than the other, by the "
        "context of the term. It starts wherever the model is, and should rise.",
    ),
    Curve(
        "reward-accuracies",
        "Pairs ranked right, by term",
        ("rewards/accuracies",),
        "Share of the pairs of a step whose preferred response gained more probability than the "
        "other. At 1 from early on, the pairs are too easy; at one half nothing is learnt.",
        "Share of the pairs of a step whose preferred response is likelier per token than the "
        "other. It starts wherever the model is, and should rise.",
    ),
    Curve(
        "rewards",
        "Where the margin comes from",
        ("rewards/chosen", "rewards/rejected"),
        "Solid: the preferred response, dashed: the other. Both falling together is the well-known "
        "way in which DPO loses probability of everything; the preferred one should not sink far.",
        "Solid: β times the log-prob per token of the preferred response, dashed: of the other. "
        "Where both fall together, the model loses probability of everything.",
    ),
    Curve(
        "kl",
        "Divergence from the target, per token",
        ("kl",),
        "What distillation minimises: how far the policy is from what its principles would make of "
        "it, in nats. It starts at what there is to learn, and should fall towards zero; where it "
        "starts near zero, the principles change nothing.",
    ),
)


def _lines(run: RunView, metrics: Sequence[str]) -> dict[tuple[str, str, str, int], np.ndarray]:
    """(kind of training, method, context, which metric) → (step, value) rows.

    Iterations come one after another.
    """
    raw: dict[tuple[str, str, str, int], list[tuple[float, float]]] = {}
    steps = Counter[tuple[str, str]]()  # of earlier iterations
    for stage in run.stages:
        method, (kind, _, half) = stage.method or run.recipe.method, stage.title.partition("/")
        entries = run.curves.get(stage.name, ())
        for entry, (i, metric) in product(entries, enumerate(metrics)):
            for name, value in entry.items():
                term = name.removeprefix(metric)
                # the loss of a single term is in the log, but not drawn
                wanted = name == metric or (term.startswith("/") and metric != "loss")
                if wanted and is_number(value):
                    line = raw.setdefault((kind, method, term[1:] or half, i), [])
                    line.append((steps[method, stage.title] + entry["step"], float(value)))
        steps[method, stage.title] += max((e["step"] for e in entries), default=0)
    return {key: _thin(np.array(raw[key])) for key in sorted(raw, key=lambda key: key[3])}


def _thin(points: np.ndarray) -> np.ndarray:
    """At most POINTS rows, each the mean of its neighbours."""
    size = -(-len(points) // POINTS)
    return np.array([points[i : i + size].mean(axis=0) for i in range(0, len(points), size)])


def _caption(run: RunView, spec: Curve) -> str:
    """What a curve shows, by the base losses of the run's trainings."""
    of = run.recipe.baselines if isinstance(run.recipe, Principled) else ()
    every = [getattr(r, name) for r in (run.recipe, *of) for name in type(r).model_fields]
    trainings = [s for s in every if isinstance(s, Optimisation)]
    free = {s.base for s in trainings if s.base in REFERENCE_FREE}
    if not free or not spec.free:
        caption = spec.caption
    elif all(s.base in free for s in trainings):
        caption = spec.free
    else:
        caption = f"{spec.caption} With base {' or '.join(sorted(free))}: {spec.free}"
    first = any(s.reference == "first" and s.base not in free for s in trainings)
    if spec.free and first and run.recipe.last_round > 1:
        caption += (
            " With reference: first it is counted from the first policy, so that a later iteration "
            "starts near where the one before ended."
        )
    return caption


def curve(run: RunView, spec: Curve) -> Drawing:
    """Metrics of every training, by its terms."""
    found = _lines(run, spec.metrics)
    kinds = sorted({kind for kind, *_ in found})
    if not kinds:
        # pairs and distillation log other metrics: only a run without any lacks something
        raise NothingToDrawError(
            ""
            if any(run.curves.values())
            else "There are no training metrics (metrics.jsonl), so trainings are not drawn."
        )
    titles = (kind.replace("_", " ") for kind in kinds)
    chart = Chart(*titles, height=0.5 + 1.5 * len(kinds), xlabel="step")
    chart.ticks()
    rows: list[Sequence[Cell]] = []
    thinned = False
    for (kind, method, context, i), points in found.items():
        own = [(m, c) for of, m, c, which in found if (of, which) == (kind, i)]
        style: dict[str, Any] = {**looks(run)[method]._asdict(), "marker": ""}
        side = {"plus": "good", "minus": "bad"}.get(context, context)
        if side in ("good", "bad") and (kind == "generator" or len(own) > 2):
            style |= {"color": palette()[side]} | ({"ls": "--"} if side == "bad" else {})
        words = [method] if len({m for m, _ in own}) > 1 else []
        words += [f"{context} context" if context in CONTEXTS else context]
        if len(spec.metrics) > 1:
            style["ls"] = ("-", "--")[i]
            words.append(("preferred", "other")[i])
        label = " ".join(filter(None, words)) or method
        x, y = points.T
        thinned |= bool(len(x) > 1 and x[1] - x[0] > 1)
        style |= {"marker": "o", "ms": 3} if len(x) == 1 else {}
        chart.line(x, y, panel=kinds.index(kind), label=label, **style)
        kept = points[:: -(-len(points) // ROWS)].tolist()
        rows += [(kind, label, int(a) if a.is_integer() else a, b) for a, b in kept]
    for ax in chart.axes:
        legend: dict[str, Any] = {"loc": "best"}
        if len(ax.lines) > 3:
            low, high = ax.get_ylim()
            ax.set_ylim(low - 0.4 * (high - low), high)
            legend = {"loc": "lower left", "ncols": 2, "fontsize": 7, "columnspacing": 1}
        ax.legend(**legend)
        ax.margins(x=0.02)
    told = (text for metric, text in spec.told.items() if _lines(run, [metric]))
    caption = "".join([_caption(run, spec), *told])
    caption += " Each point is the mean of neighbouring steps." if thinned else ""
    caption += " Iterations follow one another." if run.recipe.last_round > 1 else ""
    sheet = Sheet("", ("training", "line", "step", "value"), rows)
    return Drawing(spec.name, spec.title, caption, sheet, chart.figure)


def selection(run: RunView) -> Drawing:
    """What each candidate step was measured to be, and which was kept."""
    trainings = [(s, s.selection) for s in run.stages if s.selection]
    if not trainings:
        points = [s.settings.selection.points for s in run.recipe.plan() if isinstance(s, Train)]
        if not any("last" in s.notes for s in run.stages):
            raise NothingToDrawError("No training has finished.")
        why = "a tenth of the queries is too few to hold back" if any(points) else "it is off"
        raise NothingToDrawError(
            f"No checkpoint was selected, as {why}: the last step of each training is kept."
        )
    wins = {f.wins for _, f in trainings if f.wins and any(x.wins_mean for x in f.candidates)}
    generators = [s for s, _ in trainings if s.title.startswith("generator")]
    titles = [f"{' or '.join(sorted(wins))} on held-back queries"] if wins else []
    titles += ["on-policyness of what the generator writes"] if generators else []
    if not titles:
        raise NothingToDrawError("Selection had no judge, so candidates are not drawn.")
    rows: list[Sequence[Cell]] = []
    text = palette()["text"]
    chart = Chart(*titles, height=0.5 + 1.6 * len(titles), xlabel="step")
    for stage, found in trainings:
        method = stage.method or run.recipe.method
        number = f" {stage.round}" if run.recipe.last_round > 1 else ""
        label, style = f"{method} {stage.title}{number}", looks(run)[method]._asdict()
        for x in found.candidates:
            kept = "kept" if x.step == found.chosen else ""
            own: Sequence[Cell] = x.wins_mean or (None, None, None)
            policyness = map((x.on_policyness or {}).get, PAIR)
            drift = max(x.excess.values()) if x.excess else None
            rows.append((label, x.step, kept, *own, *policyness, drift))
        if stage in generators:
            style |= {"color": palette()["good"], "marker": "^"}
            known = [(x.step, x.on_policyness) for x in found.candidates if x.on_policyness]
            for side, token, dash in (("chosen", "good", "-"), ("rejected", "bad", "--")):
                chart.line(
                    [step for step, _ in known],
                    [policyness[side] for _, policyness in known],
                    f"{dash}o",
                    panel=-1,
                    color=palette()[token],
                    ms=4,
                    label=side if len(generators) == 1 else f"{label} {side}",
                )
            chart.axes[-1].axvline(found.chosen, color=text, lw=1, ls=":")
        measured = [(x.step, *x.wins_mean) for x in found.candidates if x.wins_mean]
        if measured:
            steps, y, low, high = np.array(measured, dtype=float).T
            chart.axes[0].vlines(steps, low, high, color=style["color"], lw=1, alpha=0.6)
            chart.line(steps, y, ms=4.5, label=label, **style)
            at = steps == found.chosen
            ring: dict[str, Any] = {"mfc": "none", "color": text, "ms": 11, "mew": 1.2}
            chart.axes[0].plot(steps[at], y[at], "o", **ring)
    for ax in chart.axes:
        ax.legend(loc="best")
    chart.ticks()
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
        chart.figure,
    )


def times(run: RunView) -> Drawing:
    """Wall time of every finished stage."""
    done = [s for s in run.stages if s.done]
    if not done:
        raise NothingToDrawError("No stage has finished, so there are no times.")
    summed = len(done) > 18
    bars, colors = dict[str, float](), dict[str, str]()
    for s in done:
        label = f"{home_of(run, s)}{s.title}" if summed else label_of(run, s)
        colors[label] = looks(run)[s.method].color if s.method else palette()["plain"]
        bars[label] = bars.get(label, 0.0) + s.seconds
    chart = Chart(height=0.6 + 0.23 * len(bars), rows=[*bars], room=0.6, xlabel="seconds")
    for y, (label, seconds) in enumerate(bars.items()):
        chart.mark(chart.axes[0].barh(y, seconds, 0.6, color=colors[label])[0])
        text = duration(seconds) if seconds >= 1 else "< 1 s"
        chart.text(text, (seconds, y), (3, 0), color=palette()["muted"])
    chart.axes[0].set_xlim(0, 1.2 * max(*bars.values(), 1e-9))
    chart.ticks(integer=False)
    total = duration(sum(s.seconds for s in done))
    added = " Stages of the same name are added over the iterations." if summed else ""
    return Drawing(
        "times",
        "Where the time went",
        f"Wall time of each stage's last, finishing try; {total} together.{added} Grey stages "
        "serve all methods.",
        Sheet("", ("stage", "seconds"), [(s.name, s.seconds) for s in done]),
        chart.figure,
    )
