"""Methods that prefer given answers: whole rounds on the tiny world."""

from pathlib import Path

from selfsteer.methods import load_recipe
from selfsteer.run.execute import execute
from selfsteer.stages.inputs import Share, stored_preferences, stored_queries
from selfsteer.stages.sample import Sample
from tests.make import stages_of, tiny_pairs, write_pairs

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


def test_a_slice_is_counted_as_such() -> None:
    """7 queries in 3 slices are 2, 2 and 3: plans count the largest."""
    slices = [Share(k, None, 3).bounds(7) for k in (1, 2, 3)]
    assert slices == [(0, 2), (2, 2), (4, 3)]
    assert Share(1, None, 3).most(7) == 3
    assert Share(1, 20, None).most(7) == 7
