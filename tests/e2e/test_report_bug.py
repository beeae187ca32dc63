"""`selfsteer report-bug`: what is in the file, and what never is."""

import gzip
import json
import os
import shutil
import socket
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from selfsteer.verbs.bugs import _SAID, Packed, packed, redacted
from tests.e2e.support import Here, fails
from tests.make import write_jsonl

KEY = "correct-horse-battery"


@pytest.fixture
def run(smoke: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "done"
    shutil.copytree(smoke, copied)
    return copied


def files(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as packed:
        assert packed.testzip() is None
        return {name: packed.read(name).decode() for name in packed.namelist()}


def texts_of(run: Path) -> list[str]:
    """Prompts and answers of the run, long enough to be no accident."""
    triples = (run / "iteration-1/triples/shard-00000.jsonl").read_text().splitlines()
    return [
        text
        for triple in map(json.loads, triples)
        for text in (triple["messages"][-1]["content"], *triple["responses"].values())
        if len(text) > 12
    ]


def test_a_report_holds_what_is_needed_and_no_texts(run: Path, tmp_path: Path, here: Here) -> None:
    ended = here("report-bug", run, "--out", tmp_path / "bug.zip", "--json")
    assert ended.code == 0, ended
    found, said = files(tmp_path / "bug.zip"), json.loads(ended.out)
    assert said["files"] == {name: len(text.encode()) for name, text in found.items()}
    about = json.loads(found["about.json"])
    assert {"python", "selfsteer", "torch"} <= about["versions"].keys()
    assert about["packages"]["pydantic"]
    assert [json.loads(x)["event"] for x in found["ledger.jsonl"].splitlines()].count("finish") > 5
    assert found["recipe.yaml"]
    logged = [json.loads(x)["stage"] for x in found["metrics.last.jsonl"].splitlines()]
    assert "iteration-1/policy" in logged
    dropped = json.loads(found["dropped.json"])
    for name, reasons in dropped.items():
        lines = (run / name).read_text().splitlines()
        assert sum(reasons.values()) == len(lines)
    assert dropped
    assert "iteration-1/triples/shard-00000.jsonl" in found["files.txt"]
    everything = "".join(found.values())
    assert [t for t in texts_of(run) if t in everything] == []


def test_data_is_packed_if_it_is_asked_for(run: Path, tmp_path: Path, here: Here) -> None:
    ended = here("report-bug", run, "--out", tmp_path / "bug.zip", "--with-data")
    assert ended.code == 0, ended
    found = files(tmp_path / "bug.zip")
    everything = "".join(found.values())
    assert all(json.dumps(t, ensure_ascii=False)[1:-1] in everything for t in texts_of(run))
    stored = (run / "queries.jsonl").read_text().splitlines()
    assert found["data/queries.jsonl"].splitlines() == stored[:20]
    for name in found:
        assert name in ended.out


def test_no_secret_is_in_it_and_each_is_counted(
    run: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)
    token = "hf_" + "a1B2" * 8
    with open(run / "progress.json", "w") as file:
        home = Path.home() / "models"
        said = f"refused {KEY}; {token}; http://me:pass@h/v1?sig=abcdef at {home}"
        json.dump({"error": said, "host": socket.gethostname()}, file)
    ended = here("report-bug", run, "--out", tmp_path / "bug.zip", "--json")
    everything = "".join(files(tmp_path / "bug.zip").values())
    for secret in (KEY, token, "me:pass", "sig=abcdef"):
        assert secret not in everything
    assert json.loads(files(tmp_path / "bug.zip")["progress.json"]) == {
        "error": "refused [secret]; [secret]; http://[secret]@h/v1?[secret] at ~/models",
        "host": "[host]",
    }
    replaced = json.loads(ended.out)["replaced"]
    assert replaced["value of MY_API_KEY"] == 1
    assert replaced["keys and tokens"] == 1
    assert replaced["users and passwords of addresses"] == 1
    assert replaced["queries of addresses"] == 1


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('"api_key": "abcd1234"', '"api_key": "[secret]"'),
        ("serve --api-key abcd1234 --port 1", "serve --api-key [secret] --port 1"),
        ("Authorization: Bearer abcd1234", "Authorization: Bearer [secret]"),
        ("password: hunter22", "password: [secret]"),
        (
            "ENV {'MY_JUDGE_KEY': 'ab, c\"d', 'N': '1'}",
            "ENV {'MY_JUDGE_KEY': '[secret]', 'N': '1'}",
        ),
        ("OPENAI_API_KEY='a, b'", "OPENAI_API_KEY='[secret]'"),
        ("A=1 HF_TOKEN=abcd1234 B=2", "A=1 HF_TOKEN=[secret] B=2"),
        (r'"{\"X_PASSWORD\": \"abcd\"}"', r'"{\"X_PASSWORD\": \"[secret]\"}"'),
        ("'A_SECRET': 'abcd12", "'A_SECRET': '[secret]"),
        ("export PGPASSWORD=abcd1234", "export PGPASSWORD=[secret]"),
        # names of variables, and what only looks like it, stay
        ("api_key_env: OPENAI_API_KEY\nconcurrency: 32\n", None),
        ('"api_key_env": "OPENAI_API_KEY", "model": "x"', None),
        ('"hf_token": null, "a": 1', None),
        ("max_new_tokens: 2048, top_p: 0.8, keys: [1, 2]", None),
        ("Is this a question? a=b", None),
        ("sha256 27a62302f2d5a0a0167930ac6007f8ec3badc2fbbb151ac3ce07ede661ad9da6", None),
    ],
)
def test_what_is_replaced(text: str, clean: str | None) -> None:
    assert redacted(text)[0] == (clean or text)


