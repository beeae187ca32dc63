"""What is run for the evidence: arms, tables, and one cell of them, a run of the real command line.

A cell is one arm on one base model with one data seed. The seed decides which alignment queries are
taken, their principles, all samples and the order of training; the evaluation queries stay.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from selfsteer.principles.writer import picked

HERE = Path(__file__).parent
CELLS = HERE / "cells"
#: Alignment queries of a cell: of the world's 1,326, so that seeds differ in their queries.
SIZE = 480
#: Queries of the control of about SSO's compute: 2.64 times as many, what a query costs SSO in
#: training for one epoch. The page shows what was measured. PBAA's settings would be wrong for it:
#: with as many more steps the learning rate found for fewer queries wrecks the policy.
CONTROL_SIZE = 1267
#: Queries of smaller budgets.
BUDGETS = (120, 240)
#: Kinds of questions that the arms of transfer are aligned on, about half of all; the others are
#: comparisons, advice and descriptions.
SEEN = ("fact", "steps", "list", "unsafe")
#: Bases from here on are of the uneven world: 10 is built with seed 0, 11 with seed 1.
UNEVEN = 10
#: Seeds of the search, apart from those of the tables.
SEARCH_SEED = 100

COMMON = (
    "baseline=null",
    "training.selection.points=0",
    "training.batch_size=16",
    "policy.threads=1",
)
NO_GENERATOR = ("generator=null",)
PBAA = ("method=pbaa", *NO_GENERATOR)
SSO = ("method=sso", "generator.selection.points=0", "generator.batch_size=16")
ANNOTATED = ("method=best-of-n", "ranking.samples=2", "principles=null", *NO_GENERATOR)
#: 64 entries of the tiny vocabulary cover all but a few tokens.
CONTRAST = ("method=contrast", *NO_GENERATOR, "contrast.top_k=64")
RANKED = ("method=best-of-n-principles", *NO_GENERATOR, "ranking.samples=4")
#: Table 6: IPO in every training; β is v1's.
IPO = ("training.base=ipo", "training.beta=0.2")
GENERATOR_IPO = ("generator.base=ipo", "generator.beta=0.2")
#: v1's filter is off: on the tiny world it leaves one triple in twenty (results/tiny_world.md).
ONLINE = ("method=sso-online", "iterations=3", "filter=false", *IPO, *NO_GENERATOR)
#: Queries of the online way, shared out over its iterations.
ONLINE_SIZE = 720
WITHOUT_WEIGHT = "training.use_weight=false"
WITHOUT_STEER = "training.use_steer=false"
#: Writers of principles that are no models: features drawn at random, with the catalogue's text,
#: and those that the oracle scores an answer to the query on.
WEAK_WRITER = "principles={mode: picked, features: random}"
STRONG_WRITER = 'principles={mode: fixed, path: "{truth}"}'
#: Shares of queries, in %, whose good and bad principle are swapped.
SWAPPED = (10, 30)
_one = picked(("Helpfulness", "Accuracy"))
#: One principle for every query: what a user writes who knows the catalogue and no query.
ONE_FOR_ALL = f"principles={{mode: fixed, good: '{_one.good}', bad: '{_one.bad}'}}"
WPO = "training.weighting=wpo"
#: A reward model trained on the annotated pairs of the same base and seed.
REWARD_JUDGE = 'ranking.judge={kind: reward, model: "{reward}"}'


def swapped(share: int) -> str:
    """The setting of principles as the policy writes them, good and bad swapped for a share."""
    return f'principles={{mode: fixed, path: "{{swapped-{share}}}"}}'


@dataclass(frozen=True)
class Arm:
    """One method with its settings.

    ``family`` names the search whose best settings it takes, None: none; ``says`` is for the page.
    ``shared``: its principles are those of PBAA on the same base, seed and size, written once.
    ``audited``: not scored; its policy is asked under bad principles, beside its base.
    ``tasks``: kinds of questions that it is aligned on; empty: all.
    """

    family: str | None
    settings: tuple[str, ...]
    says: str
    size: int = SIZE
    shared: bool = True
    #: Arms whose pairs a reward model is trained on; empty where a policy is trained.
    sets: tuple[str, ...] = ()
    audited: bool = False
    tasks: tuple[str, ...] = ()


ARMS = {
    "annotated": Arm(
        "annotated", ANNOTATED, "two plain answers per query, ranked by the oracle", shared=False
    ),
    "pbaa": Arm("pbaa", PBAA, "pairs from the policy itself under good and bad principles"),
    "sso": Arm("sso", SSO, "pairs from a generator trained with both halves of L_SSO"),
    "pbaa-compute": Arm(
        "pbaa-compute", PBAA, "PBAA on more queries, at nine tenths of SSO's compute", CONTROL_SIZE
    ),
    "sso-plus-only": Arm("sso", (*SSO, "generator.objective=sso-plus-only"), "generator: L+ alone"),
    "sso-minus-only": Arm(
        "sso", (*SSO, "generator.objective=sso-minus-only"), "generator: L- alone"
    ),
    "sso-direct-minus": Arm(
        "sso", (*SSO, "generator.objective=sso-direct-minus"), "generator: eq. 3 in place of eq. 4"
    ),
    "sso-weak-writer": Arm(
        "sso", (*SSO, WEAK_WRITER), "principles on features drawn at random", shared=False
    ),
    "sso-strong-writer": Arm(
        "sso",
        (*SSO, STRONG_WRITER),
        "principles on two of the features that an answer to the query is scored on",
        shared=False,
    ),
    "pbaa-ipo": Arm("pbaa-ipo", (*PBAA, *IPO), "PBAA with IPO"),
    "sso-ipo": Arm("sso-ipo", (*SSO, *IPO, *GENERATOR_IPO), "SSO with IPO in both trainings"),
    "online": Arm("pbaa-ipo", ONLINE, "v1, three iterations, W and G", ONLINE_SIZE, shared=False),
    "online-no-weight": Arm(
        "pbaa-ipo", (*ONLINE, WITHOUT_WEIGHT), "v1 without W", ONLINE_SIZE, shared=False
    ),
    "online-no-steer": Arm(
        "pbaa-ipo", (*ONLINE, WITHOUT_STEER), "v1 without G", ONLINE_SIZE, shared=False
    ),
    "online-pbaa": Arm(
        "pbaa-ipo",
        (*ONLINE, WITHOUT_WEIGHT, WITHOUT_STEER),
        "v1 without W and G: PBAA, iteration after iteration",
        ONLINE_SIZE,
        shared=False,
    ),
    "pbaa-wpo": Arm("pbaa", (*PBAA, WPO), "PBAA, pairs weighted by WPO"),
    "sso-wpo": Arm("sso", (*SSO, WPO), "SSO, the policy's pairs weighted by WPO"),
    "best-of-4": Arm(
        "annotated",
        (*ANNOTATED, "ranking.samples=4"),
        "four plain answers per query, ranked by the oracle in a reward model's place",
        shared=False,
    ),
    "best-of-4-reward": Arm(
        "annotated",
        (*ANNOTATED, "ranking.samples=4", REWARD_JUDGE),
        "four plain answers per query, ranked by a reward model trained on the annotated pairs",
        shared=False,
    ),
    "spin": Arm(
        "annotated",
        ("method=spin", "principles=null", *NO_GENERATOR),
        "answers as in the base's own training data, against the policy's",
        shared=False,
    ),
    "contrast": Arm(
        "contrast", CONTRAST, "the difference of the principles, distilled at plain answers' tokens"
    ),
    "contrast-rounds": Arm(
        "contrast",
        (*CONTRAST, "iterations=3", "training.reference=first"),
        "contrast distillation in three rounds over the same queries, each on the policy's answers "
        "of then, under the eye of the first policy: no more compute than SSO",
    ),
    "best-of-4-principles": Arm(
        "best-of-4-principles",
        RANKED,
        "four plain answers per query, ranked by how the principles change their likelihood",
    ),
}
REWARD = ("reward.learning_rate=3e-4", "reward.batch_size=16", "reward.epochs=2")
for _sets in (
    ("annotated",),
    ("pbaa",),
    ("sso",),
    ("annotated", "pbaa"),
    ("annotated", "sso"),
):
    ARMS["reward-" + "-".join(_sets)] = Arm(
        None, REWARD, f"reward model on the pairs of {' and '.join(_sets)}", sets=_sets
    )
ARMS["reward-annotated-longer"] = Arm(
    None,
    (*REWARD[:2], "reward.epochs=4"),
    "reward model on the pairs of annotated, as many steps as on a mixture",
    sets=("annotated",),
)
for _name in ("contrast", "pbaa", "sso"):
    ARMS[f"{_name}-one-for-all"] = replace(
        ARMS[_name],
        settings=(*ARMS[_name].settings, ONE_FOR_ALL),
        says=f"{_name}, one principle on helpfulness and accuracy for every query",
        shared=False,
    )
    for _share in SWAPPED:
        ARMS[f"{_name}-swapped-{_share}"] = replace(
            ARMS[_name],
            settings=(*ARMS[_name].settings, swapped(_share)),
            says=f"{_name}, good and bad principle swapped for {_share} % of the queries",
            shared=False,
        )
#: Half of PBAA's learning rate: with PBAA's, three rounds wreck the policy (6 points below PBAA).
BAD_TO_PLAIN = ("training.learning_rate=1e-4", "training.epochs=1", "training.beta=0.3")
#: Every other method that the tiny model can do: arm → whose search, its settings, what it does.
OTHERS = {
    "dlma": ("dlma", (), "PBAA's pairs, with a margin by the principles"),
    "good-over-plain": ("good-over-plain", (), "the good answer over the plain one"),
    "distil": (
        "distil",
        ("distillation.top_k=64",),
        "the good principle alone, distilled at plain answers' tokens",
    ),
    "bad-to-plain": (
        None,
        (*COMMON, *BAD_TO_PLAIN),
        "bad answers brought to plain ones first, three rounds",
    ),
    "pbaa-best-of-n": ("pbaa", (), "of four answers under each principle, those furthest apart"),
    "rlcd": ("pbaa", REWARD, "four plain answers, ranked by a reward model of good and bad ones"),
}
for _name, (_family, _own, _says) in OTHERS.items():
    ARMS[_name] = Arm(
        _family, (f"method={_name}", *NO_GENERATOR, *_own), _says, shared=_family == _name
    )
ARMS["best-of-8-principles"] = Arm(
    "best-of-4-principles",
    (*RANKED, "ranking.samples=8"),
    "eight plain answers per query, ranked as best of 4 by principles",
)
METHODS = ("annotated", "pbaa", "sso", "contrast", "best-of-4-principles")
for _name in METHODS:
    ARMS[f"{_name}-transfer"] = replace(
        ARMS[_name], tasks=SEEN, shared=False, says=f"{_name}, aligned on four kinds of questions"
    )
    for _size in BUDGETS:
        ARMS[f"{_name}-{_size}"] = replace(
            ARMS[_name], size=_size, says=f"{_name} on {_size} queries"
        )
for _name in ("annotated", "pbaa", "sso", "online", "contrast"):
    ARMS[f"audit-{_name}"] = replace(
        ARMS[_name], says=f"{_name}, its models asked under bad principles", audited=True
    )

#: Trials per family, all of the same number: what is searched on the tuning queries.
SEARCH = {
    family: tuple(
        (f"training.learning_rate={rate}", f"training.epochs={epochs}", other)
        for rate in ("1e-4", "2e-4", "4e-4")
        for epochs in (1, 2)
        for other in others
    )
    for family, others in {
        "annotated": ("training.beta=0.1", "training.beta=0.3"),
        "pbaa": ("training.beta=0.1", "training.beta=0.3"),
        "pbaa-compute": ("training.beta=0.1", "training.beta=0.3"),
        "sso": ("generator.gamma=0.1", "generator.gamma=0.3"),
        # β of IPO is v1's, so the second axis is another one for both
        "pbaa-ipo": ("training.warmup=0.1", "training.warmup=0.3"),
        "sso-ipo": ("generator.gamma=0.1", "generator.gamma=0.3"),
        "contrast": ("contrast.strength=4", "contrast.strength=2"),
        "best-of-4-principles": ("training.beta=0.1", "training.beta=0.3"),
        "dlma": ("training.beta=0.1", "training.beta=0.3"),
        "good-over-plain": ("training.beta=0.1", "training.beta=0.3"),
        "distil": ("distillation.direction=reverse", "distillation.direction=forward"),
    }.items()
}


@dataclass(frozen=True)
class Table:
    """Arms side by side, in the order in which they are filled; ``last`` when the others are."""

    name: str
    title: str
    arms: tuple[str, ...]
    bases: tuple[int, ...]
    seeds: int
    last: tuple[str, ...] = ()


TABLES = (
    Table(
        "main",
        "Table 1: the main comparison",
        tuple(list(ARMS)[:4]),
        (0, 1, 2),
        10,
        last=("pbaa-compute",),
    ),
    Table(
        "contrast",
        "Without pairs, or without bad answers: the contrast of the principles",
        ("annotated", "pbaa", "sso", "contrast", "best-of-4-principles"),
        (0, 1, 2),
        10,
    ),
    Table(
        "sharpness",
        "Better, or merely surer?",
        ("annotated", "pbaa", "sso", "contrast", "contrast-rounds", "best-of-4-principles"),
        (0,),
        5,
    ),
    Table(
        "uneven",
        "A harder world",
        ("annotated", "pbaa", "sso", "contrast", "contrast-rounds", "best-of-4-principles"),
        (UNEVEN, UNEVEN + 1),
        6,
    ),
    Table(
        "halves",
        "Table 3: halves of the generator's loss",
        ("pbaa", "sso-plus-only", "sso-minus-only", "sso"),
        (0,),
        5,
    ),
    Table("direct", "Table 4: eq. 3 in place of eq. 4", ("sso-direct-minus", "sso"), (0,), 5),
    Table(
        "reward",
        "Table 2: reward models",
        tuple(arm for arm in ARMS if arm.startswith("reward-")),
        (0,),
        5,
    ),
    Table(
        "rivals",
        "Rivals",
        (
            "annotated",
            "best-of-4",
            "best-of-4-reward",
            "spin",
            "pbaa",
            "pbaa-wpo",
            "sso",
            "sso-wpo",
        ),
        (0,),
        5,
    ),
    Table(
        "others",
        "Every other method",
        ("pbaa", "best-of-4-principles", "best-of-8-principles", *OTHERS),
        (0,),
        5,
    ),
    Table(
        "audit",
        "Under bad principles: a back door?",
        tuple(arm for arm in ARMS if ARMS[arm].audited),
        (0,),
        5,
    ),
    Table(
        "writers",
        "Table 5: weak and strong writers of principles",
        ("sso-weak-writer", "sso", "sso-strong-writer"),
        (0,),
        5,
    ),
    Table(
        "noise",
        "Principles that are wrong, or the same for all",
        tuple(
            f"{arm}{kind}"
            for kind in ("", "-swapped-10", "-swapped-30", "-one-for-all")
            for arm in ("contrast", "pbaa", "sso")
        ),
        (0,),
        5,
    ),
    Table(
        "transfer",
        "On kinds of questions that no training saw",
        tuple(f"{arm}-transfer" for arm in METHODS),
        (0,),
        3,
    ),
    Table(
        "budgets",
        "With fewer queries",
        tuple(f"{arm}-{size}" for size in BUDGETS for arm in METHODS),
        (0,),
        3,
    ),
    Table("ipo", "Table 6: IPO", ("pbaa-ipo", "sso-ipo"), (0,), 5),
    Table(
        "online",
        "Version 1: three online iterations",
        ("online-pbaa", "online-no-weight", "online-no-steer", "online"),
        (0,),
        5,
    ),
)


@dataclass(frozen=True)
class Cell:
    """One run; ``trial`` is its place in the search, None where it is evidence."""

    arm: str
    base: int
    seed: int
    trial: int | None = None

    @property
    def name(self) -> str:
        """Of its file and of its run folder."""
        search = "" if self.trial is None else f"search{self.trial:02d}-"
        return f"{search}{self.arm}-base{self.base}-seed{self.seed}"

    @property
    def trains_policy(self) -> bool:
        """Scored by its policy's answers, and so in figure 3 and in tables of data."""
        return not (ARMS[self.arm].sets or ARMS[self.arm].audited)

    @property
    def path(self) -> Path:
        """Where its figures are."""
        return CELLS / f"{self.name}.json"

    @property
    def split(self) -> str:
        """The queries it is scored on."""
        return "final" if self.trial is None else "tune"

    def settings(self) -> tuple[str, ...] | None:
        """Its overrides of the demo recipe; None while the search they come from is not done."""
        arm = ARMS[self.arm]
        if arm.family is None:
            own = [Cell(name, self.base, self.seed).settings() for name in arm.sets]
            return None if None in own else arm.settings
        searched = best(arm.family) if self.trial is None else SEARCH[arm.family][self.trial]
        # an arm's own setting holds against what was found for its family
        return None if searched is None else (*COMMON, *searched, *arm.settings)

    def found(self) -> dict[str, Any] | None:
        """Its figures, where they were made with the settings of today."""
        found = read(self.path)
        settings = self.settings()
        if found is None or settings is None or found["settings"] != list(settings):
            return None
        return found


