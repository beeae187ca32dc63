import datetime
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfsteer.data.jsonl import dump_lines
from selfsteer.data.reading import import_records
from selfsteer.data.records import Message, Preference, Principles, Query, Triple
from selfsteer.errors import ConfigError, DataError
from selfsteer.formats import FORMATS, Exported, export
from selfsteer.principles.contexts import context_messages

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"

GOOD = "Your response should be accurate. Name a real place."
BAD = "Your response should be inaccurate. Name an absurd place."

RELEASE: dict[str, Any] = {
    "instruction": "Where does the heron nest?",
    "history": [],
    "system": "",
    "p_system": GOOD,
    "n_system": BAD,
    "chosen": "In tall trees.",
    "rejected": "In a piano.",
    "raw": "Near water.",
}

CHAT = (
    Message("system", "Answer in one line."),
    Message("user", "What does the heron eat?"),
    Message("assistant", "Fish."),
    Message("user", "Where does it nest?"),
)

TRIPLES = [
    Triple(
        "a",
        (Message("user", "Where does the heron nest?"),),
        Principles(GOOD, BAD, ("Accuracy",)),
        {"plain": "Near water.", "good": "In tall trees.", "bad": "In a piano."},
        {"plain": "length", "good": "stop", "bad": "stop"},
        {"source": "picked"},
    ),
    Triple("b", CHAT, Principles(GOOD, BAD), {"good": "In “trees”.\n", "bad": "In a piano. 🎹"}),
    Triple("c", CHAT[1:], None, {"plain": "Up high.", "good": "In trees.", "bad": "Nowhere."}),
]

PREFERENCES = [
    Preference("a", (Message("user", "Where does the heron nest?"),), "In tall trees.", "A piano."),
    Preference(
        "b",
        CHAT,
        "In “trees”.\n",
        "In a",
        {"chosen": "stop", "rejected": "length"},
        {"source": "picked"},
    ),
]


def read_triples(path: Path) -> list[Triple]:
    found = import_records(path, trainable=True).records
    triples = [r.to_triple() if isinstance(r, Preference) else r for r in found]
    return [t for t in triples if isinstance(t, Triple)]


def complaint(path: Path) -> str:
    """What is said of the one bad row of a file, whether or not others can be used."""
    try:
        (said,) = import_records(path, trainable=True).examples
    except DataError as e:
        return str(e)
    return said


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def lines(*records: Any) -> str:
    return "".join(json.dumps(r) + "\n" for r in records)


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in keys}


def one(tmp_path: Path, record: dict[str, Any]) -> Triple:
    (triple,) = read_triples(write(tmp_path / "one.json", record))
    return triple


# -- triples of a run ----------------------------------------------------------------------------


def test_triples_of_a_run_come_back_unchanged(tmp_path: Path) -> None:
    assert read_triples(write(tmp_path / "t.jsonl", dump_lines(TRIPLES))) == TRIPLES


def test_folder_of_shards_is_read_in_order_and_other_files_are_not(tmp_path: Path) -> None:
    write(tmp_path / "shard-00001.jsonl", dump_lines(TRIPLES[1:]))
    write(tmp_path / "shard-00000.jsonl", dump_lines(TRIPLES[:1]))
    write(tmp_path / "shard-00000.done.json", {"n_in": 1})
    assert [t.id for t in read_triples(tmp_path)] == ["a", "b", "c"]


def test_repeated_ids_are_made_distinct_without_taking_a_given_one(tmp_path: Path) -> None:
    given = [replace(TRIPLES[0], id=i) for i in ("a", "a", "a-2", "a", "b")]
    found = read_triples(write(tmp_path / "t.jsonl", dump_lines(given)))
    assert [t.id for t in found] == ["a", "a-3", "a-2", "a-4", "b"]


# -- the authors' release ------------------------------------------------------------------------


