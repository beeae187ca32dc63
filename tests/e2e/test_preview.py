"""``selfsteer preview``: a few queries through the recipe's own stages, and nothing left behind."""

import json
from pathlib import Path

import pytest

from selfsteer.verbs.previewing import lessened
from tests.e2e.support import Here, fails
from tests.make import SMALL, recipe, tiny_pairs, write_jsonl, write_pairs


@pytest.mark.parametrize(
    ("method", "names"),
    [("contrast", ["good", "plain"]), ("pbaa", ["good", "bad"]), ("sso", ["good", "bad", "plain"])],
)
def test_a_method_shows_its_answers_and_what_would_be_dropped(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, method: str, names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["sampling.max_new_tokens=24", "judge=oracle"]  # where hardly an answer ends
    ended = here("preview", method, *SMALL, *given, "-n", 2, "--to", "page", "--json")
    assert ended.code == 0, ended.err
    assert list(tmp_path.iterdir()) == [tmp_path / "page"]
    found = json.loads(ended.out)
    assert len(found["queries"]) == 2
    for row in found["queries"]:
        assert sorted(a["name"] for a in row["answers"]) == sorted(names)
        assert row["principles"]["good"] != row["principles"]["bad"]
        for answer in row["answers"]:
            assert answer["score"] is not None
            assert "".join(text for text, _ in answer["pieces"]) == answer["text"]
            assert len(answer["pieces"]) > 5
    lost = {row["dropped"] for row in found["queries"]} - {None}
    if method == "contrast":
        assert not lost
        assert found["summary"] == "2 queries: 2 kept as answers whose every token is trained on"
        roles = [[a["role"] for a in row["answers"]] for row in found["queries"]]
        assert roles == [[None, "for comparison"]] * 2
    else:
        assert lost == {f"unfinished in {'triples' if method == 'sso' else 'samples'}"}
    means = [
        sum(a["score"] for row in found["queries"] for a in row["answers"] if a["name"] == name) / 2
        for name in ("plain", "good")
        if name in names
    ]
    said = "Mean score of 2 answers each: {:.2f} without a principle, {:.2f} under the good one."
    assert (len(means) == 2) == (found["notes"][-1:] == [said.format(*means, *means)])
    page = (tmp_path / "page" / "preview.html").read_text()
    assert found["queries"][0]["messages"][0]["content"] in page
    assert 'style="background: color-mix' in page


def test_no_query_is_shown_that_the_run_would_not_take(tmp_path: Path) -> None:
    for own, shown in ((None, 5), (2, 2), (9, 5)):
        few = lessened(recipe(queries={"path": "q.jsonl", "limit": own}), 5, tmp_path)
        assert few.queries.limit == shown


def test_ranked_answers_stand_with_their_scores(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["ranking={samples: 3, judge: oracle}", *(s for s in SMALL if "principles" not in s)]
    ended = here("preview", "best-of-n", *given, "-n", 3, "--to", "page")
    assert ended.code == 0, ended.err
    assert "answer 1" in ended.out
    assert ", chosen  score" in ended.out
    assert "chosen, chosen" not in ended.out
    assert "3 queries: " in ended.out
    fails(here("preview", "reward", "policy.model=m", "reward.data=d"), 2, "has neither")


def test_given_answers_stand_beside_the_policys_and_only_those_of_the_first_round(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = {"role": "assistant", "content": "It eats grass."}
    rows = [
        {"messages": [{"role": "user", "content": f"What does the {a} eat?"}, said]}
        for a in ("bee", "bear", "cow", "owl")
    ]
    write_jsonl(tmp_path / "given.jsonl", *rows)
    given = [s for s in SMALL if not s.startswith(("principles", "queries"))]
    given += ["queries.path=given.jsonl", "iterations=2"]
    ended = here("preview", "irft", *given, "-n", 1, "--to", "page", "--json")
    assert ended.code == 0, ended.err
    (row,) = json.loads(ended.out)["queries"]
    assert {a["role"]: a["name"] for a in row["answers"]} == {
        "chosen": "given", "rejected": "plain",
    }  # fmt: skip
    assert row["principles"] is None
    # what is dropped is no answer under a principle either
    write_pairs(tmp_path / "pairs.jsonl", tiny_pairs(4, seed=1))
    lost = ["judge=oracle", "hygiene.min_chars=500", "queries.path=pairs.jsonl"]
    ended = here("preview", "irft", *given, *lost, "-n", 1, "--to", "lost", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["queries"][0]["dropped"]
    assert "under the good one" not in " ".join(found["notes"])


def test_what_a_reward_model_is_trained_on_first_is_shown(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = here("preview", "rlcd", *SMALL, "-n", 1, "--to", "page", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["summary"].endswith("kept as pairs for the reward model")
    assert found["queries"][0]["principles"]["good"]
