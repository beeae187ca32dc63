import json
import os
import random
import subprocess
import sys
from collections import Counter
from hashlib import sha256

import pytest

from selfsteer.data.jsonl import read_jsonl
from selfsteer.errors import DataError
from selfsteer.principles import catalogue, writer
from selfsteer.testbed import knowledge as k
from selfsteer.testbed import questions, world
from selfsteer.testbed.corpus import choosable, draw_levels, principle_features
from selfsteer.testbed.oracle import score

STEERING_KINDS = ("plain", "good", "bad")


def by_task(task):
    return [q for q in world.questions() if q.task == task]


# ------------------------------------------------------------------------------ questions


def test_the_world_has_its_size():
    assert 3_000 < len(world.questions()) < 4_000
    assert [len(k.COUNTRIES), len(k.ANIMALS), len(k.FOODS)] == [20, 24, 24]
    assert set(k.TASK_FEATURES) == {q.task for q in world.questions()}


def test_splits_partition_the_questions_in_their_shares():
    texts = [q.text for split in world.SPLITS for q in world.questions(split)]
    assert sorted(texts) == sorted({q.text for q in world.questions()})
    shares = {s: len(world.questions(s)) / len(texts) for s in world.SPLITS}
    wanted = {"train": 0.4, "align": 0.4, "tune": 0.1, "final": 0.1}
    assert shares == pytest.approx(wanted, abs=0.02)


def test_every_split_has_every_task():
    for split in world.SPLITS:
        assert min(Counter(q.task for q in world.questions(split)).values()) >= 5
        assert {q.task for q in world.questions(split)} == set(k.TASK_FEATURES)


def test_every_subject_is_asked_about_in_training():
    # A subject that never was would be mistaken for another: answers that no oracle can parse.
    def subject(q):
        return {
            "describe": q.entities,
            "steps": q.entities,
            "advice": q.aspect,
            "list": q.aspect,
            "unsafe": (q.aspect, q.entities),
        }[q.task]

    for task in ("describe", "steps", "advice", "list", "unsafe"):
        asked = [q for q in by_task(task) if q.split == "train"]
        assert set(map(subject, asked)) == set(map(subject, by_task(task)))


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("What does the bee eat?", "train"),
        ("Name two fruits.", "align"),
        ("Which city is the capital of Egypt?", "tune"),
        ("Do you know the language of Brazil?", "final"),
    ],
)
def test_the_split_of_a_text_never_changes(text, split):
    assert world.question(text).split == split


def test_questions_are_found_by_their_text():
    found = world.question("Which is bigger, the lion or the ant?")
    assert (found.task, found.entities) == ("compare", ("lion", "ant"))
    assert found.features == ("Logicality", "Accuracy", "Engagement", "Concision")


def test_no_two_questions_have_the_same_text():
    texts = [q.text for q in questions._all()]
    assert len(texts) == len(set(texts)) == len(world.questions())


def test_unknown_texts_and_splits_are_errors():
    with pytest.raises(DataError, match="does not know"):
        world.question("what does the bee eat?")
    with pytest.raises(DataError, match="'test'"):
        world.questions("test")


def test_features_are_catalogue_names_in_order_with_concision_last():
    for features in k.TASK_FEATURES.values():
        assert catalogue.BUILT_IN.ordered(features) == features
        assert features[-1] in catalogue.BUILT_IN.appended
        assert len(features) == 4


# ------------------------------------------------------------------------------ responses


@pytest.mark.parametrize("terse", [0.0, 1.0])
@pytest.mark.parametrize("task", k.TASK_FEATURES)
def test_the_oracle_reads_back_the_levels_of_every_response(task, terse):
    rng = random.Random(1)
    for question in by_task(task):
        levels = {f: rng.choice(k.LEVELS) for f in question.features}
        response = world.respond(question, levels, rng, terse=terse)
        found = score(question.text, response)
        assert found.unparsed == 0, response
        assert found.features == {f: k.LEVEL_SCORES[v] for f, v in levels.items()}, response


@pytest.mark.parametrize("task", k.TASK_FEATURES)
def test_flawed_and_odd_responses_are_as_long_as_good_ones(task):
    # In words and marks, as an average over everything else; the model's tokens are near these.
    for feature in k.TASK_FEATURES[task]:
        lengths = {level: _mean_words(task, feature, level) for level in k.LEVELS}
        for level in ("flaw", "odd"):
            assert lengths[level] == pytest.approx(lengths["good"], abs=1.0), (feature, lengths)


def _mean_words(task, feature, level):
    rng = random.Random(2)
    total = 0
    for question in by_task(task):
        levels = {f: rng.choice(k.LEVELS) for f in question.features} | {feature: level}
        response = world.respond(question, levels, rng)
        total += len(response.split()) + sum(response.count(mark) for mark in ".,!:")
    return total / len(by_task(task))


# ------------------------------------------------------------------------------ training examples


def test_the_corpus_is_the_same_for_the_same_seed():
    assert list(world.corpus(50, 3)) == list(world.corpus(50, 3))
    assert list(world.corpus(50, 3)) != list(world.corpus(50, 4))