def test_release_record_becomes_a_triple(tmp_path: Path) -> None:
    triple = one(tmp_path, RELEASE)
    assert triple == Triple(
        Query.from_dict({"prompt": "Where does the heron nest?"}).id,
        (Message("user", "Where does the heron nest?"),),
        Principles(GOOD, BAD),
        {"plain": "Near water.", "good": "In tall trees.", "bad": "In a piano."},
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.json", json.dumps(RELEASE)),
        ("one.json", json.dumps(RELEASE, indent=4)),
        ("one.jsonl", json.dumps(RELEASE, indent=4)),
        ("list.json", json.dumps([RELEASE])),
        ("list.json", json.dumps([RELEASE], indent=4)),
        ("list.jsonl", json.dumps([RELEASE])),
        ("lines.jsonl", "\n" + json.dumps(RELEASE) + "\n\n"),
        ("lines.json", json.dumps(RELEASE) + "\n"),
        ("bom.jsonl", "\ufeff" + json.dumps([RELEASE])),
    ],
)
def test_release_is_read_as_object_list_and_lines(tmp_path: Path, name: str, text: str) -> None:
    (triple,) = read_triples(write(tmp_path / name, text))
    assert triple.responses["good"] == "In tall trees."


def test_json_file_of_lines_has_all_its_lines(tmp_path: Path) -> None:
    other = {**RELEASE, "instruction": "Why?"}
    found = read_triples(write(tmp_path / "lines.json", lines(RELEASE, other)))
    assert [t.messages[-1].content for t in found] == ["Where does the heron nest?", "Why?"]


def test_history_system_and_input_make_the_conversation(tmp_path: Path) -> None:
    triple = one(
        tmp_path,
        {
            **RELEASE,
            "instruction": "Where does it nest?",
            "input": "Answer for Europe.",
            "history": [["What does the heron eat?", "Fish."]],
            "system": "Answer in one line.",
        },
    )
    assert triple.messages == (
        *CHAT[:3],
        Message("user", "Where does it nest?\nAnswer for Europe."),
    )


@pytest.mark.parametrize("value", ["", None])
def test_empty_input_system_history_and_raw_are_absent(tmp_path: Path, value: str | None) -> None:
    empty = dict.fromkeys(("input", "system", "history", "raw"), value)
    triple = one(tmp_path, {**RELEASE, **empty})
    assert triple.messages == (Message("user", "Where does the heron nest?"),)
    assert triple.responses == {"good": "In tall trees.", "bad": "In a piano."}
    assert "raw" not in triple.extra


@pytest.mark.parametrize("gap", ["\n\n", "\n", "  "])
def test_own_system_message_is_cut_off_the_front_of_the_guideline(tmp_path: Path, gap: str) -> None:
    own = "Answer in one line."
    triple = one(
        tmp_path,
        {**RELEASE, "system": own, "p_system": own + gap + GOOD, "n_system": own + gap + BAD},
    )
    assert triple.principles == Principles(GOOD, BAD)
    assert context_messages(triple.messages, triple.principles, "good")[0].content == (
        f"{own}\n\n{GOOD}"
    )


@pytest.mark.parametrize("own", ["Answer in one line.", "Your response should b"])
def test_guideline_that_does_not_begin_with_the_own_system_message_is_kept(
    tmp_path: Path, own: str
) -> None:
    assert one(tmp_path, {**RELEASE, "system": own}).principles == Principles(GOOD, BAD)


def test_without_guidelines_there_are_no_principles(tmp_path: Path) -> None:
    assert one(tmp_path, without(RELEASE, "p_system", "n_system")).principles is None
    assert one(tmp_path, {**RELEASE, "p_system": "", "n_system": None}).principles is None


def test_features_are_taken_from_the_list_of_principles(tmp_path: Path) -> None:
    entries = [{"feature": "Safety", "good_principle": "…"}, {"feature": "Accuracy"}]
    triple = one(tmp_path, {**RELEASE, "principles": entries})
    assert triple.principles == Principles(GOOD, BAD, ("Safety", "Accuracy"))
    assert triple.to_dict()["principles"]["good"] == GOOD


