"""The page of the evidence, made from the committed cells alone: tables, claims, figure.

Differences between two arms are paired: the same base, data seed and evaluation query. Their 95 %
interval is a percentile bootstrap that draws seeds (within each base) and evaluation queries anew,
crossed, since all seeds answer the same queries.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cells
import numpy as np
from cells import ARMS, HERE, METHODS, SEARCH, SEEN, TABLES, Cell, Table

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import read_jsonl, write_atomic
from selfsteer.judges.stats import Interval, mean_interval
from selfsteer.testbed.questions import question
from selfsteer.testbed.world import QUERIES

README = HERE / "README.md"
FINAL = QUERIES["final"]
FIGURE = HERE / "figure3.png"
COMPUTE = HERE / "compute.png"
RESAMPLES = 2000
NOT_RUN = "not run"
Found = dict[str, Any]
#: A figure of a cell: one number per evaluation query, or a single one.
Figure = Callable[[Found], Sequence[float]]
#: A figure that only cells of some tables have; None where a cell does not.
Rare = Callable[[Found], Sequence[float] | None]


def score(found: Found) -> Sequence[float]:
    """The oracle's total of each evaluation query, 0 to 100."""
    return [s / 10 for s in found["scores"]]


def base_score(found: Found) -> Sequence[float]:
    """The same of the base's answers."""
    return [s / 10 for s in found["base_scores"]]


def of_tasks(seen: bool, key: str = "scores") -> Figure:
    """Scores of the final queries of the kinds that transfer is aligned on, or of the others."""
    chosen = [(question(row["prompt"]).task in SEEN) == seen for _, row in read_jsonl(FINAL)]

    def figure(found: Found) -> Sequence[float]:
        return [s / 10 for s, ours in zip(found[key], chosen, strict=True) if ours]

    return figure


def accuracy(found: Found) -> Sequence[float]:
    """Of the last iteration's pairs, 0 to 100; none where there are no pairs."""
    last = found["iterations"][-1]
    return [100 * last["accuracy"]] if "accuracy" in last else []


def on_policy(side: str) -> Figure:
    """On-policyness of the last iteration's chosen or rejected answers, 0 to 100."""

    def figure(found: Found) -> Sequence[float]:
        last = found["iterations"][-1]
        return [100 * last["on_policyness"][side]] if "on_policyness" in last else []

    return figure


def tokens(found: Found) -> Sequence[float]:
    """Tokens of an answer of the last policy."""
    return [found["iterations"][-1]["tokens"]]


def compute(found: Found) -> Sequence[float]:
    """Tokens through the model, forward passes, millions."""
    return [found["compute"]["all"]]


def sharp(kind: str, scale: float, of: str = "sharpness") -> Rare:
    """A figure of `measures.sharpness`, of the policy or of the base."""

    def figure(found: Found) -> Sequence[float] | None:
        if of not in found:
            return None
        value = found[of][kind]
        return [scale * v for v in (value if isinstance(value, list) else [value])]

    return figure


#: (base, seed) → figures.
Rows = dict[tuple[int, int], np.ndarray]


def grid(arm: str, bases: Sequence[int], seeds: int, figure: Rare) -> Rows:
    """Figures of an arm's cells that are there; of the base itself for ``base``."""
    own = base_score if arm == "base" and figure is score else figure
    arms = [a for a in ARMS if Cell(a, 0, 0).trains_policy] if arm == "base" else [arm]
    out: Rows = {}
    for base in bases:
        for seed in range(seeds):
            known = (Cell(a, base, seed).found() for a in arms)
            values = (own(f) for f in known if f)
            found = next((v for v in values if v is not None), None)
            if found is not None:
                out[base, seed] = np.array(found)
    return out


def crossed(rows: Rows, name: str) -> Interval:
    """(mean, low, high) over bases, seeds and queries; see the head of this module.

    With one seed of each base the interval is over queries alone.
    """
    bases = sorted({base for base, _ in rows})
    data = {b: np.stack([v for (base, _), v in rows.items() if base == b]) for b in bases}
    value = float(np.mean([d.mean() for d in data.values()]))
    size = data[bases[0]].shape[1]
    if size == 1 and all(len(d) == 1 for d in data.values()):
        return value, None, None
    rng = np.random.default_rng(derive_seed("evidence", name))
    queries = drawn(size)
    found = np.zeros(RESAMPLES)
    for d in data.values():
        seeds = rng.multinomial(len(d), [1 / len(d)] * len(d), RESAMPLES) / len(d)
        found += ((seeds @ d) * queries).sum(axis=1) / len(data)
    low, high = np.quantile(found, [0.025, 0.975])
    return value, float(low), float(high)


@cache
def drawn(size: int) -> np.ndarray:
    """(resamples, size): how often each query is drawn, as shares; the same for all figures."""
    rng = np.random.default_rng(derive_seed("evidence", "queries", size))
    return rng.multinomial(size, [1 / size] * size, RESAMPLES) / size


def shown(value: Interval, digits: int = 1, sign: bool = False) -> str:
    """``62.4 [61.0, 63.8]``."""
    form = f"{'+' if sign else ''}.{digits}f"
    mean, low, high = value
    if low is None or high is None:
        return f"{mean:{form}}"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


# -- claims --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """``mine`` is above ``theirs`` in a figure, says the paper."""

    text: str
    mine: str
    theirs: str
    #: the paper's own figures
    paper: str
    #: the bases and seeds of this table
    table: str
    figure: Rare = score
    #: what we make of it, without figures: those are in the tables
    why: str = ""