def test_an_answer_that_a_warning_quotes_is_packed_only_as_data(tmp_path: Path) -> None:
    quoted = 'The "bee" (\\) eats nectar.'
    warning = f'70 % of the answers are the same text ("{quoted}"): raise the temperature.'
    write_jsonl(tmp_path / "ledger.jsonl", {"notes": {"warnings": [warning]}, "n_out": 3})
    clean, whole = packed(tmp_path), packed(tmp_path, with_data=True)
    expected = '70 % of the answers are the same text ("[text]"): raise the temperature.'
    assert json.loads(clean.files["ledger.jsonl"]) == {
        "notes": {"warnings": [expected]},
        "n_out": 3,
    }
    assert clean.removed["answers that warnings quote"] == 1
    assert json.loads(whole.files["ledger.jsonl"])["notes"]["warnings"] == [warning]


def test_a_damaged_run_is_reported_too(run: Path, tmp_path: Path, here: Here) -> None:
    ledger = (run / "ledger.jsonl").read_bytes()
    (run / "ledger.jsonl").write_bytes(ledger[:-40] + b"\xff\x00")
    (run / "resolved.json").write_text('{"method"')
    (run / "metrics.jsonl").unlink()
    outside = tmp_path / "outside.yaml"
    outside.write_text("password: hunter22\n")
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").symlink_to(outside)
    os.mkfifo(run / "pipe.dropped.jsonl")
    odd = os.fsencode(run) + b"/odd\xff"  # no UTF-8
    for name in (odd, odd + b".dropped.jsonl"):
        Path(os.fsdecode(name)).write_text('{"id": "a", "reason": "odd", "record": {}}\n')
    Path(os.fsdecode(odd + b".jsonl")).mkdir()
    ended = here("report-bug", run, "--out", tmp_path / "bug.zip", "--json", "--with-data")
    assert ended.code == 0, ended
    found, left = files(tmp_path / "bug.zip"), json.loads(ended.out)["left_out"]
    assert found["resolved.json"] == '{"method"'
    assert "recipe.yaml" not in found
    assert "hunter22" not in "".join(found.values())
    assert "leads out" in left["recipe.yaml"]
    assert left["metrics.jsonl"] == "it is not there"
    assert left["pipe.dropped.jsonl"] == "it is no file"
    assert r"odd\xff" in found["files.txt"]
    assert json.loads(found["dropped.json"])[r"odd\xff.dropped.jsonl"] == {"odd": 1}
    assert left[r"odd\xff.jsonl"] == "it is no file"