def test_responses_may_be_lists_of_one(tmp_path: Path) -> None:
    listed = {k: [RELEASE[k]] for k in ("chosen", "rejected", "raw")}
    assert one(tmp_path, {**RELEASE, **listed}).responses == one(tmp_path, RELEASE).responses


def test_ids_are_id_then_idx_then_a_hash(tmp_path: Path) -> None:
    assert one(tmp_path, {**RELEASE, "id": "mine", "idx": "theirs"}).id == "mine"
    assert one(tmp_path, {**RELEASE, "idx": 7}).id == "7"
    assert re.fullmatch(r"[0-9a-f]{16}", one(tmp_path, RELEASE).id)


def test_two_triples_of_one_query_are_kept_apart(tmp_path: Path) -> None:
    second = {**RELEASE, "chosen": "In reeds."}
    a, b, c = read_triples(write(tmp_path / "l.json", [RELEASE, second, second]))
    assert (b.id, c.id) == (f"{a.id}-2", f"{a.id}-3")
    assert [t.responses["good"] for t in (a, b, c)] == ["In tall trees.", "In reeds.", "In reeds."]


def test_unknown_keys_are_kept_and_cannot_replace_ours(tmp_path: Path) -> None:
    extra = {"o_chosen_ppl": -0.5, "messages": "theirs", "finish_reasons": "theirs"}
    triple = one(tmp_path, {**RELEASE, **extra})
    assert triple.extra == {"o_chosen_ppl": -0.5}
    assert Triple.from_dict(triple.to_dict()) == triple


# -- preferences ---------------------------------------------------------------------------------


def test_preferences_become_triples_without_principles(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", dump_lines(PREFERENCES))
    assert read_triples(path) == [
        Triple("a", PREFERENCES[0].prompt, None, {"good": "In tall trees.", "bad": "A piano."}),
        Triple(
            "b",
            CHAT,
            None,
            {"good": "In “trees”.\n", "bad": "In a"},
            {"good": "stop", "bad": "length"},
        ),
    ]


def test_preferences_with_string_prompt_and_string_responses(tmp_path: Path) -> None:
    record = {"prompt": "Why?", "chosen": "Rain.", "rejected": "Soup.", "finish_reasons": None}
    triple = one(tmp_path, record)
    assert triple.messages == (Message("user", "Why?"),)
    assert triple.responses == {"good": "Rain.", "bad": "Soup."}


# -- what is refused -----------------------------------------------------------------------------

PREFERENCE = PREFERENCES[0].to_dict()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"history": [["only one"]]}, "history must be a list of [user, assistant] pairs"),
        ({"history": 5}, "history must be a list of [user, assistant] pairs, found 5"),
        ({"history": [["a", None]]}, "history must be a list of [user, assistant] pairs"),
        ({"instruction": ""}, "the last user turn is empty"),
        ({"instruction": 3}, "instruction and input must be texts, found [3"),
        ({"system": ["s"]}, "system must be a string"),
        ({"n_system": ""}, "p_system and n_system belong together"),
        ({"system": BAD}, "n_system holds no guideline beyond the query's own system message"),
        ({"chosen": ["a", "b"]}, "chosen must be one text or one assistant turn"),
        ({"rejected": None}, "rejected must be one text or one assistant turn, found None"),
        ({"raw": 0}, "raw must be one text or one assistant turn, found 0"),
        ({"chosen": "half \ud83d"}, "must be a UTF-8 text"),
        ({"ppl": math.nan}, "cannot be stored as UTF-8 JSON"),
    ],
)
def test_malformed_release_record_is_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "r.json", [RELEASE, {**RELEASE, **change}])
    assert complaint(path).startswith(f"{path}, entry 2: ")
    assert said in complaint(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": [{"role": "user", "content": "Hm?"}]}, "chosen must be one text or one assist"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "chosen must be one text or one as"),
        ({"rejected": []}, "rejected must be one text or one assistant turn, found []"),
        ({"prompt": [{"role": "assistant", "content": "Hi."}]}, "no user turn"),
        ({"finish_reasons": {"good": "stop"}}, "finish_reasons give"),
    ],
)
def test_malformed_preference_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "p.jsonl", lines(PREFERENCE, {**PREFERENCE, **change}))
    assert complaint(path).startswith(f"{path}, line 2: ")
    assert said in complaint(path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "Why?"}, "1 no_pair). FILE, line 1: query, not two answers to one prompt"),
        ({"question": "Why?", "answer": "Rain."}, "1 no_pair). FILE, line 1: answered query, not"),
        (
            {"text": "Why?"},
            "1 unknown_shape). FILE, line 1: no known shape of record, its",
        ),
        (without(RELEASE, "rejected"), "1 no_pair). FILE, line 1: query, not"),
        (without(TRIPLES[0].to_dict(), "responses"), "1 no_pair). FILE, line 1: query, not"),
    ],
)
def test_a_file_without_a_pair_is_refused_with_what_is_accepted(
    tmp_path: Path, record: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "u.jsonl", lines(record))
    with pytest.raises(DataError, match=r"answers .prompt, completion, label.\.$") as caught:
        read_triples(path)
    assert said.replace("FILE", str(path)) in str(caught.value)


