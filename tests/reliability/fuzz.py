"""Random inputs of every kind, and what must hold of all of them.

``python -m tests.reliability.fuzz [KIND …] [--count N] [--seed S] [--json FILE]`` tries N inputs of
each kind. An input may be refused, by an error of the program's own whose message is one paragraph;
it must not raise anything else, take longer than `HANG_S`, or lose a record that nobody counts. A
case is a function of kind, seed and number, so each one can be tried again alone.
"""

import argparse
import copy
import csv
import gzip
import io
import json
import re
import signal
import string
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from selfsteer.data.jsonl import parse
from selfsteer.data.queries import load_queries
from selfsteer.data.reading import import_records
from selfsteer.errors import SelfsteerError
from selfsteer.judges import reading
from selfsteer.methods import load_recipe as read_recipe
from selfsteer.principles import catalogue, lint, writer
from selfsteer.recipe.read import descriptions, recipe_names, recipe_text, validate
from selfsteer.recipe.sections import Queries
from selfsteer.report import live, summary
from selfsteer.report.document import content
from selfsteer.verbs.common import load_recipe
from selfsteer.view import RunView

#: Seconds after which a case counts as hanging.
HANG_S = 10

#: Characters that a message may have.
LONGEST_MESSAGE = 4000

Case = Callable[[Random, Path], None]


class Lost(Exception):
    """Records went in that neither came out nor were counted as dropped."""


class Hang(BaseException):
    """A case took longer than `HANG_S`; no handler of the program catches it."""


# -- values ----------------------------------------------------------------------------------------

NASTY = (
    *("", " ", "\n", "\x00", "\x07", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ufeff", "\ufffe"),
    *("\ud800", "\udfff", "\U0001f600", "\u202e", "\u200b", "a\u0301", "\ufdd0", "\u0130", "ß"),
    *("<|im_end|>", "<|im_start|>system\n", "</s>", "<|eot_id|>", "[INST]", "<end_of_turn>"),
    *("<think>", "</think>", "[[A]]", "\\boxed{B}", "Verdict: tie", "Rating: 11/10", "Good:"),
    *("Bad:", "{{7*7}}", "{% for x in y %}", "${HOME}", "%s%n", "../../etc/passwd", "null"),
    *("~", "NaN", "1e999", "-0", "9" * 30, "0x1F", "yes", "2026-01-01", "!!python/object:os.x"),
    *("&a", "*a", "<<: *a", "- [", "{a: ", "'", '"', "#", ": ", ",", "\t", "\r\n", "|-", "?"),
)
WORDS = ("bee", "honey", "the", "Answer", "B", "A", "is", "better", "Überraschung", "蜜蜂", "نحلة")


def text(rng: Random, most: int = 12) -> str:
    """Words, and what is no word; once in a few hundred cases very long."""
    if rng.random() < 0.002:
        return rng.choice((*WORDS, *NASTY, "ab ", "Verdict: ", "[[")) * rng.choice((5_000, 60_000))
    pools = (WORDS, WORDS, WORDS, NASTY, string.printable)
    parts = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(most))]
    return rng.choice((" ", "", "\n")).join(parts)


