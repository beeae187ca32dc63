"""The page of the figures on a real model, made from the results alone."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.judges.stats import mean_interval
from selfsteer.terminal import duration, interval

HERE = Path(__file__).parent

CONFIGS = {
    "style": (
        "A house style",
        """The shipped recipe (`selfsteer run smollm2`): a catalogue of four features with rules,
152 prompts of ours, 48 held out. The figure of an answer is the share of the rules it keeps. The
recipe's principles ask for one feature, drawn for each query, those of *contrast-all* for all.
*contrast-all-three-rounds* lets the policy answer anew before each of three rounds, whose teacher
stays the first policy. *best-of-n-principles* trains on finished answers alone, of at most 192
tokens: of four plain answers to a query, fewer than two were finished for 95 to 100 of 152, and in
0.50 to 0.53 of the pairs of the others the chosen answer keeps more rules, which is chance. So
nothing is gained: where all plain answers are long, none can be preferred for its brevity.""",
    ),
    "first-try": (
        "One short sentence",
        """Fixed principles, "Answer in one short sentence." and "Answer at great length, with many
paragraphs."; 128 prompts of self-instruct of at most 220 characters, 48 held out. The figure of an
answer is 1 if it has at most 30 words, else 0. Triples with an answer cut off are dropped.""",
    ),
}

HEAD = """# A house style on a real model

Made by `python benchmarks/real/run.py` from the JSON files in `{results}/`; do not edit.