#: Why claims come out as they do; those that share a reason share a text.
WHY_SSO = """\
The generator's rejected answers are likelier under the policy than PBAA's, at slightly less
accuracy; its policies are a little better and differ less from seed to seed. The paper's
differences are larger, in another measure. Against a PBAA that may spend as many tokens the
difference is about half, and undecided."""
WHY_ANNOTATED = """\
The stand-in is better data than UltraFeedback, whose answers are other models' and whose judge
errs. Here both answers are the policy's own and the judge is the one that scores, so that annotated
pairs lead in accuracy and in on-policyness: by the paper's own reasoning they must win. What SSO
reaches without a label is most of what an annotator who never errs reaches."""
WHY_CONTRAST = """\
Other than pairs, contrast distillation learns from every token of every answer, and needs no bad
one to be written. Its lead is left when answers are greedy, at about the entropy of SSO's policies,
so it is not a matter of sharpness alone. At temperature 1 it is not left. Annotated pairs are
ranked by the judge that scores, and it is below them on two of the three bases."""
WHY_RANKED = """\
How much likelier the good principle makes a plain answer than the bad one ranks the plain answers
of the tiny world well enough to come out beside SSO, at three quarters of its compute, and no bad
answer is written. On the harder world it ranks them worse (the table there has the accuracy of the
pairs) and prefers short ones. So it depends on the policy: `selfsteer check` measures how well
principles rank its answers."""
WHY_ROUNDS = """\
Three rounds cost less than SSO and lead it, sampled and greedily. Over one round they gain where
answers are sampled, most at temperature 1, and nothing greedily, with less entropy and variety: the
policy slips less. This world's ceiling is near."""
WHY_ACCURACY = """\
What a half of the loss teaches under one principle carries over to the other (either half alone
costs more accuracy than both): bad answers come nearer to plain ones, so they are more on-policy,
and some are no worse than the chosen one. Settings were searched by the policy's score alone."""
WHY_UNEVEN = """\
On the tiny world every good method comes near the ceiling, which hides most of what is between
them. Here SSO leads PBAA by far in sampled answers, and greedily on one of the two bases only: much
of what its policies have over PBAA's is that they slip less when they are sampled. One round of
contrast distillation scores about as SSO does, at less than a third of its compute. In three
rounds, each on the policy's answers of then and all under the eye of the first policy, it costs a
little less than SSO and scores more, sampled, greedily and at temperature 1, with no less variety.
Annotated pairs are far above all of them, greedily too, so there is more to be learnt from plain
answers than principles bring out."""
WHY_HALVES = """\
L+ does most of the work here. L- alone costs as much accuracy and gains less; in the paper too it
gains less than L+. What both add to L+ alone is smaller than five seeds can show."""
WHY_DIRECT = """\
Eq. 3 makes the most accurate pairs of all and the least on-policy, less so than PBAA's: what the
paper gives as the reason for eq. 4. In the policy's score the two effects nearly balance here."""
WHY_REWARD = """\
The test pairs are two plain answers of the policy. So are the annotated pairs; pairs under good and
bad principles are not. No arm is trained on data like RewardBench's. The paper's differences are of
a size that five seeds here could not show. A mixture has twice the pairs and the steps; annotated
pairs alone, with as many steps, come out about the same, so that most of its gain is in the
steps."""
WHY_WRITERS = """\
Principles on random features cost a tenth of the pairs' accuracy and leave rejected answers
more on-policy; the policy does not mind: it is as if the two balanced. Naming the features that
count adds nothing to what the policy names itself. No arm has a writer whose text is bad, so
that the paper's question, a weak model's wording against a strong one's, is asked only in part."""
WHY_NOISE = """\
Wrong principles cost every method, PBAA most: it trains on the pairs as they are written. SSO's
generator and the teacher of contrast distillation see all queries at once, and a few wrong ones
among them do less harm. Contrast distillation's lead on SSO shrinks and is gone at 30 %. One
principle for every query, from the catalogue, costs PBAA about two points, contrast distillation
one and SSO nothing that five seeds could show: here a writer is worth less than a principle that is
right."""
WHY_IPO = """\
As with DPO in size and in the data behind it, with five seeds instead of thirty. On the tuning
queries the search found less for SSO than for PBAA; their second axes differ."""
WHY_ONLINE = """\
In all four arms the accuracy of the pairs falls from iteration to iteration: a better policy's bad
answers are better too. v1's filter might help against it and leaves too few triples here. Neither W
nor G helps with settings that were found for PBAA, in one iteration. Lengths are the world's."""
CLAIMS = (
    Claim("SSO is above PBAA", "sso", "pbaa", "+5.5, +5.3, +1.8, +1.8", "main", why=WHY_SSO),
    Claim(
        "SSO is above annotated pairs",
        "sso",
        "annotated",
        "+13.0, +22.8, +1.8, +16.1",
        "main",
        why=WHY_ANNOTATED,
    ),
    Claim(
        "PBAA is above annotated pairs",
        "pbaa",
        "annotated",
        "+7.5, +17.5, 0.0, +14.3",
        "main",
        why=WHY_ANNOTATED,
    ),
    Claim("annotated pairs help", "annotated", "base", "+1.4, +0.1, +3.7, +0.9", "main"),
    Claim("SSO helps", "sso", "base", "+14.4, +22.9, +5.5, +17.0", "main"),
    Claim(
        "SSO is above PBAA of nine tenths of its compute",
        "sso",
        "pbaa-compute",
        "not in it",
        "main",
        why=WHY_SSO,
    ),
    Claim(
        "SSO's rejected answers are more on-policy",
        "sso",
        "pbaa",
        "figure 3",
        "main",
        on_policy("rejected"),
        why=WHY_SSO,
    ),
    Claim(
        "SSO's pairs are more accurate",
        "sso",
        "pbaa",
        "figure 3",
        "main",
        accuracy,
        why=WHY_ACCURACY,
    ),
    Claim(
        "contrast distillation is above SSO",
        "contrast",
        "sso",
        "not in it",
        "contrast",
        why=WHY_CONTRAST,
    ),
    Claim(
        "contrast distillation is above PBAA",
        "contrast",
        "pbaa",
        "not in it",
        "contrast",
        why=WHY_CONTRAST,
    ),
    Claim(
        "contrast distillation is above annotated pairs",
        "contrast",
        "annotated",
        "not in it",
        "contrast",
        why=WHY_CONTRAST,
    ),
    Claim(
        "best of 4 by principles is above PBAA",
        "best-of-4-principles",
        "pbaa",
        "not in it",
        "contrast",
        why=WHY_RANKED,
    ),
    Claim(
        "best of 4 by principles is above SSO",
        "best-of-4-principles",
        "sso",
        "not in it",
        "contrast",
        why=WHY_RANKED,
    ),
    Claim(
        "best of 8 by principles is above best of 4",
        "best-of-8-principles",
        "best-of-4-principles",
        "not in it",
        "others",
        why=WHY_RANKED,
    ),
    Claim(
        "greedily, contrast distillation is above SSO",
        "contrast",
        "sso",
        "not in it",
        "sharpness",
        sharp("greedy", 0.1),
        why=WHY_CONTRAST,
    ),
    Claim(
        "greedily, contrast distillation is above annotated pairs",
        "contrast",
        "annotated",
        "not in it",
        "sharpness",
        sharp("greedy", 0.1),
        why=WHY_CONTRAST,
    ),
    Claim(
        "contrast distillation in three rounds is above SSO",
        "contrast-rounds",
        "sso",
        "not in it",
        "sharpness",
        why=WHY_ROUNDS,
    ),
    Claim(
        "greedily, contrast distillation in three rounds is above SSO",
        "contrast-rounds",
        "sso",
        "not in it",
        "sharpness",
        sharp("greedy", 0.1),
        why=WHY_ROUNDS,
    ),
    Claim(
        "contrast distillation in three rounds is above one round",
        "contrast-rounds",
        "contrast",
        "not in it",
        "sharpness",
        why=WHY_ROUNDS,
    ),
    Claim(
        "contrast distillation in three rounds is above annotated pairs",
        "contrast-rounds",
        "annotated",
        "not in it",
        "sharpness",
        why=WHY_ROUNDS,
    ),
    Claim(
        "on the harder world, SSO is above PBAA",
        "sso",
        "pbaa",
        "not in it",
        "uneven",
        why=WHY_UNEVEN,
    ),
    Claim(
        "on the harder world, greedily, SSO is above PBAA",
        "sso",
        "pbaa",
        "not in it",
        "uneven",
        sharp("greedy", 0.1),
        why=WHY_UNEVEN,
    ),
    Claim(
        "on the harder world, contrast distillation is above SSO",
        "contrast",
        "sso",
        "not in it",
        "uneven",
        why=WHY_UNEVEN,
    ),
    Claim(
        "on the harder world, best of 4 by principles is above SSO",
        "best-of-4-principles",
        "sso",
        "not in it",
        "uneven",
        why=WHY_RANKED,
    ),
    Claim(
        "on the harder world, greedily, contrast distillation is above SSO",
        "contrast",
        "sso",
        "not in it",
        "uneven",
        sharp("greedy", 0.1),
        why=WHY_UNEVEN,
    ),
    Claim(
        "on the harder world, contrast distillation in three rounds is above SSO",
        "contrast-rounds",
        "sso",
        "not in it",
        "uneven",
        why=WHY_UNEVEN,
    ),
    Claim(
        "on the harder world, greedily, contrast distillation in three rounds is above SSO",
        "contrast-rounds",
        "sso",
        "not in it",
        "uneven",
        sharp("greedy", 0.1),
        why=WHY_UNEVEN,
    ),
    Claim(
        "on the harder world, contrast distillation is above annotated pairs",
        "contrast",
        "annotated",
        "not in it",
        "uneven",
        why=WHY_UNEVEN,
    ),
    Claim("L+ alone is above PBAA", "sso-plus-only", "pbaa", "+4.1", "halves", why=WHY_HALVES),
    Claim("L- alone is above PBAA", "sso-minus-only", "pbaa", "+2.5", "halves", why=WHY_HALVES),
    Claim(
        "both halves are above L+ alone", "sso", "sso-plus-only", "+1.4", "halves", why=WHY_HALVES
    ),
    Claim(
        "both halves are above L- alone", "sso", "sso-minus-only", "+3.0", "halves", why=WHY_HALVES
    ),
    Claim("eq. 4 is above eq. 3", "sso", "sso-direct-minus", "+3.2", "direct", why=WHY_DIRECT),
    Claim(
        "reward model: SSO's pairs are above PBAA's",
        "reward-sso",
        "reward-pbaa",
        "+1.1",
        "reward",
        why=WHY_REWARD,
    ),
    Claim(
        "reward model: SSO's pairs are above annotated ones",
        "reward-sso",
        "reward-annotated",
        "+0.5",
        "reward",
        why=WHY_REWARD,
    ),
    Claim(
        "reward model: SSO's pairs add to annotated ones",
        "reward-annotated-sso",
        "reward-annotated",
        "+1.8 (Skywork)",
        "reward",
        why=WHY_REWARD,
    ),
    Claim(
        "reward model: the same against as many steps on annotated ones",
        "reward-annotated-sso",
        "reward-annotated-longer",
        "not in it",
        "reward",
        why=WHY_REWARD,
    ),
    Claim(
        "a weak writer costs SSO", "sso", "sso-weak-writer", "table 5", "writers", why=WHY_WRITERS
    ),
    Claim(
        "a strong writer helps SSO",
        "sso-strong-writer",
        "sso",
        "table 5",
        "writers",
        why=WHY_WRITERS,
    ),
    *(
        Claim(text, mine, theirs, "not in it", "noise", why=WHY_NOISE)
        for text, mine, theirs in (
            (
                "10 % of swapped principles cost contrast distillation",
                "contrast",
                "contrast-swapped-10",
            ),
            ("10 % of swapped principles cost PBAA", "pbaa", "pbaa-swapped-10"),
            ("10 % of swapped principles cost SSO", "sso", "sso-swapped-10"),
            (
                "30 % of swapped principles cost contrast distillation",
                "contrast",
                "contrast-swapped-30",
            ),
            ("30 % of swapped principles cost PBAA", "pbaa", "pbaa-swapped-30"),
            ("30 % of swapped principles cost SSO", "sso", "sso-swapped-30"),
            (
                "with 30 % swapped, contrast distillation is above SSO",
                "contrast-swapped-30",
                "sso-swapped-30",
            ),
            (
                "one principle for all costs contrast distillation",
                "contrast",
                "contrast-one-for-all",
            ),
            ("one principle for all costs PBAA", "pbaa", "pbaa-one-for-all"),
            ("one principle for all costs SSO", "sso", "sso-one-for-all"),
        )
    ),
    Claim("with IPO, SSO is above PBAA", "sso-ipo", "pbaa-ipo", "table 6", "ipo", why=WHY_IPO),
    Claim("online, SSO is above PBAA", "online", "online-pbaa", "v1", "online", why=WHY_ONLINE),
    Claim(
        "online, PBAA's answers are longer",
        "online-pbaa",
        "online",
        "v1",
        "online",
        tokens,
        why=WHY_ONLINE,
    ),
    Claim("online, W helps", "online", "online-no-weight", "v1", "online", why=WHY_ONLINE),
    Claim("online, G helps", "online", "online-no-steer", "v1", "online", why=WHY_ONLINE),
)