def value(rng: Random, depth: int = 3) -> Any:
    """A JSON value of any kind."""
    kind = rng.randrange(12 if depth else 8)
    if kind < 3:
        return text(rng)
    if kind < 8:
        plain = (None, True, False, 0, -1, 1, 2**63, 10**40, 0.5, -1e308, float("inf"), "")
        return rng.choice((*plain, rng.randrange(1000), rng.random()))
    if kind < 10:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {text(rng, 3): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def changed(rng: Random, whole: Any, times: int | None = None) -> Any:
    """A copy of a JSON value in which places are replaced, removed, renamed or doubled."""
    root = [copy.deepcopy(whole)]
    for _ in range(rng.randrange(4) if times is None else times):
        place: Any = root
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = rng.choice(list(keys))
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
                place = place[key]
                continue
            how = rng.randrange(5)
            if how == 0 and place is not root:
                del place[key]
            elif how == 1 and isinstance(place, dict):
                place[text(rng, 3)] = place.pop(key)
            elif how == 2 and isinstance(place, list) and place is not root:
                place.append(copy.deepcopy(place[key]))
            elif how == 3 and isinstance(place[key], str):
                at = rng.randrange(len(place[key]) + 1)
                place[key] = place[key][:at] + text(rng, 4) + place[key][at:]
            else:
                place[key] = value(rng, 2)
            break
    return root[0]


def scratched(rng: Random, whole: str) -> str:
    """A text with pieces cut out, doubled or put in."""
    for _ in range(rng.randrange(4)):
        a, b = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
        b = min(b, a + 40)
        whole = whole[:a] + rng.choice(("", whole[a:b] * 2, text(rng, 4))) + whole[b:]
    return whole


def encoded(rng: Random, whole: str) -> bytes:
    """Bytes of a text: mostly UTF-8, sometimes damaged, packed or in another encoding."""
    raw = whole.encode("utf-8", "surrogatepass" if rng.random() < 0.1 else "replace")
    how = rng.random()
    if how < 0.02:
        return whole.encode("utf-16", "replace")
    if how < 0.06:
        return gzip.compress(raw, 1)[: rng.choice((None, None, -3, 20))]
    if how < 0.1:
        at = rng.randrange(len(raw) + 1)
        return raw[:at] + rng.randbytes(3) + raw[at:]
    return b"\xef\xbb\xbf" + raw if how < 0.13 else raw


# -- recipes ---------------------------------------------------------------------------------------


#: What a recipe needs.
NEEDED = ("policy.model=a/b", "queries.path=q.jsonl", "name=n")


@cache
def recipes() -> tuple[tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """Shipped recipes as texts and as values, and all keys."""
    whole = type(read_recipe("sso", NEEDED))
    texts = map(recipe_text, recipe_names())
    return tuple((text, yaml.safe_load(text)) for text in texts), tuple(descriptions(whole))


def recipe_case(rng: Random, folder: Path) -> None:
    """A recipe file and overrides, as ``run`` reads them before it writes them down."""
    texts, keys = recipes()
    path = folder / "recipe.yaml"
    given, values = rng.choice(texts)
    if rng.random() < 0.4:
        given = yaml.safe_dump(changed(rng, values), allow_unicode=True)
    path.write_bytes(encoded(rng, scratched(rng, given) if rng.random() < 0.3 else given))
    overrides = [*NEEDED] * (rng.random() < 0.9)
    for _ in range(rng.randrange(3)):
        key = rng.choice(keys) if rng.random() < 0.9 else text(rng, 3)
        plain = rng.choice(("1", "0", "0.5", "true", "null", "oracle", "2", "[]", "{}", "x"))
        said = rng.choice((plain, plain, text(rng, 3), json.dumps(value(rng, 2))))
        overrides.append(f"{key}={said}" if rng.random() < 0.95 else said)
    recipe, asked = load_recipe(str(path), overrides)
    yaml.safe_dump(asked, allow_unicode=True).encode()
    recipe.model_dump_json().encode()
    recipe.plan()


@cache
def built_in() -> dict[str, Any]:
    """The catalogue that comes with the program."""
    return dict(yaml.safe_load(catalogue.catalogue_text(None)))


def catalogue_case(rng: Random, folder: Path) -> None:
    """A catalogue, as ``principles lint`` reads it."""
    whole = {**built_in(), "features": rng.sample(built_in()["features"], rng.randrange(1, 5))}
    whole["appended"] = {}
    given = yaml.safe_dump(changed(rng, whole), allow_unicode=True)
    path = folder / "catalogue.yaml"
    path.write_bytes(encoded(rng, scratched(rng, given) if rng.random() < 0.4 else given))
    for finding in lint.lint(catalogue.catalogue_text(str(path))):
        check_message(str(finding))
    found = catalogue.load_catalogue(str(path))
    names = found.choosable[:2]
    writer.picked(names, found)
    writer.parse_features(text(rng), found)


# -- data ------------------------------------------------------------------------------------------

TURN = {"role": "user", "content": "What does the bee eat?"}
SAID = {"role": "assistant", "content": "Honey."}
PRINCIPLES = {"good": "Be brief.", "bad": "Ramble."}
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "What does the bee eat?", "id": "a"},
    {"messages": [{"role": "system", "content": "Be brief."}, TURN], "id": "b"},
    {"messages": [TURN, SAID]},
    {"prompt": [TURN], "chosen": [SAID], "rejected": [SAID]},
    {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "score_chosen": 1.0, "margin": 2},
    {"chosen": [TURN, SAID], "rejected": [TURN, SAID]},
    {"instruction": "Name it.", "input": "bee", "output": "Apis", "history": [["a", "b"]]},
    {"instruction": "Go.", "chosen": "a", "rejected": "b", "p_system": "g", "n_system": "b"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    {"prompt": "Is it?", "completion": "Yes.", "label": True},
    {"question": "2 + 2?", "answer": "4"},
    {"turns": ["First?", "Second?"], "question_id": 3},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {"input": "x", "output_1": "a", "output_2": "b", "label": 1},
    {"instruction": "Do.", "instances": [{"input": "", "output": "a"}, {"input": "c"}]},
    {"trait": "calm", "questions": ["One?", "Two?"], "additional_questions": ["Three?"]},
    {"custom_id": "r", "body": {"messages": [TURN], "model": "m"}},
    {"id": "t", "messages": [TURN], "principles": PRINCIPLES, "responses": {"good": "a"}},
    {
        "message_tree_id": "o",
        "prompt": {
            "text": "Hi?",
            "role": "prompter",
            "replies": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1, "replies": []}],
        },
    },
)


