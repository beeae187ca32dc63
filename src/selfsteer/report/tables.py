"""The tables of a run: each is made once, for the terminal, the page and the Markdown file."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from selfsteer.evaluation.benchmark_table import notes, tables
from selfsteer.judges.stats import Interval
from selfsteer.terminal import duration, interval, out, table
from selfsteer.view import Answers, Difference, RewardPart, RunView, SetFigures, StageView

PAIR = ("chosen", "rejected")

Cell = str | int | float | Sequence[float | None] | None


def show_cell(value: Cell, *, brief: bool = False) -> str:
    """A cell as text: three decimals, thousands, intervals (``brief`` in a terminal).

    >>> show_cell(0.5), show_cell(1326), show_cell([0.6, 0.5, 0.7]), show_cell(None)
    ('0.500', '1,326', '0.600 [0.500, 0.700]', '')
    >>> show_cell([0.6, 0.5, 0.7], brief=True)
    '0.600 [.50, .70]'
    >>> show_cell([-9.9, -10.5, -0.25], brief=True)
    '-9.900 [-10.50, -.25]'
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
    mean, *bounds = value
    if not brief or None in bounds:
        return interval(value, ".3f")
    low, high = (re.sub(r"\b0\.", ".", f"{b:.2f}") for b in bounds)
    return f"{mean:.3f} [{low}, {high}]"


def inline(text: str) -> str:
    """Text inside Markdown: nothing in it is markup, and no picture or link of it is loaded."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return escaped.replace("|", "\\|").replace("](", "]\\(")


@dataclass(frozen=True)
class Sheet:
    """A table; cells are shown by `show_cell`, columns of numbers stand to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers and nothing else but gaps."""
        cells = [row[column] for row in self.rows if row[column] not in (None, "")]
        return bool(cells) and not any(isinstance(cell, str) for cell in cells)

    def print(self) -> None:
        """Shows it in the terminal, unless it is empty."""
        if self.rows:
            words = [i for i in range(len(self.columns)) if not self.is_number(i)]
            cells = ([show_cell(cell, brief=True) for cell in row] for row in self.rows)
            title = f"\n{self.title}" if self.title else ""
            out.print(table(self.columns, cells, title=title, words=words))

    @property
    def filled(self) -> "Sheet":
        """The same without the columns that hold nothing."""
        kept = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Sheet(self.title, [self.columns[i] for i in kept], rows)


def counts(of: Mapping[str, int]) -> str:
    """``5 unfinished, 4 equals_plain``."""
    return ", ".join(f"{n:,} {reason}" for reason, n in of.items())


# -- results ---------------------------------------------------------------------------------------


def compared(run: RunView) -> str:
    """``sso``, or ``sso compared with pbaa, dlma and contrast`` where there are baselines."""
    method, *baselines = run.methods
    *others, last = baselines or [""]
    both = " and ".join(filter(None, (", ".join(others), last)))
    return f"{method} compared with {both}" if baselines else method


def about(run: RunView) -> str:
    """``sso compared with pbaa, 2 iterations, seed 0``."""
    rounds = run.recipe.last_round
    iterations = f"{rounds} iteration{'s' if rounds > 1 else ''}, " if rounds else ""
    return f"{compared(run)}, {iterations}seed {run.recipe.seed}"


def decision(mine: str, theirs: str, figure: Interval, zero: float = 0.0) -> str:
    """Which of two is better, or ``undecided`` where the interval holds ``zero``."""
    _, low, high = figure
    if low is not None and low > zero:
        return f"{mine} is better"
    return f"{theirs} is better" if high is not None and high < zero else "undecided"


def sentence(run: RunView) -> str:
    """The result in one sentence, with its intervals; says so when it cannot be told apart."""
    found = run.evaluation.differences if run.evaluation else ()
    if not found:
        return ""
    if found[0].score[1] is None:
        return f"{found[0].of}: {found[0].score[0]:+.3f} in score: one query decides nothing."
    said = "; ".join(map(_apart, found))
    return (
        f"{said}. {worse_rules(run)}Differences are paired by query, with 95 % intervals over "
        "queries; training seeds vary more."
    )


def worse_rules(run: RunView) -> str:
    """Names the rules that fewer answers keep than before, beyond chance, in a sentence; or ``""``.

    A better score may hide one of them.
    """
    found = run.evaluation
    if found is None or not found.rules:
        return ""
    label = found.finals.get(run.methods[0], run.methods[0])
    gains = ((name, rule.gained.get(label)) for name, rule in found.rules.items())
    worse = [f"{name} ({interval(g, '+.3f')})" for name, g in gains if g and (g[2] or 0) < 0]
    return f"Fewer answers than before keep: {'; '.join(worse)}. " if worse else ""


def _apart(found: Difference) -> str:
    """``sso scores 0.026 [0.015, 0.037] more than pbaa``."""
    mine, _, theirs = found.of.partition(" - ")
    figure = mean, low, high = found.score
    assert low is not None
    assert high is not None
    if decision(mine, theirs, figure) == "undecided":
        return f"{mine} and {theirs} cannot be told apart by score: {interval(figure)}"
    size, way = (figure, "more") if low > 0 else ((-mean, -high, -low), "less")
    return f"{mine} scores {interval(size, '.3f')} {way} than {theirs}"


#: The row below the rules.
CUT_OFF = "(cut off by the token budget)"

EVALUATED = ("score", "win rate vs base", "accuracy", "on-policy chosen", "rejected", "tokens")


def _evaluated(answers: Answers, pairs: SetFigures | None) -> list[Cell]:
    """Figures of a model and of the pairs that it was trained on, as `EVALUATED` names them."""
    data: list[Cell] = [None] * 3
    if pairs:
        data = [pairs.accuracy, *(pairs.on_policyness[r] for r in PAIR)]
    return [answers.score, answers.win_rate, *data, answers.tokens]


def results(run: RunView) -> Sheet:
    """Base, baselines and method; empty before evaluation."""
    rows: list[list[Cell]] = []
    for method in ("base", *reversed(run.methods)):
        answers, pairs = run.last(method)
        seconds = run.seconds_of(method) if method in run.methods else None
        if answers:
            rows.append([method, *_evaluated(answers, pairs), seconds and round(seconds)])
    title = f"{run.evaluation.queries:,} held-out queries" if run.evaluation else ""
    return Sheet(title, ("model", *EVALUATED, "time, s"), rows).filled


def models(run: RunView) -> Sheet:
    """Every evaluated model, where there are more than the result's."""
    qualities = {r.label: r.quality for r in run.rounds}
    rows: list[list[Cell]] = []
    for label, answers in run.evaluation.models.items() if run.evaluation else ():
        quality = qualities.get(label)
        figures = _evaluated(answers, quality.preferences if quality else None)
        rows.append([label, *figures, answers.unfinished])
    more = len(rows) > len(run.methods) + 1
    return Sheet("Every model", ("model", *EVALUATED, "unfinished"), rows if more else []).filled