def test_record_of_two_kinds_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "u.jsonl", lines({**RELEASE, "prompt": "Why?"}))
    with pytest.raises(DataError, match="line 1: more than one kind of record: its keys are ins"):
        read_triples(path)


def test_mixed_records_are_refused_and_both_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", lines(RELEASE, RELEASE, PREFERENCE))
    said = "preference, but the first record is: triple (SSO release)"
    assert complaint(path) == f"{path}, line 3: {said}"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("b.jsonl", lines(RELEASE) + '{"instruction": ', 2),
        ("b.json", lines(RELEASE) + "nonsense", 2),
        ("b.json", '{\n  "instruction": "a",\n  "chosen": oops\n}', 3),
        ("b.jsonl", '{"instruction":\n' + lines(RELEASE), 1),
        ("b.json", "oops", 1),
        ("b.jsonl", '[{"a": 1},\n oops]', 2),
    ],
)
def test_malformed_json_is_named_by_line(tmp_path: Path, name: str, text: str, line: int) -> None:
    path = write(tmp_path / name, text)
    assert f"{path}, line {line}: not JSON" in complaint(path)


def test_a_column_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "when": datetime.date(2026, 1, 2)}
    path = tmp_path / "dated.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(DataError, match=r"row 1: it cannot be stored as UTF-8 JSON: .* date"):
        read_triples(path)


def test_list_entry_that_is_no_object_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "l.json", [RELEASE, 7])
    assert complaint(path) == f"{path}, entry 2: not a JSON object: 7"


@pytest.mark.parametrize(("name", "text"), [("e.jsonl", "\n \n"), ("e.json", ""), ("e.json", "[]")])
def test_empty_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        read_triples(path)
    assert str(caught.value).startswith(f"Of the 0 records of {path} none can be used")


def test_folder_without_shards_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "t.txt", dump_lines(TRIPLES))
    with pytest.raises(DataError, match="is a folder without shards"):
        read_triples(tmp_path)


def test_absent_file_and_other_encodings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        read_triples(tmp_path / "absent.json")
    path = tmp_path / "latin.jsonl"
    path.write_bytes(lines(RELEASE).encode() + b'{"prompt": "caf\xe9"}')
    assert complaint(path).startswith(f"{path}, line 2: not UTF-8 (")
    # the list is longer than what is looked at to tell it from lines
    path = tmp_path / "latin.json"
    path.write_bytes(b"[\n" + b" " * 20_000 + b'"caf\xe9"')
    with pytest.raises(DataError, match=r"latin.json is not UTF-8 text \(.+ at byte \d+\)"):
        read_triples(path)