def rows_of(rng: Random) -> list[Any]:
    """Rows of one shape, or of several, some of them changed."""
    pool = ROWS if rng.random() < 0.3 else [rng.choice(ROWS)]
    rows = [changed(rng, rng.choice(pool)) for _ in range(rng.randrange(1, 7))]
    if rng.random() < 0.005:
        rows.append({"prompt": rng.choice(("wide ", "蜜", "\u202e", "a")) * 250_000})
    return [value(rng) if rng.random() < 0.03 else row for row in rows]


def write_rows(rng: Random, folder: Path) -> tuple[Path, int | None]:
    """A file of rows; and how many of them it has, None where that is not known."""
    rows = rows_of(rng)
    kind = rng.choice((".jsonl",) * 6 + (".json", ".csv", ".txt", ".parquet", ".jsonl.gz"))
    path = folder / f"rows{kind}"
    dump = json.dumps
    if kind == ".csv":
        told, names = io.StringIO(), sorted({k for r in rows if isinstance(r, dict) for k in r})
        table = csv.DictWriter(told, names or ["prompt"], restval="", extrasaction="ignore")
        table.writeheader()
        for row in rows:
            table.writerow(row if isinstance(row, dict) else {})
        path.write_bytes(encoded(rng, told.getvalue()))
        return path, None
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            pq.write_table(pa.Table.from_pylist([r for r in rows if isinstance(r, dict)]), path)
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
            path.write_bytes(b"PAR1" + rng.randbytes(30))
        return path, None
    if kind == ".txt":
        path.write_bytes(encoded(rng, "\n".join(text(rng) for _ in rows)))
        return path, None
    if kind == ".json":
        path.write_bytes(encoded(rng, dump(rows if rng.random() < 0.8 else rows[0])))
        return path, None
    lines = [dump(row, ensure_ascii=rng.random() < 0.7) for row in rows]
    if rng.random() < 0.2:
        lines[rng.randrange(len(lines))] = scratched(rng, lines[0]).replace("\n", " ")
    whole = "\n".join(lines) + "\n"
    if kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(whole.encode("utf-8", "replace"), 1))
    else:
        path.write_bytes(whole.encode("utf-8", "replace"))
    counted = sum(1 for line in whole.split("\n") if line.strip())
    one_each = all(isinstance(r, dict) and r.keys() & {"prompt", "messages"} for r in rows)
    return path, counted if one_each and len(lines) > 1 else None