def test_what_an_error_quotes_is_packed_only_as_data(tmp_path: Path, here: Here) -> None:
    rows = ('{"prompt": "It\'s private, isn\'t it"\n', '["' + "private " * 90 + '"]\n')
    for number, row in enumerate(rows):
        (tmp_path / "q.jsonl").write_text(row)
        given = (f"name=told{number}", f"runs_dir={tmp_path}", f"queries.path={tmp_path}/q.jsonl")
        ended = here("run", "smoke", "evaluation=null", "queries.limit=null", *given)
        assert ended.code == 2
        assert "private" in ended.err
        run = tmp_path / f"told{number}"
        bare, whole = (packed(run, with_data=data) for data in (False, True))
        assert "private" not in "".join(bare.files.values())
        assert "[text]" in json.loads(bare.files["progress.json"])["error"]
        assert bare.removed["quotes in the error"]
        assert "private" in whole.files["progress.json"]
    (run / "progress.json").write_text('{"error": "private')
    damaged = packed(run)
    assert damaged.files["progress.json"] == ""
    assert "damaged" in damaged.left_out["progress.json"]


def test_what_an_error_says_without_quotes_is_packed_only_as_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "queries.jsonl", {"id": "Ann Doe", "prompt": "Maria has scarlatina."})
    with gzip.open(tmp_path / "asked.csv.gz", "wt") as packed_up:
        packed_up.write("Joaquin takes warfarin\nWhy?\n")
    (tmp_path / "resolved.json").write_text(
        json.dumps({"queries": {"path": f"{tmp_path}/asked.csv.gz"}, "notes": ["none.jsonl", 3]})
    )
    told = "input rejected by the content filter: maria has SCARLATINA."
    write_jsonl(tmp_path / "ledger.jsonl", {"notes": {"warnings": [told]}, "n_out": 3})
    for said, clean in (
        (f"The server refuses it (400: {told})", "filter: [text]."),
        ("The loss is not finite on the records Ann Doe", "on the records [text]"),
        ("q.csv, line 2: its keys are Joaquin takes warfarin", "its keys are [text]"),
        ("cannot import name gizmo of torchvision", "cannot import name gizmo of torchvision"),
        ("not Émilie, but this", "not [text], but this"),
    ):
        (tmp_path / "progress.json").write_text(json.dumps({"error": said}))
        bare, whole = (packed(tmp_path, with_data=data) for data in (False, True))
        assert clean in json.loads(bare.files["progress.json"])["error"]
        assert json.loads(whole.files["progress.json"])["error"] == said
        warned = json.loads(bare.files["ledger.jsonl"])
        assert warned["n_out"] == 3
        assert warned["notes"]["warnings"] == ["input rejected by the content filter: [text]."]
    for name in ("queries.jsonl", "resolved.json"):
        (tmp_path / name).unlink()
    clean = json.loads(packed(tmp_path).files["ledger.jsonl"])["notes"]["warnings"]
    assert clean == ["input rejected by the content filter: [text]."], "no data to be found"


@pytest.mark.parametrize(
    ("error", "clean"),
    [
        ("found 'mine', not 7", "found '[text]', not 7"),
        ('found {"a": "it\'s mine"}; it\'s odd', "found {'[text]': '[text]'}; it's odd"),
        (r"found 'both \" and \' of mine' here", "found '[text]' here"),
        ("found 'cut, isn't it…. Use 'x'", "found '[text]'"),
        ("the users' file", "the users' file"),
    ],
)
def test_what_an_error_quotes(error: str, clean: str) -> None:
    assert _SAID.sub("'[text]'", error) == clean


def test_a_clock_that_zip_files_do_not_know_stops_no_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "localtime", lambda *_: time.struct_time((1970, *[1] * 8)))
    with zipfile.ZipFile(BytesIO(Packed({"a": "text " * 99}).archive())) as made:
        assert made.read("a") == b"text " * 99
        assert made.infolist()[0].compress_size < 99


def test_what_is_no_run_is_refused_and_no_file_is_overwritten(
    run: Path, tmp_path: Path, here: Here
) -> None:
    fails(here("report-bug", tmp_path), 3, "not a run folder")
    there = tmp_path / "bug.zip"
    there.write_text("mine")
    fails(here("report-bug", run, "--out", there), 2, "is there already")
    assert there.read_text() == "mine"
    fails(here("report-bug", run, "--out", tmp_path / "bug.tar"), 2, ".zip")
