import json
import re
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfsteer.data.jsonl import read_jsonl
from selfsteer.data.queries import Loaded, load_queries, queries_digest, write_curated
from selfsteer.data.records import Triple, content_id, parse_messages
from selfsteer.errors import ConfigError, DataError
from selfsteer.principles.rules import read_checks
from selfsteer.recipe.sections import Queries

CHAT = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Name a fish."},
]
ANSWER = {"role": "assistant", "content": "The cod."}
ROWS: list[dict[str, Any]] = [
    {"id": "b", "prompt": "Why is the sky blue?"},
    {"id": "a", "prompt": CHAT},
    {"id": "c", "messages": [{"role": "user", "content": "x"}], "system": "Be a cook."},
]


def load(path: Path, **more: Any) -> Loaded:
    return load_queries(Queries(path=str(path), **more))


def rows_in(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(params=["jsonl", "json", "parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"q.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in ROWS) + "\n")
    elif request.param == "json":
        path.write_text(json.dumps(ROWS))
    else:
        rows = [
            {
                "id": r["id"],
                "messages": r["prompt"]
                if isinstance(r.get("prompt"), list)
                else r.get("messages") or [{"role": "user", "content": r["prompt"]}],
                "system": r.get("system"),
                "other": 1,
            }
            for r in ROWS
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_every_file_kind_gives_the_same_queries_in_id_order(file: Path) -> None:
    queries, dropped, cut, overlaps, *_ = load(file)
    assert [q.id for q in queries] == ["a", "b", "c"]
    assert [len(q.messages) for q in queries] == [3, 1, 2]
    assert queries[1].text == "Why is the sky blue?"
    assert queries[2].messages[0].role == "system"
    assert not dropped
    assert (cut, overlaps) == (0, [])


def test_ids_are_content_hashes_when_missing(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n')
    found = load(path)
    messages = parse_messages([{"role": "user", "content": "a"}])
    assert content_id(messages) in {q.id for q in found.queries}
    assert found.dropped == {"duplicate": 1}
    # pinned: ids must not change between versions, runs are joined by them
    assert content_id(messages) == "050d8ef56e888db0"


def test_a_limit_counts_what_it_leaves_out(file: Path) -> None:
    found = load(file, limit=2)
    assert {q.id for q in found.queries} == {"a", "b"}
    assert found.dropped == {"over_limit": 1}


def test_the_digest_follows_the_content_of_queries_and_evaluation_sets(tmp_path: Path) -> None:
    path, other = tmp_path / "q.jsonl", tmp_path / "e.jsonl"
    settings = Queries(path=str(path), against=(str(other),))
    found = set()
    for query, evaluation in (("a", "c"), ("b", "c"), ("b", "d")):
        rows_in(path, {"prompt": query})
        rows_in(other, {"prompt": evaluation})
        found.add(tuple(queries_digest(settings)))
    assert len(found) == 3


SHAPES: dict[str, tuple[dict[str, Any], list[tuple[str, str]], bool]] = {
    "preference, text": (
        {"prompt": "Name a fish.", "prompt_id": "p7", "chosen": [ANSWER], "messages": [*CHAT]},
        [("user", "Name a fish.")],
        False,
    ),
    "preference, instruction": (
        {"instruction": "Name a fish.", "completions": [{"response": "The cod."}]},
        [("user", "Name a fish.")],
        False,
    ),
    "preference, implicit prompt": (
        {"chosen": [*CHAT, ANSWER], "rejected": [*CHAT, ANSWER]},
        [("user", "Hi."), ("assistant", "Hello."), ("user", "Name a fish.")],
        False,
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi."},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "Name a fish."},
                {"from": "gpt", "value": "The cod."},
            ]
        },
        [
            ("system", "Be brief."),
            ("user", "Hi."),
            ("assistant", "Hello."),
            ("user", "Name a fish."),
        ],
        True,
    ),
    "sharegpt, system apart": (
        {"conversations": [{"role": "user", "content": "Hi."}], "system": "Be brief."},
        [("system", "Be brief."), ("user", "Hi.")],
        False,
    ),
    "alpaca": (
        {
            "instruction": "Translate.",
            "input": "la mer",
            "output": "the sea",
            "history": [["Hi.", "Hello."]],
            "system": "Be brief.",
        },
        [
            ("system", "Be brief."),
            ("user", "Hi."),
            ("assistant", "Hello."),
            ("user", "Translate.\nla mer"),
        ],
        False,
    ),
    "alpaca, empty input": (
        {"instruction": "Name a fish.", "input": "", "output": "cod"},
        [("user", "Name a fish.")],
        False,
    ),
    "ranking, sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Hi."}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        [("user", "Hi.")],
        False,
    ),
    "prompt beside its conversation": (
        {"prompt": "Hi.", "prompt_id": "p7", "messages": [*CHAT, ANSWER]},
        [("user", "Hi.")],
        True,
    ),
    "own, answered": (
        {"messages": [*CHAT, ANSWER]},
        [("user", "Hi."), ("assistant", "Hello."), ("user", "Name a fish.")],
        True,
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes_give_their_prompt_side(shape: str, kind: str, tmp_path: Path) -> None:
    row, messages, cut = SHAPES[shape]
    path = tmp_path / f"q.{kind}"
    if kind == "jsonl":
        rows_in(path, row)
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    found = load(path)
    assert [tuple(m) for m in found.queries[0].messages] == messages
    assert found.answers_cut == cut
    assert not found.dropped
    if "prompt_id" in row:
        assert found.queries[0].id == "p7"


def test_what_is_no_conversation_in_a_foreign_set_is_counted(tmp_path: Path) -> None:
    def talk(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"conversations": [{"from": who, "value": text} for who, text in turns]}

    path = rows_in(
        tmp_path / "q.jsonl",
        talk(("gpt", "Hello.")),
        talk(("gpt", "Hello."), ("human", "Hi.")),
        talk(("human", "Hi."), ("human", "There?")),
        talk(("human", " ")),
        {"instruction": "", "output": "x"},
        talk(("human", "Hi.")),
    )
    found = load(path)
    assert [q.text for q in found.queries] == ["Hi."]
    assert found.dropped == {"no_user_turn": 1, "turns_do_not_alternate": 2, "empty_query": 2}


def test_csv_columns_are_read_and_empty_cells_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text('prompt,system,id,note\n"One, ""two""?\nThree?",,7,x\nFour?,Be brief.,,y\n')
    queries = {q.id: q for q in load(path).queries}
    assert queries["7"].text == 'One, "two"?\nThree?'
    assert [m.role for q in queries.values() for m in q.messages] == ["user", "system", "user"]
    path.write_text("prompt\nFour?,extra\n")
    with pytest.raises(DataError, match=r"line 2: it does not have as many cells"):
        load(path)


def test_a_query_of_a_table_keeps_its_rules(tmp_path: Path) -> None:
    rules = {"checks": [{"words": {"max": 3}}, {"lacks": ["bee"]}], "kwargs": [{"n": 1}]}
    row = {"prompt": "What eats nectar?", **rules, "note": "x"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    (query,) = load(tmp_path / "q.parquet").queries
    assert set(query.extra) == {"checks", "kwargs"}
    assert read_checks(query.extra["checks"], "q") == read_checks(rules["checks"], "q")


def test_an_id_of_another_name_does_not_cost_a_query_its_other_keys(tmp_path: Path) -> None:
    rows = [
        {"prompt": "What eats nectar?", "prompt_id": "p7", "topic": "bees"},
        {"prompt": "What eats bees?", "prompt_id": "p8", "id": "q8"},
    ]
    first, second = load(rows_in(tmp_path / "q.jsonl", *rows)).queries
    assert (first.id, first.extra) == ("p7", {"topic": "bees"})
    assert (second.id, second.extra) == ("q8", {"prompt_id": "p8"})


def test_what_belongs_to_answers_is_not_kept_with_a_query(tmp_path: Path) -> None:
    """A sampled answer would be replaced by the one that stands there."""
    stale = {"responses": {"plain": "Old."}, "reasoning": "Hm.", "finish_reasons": {}}
    path = rows_in(tmp_path / "q.jsonl", {"prompt": "What eats nectar?", "topic": "bees", **stale})
    (query,) = load(path).queries
    assert query.extra == {"topic": "bees"}
    assert not Triple.from_dict(query.to_dict()).responses


def test_a_folder_of_shards_is_one_set(tmp_path: Path) -> None:
    for i in range(3):
        rows_in(tmp_path / f"train-{i}.jsonl", {"prompt": f"q{i}"}, {"prompt": "same"})
    (tmp_path / "notes.json").write_text("{}")
    found = load(tmp_path)
    assert {q.text for q in found.queries} == {"q0", "q1", "q2", "same"}
    assert found.dropped == {"duplicate": 2}
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"\.jsonl and \.parquet files\. Give"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.json", "[1]", "entry 1: not a JSON object: 1"),
        ("q.json", "{", "line 1: not JSON"),
        ("q.jsonl", "version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("q.csv", "prompt,prompt\na,b\n", "more than one column called 'prompt'"),
        ("q.csv", 'messages\n"[{}]"\n', "its keys are messages; give .prompt. .text or chat."),
        (
            "q.jsonl",
            '{"conversations": [{"from": ["human"], "value": "x"}]}',
            "must be from one of",
        ),
        ("q.parquet", "no parquet", "not a Parquet file"),
        ("q.jsonl", '{"prompt": "a", "messages": []}', "exactly one of"),
        ("q.jsonl", '{"prompt": "  "}', "line 1: the last user turn is empty"),
        ("q.jsonl", '{"prompt": "a", "system": 3}', "system must be a string"),
        ("q.jsonl", '\n{"text": "a", "n": 1}', "line 2: no known shape .* keys are text, n;"),
        ("q.csv", "text,n\na,1\n", "its keys are text, n"),
        ("q.csv", 'prompt\n"a', "not a CSV file"),
        ("q.jsonl", '{"conversations": [{"from": "tool", "value": "x"}]}', "has_tools"),
        ("q.jsonl", '{"instruction": "a", "history": [["b"]]}', "user, assistant. pairs"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        load(path)
    assert name in str(caught.value)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder without shards"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")  # datasets and its http client warn in many ways when offline
def test_a_datasets_name_that_cannot_be_had_says_so() -> None:
    with pytest.raises(DataError, match="as a data set on the hub it cannot be loaded"):
        load(Path("no-such-owner/no-such-set"))


SENTENCE = "Describe how a village by the river gets ready for the yearly flood in spring"


def test_each_step_counts_what_it_drops(tmp_path: Path) -> None:
    evaluation = rows_in(
        tmp_path / "e.jsonl",
        {"id": "e1", "prompt": "Please say what one should know before moving to a new country."},
        {"id": "e2", "instruction": "Name a fish!", "output": "cod"},
    )
    path = rows_in(
        tmp_path / "q.jsonl",
        {"id": "1", "prompt": f"{SENTENCE}."},
        {"id": "0", "prompt": f"{SENTENCE} again"},
        {"id": "2", "prompt": f"{SENTENCE.upper()}. "},
        {"id": "3", "prompt": "Tell me what one should know before moving to a town."},
        {"id": "4", "prompt": "name a  fish"},
        {"id": "5", "prompt": "Hm?"},
        {"id": "6", "prompt": "x" * 200},
        {"id": "7", "prompt": "Почему небо голубое, а трава зелёная?"},
        {"id": "8", "prompt": "Why is the sky blue?"},
        {"id": "9", "prompt": "And why is the grass green?"},
    )
    found = load(
        path,
        min_chars=5,
        max_chars=150,
        scripts=("Latin",),
        near_duplicates=0.8,
        against=(str(evaluation),),
        limit=3,
    )
    assert [q.id for q in found.queries] == ["0", "8"]
    assert found.dropped == {
        "duplicate_but_case": 1,
        "contaminated": 2,
        "too_short": 1,
        "too_long": 1,
        "other_script": 1,
        "near_duplicate": 1,
        "over_limit": 1,
    }
    assert [tuple(pair) for pair in found.overlaps] == [
        ("3", str(evaluation), "e1", "what one should know before moving to a"),
        ("4", str(evaluation), "e2", "name a fish"),
    ]


def test_an_answer_cut_off_a_near_duplicate_is_not_counted(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": f"{SENTENCE} again"}, {"from": "gpt", "value": "No."}]
    rows = ({"id": "0", "prompt": f"{SENTENCE}."}, {"id": "1", "conversations": talk})
    found = load(rows_in(tmp_path / "q.jsonl", *rows), near_duplicates=0.8)
    assert (found.dropped, found.answers_cut) == ({"near_duplicate": 1}, 0)


def test_rows_of_evaluation_sets_that_cannot_be_compared_are_counted(tmp_path: Path) -> None:
    path = rows_in(tmp_path / "q.jsonl", {"prompt": "Why?"})
    lame = {"conversations": [{"from": "gpt", "value": "Hello."}]}
    evaluation = rows_in(tmp_path / "e.jsonl", {"prompt": "Who?"}, lame)
    assert load(path, against=(str(evaluation),)).not_compared == {"no_user_turn": 1}
    rows_in(evaluation, lame)
    with pytest.raises(DataError, match=r"e\.jsonl holds no query, so nothing would be kept apart"):
        load(path, against=(str(evaluation),))
    evaluation.write_text("")
    with pytest.raises(DataError, match=r"e\.jsonl holds no query"):
        load(path, against=(str(evaluation),))


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    path = rows_in(tmp_path / "q.jsonl", {"prompt": "Why?"})
    with pytest.raises(
        ConfigError, match=r"split 'test' has no effect: .*q\.jsonl is not a datasets"
    ):
        load(path, split="test")


def test_what_a_json_file_is_its_content_says(tmp_path: Path) -> None:
    lines = rows_in(tmp_path / "lines.json", {"prompt": "Why?"}, {"prompt": "Who?"})
    whole = tmp_path / "list.jsonl"
    whole.write_text(json.dumps([{"prompt": "Why?"}, {"prompt": "Who?"}]))
    assert (
        {q.text for q in load(lines).queries}
        == {"Why?", "Who?"}
        == {q.text for q in load(whole).queries}
    )


class Streamed:
    """Stands in for `datasets`: an endless set, and what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | bool | None, ...]] = []

    def load_dataset(
        self, name: str, config: str | None, *, split: str, revision: str | None, streaming: bool
    ) -> Iterator[dict[str, Any]]:
        self.asked.append((name, config, split, revision, streaming))
        return ({"prompt": f"Question {i}?", "score": i} for i in count())


def test_a_datasets_name_may_hold_dots_and_is_read_up_to_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streamed = Streamed()
    monkeypatch.setitem(sys.modules, "datasets", streamed)
    found = load(Path("owner/Set-2.5"), limit=3, split="test")
    assert {q.text for q in found.queries} == {"Question 0?", "Question 1?", "Question 2?"}
    assert streamed.asked == [("owner/Set-2.5", None, "test", None, True)]
    assert not found.dropped


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_name_on_the_hub_has_a_config_a_split_and_a_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def moved(repo: str, **more: Any) -> SimpleNamespace:
        assert (repo, more["revision"]) == ("owner/set", "v1")
        return SimpleNamespace(sha=COMMIT)

    streamed = Streamed()
    monkeypatch.setitem(sys.modules, "datasets", streamed)
    monkeypatch.setattr("huggingface_hub.dataset_info", moved)
    for name, asked in {
        "owner/set:en:test@v1": ("owner/set", "en", "test", COMMIT),
        "owner/set::test@v1": ("owner/set", None, "test", COMMIT),
        f"owner/set@{COMMIT}": ("owner/set", None, "train", COMMIT),
    }.items():
        found = load_queries(Queries(path=name, limit=1))
        assert (streamed.asked.pop(), found.commit) == ((*asked, True), COMMIT)
    with pytest.raises(ConfigError, match="names another split than the setting 'train'"):
        load_queries(Queries(path="owner/set::test", split="train"))
    evaluation = "owner/set[test]@v1"
    given = [Queries(path=p, against=(evaluation,)) for p in ("a/b", "a/b@v2", "a/b:en")]
    digests = [queries_digest(settings) for settings in given]
    assert len({d[0] for d in digests}) == 3
    assert {d[1] for d in digests} == {"hub:owner/set::test@v1"}


def test_everything_dropped_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = rows_in(tmp_path / "q.jsonl", {"prompt": "Hm?"}, {"prompt": "Ha?"})
    with pytest.raises(DataError, match="no query left: 2 too_short"):
        load(path, min_chars=10)


def test_a_cleaned_file_and_its_hold_out_are_what_was_kept(tmp_path: Path) -> None:
    path = rows_in(tmp_path / "q.jsonl", *({"prompt": f"Question {i}?"} for i in range(200)))
    settings = Queries(path=str(path))
    made = write_curated(settings, tmp_path / "out.jsonl", 0.25)
    sides = [
        [v["id"] for _, v in read_jsonl(tmp_path / name)]
        for name in ("out.jsonl", "out.holdout.jsonl")
    ]
    assert made["queries"] == len(sides[0])
    assert made["holdout"] == len(sides[1])
    assert sorted(sides[0] + sides[1]) == [q.id for q in load(path).queries]
    assert 30 <= len(sides[1]) <= 70
    # half of the file: each query stays on its side
    rows_in(path, *({"prompt": f"Question {i}?"} for i in range(0, 200, 2)))
    write_curated(settings, tmp_path / "half.jsonl", 0.25)
    half = {v["id"] for _, v in read_jsonl(tmp_path / "half.holdout.jsonl")}
    assert half == set(sides[1]) & {q.id for q in load(path).queries}


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    path = rows_in(tmp_path / "q.jsonl", {"prompt": "Hm?"})
    with pytest.raises(ConfigError, match="choose another --to"):
        write_curated(Queries(path=str(path)), path, None)
    with pytest.raises(ConfigError, match="share between 0 and 1, found 2"):
        write_curated(Queries(path=str(path)), tmp_path / "o.jsonl", 2)
    with pytest.raises(ConfigError, match=r"o\.csv would hold JSONL"):
        write_curated(Queries(path=str(path)), tmp_path / "o.csv", None)
    with pytest.raises(DataError, match="leaves no query on the side of"):
        write_curated(Queries(path=str(path)), tmp_path / "o.jsonl", 0.5)


def test_what_is_written_is_not_read_the_next_time(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "data").mkdir(parents=True)
    rows_in(source / "data/q.jsonl", {"prompt": "Hm?"})
    for beside in (source / "clean.jsonl", source / "data" / "clean.jsonl"):
        with pytest.raises(ConfigError, match="would read its own output"):
            write_curated(Queries(path=str(source)), beside, None)
    write_curated(Queries(path=str(source)), source / "clean" / "q.jsonl", None)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ConfigError, match="would read its own output"):
        write_curated(Queries(path=str(tmp_path / "link")), source / "clean.jsonl", None)


def test_the_documented_rows_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "queries.md").read_text()
    rows = [json.loads(r) for r in re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.M)]
    for row in rows:
        (found,) = load(rows_in(tmp_path / "q.jsonl", row)).queries
        assert found.text == "Name a fish."
    assert len(rows) == 11