def rules(run: RunView, models: Mapping[str, str] | None = None) -> Sheet:
    """Shares of the answers that keep each rule, and that the budget cut off; for judge ``checks``.

    Args:
        run: empty where its evaluation has no rules.
        models: heading → label, the base first; None: the last policy of each method.
    """
    found = run.evaluation
    if found is None or not found.rules:
        return Sheet("", (), [])
    if models is None:
        names = ("base", *reversed(run.methods))
        models = {name: found.finals.get(name, name) for name in names}
    *_, (last, label) = models.items()
    rows: list[list[Cell]] = [
        [name, rule.queries, *map(rule.kept.get, models.values()), rule.gained.get(label)]
        for name, rule in found.rules.items()
    ]
    cut_off = (found.models[x].unfinished / found.queries for x in models.values())
    rows.append([CUT_OFF, found.queries, *cut_off, None])
    columns = ("rule", "queries", *models, f"gain of {last}")
    return Sheet("Share of the answers that keep each rule", columns, rows)


def benchmarks(run: RunView) -> list[Sheet]:
    """What ``benchmarks.md`` holds, under the notes it is to be read with."""
    if not run.benchmarks:
        return []
    said = f"Benchmarks ({'; '.join(notes(run.benchmarks))})"
    both = zip((said, "Differences between models"), tables(run.benchmarks), strict=False)
    return [Sheet(title, head, rows) for title, (head, *rows) in both]