#: Tables whose policies also answer greedily and at temperature 1.
SHARP = ("sharpness", "uneven")
SHARP_CELLS = {
    Cell(arm, base, seed)
    for table in TABLES
    if table.name in SHARP
    for arm in table.arms
    for base in table.bases
    for seed in range(table.seeds)
}


def read(path: Path) -> dict[str, Any] | None:
    """The JSON of a cell; None if it is not there."""
    if not path.exists():
        return None
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)


@cache
def _read(path: Path, modified_ns: int, size: int) -> dict[str, Any]:
    """A page reads each cell for every claim and table that it is in."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def trials(family: str) -> list[Cell]:
    """The search of a family: one arm, the first base."""
    return [Cell(family, 0, SEARCH_SEED, i) for i in range(len(SEARCH[family]))]


def best(family: str) -> tuple[str, ...] | None:
    """The settings with the best mean score on the tuning queries; None until all were tried."""
    found = [cell.found() for cell in trials(family)]
    scores = [sum(f["scores"]) for f in found if f]
    if len(scores) < len(found):
        return None
    return SEARCH[family][max(range(len(scores)), key=lambda i: scores[i])]


def cells_of(table: Table) -> Iterator[Cell]:
    """The search of its arms, then seed by seed, so that a table broken off is balanced."""
    for group in ([a for a in table.arms if a not in table.last], table.last):
        arms = [name for arm in group for name in (ARMS[arm].sets or (arm,))]
        for family in dict.fromkeys(ARMS[arm].family for arm in arms):
            yield from trials(family) if family else ()
        for seed in range(table.seeds):
            for base in table.bases:
                yield from (Cell(arm, base, seed) for arm in group)


def wanted(only: str | None = None) -> list[Cell]:
    """All cells in the order in which they are filled, each once; the search before what needs it.

    Args:
        only: a table's name, or ``search``.
    """
    cells: list[Cell] = []
    for table in TABLES:
        if only in (None, table.name):
            cells += cells_of(table)
    if only == "search":
        cells = [cell for family in SEARCH for cell in trials(family)]
    return list(dict.fromkeys(cells))