def test_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = write(tmp_path / "offline.jsonl", "version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(DataError, match="is a Git LFS pointer, not the data"):
        read_triples(path)


# -- exports -------------------------------------------------------------------------------------


def test_authors_export_comes_back_but_for_what_it_says_is_left_out(tmp_path: Path) -> None:
    found = export([*TRIPLES, Triple("d", CHAT)], "authors", tmp_path)
    assert found == Exported(
        [tmp_path / "triples.json"],
        3,
        [
            "1 of 4 records: without a good and a bad response, left out.",
            "1 of 3 records: no plain response, raw is empty.",
            "1 of 3 records: no principles, p_system and n_system are empty.",
            "1 of 3 records: the features' names are left out.",
            "1 of 3 records: a response was cut off; the format cannot say so, and it will train "
            "as if it ended there.",
            "1 of 3 records: the key 'source' is left out: the format has no place for it.",
        ],
    )
    first = replace(TRIPLES[0], principles=Principles(GOOD, BAD), finish_reasons={}, extra={})
    assert read_triples(tmp_path / "triples.json") == [first, *TRIPLES[1:]]


def test_authors_export_is_the_release_record(tmp_path: Path) -> None:
    export(TRIPLES[:2], "authors", tmp_path)
    single, chat = json.loads((tmp_path / "triples.json").read_text("utf-8"))
    assert single == {"idx": "a", **RELEASE}
    assert chat["system"] == "Answer in one line."
    assert chat["history"] == [["What does the heron eat?", "Fish."]]
    assert chat["instruction"] == "Where does it nest?"
    assert chat["p_system"] == f"Answer in one line.\n\n{GOOD}"
    assert chat["raw"] == ""


def test_trl_export_has_four_columns_and_says_what_is_left_out(tmp_path: Path) -> None:
    found = export(PREFERENCES, "trl", tmp_path, "heron")
    assert found == Exported(
        [tmp_path / "train.jsonl"],
        2,
        [
            "1 of 2 records: a response was cut off; the format cannot say so, and it will train "
            "as if it ended there.",
            "1 of 2 records: the key 'source' is left out: the format has no place for it.",
        ],
    )
    records = [json.loads(x) for x in found.paths[0].read_text("utf-8").splitlines()]
    assert {tuple(r) for r in records} == {("id", "prompt", "chosen", "rejected")}
    assert records[1]["prompt"] == [m.to_dict() for m in CHAT]
    assert [t.responses for t in read_triples(found.paths[0])] == [
        p.to_triple().responses for p in PREFERENCES
    ]


def test_llama_factory_export_and_its_entry(tmp_path: Path) -> None:
    write(tmp_path / "dataset_info.json", {"other": {"file_name": "other.json"}})
    found = export(PREFERENCES, "llama-factory", tmp_path, "heron")
    assert found.paths == [tmp_path / "heron.json", tmp_path / "dataset_info.json"]
    records = json.loads(found.paths[0].read_text("utf-8"))
    assert records == [
        {
            "id": "a",
            "instruction": "Where does the heron nest?",
            "history": [],
            "system": "",
            "chosen": "In tall trees.",
            "rejected": "A piano.",
        },
        {
            "id": "b",
            "instruction": "Where does it nest?",
            "history": [["What does the heron eat?", "Fish."]],
            "system": "Answer in one line.",
            "chosen": "In “trees”.\n",
            "rejected": "In a",
        },
    ]
    entries = json.loads(found.paths[1].read_text("ascii"))
    assert entries["other"] == {"file_name": "other.json"}
    assert entries["heron"]["file_name"] == "heron.json"
    assert entries["heron"]["ranking"] is True
    # LLaMA-Factory's names for the columns, each pointing to a key that every record has
    assert entries["heron"]["columns"].keys() == {
        "prompt",
        "history",
        "system",
        "chosen",
        "rejected",
    }
    assert all(set(entries["heron"]["columns"].values()) <= r.keys() for r in records)


def test_exporting_again_replaces_and_leaves_no_partial_file(tmp_path: Path) -> None:
    for fmt in ("trl", "llama-factory"):
        export(PREFERENCES, fmt, tmp_path / fmt, "heron")
        export(PREFERENCES[:1], fmt, tmp_path / fmt, "heron")
    assert len((tmp_path / "trl" / "train.jsonl").read_text("utf-8").splitlines()) == 1
    assert len(json.loads((tmp_path / "llama-factory" / "heron.json").read_text("utf-8"))) == 1
    names = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert names == ["dataset_info.json", "heron.json", "train.jsonl"]


def test_llama_factory_keeps_what_is_somebody_elses(tmp_path: Path) -> None:
    own = [{"instruction": "mine"}]
    write(tmp_path / "heron.json", own)
    with pytest.raises(ConfigError, match=r"heron.json is there, dataset_info.json does not name"):
        export(PREFERENCES, "llama-factory", tmp_path, "heron")
    write(tmp_path / "dataset_info.json", {"heron": {"file_name": "heron.json"}})
    with pytest.raises(ConfigError, match="has an entry heron for something else"):
        export(PREFERENCES, "llama-factory", tmp_path, "heron")
    assert json.loads((tmp_path / "heron.json").read_text("utf-8")) == own
    assert len(list(tmp_path.iterdir())) == 2
    # a kill may leave the file without its entry, and the same command goes on
    both = export(PREFERENCES, "llama-factory", tmp_path / "out", "heron").paths
    both[1].unlink()
    assert export(PREFERENCES, "llama-factory", tmp_path / "out", "heron").paths == both


def test_formats_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    assert tuple(FORMATS) == (
        "trl",
        "trl-prompts",
        "trl-unpaired",
        "llama-factory",
        "llama-factory-sharegpt",
        "distilabel",
        "chat",
        "parquet",
        "authors",
    )
    with pytest.raises(ConfigError, match=r"'csv'.* trl, trl-prompts, trl-unpaired"):
        export(PREFERENCES, "csv", tmp_path, "heron")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to export: of 0 records"):
        export([], "trl", tmp_path, "heron")
    with pytest.raises(
        DataError, match="nothing to export: of 1 records none has a good and a bad"
    ):
        export([Triple("d", CHAT, None, {"good": "In trees."})], "authors", tmp_path)


@pytest.mark.parametrize("name", ["../heron", "", "dataset_info", "a b", ".hidden"])
def test_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="A data set cannot be called"):
        export(PREFERENCES, "llama-factory", tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", "{oops"])
def test_broken_dataset_info_is_left_alone(tmp_path: Path, text: str) -> None:
    info = write(tmp_path / "dataset_info.json", text)
    with pytest.raises(DataError, match="is there and cannot be added to"):
        export(PREFERENCES, "llama-factory", tmp_path, "heron")
    assert info.read_text("utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["dataset_info.json"]


# -- the libraries that read the exports ---------------------------------------------------------


def load(folder: Path, cache: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # the environment variable is read once, at an import that may lie before this test
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_load_dataset_opens_the_trl_export_beside_another(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(PREFERENCES, "llama-factory", folder, "heron")
    export(PREFERENCES, "trl", folder, "heron")
    rows = load(folder, tmp_path / "cache")
    assert rows.column_names == ["id", "prompt", "chosen", "rejected"]
    assert rows.to_list() == [
        replace(p, finish_reasons={}, extra={}).to_dict() for p in PREFERENCES
    ]


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<end>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_model(folder: Path) -> None:
    """A random Llama of some thousand weights, with a tokenizer trained on the preferences."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "<unk>", "<system>", "<user>", "<assistant>"]
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [t for p in PREFERENCES for t in (*(m.content for m in p.prompt), p.chosen, p.rejected)]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.usefixtures("offline")
# TRL 1.16 still uses transformers' old name for activation checkpointing.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_trl_takes_a_dpo_step_on_the_export_as_it_is(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    tiny_model(tmp_path / "model")
    export(PREFERENCES, "trl", tmp_path / "out", "heron")
    trainer = DPOTrainer(
        str(tmp_path / "model"),
        args=DPOConfig(
            output_dir=str(tmp_path / "trained"),
            max_steps=1,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=load(tmp_path / "out", tmp_path / "cache"),
    )
    made: Any = trainer  # whose attributes are typed as unions over all kinds of trainers
    rows = {row["id"]: row for row in made.train_dataset}
    decode = made.processing_class.decode
    assert decode(rows["b"]["prompt_ids"]) == (
        "<system> Answer in one line . <user> What does the heron eat ? <assistant> Fish . <end> "
        "<user> Where does it nest ? <assistant>"
    )
    assert decode(rows["b"]["chosen_ids"]) == "In “ trees ”. <end>"
    # The first step's loss, before any update: policy and reference are equal, -log σ(0).
    trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(math.log(2), abs=1e-4)


# -- the documentation ---------------------------------------------------------------------------


def examples() -> list[tuple[str, Any]]:
    found = re.findall(r"<!-- record: (.+?) -->\n```json\n(.+?)```", DOCS.read_text("utf-8"), re.S)
    return [(kind, json.loads(text)) for kind, text in found]


def test_every_json_block_of_the_docs_is_marked() -> None:
    assert DOCS.read_text("utf-8").count("```json") == len(examples())
    kinds = {kind for kind, _ in examples()}
    assert kinds == {
        "Query",
        "Triple",
        "Preference",
        "release",
        "Triple, the release's",
        *FORMATS,
    } - {"trl", "parquet", "authors"}


def test_examples_of_our_records_are_read_and_written_back() -> None:
    for kind, record in examples():
        if kind == "Query":
            again = Query.from_dict(Query.from_dict(record).to_dict())
            assert again == Query.from_dict(record)
        elif kind == "Triple":
            assert Triple.from_dict(record).to_dict() == record
        elif kind == "Preference":
            assert Preference.from_dict(record).to_dict() == record


def test_example_of_the_release_is_the_triple_beside_it(tmp_path: Path) -> None:
    by_kind = dict(examples())
    triple = Triple.from_dict(by_kind["Triple, the release's"])
    assert one(tmp_path, by_kind["release"]) == triple
    export([triple], "authors", tmp_path)
    assert json.loads((tmp_path / "triples.json").read_text("utf-8")) == [by_kind["release"]]


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f not in ("trl", "parquet", "authors")])
def test_example_of_a_format_is_what_is_written(tmp_path: Path, fmt: str) -> None:
    by_kind = dict(examples())
    given = Preference.from_dict(by_kind["Preference"])
    models = ("mine/iteration-1/generator",) * 2
    path = export([given], fmt, tmp_path, "bee", models=models).paths[0]
    text = path.read_text("utf-8")
    written = (
        json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.split("\n")[:-1]))
    )
    shown = by_kind[fmt]
    assert written == (shown if isinstance(shown, list) else [shown])


def test_thoughts_that_a_record_keeps_go_before_its_responses(tmp_path: Path) -> None:
    pair = replace(PREFERENCES[0], reasoning={"chosen": "Where?\n</think>\n\n"})
    whole = "<think>\nWhere?\n</think>\n\nIn tall trees."
    for fmt, path, key in (
        ("trl", "train.jsonl", "chosen"),
        ("trl-unpaired", "train.jsonl", "completion"),
        ("distilabel", "train.jsonl", "generations"),
    ):
        export([pair], fmt, tmp_path / fmt)
        row = json.loads((tmp_path / fmt / path).read_text().splitlines()[0])
        assert whole in (row[key][0], row[key][0].get("content") if fmt[0] == "t" else None)
        assert "reasoning" not in row
        assert pair.rejected in json.dumps(row) or fmt == "trl-unpaired"
    triple = replace(TRIPLES[0], reasoning={"bad": "<think>Hm</think>"})
    export([triple], "authors", tmp_path)
    (row,) = json.loads((tmp_path / "triples.json").read_text())
    assert (row["chosen"], row["rejected"]) == ("In tall trees.", "<think>Hm</think>In a piano.")