#: Our difference, seeds with the paper's sign, and whether the claim holds in miniature.
Judged = tuple[str, str, str]


def judged(claim: Claim) -> Judged:
    """See `Judged`."""
    table = next(t for t in TABLES if t.name == claim.table)
    mine, theirs = (
        grid(arm, table.bases, table.seeds, claim.figure) for arm in (claim.mine, claim.theirs)
    )
    rows = {key: mine[key] - theirs[key] for key in mine if key in theirs}
    if not rows:
        return NOT_RUN, "", NOT_RUN
    value = crossed(rows, f"{claim.table}/{claim.mine}/{claim.theirs}/{claim.text}")
    mean, low, high = value
    verdict = "undecided"
    if low is not None and high is not None and (low > 0 or high < 0):
        verdict = "holds" if mean > 0 else "**fails**"
    of = table.seeds * len(table.bases)
    missing = "" if len(rows) == of else f", {of - len(rows)} not run"
    signs = sign_test([float(row.mean()) for row in rows.values()])
    return shown(value, 2, sign=True), signs + missing, verdict


def sign_test(differences: Sequence[float]) -> str:
    """``28 of 30, p < 0.001``: how many are positive, exact and two-sided, zeros left out."""
    above, of = sum(d > 0 for d in differences), sum(d != 0 for d in differences)
    if not of:
        return f"0 of {len(differences)}"
    extreme = max(above, of - above)
    p = min(1.0, 2 * sum(math.comb(of, k) for k in range(extreme, of + 1)) / 2**of)
    chance = "p < 0.001" if p < 0.001 else f"p {p:.2f}" if p >= 0.1 else f"p {p:.3f}"
    return f"{above} of {len(differences)}, {chance}"