def queries_case(rng: Random, folder: Path) -> None:
    """A query file, curated; its records are counted."""
    path, count = write_rows(rng, folder)
    settings: dict[str, Any] = {"path": str(path)}
    if rng.random() < 0.3:
        settings["near_duplicates"] = rng.choice((0.5, 0.8))
    if rng.random() < 0.3:
        settings |= {"min_chars": rng.randrange(1, 5), "max_chars": rng.randrange(5, 50)}
    if rng.random() < 0.2:
        settings["limit"] = rng.randrange(1, 4)
    if rng.random() < 0.1:
        settings["columns"] = {rng.choice(("question", "prompt", text(rng, 2))): "prompt"}
    found = load_queries(validate(Queries, settings, "settings"), folder)
    if count is not None and len(found.queries) + found.dropped.total() != count:
        raise Lost(f"{count} rows, {len(found.queries)} kept, {dict(found.dropped)} dropped")
    if len(found.left_out) != found.dropped.total():
        raise Lost(f"{found.dropped.total()} dropped, {len(found.left_out)} written down")
    for query in found.queries:
        json.dumps(query.to_dict(), ensure_ascii=False).encode()


def import_case(rng: Random, folder: Path) -> None:
    """Other programs' rows, imported; then exported in a format of someone else's."""
    path, count = write_rows(rng, folder)
    found = import_records(path, folder, trainable=rng.random() < 0.3)
    halves = 2 if "labelled" in found.shape else 1
    came = len(found.records) * halves + found.dropped.total()
    if found.n_in != came or (count is not None and found.n_in != count):
        raise Lost(f"{count} rows, {found.n_in} in, {came} out or dropped")
    if len({record.id for record in found.records}) < len(found.records):
        raise Lost("two records share an id")
    for record in found.records:
        line = json.dumps(record.to_dict(), ensure_ascii=False)
        line.encode()
        assert type(record).from_dict(parse(line)) == record, line


# -- what models say -------------------------------------------------------------------------------

SAYINGS = (
    *("Verdict: ", "[[A]]", "[[B]]", "[[tie]]", "my choice is ", "Response A is better", "A", "B"),
    *("\\boxed{A}", "Rating: 8", "rating = 7,5 out of 10", "margin: small", "not ", "\n", ". "),
    *("both are equally good", "wait", " or ", "<think>", "</think>", "**", "Good: be brief\n"),
    *("Bad: ramble\n", "1. Helpfulness", "Accuracy, Clarity", "９", "Ａ", "ﬁ", "\u2028"),
)


def said_by(rng: Random) -> str:
    """What a judge or a writer may say."""
    if rng.random() < 0.02:
        return rng.choice((*SAYINGS, *NASTY)) * rng.choice((300, 3000))
    parts = [rng.choice(SAYINGS) if rng.random() < 0.6 else text(rng, 4) for _ in range(8)]
    return "".join(parts[: rng.randrange(9)])


def answers_case(rng: Random, folder: Path) -> None:
    """Answers of judges and of writers of principles: read, or counted as unreadable."""
    said, reason = said_by(rng), rng.choice(("stop", "length", "request_failed:http_500", ""))
    verdict, why = reading.read_verdict({"text": said, "finish_reason": reason})
    assert bool(why) == (verdict.value == "unparseable"), (verdict, why)
    rating, why = reading.extract_rating(said)
    assert bool(why) == (rating is None), (rating, why)
    assert reading.extract_margin(said) in (None, "small", "large")
    features = writer.parse_features(said)
    assert set(features) <= set(catalogue.BUILT_IN.by_name), features
    outcome, good, bad = writer.read_answer(said, reason, rng.randrange(3))
    assert bool(good and bad) == (outcome is writer.Outcome.OK), outcome


# -- chat templates --------------------------------------------------------------------------------

