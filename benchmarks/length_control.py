"""Length control on simulated verdicts whose true length effect is known.

    python benchmarks/length_control.py              # about 2 minutes on one core

Verdicts are drawn from the published model (arXiv 2404.04475): harder questions get longer answers,
the judge pays for length. The truth is the mean win rate of the same questions at equal lengths.
Three cases: the questions' difficulties are known; nothing is known of them; they are estimated
from the verdicts on three other models, as in a table of four.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent
QUESTIONS, MODEL, LENGTH, DIFFICULTY = 800, -0.4, 1.2, 0.8
CASES = ("difficulty known", "nothing known", "from three other models")


def simulate(seed: int) -> dict[str, dict[str, float]]:
    """Case → error of the raw and of the controlled win rate, whether intervals hold the truth."""
    from selfsteer.evaluation.judged_sets import Compared, difficulties, length_controlled

    rng = np.random.default_rng(seed)
    easy = rng.normal(size=QUESTIONS)
    rng.integers(1000, 2500, QUESTIONS)  # the baseline's lengths: only differences count
    longer = (rng.normal(300, 600, QUESTIONS) - 200 * easy).astype(int)

    def verdicts(model: float, length: float) -> np.ndarray:
        logit = model + length * np.tanh(longer / longer.std(ddof=1)) + DIFFICULTY * easy
        return (rng.random(QUESTIONS) < 1 / (1 + np.exp(-logit))).astype(float)

    wins = {"mine": verdicts(MODEL, LENGTH)}
    # the others answer at the baseline's length
    wins |= {f"other {i}": verdicts(m, 0.0) for i, m in enumerate((-1.0, 0.0, 0.5))}
    truth = float((1 / (1 + np.exp(-MODEL - DIFFICULTY * easy))).mean())
    by_id = {
        name: dict(zip(map(str, range(QUESTIONS)), w, strict=True)) for name, w in wins.items()
    }
    estimated = difficulties(by_id, "mine")
    known = {CASES[0]: easy.tolist(), CASES[1]: [], CASES[2]: list(estimated.values())}
    compared = [Compared(win, more) for win, more in zip(wins["mine"], longer, strict=True)]
    found = {}
    for case, difficulty in known.items():
        fit = length_controlled(compared, difficulty, np.random.default_rng(seed), 500)
        assert fit.win_rate is not None
        assert fit.length_effect is not None
        rate, effect = np.array(fit.win_rate), np.array(fit.length_effect)
        found[case] = {
            "raw": float(wins["mine"].mean()) - truth,
            "controlled": float(rate[0]) - truth,
            "rate held": float(rate[1] <= truth <= rate[2]),
            "effect": float(effect[0]),
            "effect held": float(effect[1] <= LENGTH <= effect[2]),
        }
    return found


def table(means: dict[str, dict[str, float]], header: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Length control on simulated verdicts",
        "",
        f"{header['date']}, {header['sets']} sets of {QUESTIONS} questions, seeds from "
        f"{header['seed']}; versions {header['versions']}. `python benchmarks/length_control.py`.",
        f"True φ {LENGTH}. Errors are means over the sets; held: share of 95 % intervals with the "
        "truth in them.",
        "",
        "| instruction term | raw win rate's error | controlled one's | held | φ | φ held |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {case} | {m['raw']:+.4f} | {m['controlled']:+.4f} | {m['rate held']:.3f} "
        f"| {m['effect']:.3f} | {m['effect held']:.3f} |"
        for case, m in means.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulates, prints, writes benchmarks/results/length_control.{md,json}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    from importlib.metadata import version

    from selfsteer.data.jsonl import write_atomic

    runs = [simulate(args.seed + i) for i in range(args.sets)]
    means = {
        case: {k: float(np.mean([r[case][k] for r in runs])) for k in runs[0][case]}
        for case in CASES
    }
    header = {
        "date": time.strftime("%Y-%m-%d"),
        "sets": args.sets,
        "seed": args.seed,
        "versions": {name: version(name) for name in ("numpy", "statsmodels", "scipy")},
    }
    text = json.dumps({**header, "cases": means}, indent=1) + "\n"
    write_atomic(args.output / "length_control.json", text)
    write_atomic(args.output / "length_control.md", table(means, header))
    print(table(means, header))


if __name__ == "__main__":
    main()
