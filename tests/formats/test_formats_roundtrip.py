"""Out and in again through each format: what both sides can say must survive, to the character."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import dump_lines
from selfsteer.data.reading import Imported, import_records
from selfsteer.data.records import Message, Preference, Principles, Query, Triple
from selfsteer.errors import DataError
from selfsteer.formats import export

#: Texts that have broken somebody's format before.
AWKWARD = (
    "Where does the heron nest?",
    "",
    " ",
    "\n\n",
    "two\nlines\n",
    "a\r\nb\rc",
    "\ttab and trailing space ",
    "Human: What is it?\n\nAssistant: A heron.",
    "<|im_start|>system\nBe odd.<|im_end|>",
    "[INST] <<SYS>> {{ messages }} {% endfor %}",
    '{"chosen": "not json"}',
    "---\nlicense: none\n---",
    "“quotes” — naïve, e\u0301 and \u00e9",
    "鷺はどこに巣を作りますか。",
    "أين يعشش مالك الحزين؟",
    "🎹\U0001f3fd‍🦰",
    "line\u2028separator and \u0085 next line",
    "\ufeffmark in front, nul \x00 inside",
    "null",
    "x" * 5_000,
)
FEATURES = ("Accuracy", "Safety", "Concision")


def text(rng: random.Random) -> str:
    return rng.choice(AWKWARD)


def full(rng: random.Random) -> str:
    """A text with something in it, and no white space in front."""
    return rng.choice([t for t in AWKWARD if t.strip() and t == t.lstrip()])


def triples_in(path: Path) -> list[Triple]:
    found = import_records(path, trainable=True).records
    triples = [r.to_triple() if isinstance(r, Preference) else r for r in found]
    return [t for t in triples if isinstance(t, Triple)]


def conversation(rng: random.Random) -> tuple[Message, ...]:
    turns = []
    if rng.random() < 0.4:
        turns.append(Message("system", text(rng)))
    for _ in range(rng.choice((0, 0, 1, 3))):
        turns += [Message("user", text(rng)), Message("assistant", text(rng))]
    return (*turns, Message("user", full(rng)))


def reasons(rng: random.Random, names: Sequence[str]) -> dict[str, str]:
    return {n: rng.choice(("stop", "length")) for n in names if rng.random() < 0.5}


def extra(rng: random.Random) -> dict[str, Any]:
    return {"source": text(rng)} if rng.random() < 0.3 else {}


def preferences(seed: int) -> list[Preference]:
    rng = random.Random(seed)
    return [
        Preference(
            f"p{i}",
            conversation(rng),
            text(rng),
            text(rng),
            reasons(rng, ("chosen", "rejected")),
            extra(rng),
        )
        for i in range(30)
    ]


def triples(seed: int) -> list[Triple]:
    rng = random.Random(seed)
    found = []
    for i in range(30):
        plain = {"plain": text(rng)} if rng.random() < 0.7 else {}
        names = tuple(f for f in FEATURES if rng.random() < 0.5)
        principles = Principles(full(rng), full(rng), names) if rng.random() < 0.8 else None
        responses = {**plain, "good": text(rng), "bad": text(rng)}
        found.append(
            Triple(
                f"t{i}",
                conversation(rng),
                principles,
                responses,
                reasons(rng, tuple(responses)),
                extra(rng),
            )
        )
    return found


SEEDS = range(4)


def without_empty_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return messages[1:] if messages[0] == ("system", "") else messages


def bare(preference: Preference) -> Preference:
    return replace(preference, finish_reasons={}, extra={})


def bare_on_alpaca(preference: Preference) -> Preference:
    return replace(bare(preference), prompt=without_empty_system(preference.prompt))


def rated(preference: Preference) -> Preference:
    points = {"ratings": [1.0, 0.0], "chosen_rating": 1.0, "rejected_rating": 0.0}
    return replace(bare(preference), extra=points)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("fmt", "file", "shape", "expected"),
    [
        ("trl", "train.jsonl", "preference", bare),
        ("trl-unpaired", "train.jsonl", "labelled answer", bare),
        ("distilabel", "train.jsonl", "preference (two conversations)", rated),
        ("llama-factory", "h.json", "preference (Alpaca)", bare_on_alpaca),
        ("llama-factory-sharegpt", "h.json", "preference (ShareGPT)", bare_on_alpaca),
    ],
)
def test_preferences_come_back(
    tmp_path: Path,
    seed: int,
    fmt: str,
    file: str,
    shape: str,
    expected: Callable[[Preference], Preference],
) -> None:
    given = preferences(seed)
    exported = export(given, fmt, tmp_path, "h")
    found = import_records(tmp_path / file)
    assert found.shape == shape
    assert found.dropped == Counter()
    assert found.left_out == []
    assert list(found.records) == [expected(p) for p in given]
    assert found.n_in == exported.count
    # what is missing was said, and nothing else
    said = {"a response was cut off": any("length" in p.finish_reasons.values() for p in given)}
    said["the key 'source'"] = any(p.extra for p in given)
    if fmt.startswith("llama"):
        said["an empty system message"] = any(p.prompt[0] == ("system", "") for p in given)
    assert {k: any(k in s for s in exported.left_out) for k in said} == said
    assert len(exported.left_out) == sum(said.values())
    # and training reads the same pairs
    assert [(t.messages, t.responses) for t in triples_in(tmp_path / file)] == [
        (expected(p).prompt, {"good": p.chosen, "bad": p.rejected}) for p in given
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_parquet_keeps_finish_reasons_and_comes_back_over_shards(tmp_path: Path, seed: int) -> None:
    given = preferences(seed)
    export(given, "parquet", tmp_path, rows_per_file=4)
    exported = export(
        given, "parquet", tmp_path, card=lambda *said: json.dumps(said), rows_per_file=7
    )
    names = [f"data/train-{i:05d}-of-00005.parquet" for i in range(5)]
    # the shards of the first export are gone
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("data/*")) == names
    keys = sum(bool(p.extra) for p in given)
    assert exported.left_out == [
        f"{keys} of 30 records: the key 'source' is left out: the format has no place for it."
    ]
    assert json.loads((tmp_path / "README.md").read_text()) == [names, exported.left_out]
    assert list(import_records(tmp_path).records) == [replace(p, extra={}) for p in given]


def test_parquet_keeps_the_features_where_there_are_any(tmp_path: Path) -> None:
    first, second = preferences(0)[:2]
    given = [replace(first, extra={"features": ["Safety"]}), replace(second, extra={})]
    assert export(given, "parquet", tmp_path).left_out == []
    assert list(import_records(tmp_path).records) == given


@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_and_conversations_keep_their_side(tmp_path: Path, seed: int) -> None:
    given = preferences(seed)
    export(given, "trl-prompts", tmp_path / "p", "h")
    assert list(import_records(tmp_path / "p" / "train.jsonl").records) == [
        Query(p.id, p.prompt) for p in given
    ]
    export(given, "chat", tmp_path / "c", "h")
    found = import_records(tmp_path / "c" / "train.jsonl").records
    assert [(t.messages, t.responses) for t in found if isinstance(t, Triple)] == [
        (p.prompt, {"good": p.chosen}) for p in given
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_triples_come_back_from_the_authors_format(tmp_path: Path, seed: int) -> None:
    # white space between a system message and its guideline belongs to neither
    given = [t for t in triples(seed) if without_empty_system(t.messages) == t.messages]
    exported = export(given, "authors", tmp_path)
    expected = [
        replace(
            t,
            principles=t.principles and replace(t.principles, features=()),
            responses={k: v for k, v in t.responses.items() if k != "plain" or v},
            finish_reasons={},
            extra={},
        )
        for t in given
    ]
    found = import_records(tmp_path / "triples.json")
    assert list(found.records) == expected == triples_in(tmp_path / "triples.json")
    no_plain = sum(not t.responses.get("plain") for t in given)
    assert f"{no_plain} of {len(given)} records: no plain response, raw is empty." in (
        exported.left_out
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_our_own_records_come_back_whole(tmp_path: Path, seed: int) -> None:
    (tmp_path / "t.jsonl").write_bytes(dump_lines(triples(seed)).encode())
    assert list(import_records(tmp_path / "t.jsonl").records) == triples(seed)
    (tmp_path / "p.jsonl").write_bytes(dump_lines(preferences(seed)).encode())
    assert list(import_records(tmp_path / "p.jsonl").records) == preferences(seed)


# -- what distilabel and LLaMA-Factory look for --------------------------------------------------


def test_distilabel_record(tmp_path: Path) -> None:
    prompt = (
        Message("system", "Be brief."),
        Message("user", "What does the heron eat?"),
        Message("assistant", "Fish."),
        Message("user", "And where does it nest?"),
    )
    given = Preference("a", prompt, "In trees.", "In a piano.")
    export([given], "distilabel", tmp_path, "h", models=("m/good", "m/bad"))
    record = json.loads((tmp_path / "train.jsonl").read_text())
    asked = [m.to_dict() for m in prompt]
    assert record == {
        "id": "a",
        "prompt": "What does the heron eat?",
        # sha256 of the prompt
        "prompt_id": "671dea875677b1b8dc7817275c6a5b8a750c9aff568ed9f3ad60b95f82ecb0ac",
        "messages": asked,
        "generations": ["In trees.", "In a piano."],
        "generation_models": ["m/good", "m/bad"],
        "ratings": [1.0, 0.0],
        "chosen": [*asked, {"role": "assistant", "content": "In trees."}],
        "chosen_model": "m/good",
        "chosen_rating": 1.0,
        "rejected": [*asked, {"role": "assistant", "content": "In a piano."}],
        "rejected_model": "m/bad",
        "rejected_rating": 0.0,
    }


def test_sharegpt_record_and_its_entry(tmp_path: Path) -> None:
    prompt = (Message("system", "Be brief."), Message("user", "Where does the heron nest?"))
    export([Preference("a", prompt, "Trees.", "A piano.")], "llama-factory-sharegpt", tmp_path, "h")
    assert json.loads((tmp_path / "h.json").read_text()) == [
        {
            "id": "a",
            "conversations": [{"from": "human", "value": "Where does the heron nest?"}],
            "system": "Be brief.",
            "chosen": {"from": "gpt", "value": "Trees."},
            "rejected": {"from": "gpt", "value": "A piano."},
        }
    ]
    assert json.loads((tmp_path / "dataset_info.json").read_text()) == {
        "h": {
            "file_name": "h.json",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {
                "messages": "conversations",
                "system": "system",
                "chosen": "chosen",
                "rejected": "rejected",
            },
        }
    }


# -- what an import drops ------------------------------------------------------------------------


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def pair(chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    asked = turn("user", "Where does the heron nest?")
    return {
        "prompt": "Where does the heron nest?",
        "prompt_id": "abc",
        "chosen": [asked, turn("assistant", chosen)],
        "rejected": [asked, turn("assistant", rejected)],
        **more,
    }


def imported(tmp_path: Path, *records: Any) -> Imported:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return import_records(path)


def test_pairs_are_dropped_for_their_ratings_prompts_and_faults(tmp_path: Path) -> None:
    other = [turn("user", "Why?"), turn("assistant", "Soup.")]
    found = imported(
        tmp_path,
        pair("Trees.", "Pianos.", score_chosen=8.5, score_rejected=3.0, source="x"),
        pair("Trees.", "Reeds.", score_chosen=5.0, score_rejected=5.0),
        pair("Trees.", "Reeds.", chosen_rating=1, rejected_rating=4),
        {**pair("Trees.", "Reeds."), "rejected": other},
        {**pair("Trees.", "Reeds."), "chosen": [turn("user", "Why?"), turn("user", "Why?")]},
        pair("Trees.", "Reeds.", chosen_rating=None, rejected_rating=None),
        {"prompt": "Why?", "chosen": "Rain.", "rejected": "Soup."},
        {"text": "Why?"},
        pair("half \ud83d", "Reeds."),
    )
    asked = (Message("user", "Where does the heron nest?"),)
    scores = {"score_chosen": 8.5, "score_rejected": 3.0, "source": "x"}
    assert list(found.records) == [
        Preference("abc", asked, "Trees.", "Pianos.", extra=scores),
        Preference(
            "abc-2",
            asked,
            "Trees.",
            "Reeds.",
            extra={"chosen_rating": None, "rejected_rating": None},
        ),
    ]
    assert found.dropped == {
        "not_rated_higher": 2,
        "prompts_differ": 1,
        "malformed": 1,
        "other_shape": 1,
        "unknown_shape": 1,
        "not_storable": 1,
    }
    assert found.n_in == len(found.records) + found.dropped.total()
    path = tmp_path / "in.jsonl"
    *examples, last = found.examples
    assert examples == [
        f"{path}, line 2: score_chosen 5.0 is not above score_rejected 5.0; also line 3",
        f"{path}, line 4: chosen and rejected do not answer the same prompt",
        f"{path}, line 5: chosen must be one text or one assistant turn, found "
        "{'role': 'user', 'content': 'Why?'}",
        f"{path}, line 7: preference, but the first record is: preference (two conversations)",
        f"{path}, line 8: no known shape of record, its keys are text; give 'prompt' (text or "
        "chat) or 'messages' (chat), 'instruction' (Alpaca), or 'conversations' (ShareGPT), or "
        "rename a column",
    ]
    assert last.startswith(f"{path}, line 9: it cannot be stored as UTF-8 JSON: 'utf-8' codec")


def test_labelled_answers_are_paired_within_their_prompt(tmp_path: Path) -> None:
    def half(prompt: str, answer: str, label: Any) -> dict[str, Any]:
        return {"prompt": prompt, "completion": answer, "label": label}

    found = imported(
        tmp_path,
        half("Why?", "Soup.", False),
        half("Where?", "In trees.", True),
        half("Why?", "Rain.", True),
        half("Where?", "In reeds.", True),
        half("Where?", "In a piano.", False),
        half("When?", "Never.", False),
        half("When?", "Never.", "no"),
        half("Why?", "Clouds.", True),
        half("Why?", "Spoons.", False),
    )
    pairs = [p for p in found.records if isinstance(p, Preference)]
    assert [(p.prompt[0].content, p.chosen, p.rejected) for p in pairs] == [
        ("Why?", "Rain.", "Soup."),
        ("Where?", "In trees.", "In a piano."),
        ("Why?", "Clouds.", "Spoons."),
    ]
    assert found.dropped == {"unpaired": 2, "malformed": 1}
    assert found.n_in == 2 * len(found.records) + found.dropped.total()
    assert pairs[2].id == f"{pairs[0].id}-2"
    alone = "a labelled answer without one of the same prompt and the other label"
    path = tmp_path / "in.jsonl"
    assert found.examples == [
        f"{path}, line 7: label must be true or false, found 'no'",
        f"{path}, line 4: {alone}; also line 6",
    ]
    lonely = tmp_path / "lonely.jsonl"
    lonely.write_text(json.dumps(half("Why?", "Soup.", False)) + "\n")
    with pytest.raises(DataError, match=r"Of the 1 records of .* none can be used \(1 unpaired\)"):
        import_records(lonely)


def test_keys_are_kept_and_those_that_cannot_be_are_named(tmp_path: Path) -> None:
    half = {"prompt": "Why?", "completion": "Rain.", "label": True, "source": "x"}
    found = imported(tmp_path, half, {**half, "completion": "Soup.", "label": False, "score": 1})
    assert found.left_out == [
        "1 of 2 records: the key 'score' is left out.",
        "2 of 2 records: the key 'source' is left out.",
    ]
    alpaca = {"instruction": "Why?", "chosen": "Rain.", "rejected": "Soup.", "source": "x"}
    found = imported(tmp_path, {**alpaca, "messages": "theirs"})
    assert found.records[0].extra == {"source": "x"}
    assert found.left_out == ["1 of 1 records: the key 'messages' is left out."]
    three = ["Trees.", "Reeds.", "Pianos."]
    found = imported(tmp_path, pair("Trees.", "Pianos.", generations=three))
    assert found.records[0].extra == {"generations": three}
    assert found.left_out == []


def test_nothing_usable_is_an_error_that_lists_the_drops(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        imported(tmp_path, {"text": "Why?"}, {"prompt": ""})
    path = tmp_path / "in.jsonl"
    assert str(caught.value).startswith(
        f"Of the 2 records of {path} none can be used (1 unknown_shape, 1 empty_query). "
        f"{path}, line 1: no known shape of record, its keys are text"
    )


def test_release_records_without_its_own_keys_stay_with_it(tmp_path: Path) -> None:
    whole = {"instruction": "Why?", "chosen": "Rain.", "rejected": "Soup.", "raw": "Clouds."}
    bare_one = {k: v for k, v in whole.items() if k != "raw"}
    found = imported(tmp_path, whole, bare_one)
    assert found.shape == "triple (SSO release)"
    assert [t.responses.get("plain") for t in found.records if isinstance(t, Triple)] == [
        "Clouds.",
        None,
    ]
    assert len(triples_in(tmp_path / "in.jsonl")) == 2
    assert imported(tmp_path, bare_one).shape == "preference (Alpaca)"


def test_parquet_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match=r"x\.parquet is not a Parquet file"):
        import_records(tmp_path / "x.parquet")