def advice(judgements: dict[Claim, Judged]) -> str:
    """Which method to use, and how sure that is."""
    said = {claim.text: f"{ours} ({signs})" for claim, (ours, signs, _) in judgements.items()}
    costs = {}
    for arm in ("contrast", "pbaa", "sso"):
        rows = grid(arm, (0,), 10, compute)
        costs[arm] = f"{np.mean(list(rows.values())):.2f}" if rows else NOT_RUN
    text = ADVICE.format(
        sso=said["contrast distillation is above SSO"],
        annotated=said["contrast distillation is above annotated pairs"],
        greedy=said["greedily, contrast distillation is above SSO"],
        pbaa=said["SSO is above PBAA"],
        equal=said["SSO is above PBAA of nine tenths of its compute"],
        ranked=said["best of 4 by principles is above SSO"],
        hard_ranked=said["on the harder world, best of 4 by principles is above SSO"],
        hard_pbaa=said["on the harder world, SSO is above PBAA"],
        rounds=said["contrast distillation in three rounds is above SSO"],
        rounds_greedy=said["greedily, contrast distillation in three rounds is above SSO"],
        hard_greedy=said["on the harder world, greedily, SSO is above PBAA"],
        hard_contrast=said["on the harder world, contrast distillation is above SSO"],
        hard_rounds=said["on the harder world, contrast distillation in three rounds is above SSO"],
        hard_rounds_greedy=said[
            "on the harder world, greedily, contrast distillation in three rounds is above SSO"
        ],
        costs=costs,
    )
    found = text.replace("\n- ", "\0- ").replace("\n", " ").split("\0")
    return "\n".join(map(_wrapped, found))


def claims(judgements: dict[Claim, Judged]) -> str:
    """One row per claim."""
    lines = [
        "| claim | paper | its signs | ours | our signs | in miniature |",
        "|---|---|---|---|---|---|",
    ]
    for claim, found in judgements.items():
        theirs = [float(figure) for figure in re.findall(r"[-+]?\d+\.\d+", claim.paper)]
        signs = sign_test(theirs) if len(theirs) > 1 else ""
        lines.append("| " + " | ".join([claim.text, claim.paper, signs, *found]) + " |")
    return "\n".join(lines)


def explanations(judgements: dict[Claim, Judged]) -> str:
    """What we make of the claims that were run; one paragraph may stand behind several."""
    texts: dict[str, list[str]] = {}
    for claim, (ours, _, _) in judgements.items():
        if claim.why and ours != NOT_RUN:
            texts.setdefault(claim.why, []).append(claim.text)
    found = [f"- **{'; '.join(named)}.** {why}" for why, named in texts.items()]
    return "\n".join(_wrapped(text) for text in found)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False)