TURNS = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no') }}{% endif %}[INST] {{ m['content'] | trim }} [/INST]{% endfor %}",
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{{ eos_token }}{% endfor %}",
    "{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{{ m.content }}"
    "<|im_end|>{% endfor %}{{ strftime_now('%d %b %Y') }}",
)
PIECES = (
    *("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ x }}"),
    *("{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ cycler.__init__ }}"),
    *("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{{ messages[99].content }}"),
    *("{{ 1 / 0 }}", "{% if %}", "{{ raise_exception('no') }}", "{{ 'a' | nothing }}", "{{ ("),
    *("{% include 'x' %}", "{{ messages.append(1) }}", "{{ self }}", "{% generation %}", "{{ '"),
    *("{{ tools | tojson }}", "{{ messages | tojson }}", "<|im_end|>", "<think>", "\ud800"),
)


@cache
def tokenizer() -> Any:
    """Single bytes, and the control tokens of `TURNS`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(byte)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
    core.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def template_case(rng: Random, folder: Path) -> None:
    """A chat template, and a conversation whose texts must not open or close a turn."""
    from selfsteer.data.records import Message
    from selfsteer.models.chat import ChatFormat

    template = rng.choice(TURNS)
    if rng.random() < 0.5:
        at = rng.randrange(len(template) + 1)
        template = template[:at] + rng.choice((*PIECES, text(rng, 3))) + template[at:]
    if rng.random() < 0.2:
        template = scratched(rng, template)
    names = tokenizer()
    names.chat_template = template
    chat = ChatFormat(names, "the model", day="2026-11-29")
    special = chat.special_ids
    texts = [re.sub(r"[\ud800-\udfff]", "?", text(rng)) or "x" for _ in range(3)]
    roles = ("system", "user") if rng.random() < 0.3 else ("user", "assistant", "user")

    def marks(said: Sequence[str]) -> int:
        turns = tuple(Message(role, t) for role, t in zip(roles, said, strict=False))
        return sum(i in special for i in chat.prompt_ids(turns))

    answer = chat.response_ids(texts[0])
    assert sum(i in special for i in answer) == 1, (texts[0], answer)
    assert answer[-1] == chat.end_of_turn
    assert marks(texts) == marks(["x"] * 3), (template, texts)


# -- run folders -----------------------------------------------------------------------------------


_LENGTHS = {
    **{"pairs": 4, "chosen": 5.0, "rejected": 6.0},
    **{"longer_chosen": 0.5, "longer_rejected": None},
}

#: Notes of a stage, of every kind that is shown.
NOTES = {
    "warnings": ["w"],
    "selection": {"text": "step 1 of 2", "warnings": ["v"]},
    "diversity": {"before": {"distinct": 0.5}, "after": {"distinct": 0.6}},
    "first_try": {"ok": 3},
    "retry": {"ok": 1},
    "sources": {"generated": 4},
    "survivors": {"in": 4, "hygiene": 3, "gap": 3, "lengths": 2},
    **{"entries": 4.5, "covered": 0.99, "reward": 0.1},
    "lengths": {"before": _LENGTHS, "after": {**_LENGTHS, "pairs": 3}},
    "sampled": {"answers": 4, "retokenised": 0.25, "special_tokens": 0.0},
}


@cache
def run_files() -> dict[str, Any]:
    """The JSON of a small run by file: a list stands for lines."""
    interval = [0.6, 0.5, 0.7]
    figures = {
        "of": 4,
        "pairs": 4,
        "accuracy": 0.75,
        "verdicts": {"first": 3, "second": 1},
        "on_policyness": {"both": 0.5, "chosen": 0.6, "rejected": 0.4},
        "logps": {"chosen": -3.0, "rejected": -4.0},
        "steering_gap": {"good": 0.1, "bad": 0.2},
        "tokens": {"chosen": 5.0, "rejected": 6.0},
    }
    recipe = read_recipe("sso", NEEDED)
    ledger: list[dict[str, Any]] = []
    for stage in recipe.plan():
        known = {
            "stage": stage.name,
            "kind": type(stage).__name__,
            "title": stage.title,
            "method": stage.where.method,
            "round": stage.where.round,
            "fingerprint": "f",
            "outputs": list(stage.files),
            "time": 1.0,
        }
        counts = {"n_in": 4, "n_out": 3, "dropped": {"empty": 1}, "seconds": 2.0, "notes": NOTES}
        ledger += [
            {"event": "begin", **known, "versions": {"torch": "2"}},
            {"event": "finish", **known, **counts},
        ]
    answers = {"tokens": 30.5, "unfinished": 1, "score": interval, "win_rate": interval}
    train = next(e["stage"] for e in ledger if e["kind"] == "Train")
    return {
        "resolved.json": recipe.model_dump(mode="json"),
        "ledger.jsonl": ledger,
        "metrics.jsonl": [{"stage": train, "step": n, "loss": 0.5, "lr": 1e-6} for n in (1, 2)],
        "evaluation.json": {
            "queries": 4,
            "judge": "oracle",
            "score_scale": "0 to 1",
            "finals": {"sso": "sso/iteration-1"},
            "models": {"base": answers, "sso/iteration-1": answers},
        },
        "iteration-1/quality.json": {"judge": "oracle", "preferences": figures},
        "iteration-1/triples/shard-00000.jsonl": [
            {"id": "a", "messages": [TURN], "responses": {"good": "g", "bad": "b", "plain": "p"}}
        ],
        "progress.json": {
            "state": "working",
            "host": "elsewhere",
            "pid": 1,
            "process_began": 1.0,
            "began": 1.0,
            "time": 1.0,
            "error": None,
            "todo": ["queries"],
            "stage": "queries",
            "bar": {
                **{"label": "x", "done": 1, "total": 2, "tokens": 3},
                **{"items_per_s": 0.5, "tokens_per_s": 1.5, "seconds_left": 2.0},
            },
        },
        "evaluation/exhibit.json": {
            "query": "q",
            "principles": {"good": "g", "bad": "b", "features": ["f"]},
            "responses": {"policy": {"plain": "p", "good": "g", "bad": "b"}},
        },
        "benchmarks.json": {
            "models": {"base": "m", "sso": "n"},
            "limit": 2,
            "differences": [
                {
                    **{"benchmark": "t", "figure": "", "of": ["sso", "base"]},
                    **{"questions": 2, "difference": [0.1, 0.0, 0.2]},
                }
            ],
            "benchmarks": [
                {
                    **{"name": "t", "kind": "task"},
                    "models": {
                        name: {
                            **{"metric": "acc,none", "score": 0.5, "stderr": 0.1},
                            **{"higher_is_better": True, "questions": 2, "truncated": 1},
                        }
                        for name in ("base", "sso")
                    },
                },
                {
                    **{"name": "a", "kind": "alpaca-eval", "judge": "j", "scale": "1 to 10"},
                    "against": "base",
                    "models": {
                        "sso": {
                            **{"win_rate": interval, "dropped": {"lost": 1}},
                            "characters": [5.0, 6.0],
                            "length_controlled": {"win_rate": interval, "reason": "few"},
                        }
                    },
                },
                {
                    **{"name": "b", "kind": "mt-bench", "judge": "j", "scale": "1 to 10"},
                    "against": "base",
                    "models": {
                        "sso": {
                            **{"score": [5.0, 4.0, 6.0], "dropped": {}},
                            **{"turns": {"1": [5.0, 4.0, 6.0]}, "categories": {}},
                        }
                    },
                },
            ],
            "versions": {},
        },
        "reward.json": {
            "sources": {"s": {"read": 4, "weight": 1.0, "trained": 3, "dropped": {"tie": 1}}},
            "held_out": {
                **{"pairs": 2, "accuracy": interval, "longer_is_chosen": interval},
                "by_source": {"s": {"pairs": 2, "accuracy": interval}},
                "by_length": {"similar": {"pairs": 0}},
                "calibration": {
                    "ece": 0.1,
                    "bins": [
                        {"from": 0.5, "to": 0.6, "pairs": 0},
                        {"from": 0.6, "to": 0.7, "pairs": 2, "stated": 0.6, "right": 0.5},
                    ],
                },
            },
        },
        "iteration-1/policy.selection.json": {
            **{"chosen": 1, "steps": 2, "wins": "judge"},
            "candidates": [{"step": 1, "wins_mean": interval}, {"step": 2}],
        },
        "usage/a.json": {"requests": 1, "retried": 0, "failed": {}},
    }


def run_case(rng: Random, folder: Path) -> None:
    """A run folder whose files hold something else, as ``show`` and the live page read it."""
    files = run_files()
    changes = {rng.choice(list(files)) for _ in range(2)}
    for name, whole in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        held = changed(rng, whole) if name in changes else whole
        dumped = [json.dumps(x) for x in (held if isinstance(held, list) else [held])]
        said = "\n".join(dumped) + "\n"
        if name in changes and rng.random() < 0.3:
            said = scratched(rng, said)
        path.write_bytes(said.encode("utf-8", "replace"))
    run = RunView.open(folder)
    readers: list[Callable[[], Any]] = [
        lambda: summary.print_show(run),
        lambda: json.dumps(run.to_json()),
        lambda: live.now(folder),
        lambda: [run.usage, run.measured, run.models, run.loading, run.state],
        lambda: content(run, [], []),
    ]
    live.compare({"a": folder})
    rng.choice(readers)()


# -- servers ---------------------------------------------------------------------------------------

REPLY = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Hi.", "reasoning_content": "So."},
        }
    ],
    "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
}
REFUSALS = (
    "max_tokens is too large",
    "Use 'max_completion_tokens' instead of 'max_tokens'",
    "maximum context length is 8 tokens",
    "slow down",
    "",
)


def reply_bytes(rng: Random) -> bytes:
    """What a server may send with status 200."""
    return encoded(rng, scratched_rarely(rng, json.dumps(changed(rng, REPLY))))


def scratched_rarely(rng: Random, whole: str) -> str:
    return scratched(rng, whole) if rng.random() < 0.2 else whole


def reply_case(rng: Random, folder: Path) -> None:
    """The body of a reply, read; or a status and its headers."""
    from selfsteer.engines.openai import Fault, read_reply, status_fault

    if rng.random() < 0.2:
        headers = {
            rng.choice(("retry-after", "retry-after-ms")): rng.choice(("1", "nan", text(rng, 3)))
        }
        code = rng.choice((None, "insufficient_quota", text(rng, 2)))
        fault = status_fault(rng.randrange(300, 600), text(rng), code, headers)
        assert fault.pause is None or fault.pause >= 0, fault
        return
    try:
        found = read_reply(reply_bytes(rng))
    except Fault:
        return
    found.text.encode()
    found.reasoning.encode()
    assert found.prompt_tokens >= 0
    assert found.completion_tokens >= 0


def server_case(rng: Random, folder: Path) -> None:
    """Forty requests to a server whose replies are as `reply_case` has them: each is answered."""
    from selfsteer.data.records import Message
    from selfsteer.engines.base import Request, SamplingParams
    from selfsteer.engines.openai import OpenAIEngine
    from selfsteer.engines.usage import Usage
    from selfsteer.recipe.sections import EngineConfig
    from tests.fakes import Handler, serving

    def fault(h: Handler) -> bool:
        how = rng.random()
        if how < 0.4:
            h.send(200, reply_bytes(rng))
        elif how < 0.5:
            said = {"error": changed(rng, {"message": rng.choice(REFUSALS), "code": None})}
            h.send(rng.choice((400, 404, 408, 422, 429, 500, 503)), said)
        elif how < 0.52:
            h.close_connection = True
        else:
            return False
        return True

    with serving() as server:
        server.always = fault
        given: dict[str, Any] = {
            "kind": "openai",
            "base_url": server.url,
            "model": "canned",
            "backoff": 0.0001,
        }
        settings = EngineConfig(**given, retries=rng.randrange(3), timeout=5, concurrency=4)
        engine = OpenAIEngine(settings, "canned", server.url, Usage(folder / "usage.json"))
        try:
            asked = [Request(str(i), (Message("user", f"{i}?"),), i) for i in range(40)]
            got = [c.id for c in engine.generate(asked, SamplingParams(0.0, 1.0, 8))]
        finally:
            engine.close()
        if sorted(got) != sorted(r.id for r in asked):
            raise Lost(f"40 requests, {len(got)} answers")


#: What is tried; ``server`` counts one case for forty requests.
KINDS: dict[str, Case] = {
    "recipes": recipe_case,
    "catalogues": catalogue_case,
    "queries": queries_case,
    "imports": import_case,
    "answers": answers_case,
    "templates": template_case,
    "runs": run_case,
    "replies": reply_case,
    "server": server_case,
}


# -- trying ----------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of the cases of a kind; ``found`` has the first faults in words."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    tracebacks: int = 0
    hangs: int = 0
    losses: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    found: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """All of them."""
        return self.tracebacks + self.hangs + self.losses


def check_message(said: str, code: int = 2) -> None:
    """One paragraph, not endless, and an exit code of those that are documented."""
    assert code in (2, 3), code
    assert "\n" not in said.strip(), said[:400]
    said.encode("utf-8", "backslashreplace")
    assert len(said) <= LONGEST_MESSAGE, said[:400]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """A block that is broken off after so many seconds."""

    def late(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_one(kind: str, seed: int, number: int, tally: Tally) -> None:
    """Tries one case and counts what comes of it."""
    rng, began = Random(f"{kind}/{seed}/{number}"), time.monotonic()
    tally.cases += 1
    try:
        with (
            TemporaryDirectory(prefix="fuzz-", dir="/dev/shm") as folder,
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            within(HANG_S),
        ):
            try:
                KINDS[kind](rng, Path(folder))
                tally.accepted += 1
            except SelfsteerError as e:
                check_message(str(e), e.exit_code)
                tally.refused += 1
    except Hang as e:
        tally.hangs += 1
        last = traceback.extract_tb(e.__traceback__)[-1]
        tally.found.append(f"{kind} {seed} {number}: hangs ({last.filename}:{last.lineno})")
    except Lost as e:
        tally.losses += 1
        tally.found.append(f"{kind} {seed} {number}: {e}")
    except Exception as e:
        tally.tracebacks += 1
        frames = traceback.extract_tb(e.__traceback__)
        where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-4:]]
        tally.found.append(
            f"{kind} {seed} {number}: {type(e).__name__}: {str(e)[:300]} ({' > '.join(where)})"
        )
    took = time.monotonic() - began
    tally.seconds += took
    tally.slowest_s = max(tally.slowest_s, took)


def fuzz(kind: str, seed: int, numbers: range) -> Tally:
    """Tries the cases of a kind with these numbers."""
    tally = Tally()
    for number in numbers:
        try_one(kind, seed, number, tally)
    by_place = {text.rpartition("(")[2]: text for text in reversed(tally.found)}
    tally.found = list(by_place.values())[-20:]
    return tally


def main() -> None:
    """See the module."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("kinds", nargs="*", choices=[[], *KINDS], default=[])
    ask.add_argument("--count", type=int, default=1000)
    ask.add_argument("--first", type=int, default=0)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--json", type=Path)
    given = ask.parse_args()
    found = {}
    for kind in given.kinds or KINDS:
        count = given.count // 40 if kind == "server" else given.count
        tally = found[kind] = fuzz(kind, given.seed, range(given.first, given.first + count))
        print(kind, *(f"{k}={v}" for k, v in asdict(tally).items() if k != "found"))
        print(*tally.found, sep="\n", flush=True)
    if given.json:
        given.json.write_text(json.dumps({k: asdict(t) for k, t in found.items()}, indent=1))
    sys.exit(any(t.faults for t in found.values()))


if __name__ == "__main__":
    main()
