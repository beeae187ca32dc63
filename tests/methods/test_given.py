"""Methods that prefer given answers: whole rounds on the tiny world."""

from dataclasses import replace
from pathlib import Path

import pytest

from selfsteer.errors import ConfigError
from selfsteer.methods import load_recipe
from selfsteer.models.load import load_chat
from selfsteer.recipe.sections import Loading
from selfsteer.run.execute import execute
from selfsteer.stages.inputs import Share, stored_preferences, stored_queries
from selfsteer.stages.sample import Sample
from selfsteer.verbs.exporting import export_round
from selfsteer.view import RunView
from tests.make import recipe as made_recipe
from tests.make import stages_of, tiny_pairs, write_pairs

CHECKPOINT = Path(__file__).parents[2] / "src/selfsteer/testbed/checkpoint"
SMALL = (
    "policy={model: 'package:selfsteer.testbed/checkpoint', threads: 1}",
    "queries.near_duplicates=null",
    "sampling.max_new_tokens=64",
    "training={batch_size: 4, selection: {points: 0}}",
)


def test_irft_renews_answers_and_reference_at_each_slice(tmp_path: Path) -> None:
    given = write_pairs(tmp_path / "given.jsonl", tiny_pairs(8, seed=1))
    own = [*SMALL, f"queries.path={given}", "iterations=2", f"runs_dir={tmp_path}"]
    recipe = load_recipe("irft", own)
    made = stages_of(recipe)
    first, second = (made[f"iteration-{k}/samples"] for k in (1, 2))
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert first.writers["plain"].maker is None
    assert second.writers["plain"].maker == made["iteration-1/policy"]
    execute(recipe, {"name": "given"}, until="iteration-2/preferences")
    folders = [recipe.folder / f"iteration-{k}/preferences" for k in (1, 2)]
    halves = [{p.id: p.chosen for p in stored_preferences(folder)} for folder in folders]
    ids = [q.id for q in stored_queries(recipe.folder / "queries.jsonl")]
    assert [*halves[0], *halves[1]] == ids, "each query once, and half of them in each round"
    assert len(halves[0]) == 4
    chosen = {p.prompt: p.chosen for p in stored_preferences(given)}
    assert set((halves[0] | halves[1]).values()) == set(chosen.values())


def test_the_oracle_puts_the_better_answer_first(tmp_path: Path) -> None:
    """Half of the given answers are the faulty ones."""
    pairs = tiny_pairs(8, seed=1, faults=4)
    turned = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs[:4]]
    given = write_pairs(tmp_path / "given.jsonl", [*turned, *pairs[4:]])
    own = [*SMALL, f"queries.path={given}", "judge=oracle", f"runs_dir={tmp_path}"]
    recipe = load_recipe("spin-judged", own)
    execute(recipe, {"name": "given"}, until="iteration-1/quality")
    view = RunView.open(recipe.folder)
    stage = view.stage("Relabel")
    assert stage is not None
    assert stage.notes["swapped"] > 0
    figures = view.round(1).quality
    assert figures is not None
    assert figures.preferences.accuracy == 1.0
    export_round(view.round(1), "distilabel", tmp_path / "set")
    (file,) = (tmp_path / "set").rglob("*.jsonl")
    assert "given in given.jsonl or" in file.read_text()


@pytest.mark.parametrize("method", ["spin", "irft", "spin-judged"])
def test_a_given_answer_that_was_cut_off_gets_no_end_of_turn(method: str, tmp_path: Path) -> None:
    first, *others = tiny_pairs(4, seed=1)
    cut_off = replace(first, chosen=first.chosen[:40], finish_reasons={"chosen": "length"})
    given = write_pairs(tmp_path / "given.jsonl", [cut_off, *others])
    own = [*SMALL, f"queries.path={given}", "iterations=1", f"runs_dir={tmp_path}", "judge=oracle"]
    chat = load_chat(str(CHECKPOINT), Loading())
    for keep in (False, True):
        more = [f"sampling.keep_unfinished={keep}", f"name=keep-{keep}"]
        recipe = load_recipe(method, [*own, *more])
        execute(recipe, {"name": "given"}, until="iteration-1/preferences")
        stage = RunView.open(recipe.folder).stage("OpposeGiven")
        assert stage is not None
        assert stage.dropped == ({} if keep else {"unfinished": 1})
        pairs = stored_preferences(recipe.folder / "iteration-1/preferences")
        found = {p.id: p for p in pairs if cut_off.chosen in (p.chosen, p.rejected)}
        assert found.keys() == ({cut_off.id} if keep else set())
    made = found[cut_off.id].to_triple()
    name = next(n for n, text in made.responses.items() if text == cut_off.chosen)
    ended = replace(made, finish_reasons={})
    lengths = [len(chat.sequence(t, f"plain/{name}").response_ids) for t in (made, ended)]
    assert lengths[0] == lengths[1] - 1


def test_an_improver_does_not_lean_on_an_answer_that_was_cut_off(tmp_path: Path) -> None:
    first, *others = tiny_pairs(4, seed=1)
    cut_off = replace(first, finish_reasons={"chosen": "length"})
    given = write_pairs(tmp_path / "given.jsonl", [cut_off, *others])
    own = [*SMALL, f"queries.path={given}", "improver_training={}", f"runs_dir={tmp_path}"]
    recipe = load_recipe("sgpo", own)
    execute(recipe, {"name": "given"}, until="improver/opponents")
    stage = RunView.open(recipe.folder).stage("OpposeGiven")
    assert stage is not None
    assert (stage.n_out, stage.dropped) == (3, {"unfinished": 1})


@pytest.mark.parametrize(("judge", "said"), [(None, "needs a judge"), ("human:l.jsonl", "human")])
def test_who_cannot_judge_is_refused(judge: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made_recipe("spin-judged", judge=judge)


def test_a_slice_is_counted_as_such() -> None:
    """7 queries in 3 slices are 2, 2 and 3: plans count the largest."""
    slices = [Share(k, None, 3).bounds(7) for k in (1, 2, 3)]
    assert slices == [(0, 2), (2, 2), (4, 3)]
    assert Share(1, None, 3).most(7) == 3
    assert Share(1, 20, None).most(7) == 7