#: Tables whose arms are held against what they cost.
COMPARED = ("main", "contrast", "sharpness")

# -- tables --------------------------------------------------------------------------------------

#: AlpacaEval 2 LC win rate / MT-Bench of the paper's table 1, by model.
PAPER_MAIN = {
    "Llama3-8B-SFT": ("20.6 / 7.38", "22.0 / 7.71", "29.5 / 7.92", "35.0 / 7.96"),
    "Qwen2-7B-SFT": ("20.1 / 8.24", "20.2 / 8.35", "37.7 / 8.59", "43.0 / 8.66"),
    "Llama3-8B-Instruct": ("20.1 / 8.06", "23.8 / 7.72", "23.8 / 8.05", "25.6 / 8.13"),
    "Qwen2-7B-Instruct": ("19.5 / 8.33", "20.4 / 8.21", "34.7 / 8.37", "36.5 / 8.39"),
}
#: AlpacaEval 2 LC win rate of Llama3-8B-SFT in the paper's ablations (tables 3 and 4).
PAPER_ABLATIONS = {
    "pbaa": "29.5",
    "sso-plus-only": "33.6",
    "sso-minus-only": "32.0",
    "sso": "35.0",
    "sso-direct-minus": "31.8",
}


def main_table(table: Table) -> str:
    """Scores by base, the paper's rows above them."""
    arms = ("base", *table.arms)
    lines = ["| | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for model, row in PAPER_MAIN.items():
        lines.append("| paper: " + " | ".join([model, *row, "" * (len(arms) - 4)]) + " |")
    for base in table.bases:
        row = [cell_text(arm, (base,), table.seeds) for arm in arms]
        lines.append(f"| base {base} | " + " | ".join(row) + " |")
    row = [cell_text(arm, table.bases, table.seeds) for arm in arms]
    lines.append("| all | " + " | ".join(row) + " |")
    return "\n".join(lines)


def cell_text(
    arm: str, bases: Sequence[int], seeds: int, figure: Rare = score, digits: int = 1
) -> str:
    """Mean with its interval, and how many seeds it lacks."""
    rows = grid(arm, bases, seeds, figure)
    if not rows:
        return NOT_RUN
    if not next(iter(rows.values())).size:
        return "no pairs"
    missing = len(bases) * seeds - len(rows)
    text = shown(crossed(rows, f"{arm}/{bases}"), digits)
    return text + (f" ({missing} not run)" if missing else "")


def figures_table(table: Table, paper: dict[str, str] | None = None, less: str = "") -> str:
    """One row per arm: score, the data behind it, length, compute.

    ``less``: an arm that the scores of the others are held against, pair by pair.
    """
    columns = ["arm", *(["paper"] if paper else []), "score", *([f"less {less}'s"] if less else [])]
    columns += ["accuracy", "on-policy chosen"]
    columns += ["on-policy rejected", "tokens of an answer", "compute, M tokens"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for arm in table.arms:
        row = [arm, *([paper.get(arm, "")] if paper else [])]
        row.append(cell_text(arm, table.bases, table.seeds))
        if less:
            row.append(shown(found, sign=True) if (found := difference(arm, less, table)) else "")
        for figure in (accuracy, on_policy("chosen"), on_policy("rejected"), tokens):
            row.append(cell_text(arm, table.bases, table.seeds, figure))
        rows = grid(arm, table.bases, table.seeds, compute)
        row.append(f"{np.mean(list(rows.values())):.2f}" if rows else NOT_RUN)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def difference(arm: str, than: str, table: Table) -> Interval | None:
    """By how much an arm scores more than another; None for the arm itself and without cells."""
    mine, theirs = (grid(name, table.bases, table.seeds, score) for name in (arm, than))
    rows = {key: mine[key] - theirs[key] for key in mine if key in theirs}
    return crossed(rows, f"{table.name}/{arm}/{than}") if rows and arm != than else None


def sharpness_table(table: Table) -> str:
    """Scores at three temperatures, and how sure of itself a policy is; the base's row first."""
    columns = ("T 0.7", "greedy", "T 1", "entropy, nats per token", "distinct of 4")
    kinds = (("greedy", 0.1, 1), ("hot", 0.1, 1), ("entropy", 1.0, 3), ("distinct", 1.0, 2))
    lines = ["| arm | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for arm in ("base", *table.arms):
        row = [arm, cell_text(arm, table.bases, table.seeds)]
        of = "base_sharpness" if arm == "base" else "sharpness"
        for kind, scale, digits in kinds:
            row.append(cell_text(arm, table.bases, table.seeds, sharp(kind, scale, of), digits))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def transfer_table(table: Table) -> str:
    """Scores on both halves of the kinds, of policies aligned on all kinds and on one half."""
    heads = ("aligned on", "kinds of the half", "other kinds", "other kinds, less the base")
    lines = ["| arm | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    seen, base = (
        grid(METHODS[0], table.bases, table.seeds, of_tasks(which, "base_scores"))
        for which in (True, False)
    )
    own = [shown(crossed(rows, "transfer/base")) if rows else NOT_RUN for rows in (seen, base)]
    lines.append("| base | | " + " | ".join(own) + " | |")
    for method in METHODS:
        for arm, on in ((method, "all kinds"), (f"{method}-transfer", "the half")):
            row = [
                cell_text(arm, table.bases, table.seeds, of_tasks(seen)) for seen in (True, False)
            ]
            mine = grid(arm, table.bases, table.seeds, of_tasks(False))
            gain = {key: mine[key] - base[key] for key in mine if key in base}
            text = shown(crossed(gain, f"transfer/{arm}"), sign=True) if gain else NOT_RUN
            lines.append(f"| {method} | {on} | " + " | ".join([*row, text]) + " |")
    return "\n".join(lines)


def iterations_table(table: Table) -> str:
    """Score and length of an answer after each iteration, and the accuracy of its pairs."""
    lines = [
        "| arm | iteration | score | accuracy | on-policy rejected | tokens of an answer |",
        "|---|---|---|---|---|---|",
    ]
    for arm in table.arms:
        rows = [f for s in range(table.seeds) if (f := Cell(arm, 0, s).found())]
        if not rows:
            lines.append(f"| {arm} | | {NOT_RUN} | | | |")
        for k in range(3 if rows else 0):
            found = [row["iterations"][k] for row in rows]
            figures = [
                [100 * f["score"] for f in found],
                [100 * f["accuracy"] for f in found],
                [100 * f["on_policyness"]["rejected"] for f in found],
                [f["tokens"] for f in found],
            ]
            rng = np.random.default_rng(derive_seed("evidence", arm, k))
            shown_figures = [shown(mean_interval(values, rng)) for values in figures]
            lines.append(f"| {arm} | {k + 1} | " + " | ".join(shown_figures) + " |")
    return "\n".join(lines)


def audit_table(table: Table) -> str:
    """Changes against the base of policies and generators, and who fell beyond chance."""
    figures = ("score/plain", "score/bad", "gap/good", "gap/bad")
    titles = ["score", "score under bad principles", "gap, good", "gap, bad", "back doors"]
    lines = ["| model | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for arm in table.arms:
        cells_there = [(s, f) for s in range(table.seeds) if (f := Cell(arm, 0, s).found())]
        labels = dict.fromkeys(label for _, f in cells_there for label in f["changes"])
        for label in labels or ["policy"]:
            found = {(0, s): f for s, f in cells_there if label in f["changes"]}
            row = [f"{arm.removeprefix('audit-')}, {label}"]
            for name in figures:
                scale, digits = (100, 1) if name.startswith("score") else (1, 3)
                rows = {k: np.array([scale * f["changes"][label][name]]) for k, f in found.items()}
                value = crossed(rows, f"{arm}/{label}/{name}") if rows else None
                row.append(shown(value, digits, sign=True) if value else NOT_RUN)
            doors = sum(f["verdicts"][label] == "back_door" for f in found.values())
            row.append(f"{doors} of {len(found)}" if found else NOT_RUN)
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


#: RewardBench of a Llama3-8B reward model, table 2; the annotated set is UltraFeedback.
PAPER_REWARD = {"reward-annotated": "79.5", "reward-pbaa": "78.9", "reward-sso": "80.0"}


def reward_table(table: Table) -> str:
    """Accuracy of each reward model on the test pairs."""
    lines = ["| reward model on | paper, RewardBench | accuracy |", "|---|---|---|"]
    for arm in table.arms:
        name = ARMS[arm].says.removeprefix("reward model on the pairs of ")
        text = cell_text(arm, table.bases, table.seeds)
        lines.append(f"| {name} | {PAPER_REWARD.get(arm, '')} | {text} |")
    return "\n".join(lines)


def draw() -> bool:
    """Figure 3: accuracy against on-policyness, a point per cell; False without cells."""
    points: dict[str, list[tuple[float, float]]] = {}
    for arm in (a for a in ARMS if Cell(a, 0, 0).trains_policy and a != "spin"):
        for base in (0, 1, 2):
            for seed in range(10):
                found = Cell(arm, base, seed).found()
                if found and "accuracy" in found["iterations"][0]:
                    data = found["iterations"][0]
                    points.setdefault(arm, []).append(
                        (100 * data["on_policyness"]["both"], 100 * data["accuracy"])
                    )
    if not points:
        return False
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7, 5), layout="constrained")
    axes = canvas.subplots()
    for i, (arm, found) in enumerate(points.items()):
        x, y = zip(*found, strict=True)
        axes.scatter(x, y, s=18, alpha=0.7, label=arm, marker="os^Dv"[i // 10 % 5])
    axes.set_xlabel("on-policyness: mean token probability of both answers, plain context, %")
    axes.set_ylabel("accuracy of the pairs, by the oracle, %")
    axes.legend(fontsize=7, ncols=2)
    save(canvas, FIGURE)
    return True


def draw_compute() -> bool:
    """Score by compute on the first base, the budgets of a method as one line; False without cells.

    A method's points are over the same seeds where it has several.
    """
    arms = dict.fromkeys(arm for t in TABLES if t.name in COMPARED for arm in t.arms + t.last)
    budgets = next(t for t in TABLES if t.name == "budgets")
    lines = {}
    for arm in arms:
        own = [name for name in budgets.arms if name.rsplit("-", 1)[0] == arm]
        found = [point_of(name, budgets.seeds if own else 10) for name in (*own, arm)]
        if points := sorted(p for p in found if p):
            lines[arm] = points
    if not lines:
        return False
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7, 4), layout="constrained")
    axes = canvas.subplots()
    for i, (arm, points) in enumerate(lines.items()):
        cost, mean, low, high, seeds = (np.array(column) for column in zip(*points, strict=True))
        label = f"{arm}, {seeds.max()} seeds"
        axes.errorbar(
            cost, mean, [mean - low, high - mean], fmt="os^Dv"[i % 5] + "-", ms=5, lw=1, label=label
        )
    axes.set_xlabel("compute: million tokens through the model, a trained token counts three times")
    axes.set_ylabel("score of sampled answers")
    axes.set_xlim(left=0)
    canvas.legend(fontsize=7, loc="outside right upper")
    save(canvas, COMPUTE)
    return True


def point_of(arm: str, seeds: int) -> tuple[float, float, float, float, int] | None:
    """Compute, score with its interval, and how many seeds stand behind it."""
    costs, scores = (grid(arm, (0,), seeds, figure) for figure in (compute, score))
    if not costs:
        return None
    mean, low, high = crossed(scores, f"compute/{arm}")
    cost = float(np.mean(list(costs.values())))
    return cost, mean, mean if low is None else low, mean if high is None else high, len(costs)


def save(canvas: Any, path: Path) -> None:
    """A PNG without a trace of the program that drew it."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def search_table() -> str:
    """Each family's trials on the tuning queries, the chosen one marked."""
    lines = ["| family | settings | tuning score | chosen |", "|---|---|---|---|"]
    for family in SEARCH:
        for cell, trial in zip(cells.trials(family), SEARCH[family], strict=True):
            found = cell.found()
            value = f"{np.mean(score(found)):.2f}" if found else NOT_RUN
            chosen = "yes" if trial == cells.best(family) else ""
            lines.append(f"| {family} | {', '.join(trial)} | {value} | {chosen} |")
    return "\n".join(lines)


def made() -> str:
    """When and with what the cells were made."""
    found = [f for c in cells.wanted() if (f := c.found())]
    if not found:
        return "No cell is filled yet."
    dates = sorted({f["date"] for f in found})
    packages = sorted({", ".join(f"{k} {v}" for k, v in f["versions"].items()) for f in found})
    seconds = sum(sum(f["seconds"].values()) for f in found)
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    hardware = "; ".join(sorted({f["hardware"] for f in found}))
    return (
        f"{len(found)} of {len(cells.wanted())} cells, {span}; {hardware}; "
        f"{seconds / 3600:.1f} hours of runs on a shared machine. {'; '.join(packages)}."
    )


def write() -> None:
    """Writes the page."""
    main = TABLES[0]
    found = {claim: judged(claim) for claim in CLAIMS}
    texts = {"claims": claims(found), "explanations": explanations(found), "advice": advice(found)}
    parts = [HEAD.format(made=made(), size=cells.SIZE, **texts)]
    parts.append(f"## {main.title}\n\n{MAIN_NOTE.format(control=cells.CONTROL_SIZE)}")
    parts.append(main_table(main))
    parts.append(figures_table(main))
    for table in TABLES[1:]:
        paper = PAPER_ABLATIONS if table.name in ("halves", "direct") else None
        note = NOTES.get(table.name)
        parts.append(f"## {table.title}" + (f"\n\n{note}" if note else ""))
        if table.name == "reward":
            parts.append(reward_table(table))
        elif table.name == "sharpness":
            parts.append(sharpness_table(table))
        elif table.name == "uneven":
            parts += [figures_table(table), sharpness_table(table)]
        elif table.name == "transfer":
            parts.append(transfer_table(table))
        elif table.name == "audit":
            parts.append(audit_table(table))
        else:
            less = "pbaa" if table.name in ("contrast", "others") else ""
            parts.append(figures_table(table, paper, less))
        if table.name == "online":
            parts.append(iterations_table(table))
    picture = "![](compute.png)" if draw_compute() else NOT_RUN
    parts.append(f"## Score by compute\n\n{COMPUTE_NOTE}\n\n{picture}")
    figure = "![](figure3.png)" if draw() else NOT_RUN
    parts.append(
        f"## Figure 3: accuracy and on-policyness of the pairs\n\n{FIGURE_NOTE}\n\n{figure}"
    )
    arms = "\n".join(f"- `{name}`: {arm.says}." for name, arm in ARMS.items())
    parts.append(f"## Arms\n\n{arms}")
    parts.append(f"## The search\n\n{SEARCH_NOTE}\n\n{search_table()}")
    write_atomic(README, "\n\n".join(parts) + "\n")


ADVICE = """\
- **With the policy's weights at hand, take contrast distillation: one round where compute is
little, three where it may cost as much as SSO.** The score of one round less SSO's: {sso}; greedily
{greedy}; less that of annotated pairs: {annotated}. It costs {costs[contrast]} million tokens, SSO
{costs[sso]}, PBAA {costs[pbaa]}. Three rounds, at a little less compute than SSO: {rounds},
greedily {rounds_greedy}. On [a harder world](#a-harder-world) one round less SSO: {hard_contrast};
three rounds: {hard_rounds}, greedily {hard_rounds_greedy}.
- **If you want pairs, take SSO; if prompts are plenty, PBAA on more of them.** SSO's score less
PBAA's: {pbaa}; less that of PBAA on 2.64 times as many queries, at nine tenths of SSO's compute:
{equal}; on the harder world less PBAA's {hard_pbaa}, though greedily {hard_greedy}. Best of 4 by
principles less SSO: {ranked}; on the harder world {hard_ranked}.
- **How sure is that?** On these worlds, as sure as the intervals say. For a house style on [a real
model](../real/README.md) of 135M parameters SSO is far above PBAA and a little above one round of
contrast distillation (three seeds each). So measure on yours: `selfsteer check` says what can
work."""
HEAD = """\
# The evidence, in miniature

Made by `python benchmarks/evidence/run.py` from the JSON files in `cells/`; do not edit.
{made}

{advice}

What the papers measured with 7B and 8B models and chat judges is measured here on the tiny world,
with a model of one million parameters and an exact judge. Only signs and orders can be compared.
Scores are the oracle's total of an answer to the 354 final queries, times 100. A data seed decides
which {size} alignment queries are taken, their principles, all samples and the order of training;
the base models are the shipped checkpoint and others built with another seed of data and weights.
All arms of a table start from the same ones. Some cells of the ablations on the first base are of
an earlier version of the sampler: model, queries and settings are the same, random numbers are not.
Trainings keep the last step, as the papers do.

[Intervals] are 95 %, paired by base, seed and evaluation query, from a bootstrap that draws seeds
(within each base) and queries anew, crossed. A claim *holds* if its interval lies on the claim's
side of 0, *fails* if it lies on the other, else it is *undecided*. No correction for the number of
claims. Signs: how many of the paper's models, or of our seeds and bases, have the claim's sign,
with an exact two-sided sign test.

## Claims

The paper's figures are differences in AlpacaEval 2 LC win rate, for table 1 in the order
Llama3-8B-SFT, Qwen2-7B-SFT, Llama3-8B-Instruct, Qwen2-7B-Instruct, else of Llama3-8B-SFT. Where
only a place is named, the paper says so there and its figure is not at hand.

{claims}

### What we make of it

What the tables suggest; no reason was tested by itself.

{explanations}"""
MAIN_NOTE = """\
The paper's rows are AlpacaEval 2 LC win rate / MT-Bench. Ours: `annotated` stands for
UltraFeedback: two plain answers per query, ranked by the oracle, which never errs. `pbaa-compute`
is PBAA on {control} queries, with a search of its own, for more steps want another learning rate:
with PBAA's settings, tried first, three seeds scored 67.7 on the final queries, which is why.
The last column says what each cost: tokens through the model, a trained token counted three times,
without evaluation."""
NOTES = {
    "reward": """\
Accuracy on pairs of the base's plain answers to the final queries, as the oracle ranks them. The
settings are the same for all and were not searched; a mixture has both sets, so more steps. The
paper mixes its pairs with Skywork's: 84.5 alone, 86.3 with SSO's.""",
    "contrast": """\
Methods beside the main arms of table 1 ([methods.md](../../docs/methods.md) explains them), each
with a search of its own.""",
    "sharpness": """\
A policy that is merely surer of itself makes fewer slips when it is sampled. Greedy answers have no
slips of that kind, so a lead that is left there is quality. Entropy is minus the mean log-prob of
what is sampled at temperature 1; distinct is the share of different answers among four at 0.7, over
128 queries.""",
    "uneven": """\
The same questions and the same oracle, and another base model (`selfsteer testbed build --uneven`):
some features of an answer are good less often than others, in plain answers from 46 % of the time
down to 16 %, and under every principle in the same proportion; answers to one task differ in
length. On the tiny world the greedy answers of every good method come out near its ceiling, here
they do not. Settings are those found on the tiny world; nothing was searched here.""",
    "rivals": """\
Other ways to make pairs, without principles, or to weigh them; as many queries
(docs/methods.md). Self-rewarding and SGPO are not here: the tiny model can neither judge nor
revise. Best of 4 is ranked by the oracle, which is a bound for reward models, and by a reward
model that was trained on the annotated pairs of the same seed. Best of 4 and SPIN take the
settings found for annotated pairs, WPO those of the method it weighs: none was searched by
itself. The answers given to SPIN are of the quality of the policy's own, so that there is
nothing to learn, and training on it does harm.""",
    "others": """\
The rest of [the methods](../../docs/methods.md). `dlma`, `good-over-plain` and `distil` have
searches of their own. Best of 8 takes what was found for best of 4 and the others what was found
for PBAA, so that a row of theirs below PBAA's may lie there for want of a search: `bad-to-plain`,
whose three rounds are three trainings, lay 6 points below PBAA with its learning rate, and has half
of it here. `irft`, `spin-judged`, `sgpo` and `self-rewarding` are not here: the answers that the
first two are given would be of the policy's own quality, and the tiny model can neither revise nor
judge.""",
    "audit": """\
`selfsteer audit` on the same trainings: 128 final queries under good and bad principles, changes
against the base, intervals over seeds. Score: the oracle's, times 100. Gap: how much likelier a
model holds its own answer under the principle that asked for it, nats per token; a wider one means
that it listens more. A back door is a fall of the score under bad principles beyond chance, by the
audit's own interval.""",
    "writers": """\
The writers are no models here. Weak: features drawn at random, with the catalogue's text. Own: the
policy names features and writes both principles, as in the main table. Strong: two of the features
that the oracle scores an answer to the query on, with the catalogue's text.""",
    "noise": """\
What if the writer is wrong? The good and the bad principle are swapped for a seeded share of the
queries; nothing tells the method which. Or one principle, on helpfulness and accuracy in the
catalogue's words, stands for all queries, as a user writes it who has no writer. Settings are those
of the main arms; compute counts the principles as if the policy had written them.""",
    "transfer": """\
Aligned on facts, steps, lists and questions that a model should not answer, and scored on these and
on the rest: comparisons, advice and descriptions, whose answers look different. As many queries and
the same settings. Where the last column of *the half* comes near that of *all kinds*, what was
learnt is a way to answer rather than answers to these questions.""",
    "budgets": """\
The main arms on a quarter and on half of the queries, with the settings found for 480; [the
figure](#score-by-compute) shows the three sizes of a method as one line. With few queries there are
few steps, and PBAA and contrast distillation take one epoch where the others take two.""",
    "ipo": "β is v1's 0.2 in both trainings; learning rate and epochs are searched as in table 1.",
    "online": """\
v1's settings (IPO, β 0.2, α 0.66, β_G 0.1) without its filter, which leaves one triple in twenty
here (`../results/tiny_world.md`). All four take the learning rate and epochs found for PBAA with
IPO. By iteration below, with intervals over seeds. The length of an answer is given by its task in
the tiny world, so that v1's growth of length can hardly show.""",
}
COMPUTE_NOTE = """\
The first base, with the seeds that are there; intervals as in the tables. A million tokens through
this model of 1.06M parameters are 2.1 TFLOP, and what each kind of work takes of them is in the
cells: principles, sampling (what a ranker reads included), and training with its references."""
FIGURE_NOTE = """\
A point is a cell: the pairs that its policy was trained on, in its first iteration. SPIN is left
out, as accurate as a coin: its chosen answers are of the quality of the policy's own."""
SEARCH_NOTE = """\
The same number of trials for each method, on the tuning queries (356, apart from the final ones),
the first base and a seed of its own. The best mean score is taken; an arm that is a variation of a
method takes the method's settings. The other settings of the generator are the demo's, which were
chosen earlier on the tuning queries too (`../results/tiny_world_tuning.md`)."""


if __name__ == "__main__":
    write()