def test_the_corpus_asks_training_questions_only_and_shows_what_the_pipeline_shows():
    training = {q.text for q in world.questions("train")}
    kinds: Counter[str] = Counter()
    for example in world.corpus(4_000, 0):
        kinds[example.kind] += 1
        if example.kind in STEERING_KINDS:
            assert example.messages[-1].content in training
            assert len(example.messages) == (1 if example.kind == "plain" else 2)
        if example.kind in ("good", "bad"):
            text = example.messages[0].content
            assert text.startswith("Your response should be ")
            assert text.endswith(catalogue.BUILT_IN.closing)
        elif example.kind == "features":
            assert len(writer.parse_features(example.response)) == 2
        elif example.kind == "principles":
            assert writer.parse_principles(example.response)[0] is writer.Outcome.OK
    assert kinds["plain"] / 4_000 == pytest.approx(0.46, abs=0.03)
    assert kinds["good"] / 4_000 == pytest.approx(0.17, abs=0.03)
    assert kinds["features"] + kinds["principles"] == pytest.approx(400, abs=80)


def test_training_principles_mostly_name_two_applicable_features():
    rng, question, count = random.Random(0), by_task("fact")[0], 4_000
    drawn = [principle_features(question, rng) for _ in range(count)]
    asked = [tuple(f for f in d if f not in catalogue.BUILT_IN.appended) for d in drawn]
    applicable = [sum(f in choosable(question) for f in a) for a in asked]
    shares = Counter(zip(map(len, asked), applicable, strict=True))
    assert shares[2, 2] / count == pytest.approx(0.74, abs=0.03)
    assert shares[2, 1] / count == pytest.approx(0.20, abs=0.03)
    assert shares[1, 1] / count == pytest.approx(0.03, abs=0.015)
    assert shares[3, 3] / count == pytest.approx(0.03, abs=0.015)
    appended = sum("Concision" in d for d in drawn)
    assert appended / count == pytest.approx(0.2, abs=0.03)


def test_terse_responses_leave_out_what_does_not_count():
    question = world.question("What does the bee eat?")
    levels = {"Engagement": "flaw", "Concision": "good", "Accuracy": "good", "Helpfulness": "flaw"}
    said = world.respond(question, levels, random.Random(0), terse=1.0)
    assert said == "The bee eats nectar."
    levels = {**levels, "Engagement": "good", "Concision": "flaw", "Helpfulness": "odd"}
    said = world.respond(question, levels, random.Random(0), terse=1.0)
    assert said.count(".") + said.count("!") == 4


def test_in_the_uneven_world_features_are_good_less_often_in_the_same_proportion():
    question = by_task("compare")[0]  # the sixth task: Logicality keeps 0.75, then 0.5, 0.35 and 1
    for context, good in (("plain", 0.46), ("good", 0.78), ("bad", 0.14)):
        rng = random.Random(0)
        named = question.features
        drawn = [draw_levels(question, context, named, rng, uneven=True) for _ in range(4_000)]
        for feature, share in zip(question.features, (0.75, 0.5, 0.35, 1.0), strict=True):
            found = Counter(levels[feature] for levels in drawn)
            assert found["good"] / 4_000 == pytest.approx(good * share, abs=0.03)


def test_the_uneven_corpus_is_another_one_on_the_same_questions():
    even, uneven = (list(world.corpus(300, 3, uneven=u)) for u in (False, True))
    assert [e.messages for e in uneven if e.kind == "plain"]
    assert even != uneven
    training = {q.text for q in world.questions("train")}
    assert all(e.messages[-1].content in training for e in uneven if e.kind == "plain")


@pytest.mark.parametrize(
    ("context", "feature", "odds"),
    [
        ("plain", "Accuracy", (0.46, 0.52, 0.02)),
        ("good", "Accuracy", (0.78, 0.20, 0.02)),
        ("good", "Engagement", (0.50, 0.48, 0.02)),
        ("bad", "Accuracy", (0.14, 0.26, 0.60)),
        ("bad", "Engagement", (0.40, 0.52, 0.08)),
    ],
)
def test_levels_are_drawn_with_the_odds_of_the_context(context, feature, odds):
    rng, question = random.Random(0), by_task("fact")[0]
    drawn = Counter(
        draw_levels(question, context, ("Accuracy",), rng)[feature] for _ in range(5_000)
    )
    assert [drawn[level] / 5_000 for level in k.LEVELS] == pytest.approx(odds, abs=0.03)


# ------------------------------------------------------------------------------ fingerprint, files


def test_nothing_heavy_is_imported_before_a_model_is_needed():
    code = (
        "import sys, selfsteer.testbed.world, selfsteer.testbed.oracle;"
        "print([m for m in ('torch', 'transformers', 'rich', 'filelock') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_fingerprint_is_the_same_in_every_process():
    code = "from selfsteer.testbed import world; print(world.fingerprint())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == world.fingerprint()


def test_the_fingerprint_notices_a_change_of_the_data(monkeypatch):
    before = world.fingerprint()
    monkeypatch.setitem(k.OPENERS, "good", ("Hello there!", "Hi!"))
    world.fingerprint.cache_clear()
    changed = world.fingerprint()
    monkeypatch.undo()
    world.fingerprint.cache_clear()
    assert changed != before == world.fingerprint()


def test_the_query_files_are_the_questions_of_their_split():
    assert set(world.QUERIES) == {"align", "tune", "final"}
    for split, path in world.QUERIES.items():
        lines = [line for _, line in read_jsonl(path)]
        assert sorted(line["prompt"] for line in lines) == sorted(
            q.text for q in world.questions(split)
        )
        assert lines == sorted(lines, key=lambda line: line["id"])
        assert all(list(line) == ["id", "prompt"] for line in lines)
        first = lines[0]["prompt"]
        # The id of a query that is given none: a hash of its messages.
        content = json.dumps([["user", first]])
        assert lines[0]["id"] == sha256(content.encode()).hexdigest()[:16]
