"""DLMA, weighted by DoRA, on the tiny world: figures of each pair, stored and trained on."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfsteer.methods import load_recipe
from selfsteer.models.load import load_model
from selfsteer.recipe.sections import Loading, resolve_path
from selfsteer.run.execute import execute
from selfsteer.run.folder import RunFolder
from selfsteer.stages.figures import FigurePairs, stored_figures
from selfsteer.stages.inputs import stored_preferences, stored_triples
from selfsteer.view import RunView
from tests.e2e.support import accepted
from tests.make import SMALL, stages_of
from tests.methods.test_best_of_n_principles import whole_logps

OWN = (
    "sampling.max_new_tokens=48",
    "margin={weight: 0.5, bound: 9}",
    "training={weighting: dora, learning_rate: 4e-4, batch_size: 4, selection: {points: 0}}",
)


def recipe(folder: Path, *more: str) -> Any:
    return load_recipe("dlma", [*SMALL, *OWN, f"runs_dir={folder}", *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = recipe(tmp_path_factory.mktemp("runs"))
    execute(made, {"name": "given"})
    return Path(made.folder)


def test_weight_and_margin_of_each_pair_by_hand(done: Path) -> None:
    folder = done / "iteration-1"
    loaded = load_model(resolve_path("package:selfsteer.testbed/checkpoint"), Loading())
    pairs = {p.id: p for p in stored_preferences(folder / "preferences")}
    samples = {t.id: t for t in stored_triples(folder / "samples")}
    found = stored_figures(folder / "figures.jsonl")
    assert found.keys() == pairs.keys()
    margins = []
    for id, figures in found.items():
        triple = samples[id]
        assert (triple.responses["good"], triple.responses["bad"]) == (
            pairs[id].chosen,
            pairs[id].rejected,
        )
        logps = {
            f"{c}/{r}": whole_logps(loaded.model, loaded.chat.sequence(triple, f"{c}/{r}")).double()
            for c in ("plain", "good", "bad")
            for r in ("good", "bad")
        }
        s = {name: float(v.sum()) for name, v in logps.items()}
        m = {name: float(v.mean()) for name, v in logps.items()}
        contrast = (s["good/good"] - s["bad/good"]) - (s["good/bad"] - s["bad/bad"])
        assert figures["margins"] == pytest.approx(0.5 * max(-9, min(9, contrast)), abs=1e-3)
        odds = (m["good/good"] - m["plain/good"], m["bad/bad"] - m["plain/bad"])
        assert figures["weights"] == pytest.approx(
            sum(1 / (1 + math.exp(x)) for x in odds), abs=1e-4
        )
        margins.append(figures["margins"])
    assert len(set(margins)) > 1
    assert min(abs(x) for x in margins) < 4.5


def test_what_is_stored_is_what_is_trained_on(done: Path) -> None:
    """The first step starts at the reference: -log σ(-β·margin), weighted; 4 of 8 pairs."""
    figures = stored_figures(done / "iteration-1/figures.jsonl").values()
    lines = RunView.open(done).curves["iteration-1/policy"]
    assert len(lines) == 2
    for name, column in (("weight/query", "weights"), ("margin/query", "margins")):
        seen = sum(line[name] for line in lines) / 2
        assert seen == pytest.approx(sum(f[column] for f in figures) / 8)
    first = [f["weights"] * math.log1p(math.exp(0.1 * f["margins"])) for f in figures]
    assert min(first) < lines[0]["loss"] < max(first)
    assert abs(lines[0]["rewards/margins"]) < 1e-4


def test_a_run_that_stops_after_its_figures_ends_the_same(done: Path, tmp_path: Path) -> None:
    broken = recipe(tmp_path)
    execute(broken, {"name": "given"}, until="figures")
    execute(broken, {"name": "given"})
    for name in ("figures.jsonl", "policy/model.safetensors"):
        one, other = (folder / "iteration-1" / name for folder in (done, Path(broken.folder)))
        assert one.read_bytes() == other.read_bytes()


def test_pairs_without_room_are_counted_and_others_cut_as_in_training(
    done: Path, tmp_path: Path
) -> None:
    """The training has room for one token behind the shortest prompt, and for none elsewhere."""
    made = recipe(done.parent)
    stage = next(s for s in made.plan() if isinstance(s, FigurePairs))
    loaded = load_model(resolve_path(made.policy.model), Loading())
    triples = {t.id: t for t in stored_triples(done / "iteration-1/samples")}
    lengths = {
        id: len(loaded.chat.sequence(triples[id], "plain/good").prompt_ids)
        for id in (p.id for p in stored_preferences(done / "iteration-1/preferences"))
    }
    short = min(lengths.values())
    fits = [i for i, n in lengths.items() if n == short]
    assert 0 < len(fits) < len(lengths)
    result = replace(stage, max_length=short + 1).run(RunFolder(tmp_path))
    found = stored_figures(tmp_path / "iteration-1/figures.jsonl")
    assert list(found) == fits
    assert result.dropped == {"prompt_too_long": len(lengths) - len(fits)}
    assert (result.n_in, result.n_out) == (len(lengths), len(fits))
    first = {
        name: float(whole_logps(loaded.model, loaded.chat.sequence(triples[fits[0]], name))[0])
        for name in stage.objective.read
    }
    contrast = first["good/good"] - first["bad/good"] - first["good/bad"] + first["bad/bad"]
    assert found[fits[0]]["margins"] == pytest.approx(0.5 * contrast, abs=1e-4)


def test_figures_are_computed_again_for_what_they_depend_on_alone() -> None:
    def fingerprint(*more: str) -> str:
        return stages_of(load_recipe("dlma", [*SMALL, *OWN, *more]))[
            "iteration-1/figures"
        ].fingerprint

    same = ("training.beta=0.3", "training.base=hinge", "training.budget={}")
    other = ("margin.bound=3", "training.noise=1", "training.weighting=wpo")
    assert {fingerprint(setting) for setting in same} == {fingerprint()}
    assert len({fingerprint(), *map(fingerprint, other)}) == 4


def test_a_pair_without_figures_is_not_trained_on(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    execute(made, {"name": "given"}, until="figures")
    path = made.folder / "iteration-1/figures.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    accepted(made.folder)
    execute(made, {"name": "given"})
    trained = RunView.open(made.folder).stage("Train")
    assert trained is not None
    assert (trained.n_out, trained.dropped) == (7, {"no_figures": 1})