SmolLM2-135M-Instruct (Q4_1, dequantised), full weights, on a CPU. *base* is the model as it is,
*good* the same model under a good principle (of a catalogue's first two features), which training
should make unnecessary. Answers are sampled as in the recipe, or greedy. [Intervals] are 95 %
bootstraps over prompts, whose figures are averaged over seeds first; the figures of the single
seeds follow. *gain* is the paired difference to the base. IFEval: share of a seeded quarter of its
prompts of which a greedy answer of at most 256 tokens follows all instructions, strictly; IFEval's
own checkers, from lm-evaluation-harness, decide.
"""

Results = dict[str, list[dict[str, Any]]]


def shares(answered: dict[str, Any], *, whole: bool = False) -> np.ndarray:
    """(N,) share of its rules that each answer keeps; where whole, whether it keeps them all."""
    kept, of = np.array(answered["kept"]), np.array(answered["of"])
    return (kept == of).astype(float) if whole else kept / of


def over_seeds(results: Sequence[dict[str, Any]], kind: str, *, whole: bool = False) -> np.ndarray:
    """(seeds, N) of `shares`; every seed has the same prompts."""
    ids = {tuple(r[kind]["ids"]) for r in results}
    if len(ids) != 1:
        raise SystemExit(f"the results of {results[0]['method']} are of different prompts")
    return np.stack([shares(r[kind], whole=whole) for r in results])


def cell(values: np.ndarray, form: str = ".2f") -> str:
    """Mean and interval over prompts, and the seeds' own means where there are several."""
    rng = np.random.default_rng(0)
    text = interval(mean_interval(values.mean(axis=0).tolist(), rng), form)
    own = ", ".join(format(v, form) for v in values.mean(axis=1))
    return f"{text} ({own})" if len(values) > 1 else text


def summary(result: dict[str, Any]) -> str:
    """One result in a line."""
    parts = [
        f"{kind} {shares(result[kind], whole=kind == 'ifeval').mean():.3f}"
        for kind in ("sampled", "greedy", "ifeval")
        if kind in result
    ]
    return ", ".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def config_tables(results: Results) -> list[str]:
    """Answers, rules, pairs and seconds of one configuration."""
    base = results.get("base")
    rows = []
    for method, found in results.items():
        row = [method, ", ".join(str(r["seed"]) for r in found)]
        for kind in ("sampled", "greedy"):
            values = over_seeds(found, kind)
            row.append(cell(values))
            gain = values - over_seeds(base, kind) if base and method != "base" else None
            row.append("" if gain is None else cell(gain, "+.2f"))
        asked = [r for r in found if "ifeval" in r]
        of = f" (seed {asked[0]['seed']})" if 0 < len(asked) < len(found) else ""
        row.append(cell(over_seeds(asked, "ifeval", whole=True)) + of if asked else "")
        rows.append(row)
    head = ("method", "seeds", "sampled", "gain", "greedy", "gain", "IFEval")
    out = [table(head, rows)]
    rules = list(
        dict.fromkeys(n for f in results.values() for r in f for n in r["sampled"]["by_rule"])
    )
    rows = []
    for method, found in results.items():
        said = [r["sampled"] for r in found]
        count = sum(len(s["ids"]) for s in said)
        rows.append(
            [
                method,
                *(f"{_rate(said, rule):.0%}" for rule in rules),
                f"{np.mean([w for s in said for w in s['words']]):.0f}",
                f"{np.mean([t for s in said for t in s['tokens']]):.0f}",
                f"{sum(s['unfinished'] for s in said) / count:.0%}",
                f"{sum(s['distinct'] for s in said) / count:.0%}",
            ]
        )
    more = ("words", "tokens", "cut off", "distinct")
    out.append("Sampled answers by rule:\n\n" + table(("method", *rules, *more), rows))
    trained = {m: [r for r in f if r.get("pairs")] for m, f in results.items()}
    if any(trained.values()):
        rows = [[m, *(_mean(f, *path) for path in PAIRS.values())] for m, f in trained.items() if f]
        out.append("Pairs that the policy was trained on:\n\n" + table(("method", *PAIRS), rows))
    timed = {m: [r for r in f if r.get("seconds")] for m, f in results.items()}
    if any(timed.values()):
        out.append("Seconds, taken beside other work:\n\n" + _seconds(timed))
    return out


PAIRS = {
    "pairs": ("pairs",),
    "accuracy": ("accuracy",),
    "on-policyness chosen": ("on_policyness", "chosen"),
    "rejected": ("on_policyness", "rejected"),
    "tokens chosen": ("tokens", "chosen"),
    "tokens rejected": ("tokens", "rejected"),
}


def _rate(said: Sequence[dict[str, Any]], rule: str) -> float:
    counts = np.array([s["by_rule"].get(rule, (0, 0)) for s in said]).sum(axis=0)
    return float(counts[0] / max(counts[1], 1))


def _mean(found: Sequence[dict[str, Any]], *path: str) -> str:
    values = []
    for result in found:
        value = result["pairs"]
        for name in path:
            value = value[name]
        values.append(value)
    return f"{np.mean(values):.3g}" if None not in values else ""


def _seconds(trained: Results) -> str:
    rows = []
    for method, found in trained.items():
        names = dict.fromkeys(n for r in found for n in r["seconds"])
        for name in names:
            spent = [r["seconds"][name] for r in found if name in r["seconds"]]
            rows.append([method, name, duration(float(np.mean(spent)))])
    return table(("method", "stage", "mean over seeds"), rows)


def write(results: Path) -> Path:
    """Writes README.md beside a folder called ``results``, else into the folder; returns it."""
    by_config: dict[str, Results] = defaultdict(lambda: defaultdict(list))
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        by_config[result["config"]][result["method"]].append(result)
    parts = [HEAD.format(results=results.name)]
    for config, (title, text) in CONFIGS.items():
        if config not in by_config:
            continue
        order = ("base", "good", "pbaa", "sso")
        found = by_config[config]
        names = [*(n for n in order if n in found), *sorted(found.keys() - set(order))]
        seeds = sorted({r["seed"] for f in found.values() for r in f})
        missing = [n for n in order if n not in found]
        parts += [f"## {title}", text]
        parts.append(
            f"Seeds: {', '.join(map(str, seeds))}."
            + (f" Not run yet: {', '.join(missing)}." if missing else "")
        )
        own = {m: " ".join(r.get("given", ())) for m, f in found.items() for r in f}
        differing = [f"{m} with {given}" for m, given in own.items() if given]
        if differing:
            parts.append(f"Settings other than the recipe's: {'; '.join(differing)}.")
        parts += config_tables({n: found[n] for n in names})
        undecided = max(r["ifeval_undecided"] for f in found.values() for r in f)
        if undecided:
            parts.append(
                f"{undecided} prompts of IFEval's quarter are left out: their checkers need data "
                "of nltk that was not there."
            )
    page = (results.parent if results.name == "results" else results) / "README.md"
    page.write_text("\n\n".join(p.strip() for p in parts) + "\n", "utf-8")
    return page