def reward(run: RunView) -> list[Sheet]:
    """A reward model: its sets of preferences, accuracy on held-out pairs, reliability."""
    if run.reward is None:
        return []
    sources = [
        (name, s.read, f"{s.weight:g}", s.trained, counts(s.dropped))
        for name, s in run.reward.sources.items()
    ]
    found = [
        Sheet("Sets of preferences", ("set", "read", "weight", "trained on", "dropped"), sources)
    ]
    held_out = run.reward.held_out
    if not held_out.pairs or held_out.calibration is None:
        return found
    parts: dict[str, RewardPart] = {"all": held_out}
    if len(held_out.by_source) > 1:
        parts |= {f"set {name}": f for name, f in held_out.by_source.items()}
    parts |= held_out.by_length
    rows = [(name, f.pairs, f.accuracy) for name, f in parts.items()]
    bins = [
        (f"{b['from']:.2f} to {b['to']:.2f}", round(b["pairs"]), b["stated"], b["right"])
        for b in held_out.calibration.bins
        if b["pairs"]
    ]
    return [
        *found,
        Sheet("Reward model on held-out pairs, 95 % (Wilson)", ("of", "pairs", "accuracy"), rows),
        Sheet(
            f"Reliability: calibration error {held_out.calibration.ece:.3f}",
            ("stated probability", "pairs", "mean stated", "right"),
            bins,
        ),
    ]


# -- the data --------------------------------------------------------------------------------------


def quality(run: RunView) -> Sheet:
    """Quality of every measured set; how many were measured where it was not all."""
    rows: list[list[Cell]] = []
    for found, kind, f in run.measured:
        gap = f.steering_gap or {}
        records = f.of if f.pairs == f.of else f"{f.pairs:,} of {f.of:,}"
        row: list[Cell] = [f"{found.label} {kind}", records, f.accuracy]
        row += [*(f.on_policyness[r] for r in PAIR), gap.get("good"), gap.get("bad")]
        rows.append([*row, *(f.tokens[r] for r in PAIR)])
    columns = ("set", "records", "accuracy", "on-policy chosen", "rejected", "gap good", "bad",
               "tokens chosen", "rejected")  # fmt: skip
    return Sheet("Quality of the data, under the policy before the iteration", columns, rows).filled


def verdicts(run: RunView) -> Sheet:
    """Every verdict class of every judged set, unparseable included."""
    sets = {f"{r.label} {kind}": f.verdicts for r, kind, f in run.measured}
    for label, answers in run.evaluation.models.items() if run.evaluation else ():
        sets[f"{label} against base"] = answers.verdicts
    judged = {label: v for label, v in sets.items() if v}
    names = list(next(iter(judged.values()), {}))
    return Sheet(
        "Verdicts; first is "
        + ("the chosen response, or " if run.measured else "")
        + "the model's answer, not base's",
        ("set", *names),
        [(label, *(v[n] for n in names)) for label, v in judged.items()],
    )


def lengths(run: RunView) -> Sheet:
    """Lengths of pairs before and after hygiene's length settings; empty where none were used."""
    rows = []
    keys = ("pairs", "chosen", "rejected", "longer_chosen", "longer_rejected")
    for stage in run.stages:
        both = stage.notes.get("lengths", {})
        if both.get("before") != both.get("after"):
            rows += [(stage.name, when, *(f[k] for k in keys)) for when, f in both.items()]
    columns = ("stage", "", "pairs", "chosen", "rejected", "chosen longer", "rejected longer")
    return Sheet("Lengths of pairs, tokens", columns, rows)


def tokens(run: RunView) -> Sheet:
    """Shares of the sampled answers that are trained on as other tokens; empty where none is."""
    keys = ("answers", "retokenised", "special_tokens")
    found = {s.name: s.notes["sampled"] for s in run.stages if "sampled" in s.notes}
    rows = [(name, *(of[k] for k in keys)) for name, of in found.items() if of["retokenised"]]
    columns = ("stage", "answers", "retokenised", "with special tokens")
    return Sheet("Answers that are trained on as other tokens than were sampled", columns, rows)


def warnings(run: RunView) -> Sheet:
    """What stages warned of that is not over when they are; empty where nothing was."""
    return Sheet("Warnings", ("stage", "what was seen"), warned(run.stages))


def warned(stages: Iterable[StageView]) -> list[tuple[str, str]]:
    """The name of each of these stages beside what it warned of."""
    return [
        (stage.name, text)
        for stage in stages
        for of in (stage.notes, stage.notes.get("selection", {}))
        for text in of.get("warnings", ())
    ]


def stages(run: RunView) -> Sheet:
    """Every stage with its counts."""
    rows = [
        (s.name, s.n_in, s.n_out, counts(s.dropped) or None, duration(s.seconds))
        if s.done
        else (s.name, None, None, None, "not finished")
        for s in run.stages
    ]
    return Sheet("Stages", ("stage", "in", "out", "dropped", "time"), rows).filled
