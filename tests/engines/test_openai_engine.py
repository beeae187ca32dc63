"""The engine against a server on loopback: answers, seeds, faults, limits, and what is said."""

import asyncio
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from selfsteer.data.digests import derive_seed
from selfsteer.data.records import Message, Query, Verdict
from selfsteer.engines import openai, usage
from selfsteer.engines.answers import answers
from selfsteer.engines.base import (
    PROMPT_TOO_LONG,
    REQUEST_FAILED,
    Advance,
    Completion,
    Contrast,
    Engine,
    Request,
    SamplingParams,
    no_news,
)
from selfsteer.engines.launch import LaunchedServer
from selfsteer.engines.load import Engines, check_engine, check_served
from selfsteer.engines.openai import Fault, OpenAIEngine, read_reply, retry_after, status_fault
from selfsteer.engines.usage import Usage, as_stored
from selfsteer.errors import ConfigError, EngineError
from selfsteer.judges.base import Pair
from selfsteer.judges.load import load_judge
from selfsteer.methods import recipe_of
from selfsteer.models.chat import ChatFormat
from selfsteer.models.load import LoadedModel
from selfsteer.recipe.read import merge, recipe_text, validate
from selfsteer.recipe.sections import EngineConfig, JudgeConfig, Loading, Price
from selfsteer.run.stage import identity
from tests import fakes
from tests.fakes import (
    FAULTS,
    Handler,
    Server,
    completion,
    drips,
    packed,
    say,
    sends,
    serving,
    status,
)
from tests.make import make_tokenizer

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=64)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.8, max_new_tokens=64)
CONVERSATIONS = [[Message("system", "Be brief."), Message("user", f"Query {i}")] for i in range(12)]
PROBE_REQUESTS = 8


def ask(
    engine: Engine,
    sampling: SamplingParams,
    seed: int = 0,
    conversations: Sequence[Sequence[Message]] = CONVERSATIONS,
    advance: Advance = no_news,
) -> list[Completion]:
    """The answers in the order of the conversations."""
    requests = [
        Request(f"q{i}", tuple(c), derive_seed(seed, i)) for i, c in enumerate(conversations)
    ]
    return list(answers(engine, requests, sampling, advance=advance).values())


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


Make = Callable[..., OpenAIEngine]


@pytest.fixture
def engine(server: Server) -> Iterator[Make]:
    made: list[OpenAIEngine] = []

    def make(usage: Usage | None = None, **settings: Any) -> OpenAIEngine:
        values = {"kind": "openai", "base_url": server.url, "model": "canned", **settings}
        config = EngineConfig(**{"backoff": 0.001, "timeout": 90, "concurrency": 4, **values})
        made.append(OpenAIEngine(config, "canned", server.url, usage or Usage()))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_answers_come_in_the_order_of_the_conversations(server: Server, engine: Make) -> None:
    told: list[tuple[int, int]] = []
    server.seconds = 0.03
    one = engine(extra_body={"top_k": 5})
    found = ask(one, SAMPLED, 3, advance=lambda items, tokens: told.append((items, tokens)))
    sent = {b["messages"][-1]["content"]: b for b in server.asked[PROBE_REQUESTS:]}
    assert len(sent) == len(server.asked) - PROBE_REQUESTS == 12
    for i, answer in enumerate(found):
        body = sent[f"Query {i}"]
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        asked = (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"])
        assert asked == (64, 0.7, 0.8, 5)
        text = say(body)
        assert answer == Completion(f"q{i}", text, "stop", 10, len(text.split()))
    assert len({b["seed"] for b in sent.values()}) == 12, "a seed for each request"
    assert all(0 <= b["seed"] < 2**31 for b in sent.values())
    assert sum(items for items, _ in told) == 12
    assert sum(tokens for _, tokens in told) == sum(c.completion_tokens for c in found)
    assert server.most_under_way == 4


def test_a_contrast_of_two_contexts_is_refused(server: Server, engine: Make) -> None:
    here = (Message("user", "Hi"),)
    with pytest.raises(EngineError, match="cannot contrast two contexts"):
        list(engine().generate([Request("q", here, 0, Contrast(here, 1.0))], SAMPLED))
    assert not server.asked


def test_the_seed_decides_and_concurrency_does_not(server: Server, engine: Make) -> None:
    first = ask(engine(concurrency=1), SAMPLED, 1)
    assert ask(engine(concurrency=8), SAMPLED, 1) == first
    other = ask(engine(), SAMPLED, 2)
    assert all(a.text != b.text for a, b in zip(first, other, strict=True))


def test_finish_reasons_are_ours(server: Server, engine: Make) -> None:
    one = engine()
    for reason, value, text in (
        ("length", completion("Bees d", reason="length"), "Bees d"),
        ("stop", completion(" Bees.\n"), "Bees."),
        ("request_failed:content_filter", completion("B", reason="content_filter"), ""),
        ("request_failed:tool_calls", completion(None, reason="tool_calls"), ""),
    ):
        server.always = sends(value)
        (found,) = ask(one, GREEDY, 0, CONVERSATIONS[:1])
        assert (found.text, found.finish_reason) == (text, reason)
    assert as_stored(one.usage.counts)["failed"] == {
        "request_failed:content_filter": 1,
        "request_failed:tool_calls": 1,
    }


def with_thoughts(reason: str = "stop", **message: str | None) -> dict[str, Any]:
    """A reply whose message has these fields."""
    found = completion("", reason=reason)
    found["choices"][0]["message"] = {"role": "assistant", **message}
    return found


@pytest.mark.parametrize(
    ("value", "reasoning", "text", "missing"),
    [
        (completion("<think>\nSo.\n</think>\n\nTwo."), "<think>\nSo.\n</think>\n\n", "Two.", None),
        (completion("So.</think> Two."), "So.</think> ", "Two.", None),
        (completion("<think>\nSo"), "<think>\nSo", "", "no_answer"),
        (completion("<think>\nSo", reason="length"), "<think>\nSo", "", "unfinished_reasoning"),
        *(
            (
                with_thoughts(**{field: "So."}, content=" Two."),
                "<think>\nSo.\n</think>\n\n",
                "Two.",
                None,
            )
            for field in ("reasoning_content", "reasoning")
        ),
        (
            with_thoughts("length", reasoning_content="So", content=None),
            "<think>\nSo\n</think>\n\n",
            "",
            "unfinished_reasoning",
        ),
        (
            with_thoughts(reasoning="So.", content=None),
            "<think>\nSo.\n</think>\n\n",
            "",
            "no_answer",
        ),
        (with_thoughts(reasoning=None, content="Two."), "", "Two.", None),
    ],
)
def test_a_servers_thoughts_are_no_part_of_the_answer(
    value: Any, reasoning: str, text: str, missing: str | None, server: Server, engine: Make
) -> None:
    server.always = sends(value)
    (found,) = ask(engine(), GREEDY, 0, CONVERSATIONS[:1])
    assert (found.reasoning, found.text, found.missing) == (reasoning, text, missing)


def test_null_is_asked_for_again_and_is_no_empty_answer(server: Server, engine: Make) -> None:
    # the second request twice over
    server.faults = dict.fromkeys((1, 2), sends(completion(None)))
    one = engine(retries=1, concurrency=1)
    first, lost, last = ask(one, GREEDY, 0, CONVERSATIONS[:3])
    assert lost.missing == "request_failed:no_answer"
    assert first.text
    assert last.text
    assert as_stored(one.usage.counts)["failed"] == {"request_failed:no_answer": 1}


def test_what_cannot_be_used_counts_as_what_is_paid_for(
    server: Server, engine: Make, tmp_path: Path
) -> None:
    """Every answer is null, two, or without a message, and every one has its price."""
    two, bare = completion("A.", "B."), completion("A.")
    bare["choices"][0].pop("message")
    price = {"input": 1000.0, "output": 0.0}
    for number, value in enumerate((completion(None), two, bare)):
        server.always = sends(value)
        before, usage = len(server.asked), Usage(tmp_path / f"{number}.json", Price(**price))
        one = engine(usage, price=price, max_cost=0.5, retries=99, backoff=0)
        with pytest.raises(EngineError, match="could pass max_cost"):
            ask(one, GREEDY, 0, CONVERSATIONS[:1])
        asked = len(server.asked) - before
        assert 0 < asked <= 50
        assert usage.counts["prompt_tokens"] == 10 * asked
        assert Usage(tmp_path / f"{number}.json").cost == pytest.approx(0.01 * asked)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_leaves_no_trace_in_the_answers(
    name: str, server: Server, engine: Make
) -> None:
    undisturbed = ask(engine(), GREEDY, 5)
    start = len(server.asked)
    # the third request twice over, and a later one
    server.faults = dict.fromkeys((start + 2, start + 4, start + 9), FAULTS[name])
    hangs = name == "timeout"
    one = engine(timeout=2 if hangs else 90)
    assert ask(one, GREEDY, 5) == undisturbed
    # a busy machine may be late with other answers too
    assert one.usage.counts["retried"] == 3 or (hangs and one.usage.counts["retried"] > 3)
    assert one.usage.counts["requests"] == 12 + one.usage.counts["retried"]
    assert not as_stored(one.usage.counts)["failed"]


@pytest.mark.parametrize("name", ["http_500", "connection", "0_choices", "invalid_utf8"])
def test_a_request_that_fails_for_good_says_why(name: str, server: Server, engine: Make) -> None:
    server.always = lambda h: "Query 7" in str(h.body["messages"]) and FAULTS[name](h)
    one = engine(retries=2, concurrency=1)
    found = ask(one, GREEDY, 0)
    assert [i for i, c in enumerate(found) if c.missing] == [7]
    assert found[7] == Completion("q7", "", f"{REQUEST_FAILED}:{name}", 0, 0)
    assert (one.usage.counts["requests"], one.usage.counts["retried"]) == (11 + 3, 2)
    assert as_stored(one.usage.counts)["failed"] == {f"request_failed:{name}": 1}


def test_a_reply_without_an_end_is_given_up(
    server: Server,
    engine: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("selfsteer.engines.openai.LONGEST_REPLY", 1000)
    server.faults = {2: sends(b'{"choices": ' + b" " * 5000)}
    found = ask(engine(retries=0, concurrency=1), GREEDY, 0)
    assert Counter(c.finish_reason for c in found) == {"stop": 11, "request_failed:long_reply": 1}
    assert "it is longer than 1,000 bytes" in capsys.readouterr().err


def test_a_dead_server_stops_the_stage(server: Server, engine: Make) -> None:
    server.always = status(500, "out of luck")
    one = engine(retries=1, concurrency=2)
    with pytest.raises(EngineError, match=r"no usable answer to several requests.*out of luck"):
        ask(one, GREEDY, 0)
    assert len(server.asked) <= 2 * 7


def test_nobody_there(engine: Make, server: Server) -> None:
    with serving() as gone:
        url = gone.url
    settings = EngineConfig(kind="openai", base_url=url, model="m", retries=1, backoff=0)
    one = OpenAIEngine(settings, "m", url, Usage())
    with pytest.raises(EngineError, match=r"several requests.*connection"):
        ask(one, GREEDY, 0)
    with pytest.raises(EngineError, match="Nothing answers"):
        one.check()
    one.close()


def test_a_server_that_says_when_is_asked_then(server: Server, engine: Make) -> None:
    server.faults = {0: status(429, retry_after="0.5")}
    found = ask(engine(concurrency=1), GREEDY, 0, CONVERSATIONS[:2])
    assert [c.finish_reason for c in found] == ["stop", "stop"]
    assert server.times[1] - server.times[0] >= 0.5
    # behind the pause everybody comes back at once, so that the own backoff holds as well
    server.faults = {len(server.times): status(429, retry_after="0")}
    before = len(server.times)
    ask(engine(concurrency=1, backoff=1), GREEDY, 0, CONVERSATIONS[:1])
    assert server.times[before + 1] - server.times[before] >= 0.5
    server.always = status(429, retry_after="86400")
    with pytest.raises(EngineError, match="asks to wait 86,400 s"):
        ask(engine(), GREEDY, 0, CONVERSATIONS[:1])


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    ahead = retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert ahead == pytest.approx(100, abs=3)
    assert retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_what_an_http_error_means() -> None:
    def kind(code: int, said: str = "", name: str | None = None) -> tuple[str, bool, bool]:
        fault = status_fault(code, said, name, {})
        return fault.reason, fault.again, fault.stop

    assert kind(502) == ("http_502", True, False)
    assert kind(429, "slow down") == ("http_429", True, False)
    assert kind(429, "pay", "insufficient_quota") == ("http_429", False, True)
    assert kind(401) == ("http_401", False, True)
    assert kind(404, "no such model") == ("http_404", False, True)
    assert kind(422) == ("http_422", False, False)
    refused = ("budget_refused", False, True)
    assert kind(400, "max_tokens is too large: 9. This model supports at most 8") == refused
    assert kind(422, "[{'loc': ['body', 'max_tokens'], 'msg': 'must be <= 8'}]") == refused
    for said in (  # the request that a server echoes says nothing of its budget
        "[{'msg': 'bad content part', 'input': {'model': 'm', 'max_tokens': 64}}]",
        "cannot read: write a max_tokens parser",
    ):
        assert kind(400, said) == ("http_400", False, False)
    for said in (
        "maximum context length is 64 tokens",
        "'max_tokens' or 'max_completion_tokens' is too large: 9. The maximum context length is 8",
        "`inputs` tokens + `max_new_tokens` must be <= 64",
        "Prompt is too long",
    ):
        assert kind(400, said) == (PROMPT_TOO_LONG, False, False)


def test_a_prompt_that_the_server_calls_too_long(server: Server, engine: Make) -> None:
    server.always = status(400, "This model's maximum context length is 64 tokens.")
    one = engine()
    found = ask(one, GREEDY, 0)
    assert found == [Completion(f"q{i}", "", PROMPT_TOO_LONG, 0, 0) for i in range(12)]
    assert not as_stored(one.usage.counts)["failed"]


def test_a_prompt_without_room_is_not_sent(
    server: Server, load: Callable[..., LoadedModel]
) -> None:
    chat = load("gemma").chat
    longest = [Message("system", "Be brief."), Message("user", "What does the bear eat? " * 9)]
    limit = len(chat.prompt_ids(CONVERSATIONS[0])) + GREEDY.max_new_tokens
    settings = EngineConfig(kind="openai", base_url=server.url, model="canned")
    one = OpenAIEngine(settings, "canned", server.url, Usage(), chat=chat, context_length=limit)
    found = ask(one, GREEDY, 0, [longest, CONVERSATIONS[0]])
    one.close()
    assert [c.finish_reason for c in found] == [PROMPT_TOO_LONG, "stop"]
    # gemma's template refuses a system message, so none is sent
    assert [b["messages"] for b in server.asked] == [
        [{"role": "user", "content": "Be brief.\n\nQuery 0"}]
    ]


def test_a_conversation_that_the_template_refuses_is_not_sent(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, refused = make_tokenizer("gemma"), [Message("user", "No.")]
    refusal = (
        "{%- if messages[0].content == 'No.' -%}{{ raise_exception('not this') }}{%- endif -%}"
    )
    tokenizer.chat_template = refusal + str(tokenizer.chat_template)
    chat = ChatFormat(tokenizer, "picky")
    settings = EngineConfig(kind="openai", base_url=server.url, model="canned")
    one = OpenAIEngine(settings, "canned", server.url, Usage(), chat=chat)
    found = ask(one, GREEDY, 0, [refused, CONVERSATIONS[0]])
    one.close()
    assert [c.finish_reason for c in found] == ["request_failed:template", "stop"]
    assert len(server.asked) == 1
    assert as_stored(one.usage.counts)["failed"] == {"request_failed:template": 1}
    assert "picky refuses a conversation with the roles user: not this" in capsys.readouterr().err


def test_a_server_that_ignores_the_temperature_is_an_error(server: Server, engine: Make) -> None:
    server.answer = lambda body: say({**body, "temperature": 0})
    with pytest.raises(EngineError, match="ignores temperature"):
        ask(engine(), SAMPLED, 0)
    assert len(server.asked) == PROBE_REQUESTS
    assert len(ask(engine(), GREEDY, 0)) == 12, "greedy is what was asked for"


def test_a_server_that_keeps_its_thoughts_to_itself_is_asked_again_with_the_whole_budget(
    server: Server, engine: Make
) -> None:
    def thinks(body: dict[str, Any]) -> str:
        return say(body) if body["max_tokens"] > 32 else ""

    server.answer = thinks
    assert len(ask(engine(), SAMPLED, 0)) == 12
    assert len(server.asked) == 2 * PROBE_REQUESTS + 12
    server.answer = lambda body: ""
    with pytest.raises(EngineError, match=r"without a word within 64 tokens: it may think"):
        ask(engine(), SAMPLED, 0)


# -- what a server calls the budget ----------------------------------------------------------------

OTHER_NAME = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."


def test_a_server_that_wants_the_budget_under_its_new_name_gets_it(
    server: Server, engine: Make
) -> None:
    refused = status(400, OTHER_NAME)
    server.always = lambda h: "max_tokens" in h.body and refused(h)
    one = engine(concurrency=1, retries=0)
    assert {c.finish_reason for c in ask(one, GREEDY, 0)} == {"stop"}
    new, old = (
        [name in b for b in server.asked] for name in ("max_completion_tokens", "max_tokens")
    )
    assert old == [True] + [False] * 12, "it is remembered"
    assert new == [False] + [True] * 12
    assert {b.get("max_completion_tokens", 64) for b in server.asked} == {64}
    one.check()


def test_a_server_that_refuses_every_name_of_the_budget_stops(server: Server, engine: Make) -> None:
    server.always = status(400, OTHER_NAME)
    with pytest.raises(EngineError, match="refuses one request after the other"):
        ask(engine(), GREEDY, 0)


def test_a_budget_that_a_server_refuses_is_named(server: Server, engine: Make) -> None:
    server.always = status(400, "max_tokens is too large: 64. This model supports at most 32.")
    with pytest.raises(EngineError, match=r"answers of up to 64 tokens .*Lower max_new_tokens"):
        ask(engine(concurrency=1), GREEDY, 0)
    assert len(server.asked) == 1


def test_requests_that_are_refused_are_no_dead_server(server: Server, engine: Make) -> None:
    server.always = status(400, "temperature must be 1")
    with pytest.raises(EngineError, match=r"refuses one request after .* temperature must be 1"):
        ask(engine(), GREEDY, 0)


def test_limits_stop_before_they_are_passed(server: Server, engine: Make, tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    one = engine(Usage(path), max_requests=9)
    assert len(ask(one, GREEDY, 0, CONVERSATIONS[:5])) == 5
    again = engine(Usage(path), max_requests=9)  # another process of the same run
    with pytest.raises(EngineError, match=r"max_requests 9.*9 requests.*raise the limit"):
        ask(again, GREEDY, 0, CONVERSATIONS[:5])
    assert 5 <= len(server.asked) <= 9  # those under way are given up, sent or not
    server.asked.clear()
    # at most 10 + 6 … 17 words each; 64 are held back for the answer and 146 bytes for the prompt
    bounded = engine(max_tokens_total=600)
    with pytest.raises(EngineError, match="max_tokens_total 600"):
        ask(bounded, GREEDY, 0, CONVERSATIONS * 20)
    used = bounded.usage.counts["prompt_tokens"] + bounded.usage.counts["completion_tokens"]
    assert 350 < used <= 600
    assert bounded.usage.under_way == 0


def test_a_run_costs_no_more_than_it_may(server: Server, engine: Make, tmp_path: Path) -> None:
    price = {"input": 1000.0, "output": 4000.0}  # per million tokens
    path = tmp_path / "usage.json"
    usage = Usage(path, Price(**price))
    with pytest.raises(EngineError, match=r"could pass max_cost 2 \(\d.*raise the limit"):
        ask(engine(usage, price=price, max_cost=2.0), GREEDY, 0, CONVERSATIONS * 20)
    read, written = usage.counts["prompt_tokens"], usage.counts["completion_tokens"]
    cost = (1000 * read + 4000 * written) / 1e6
    assert 0.8 < cost <= 2
    assert json.loads(path.read_bytes())["cost"] == pytest.approx(cost)
    assert Usage(path).cost == pytest.approx(cost)
    assert Usage(path).counts == usage.counts


def test_counts_of_a_run_go_on(engine: Make, tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    ask(engine(Usage(path)), GREEDY, 0, CONVERSATIONS[:3])
    second = Usage(path)
    ask(engine(second), GREEDY, 0, CONVERSATIONS[:2])
    assert (second.counts["requests"], second.counts["prompt_tokens"]) == (5, 50)
    assert (second.here["requests"], second.here["prompt_tokens"]) == (2, 20)
    assert Usage(path).counts == second.counts


def test_counts_are_written_while_no_answer_comes(
    server: Server, engine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that came together just before: a kill in the pause after them loses no tokens."""
    monkeypatch.setattr(usage, "SAVE_EVERY_S", 1e9)  # no answer writes them
    monkeypatch.setattr(openai, "SAVE_EVERY_S", 0.05)
    path, go_on = tmp_path / "usage.json", threading.Event()

    def answer(body: dict[str, Any]) -> str:
        if body["messages"][-1]["content"] == "Query 3":
            assert go_on.wait(60)
        return say(body)

    server.answer = answer
    requests = [Request(f"q{i}", tuple(c), i) for i, c in enumerate(CONVERSATIONS[:4])]
    found = engine(Usage(path)).generate(requests, GREEDY)
    try:
        said = sum(next(found).completion_tokens for _ in range(3))
        until = time.monotonic() + 60
        while not path.exists() or Usage(path).counts["completion_tokens"] < said:
            assert time.monotonic() < until, "not written"
            time.sleep(0.01)
    finally:
        go_on.set()
    assert Usage(path).counts["prompt_tokens"] == 30
    assert [c.id for c in found] == ["q3"]


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: Server, engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    ask(engine(api_key_env="MY_KEY"), GREEDY, 0, CONVERSATIONS[:1])
    assert server.keys == {"Bearer sk-secret"}
    server.always = status(401, "Incorrect API key provided: sk-secret")
    with pytest.raises(EngineError, match=r"provided: \[key\].*MY_KEY is set") as caught:
        ask(engine(api_key_env="MY_KEY"), GREEDY, 0, CONVERSATIONS[:1])
    assert "sk-secret" not in str(caught.value)


ACCOUNT = {
    "OPENAI_API_KEY": "sk-account-secret",
    "OPENAI_ADMIN_KEY": "admin-secret",
    "OPENAI_ORG_ID": "org-secret",
    "OPENAI_PROJECT_ID": "project-secret",
    "OPENAI_CUSTOM_HEADERS": "X-Gateway: gateway-secret\nX-Other: Basic basic-secret",
}


@pytest.mark.parametrize("name", ["MY_KEY", "OPENAI_API_KEY", None])
def test_what_belongs_to_an_account_goes_where_its_key_goes(
    server: Server, engine: Make, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    for variable, value in {"MY_KEY": "my-secret", **ACCOUNT}.items():
        monkeypatch.setenv(variable, value)
    got: list[str] = []

    def quotes(h: Handler) -> bool:
        got.extend(re.findall(r"[\w-]+-secret", str(h.headers)))
        return status(401, f"no access with {' and '.join(got)}")(h)

    server.always = quotes
    launched: Any = SimpleNamespace(check=lambda: None, failed=False)
    settings = EngineConfig(kind="openai", launch="serve {model} {port}")
    one = (
        engine(api_key_env=name)
        if name
        else OpenAIEngine(settings, "m", server.url, Usage(), server=launched)
    )
    with pytest.raises(EngineError, match="no access") as caught:
        ask(one, GREEDY, 0, CONVERSATIONS[:1])
    one.close()
    account = [value.rpartition(" ")[2] for line in ACCOUNT.values() for value in line.split("\n")]
    mine = {"MY_KEY": ["my-secret"], "OPENAI_API_KEY": account, None: []}[name]
    assert set(got) == set(mine) - {"admin-secret"}
    assert not re.search("(account|gateway|basic|my)-secret", str(caught.value))
    assert os.environ["OPENAI_ORG_ID"] == "org-secret"


@pytest.mark.parametrize("key", ["sk-sécret", "\ufeffsk-secret", "sk-se\u200bcret", "sk\nsecret"])
def test_a_key_that_no_header_can_have_is_refused_by_its_name(
    key: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    settings = EngineConfig(kind="openai", base_url=server.url, model="m", api_key_env="MY_KEY")
    with pytest.raises(ConfigError, match="The key in MY_KEY holds a character") as caught:
        check_engine(settings)
    assert "cret" not in str(caught.value)
    with Engines(None) as engines, pytest.raises(ConfigError, match="The key in MY_KEY"):
        engines.get(settings, "m", Loading(), 1)
    assert not server.asked


KEY = "sk-3f9c0d/Ae71b62+84d5c9a0f21=="


@pytest.mark.parametrize("form", [KEY, quote(KEY, safe="")])
@pytest.mark.parametrize("where", ["reason", "body", "slash", "json", "status", "text", "names"])
def test_no_part_of_the_key_comes_back_from_a_server(
    where: str,
    form: str,
    server: Server,
    engine: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Also where the key stands across the end of what is shown."""
    monkeypatch.setenv("MY_KEY", KEY)
    one = engine(Usage(tmp_path / "usage.json"), api_key_env="MY_KEY", retries=0, concurrency=1)
    said = []
    for before in (0, 20, 45, 60, 75, 255, 270, 290):
        long = "x" * before + form + "y" * 300
        server.always = {
            "reason": sends(completion("Hi.", reason=long)),
            "body": sends(long.encode()),
            "slash": sends(long.replace("/", r"\/").encode()),
            "json": sends({"a": long}),
            "status": status(400, long),
            "text": sends(completion(long)),
            "names": status(404, long),
        }[where]
        try:
            if where == "names":
                server.model = long
                one.check()
            said.append(str(ask(one, GREEDY, 0, CONVERSATIONS[:1])))
        except (ConfigError, EngineError) as e:
            said.append(str(e))
        one._failed_in_a_row = 0
    one.close()
    said += [*capsys.readouterr(), (tmp_path / "usage.json").read_text()]
    shown = " ".join(said).replace("[key]", "")
    assert "x" * 20 in shown or where == "reason", "something is shown"
    assert not [part for part in (KEY[:6], KEY[3:9], KEY[-8:]) if part in shown]


def test_a_reason_that_no_server_gives_is_counted_but_not_repeated(
    server: Server, engine: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    server.always = sends(completion("B", reason="out of\nhoney"))
    one = engine()
    found = ask(one, GREEDY, 0, CONVERSATIONS[:3])
    assert {c.finish_reason for c in found} == {"request_failed:finish_reason"}
    assert as_stored(one.usage.counts)["failed"] == {"request_failed:finish_reason": 3}
    assert capsys.readouterr().err.count(r"'out of\nhoney'") == 1


def test_a_packed_reply_is_not_unpacked(
    server: Server, engine: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = {2: packed}
    found = ask(engine(retries=0, concurrency=1), GREEDY, 0)
    counts = Counter(c.finish_reason for c in found)
    assert counts == {"stop": 11, "request_failed:packed_reply": 1}
    assert "its Content-Encoding is not identity" in capsys.readouterr().err
    server.listing = packed
    with pytest.raises(EngineError, match=r"asked for its models: its Content-Encoding"):
        engine().check()


@pytest.mark.parametrize("slow", ["listing", "always"])
def test_a_server_that_drips_is_too_slow(
    slow: str, server: Server, engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsteer.engines.openai.LOOK_S", 0.5)
    setattr(server, slow, drips)
    server.model = "another"
    with pytest.raises(EngineError, match=r"is too slow: .* within 0\.5 s"):
        engine().check()


def test_names_that_are_no_texts_are_no_models(server: Server, engine: Make) -> None:
    names = [5, None, ["canned"], "llama"]
    server.listing = sends({"object": "list", "data": [{"id": name} for name in names]})
    server.always = status(404, "no model canned")
    with pytest.raises(ConfigError, match=r"does not serve 'canned' but llama \("):
        engine().check()


def test_another_model_is_served(server: Server, engine: Make) -> None:
    server.model = "llama"
    engine().check()
    assert server.asked.pop()["max_tokens"] == 1, "it answers to other names too"
    server.always = status(404, "no model canned")
    with pytest.raises(ConfigError, match="does not serve 'canned' but llama"):
        engine().check()
    server.model = "canned"
    engine().check()


# -- adapters --------------------------------------------------------------------------------------


def taking(loaded: dict[str, str]) -> fakes.Fault:
    """Keeps names and paths of adapters as vLLM does, and answers under names that it has."""

    def fault(h: Handler) -> bool:
        name, path = h.body.get("lora_name", ""), str(h.body.get("lora_path"))
        if h.path.endswith("/unload_lora_adapter"):
            return sends({})(h) if loaded.pop(name, None) else status(404, "no adapter")(h)
        if not h.path.endswith("/load_lora_adapter"):
            return h.body["model"] not in {"canned", *loaded} and status(404, "no such model")(h)
        if name in loaded or not Path(path).exists():
            return status(400 if name in loaded else 404, f"Loading lora {name} failed")(h)
        loaded[name] = path
        return sends(b"Success: LoRA adapter added.")(h)  # as vLLM says it, and no JSON

    return fault


def adapters(folder: Path, text: str) -> str:
    """A trained model whose adapters are this text."""
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "adapter" / "weights").write_text(text)
    return str(folder)


def test_what_a_run_trained_answers_as_adapters_named_by_their_content(
    server: Server, tmp_path: Path
) -> None:
    loaded: dict[str, str] = {}
    server.always = taking(loaded)
    own: dict[str, Any] = {
        "kind": "openai",
        "base_url": server.url,
        "model": "canned",
        "adapters": True,
    }
    settings, home = EngineConfig(**own), tmp_path / "run"
    check_engine(settings)

    def asked(*sources: str) -> list[str]:
        with Engines(home) as engines:
            for source in sources:
                one = engines.get(settings, source, Loading(), 1)
                ask(one, GREEDY, 0, CONVERSATIONS[:1])
            names = [body["model"] for body in server.asked if "model" in body]
            assert loaded == {
                name: f"{source}/adapter"
                for name, source in zip(names, sources, strict=True)
                if name != "canned"
            }
        server.asked.clear()
        assert not loaded, "they are gone with the stage"
        return names

    server.asked.clear()
    earlier = adapters(tmp_path / "earlier", "of an earlier run")
    good, bad = adapters(home / "good", "A"), adapters(home / "bad", "B")
    names = asked(earlier, good, bad)
    assert names[0] == "canned"
    assert len(set(names)) == 3
    assert asked(good) == [names[1]]
    # another training at the same place: vLLM would answer from what it kept under the old name
    assert asked(adapters(home / "good", "C")) != [names[1]]
    loaded[names[2]] = "of a run that was killed"
    assert asked(bad) == [names[2]]


@pytest.mark.parametrize("said", ["Not Found", "LoRA is not enabled. Use --enable-lora"])
def test_a_server_that_loads_no_adapters_is_told_at_once(said: str, server: Server) -> None:
    def none(h: Handler) -> bool:
        return h.path.endswith("lora_adapter") and status(404, said)(h)

    server.always = none
    own: dict[str, Any] = {"kind": "openai", "base_url": server.url, "model": "canned"}
    check_engine(EngineConfig(**own))
    with pytest.raises(EngineError, match=rf"{said}.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        check_engine(EngineConfig(**own, adapters=True))


def test_one_server_does_not_answer_for_several_models(tmp_path: Path) -> None:
    base, trained = "base", str(tmp_path / "run" / "policy")
    check_served(EngineConfig(**HERE), [base, base], tmp_path)
    check_served(EngineConfig(**LAUNCH), [base, trained], tmp_path)
    check_served(EngineConfig(**HERE, adapters=True), [base, trained], tmp_path / "run")
    for settings, home in (
        (EngineConfig(**HERE), tmp_path / "run"),
        (EngineConfig(**HERE, adapters=True), tmp_path / "elsewhere"),
    ):
        with pytest.raises(ConfigError, match=f"2 models are wanted: {trained}, base"):
            check_served(settings, [base, trained], home)


# -- a server of its own ---------------------------------------------------------------------------

SERVE = f"{sys.executable} {fakes.__file__} {{model}} {{port}}"


def test_two_models_of_one_server_are_counted_together(server: Server, tmp_path: Path) -> None:
    server.faults = {0: status(400)}
    with Engines(tmp_path) as engines:
        for model in ("canned", "other"):
            own: dict[str, Any] = {"base_url": server.url, "model": model, "concurrency": 1}
            one = engines.get(EngineConfig(kind="openai", **own), model, Loading(), 1)
            ask(one, GREEDY, 0, CONVERSATIONS[:2])
        (counts,) = engines.asked.values()
    assert counts["requests"] == len(server.asked) == 4
    assert sum(counts["failed"].values()) == 1


def launched(tmp_path: Path, launch: str) -> LaunchedServer:
    return LaunchedServer(launch, "m", tmp_path / "logs" / "s.log")


def test_a_launched_server_lives_as_long_as_its_block(tmp_path: Path) -> None:
    settings = EngineConfig(kind="openai", launch=SERVE)
    with Engines(tmp_path) as engines:
        one = engines.get(settings, "bees", Loading(), 1)
        assert one is engines.get(settings, "bees", Loading(), 1)
        assert isinstance(one, OpenAIEngine)
        one.check()
        (found,) = ask(one, GREEDY, 0, CONVERSATIONS[:1])
        assert found.finish_reason == "stop"
        assert engines.asked[sys.executable]["requests"] == 1
    again = OpenAIEngine(settings, "bees", one.base_url, Usage())
    with pytest.raises(EngineError, match="Nothing answers"):
        again.check()
    again.close()
    assert not (tmp_path / "logs").exists(), "it served well, so nobody needs its log"


@pytest.mark.skipif(sys.platform != "linux", reason="others let a child outlive its parent")
def test_a_server_ends_with_its_keeper_too(tmp_path: Path) -> None:
    """By kill -9 of the process between the run and the server, or for want of memory."""
    with launched(tmp_path, SERVE) as server:
        server.wait(120)
        keeper = psutil.Process(server._process.pid)
        found = keeper.children()
        keeper.kill()
        assert len(found) == 1
        assert not psutil.wait_procs(found, timeout=60)[1]


def test_a_server_that_does_not_come_up_shows_its_log(tmp_path: Path) -> None:
    broken = f"{sys.executable} -c 'import sys; sys.exit(\"no GPU for {{model}} {{port}}\")'"
    failed = pytest.raises(EngineError, match=r"exit code 1.*s\.log: no GPU for m \d+")
    with launched(tmp_path, broken) as server, failed:
        server.wait(120)
    assert "no GPU" in server.log.read_text(), "a log that says why is kept"
    sleeps = f"{sys.executable} -c 'import time; time.sleep(60)' {{model}}{{port}}"
    with (
        launched(tmp_path, sleeps) as server,
        pytest.raises(EngineError, match="did not answer"),
    ):
        server.wait(0.1)
    with pytest.raises(ConfigError, match="'no-such-server', which is not a program here"):
        launched(tmp_path, "no-such-server {model} {port}")


def test_a_server_that_dies_ends_its_stage_with_its_log(tmp_path: Path) -> None:
    settings = EngineConfig(kind="openai", launch=SERVE + " 2", backoff=0.01)

    def stage() -> None:
        with Engines(tmp_path) as engines:
            one = engines.get(settings, "bees", Loading(), 1)
            ask(one, GREEDY, 0)

    with pytest.raises(EngineError, match=r"exit code 3.*enough"):
        stage()
    (log,) = (tmp_path / "logs").iterdir()
    assert "enough" in log.read_text()


# -- settings --------------------------------------------------------------------------------------

HERE: dict[str, Any] = {"kind": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"}
LAUNCH: dict[str, Any] = {"kind": "openai", "launch": "serve {model} --port {port}"}


def recipe(**more: Any) -> Any:
    import yaml

    values = yaml.safe_load(recipe_text("smoke"))
    values["sampling"].pop("batch_size")
    values["principles"].pop("batch_size")
    return recipe_of({**values, **more}, "recipe")


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"kind": "openai"}, "needs base_url or launch"),
        ({**LAUNCH, "base_url": "http://h/v1"}, "needs base_url or launch"),
        ({"kind": "openai", "base_url": "http://h/v1"}, "sampling.engine.model is missing"),
        ({**LAUNCH, "launch": "serve --port {port}"}, r"no place for \{model\}"),
        ({**LAUNCH, "model": "m"}, "the stage names the model"),
        ({**LAUNCH, "api_key_env": "K"}, "a launched server gets no key"),
        ({**LAUNCH, "batch": True}, "a launched server answers at once"),
        ({"kind": "vllm", "batch": True}, "batch has no effect with kind vllm"),
        (
            {**HERE, "price": {"input": 1e308, "output": 1}},
            "price.input: input should be less than or equal to",
        ),
        (
            {**HERE, "price": {"input": 1, "output": 1, "batch": 0.3}},
            r"price\.batch has no effect without batch",
        ),
        ({**HERE, "base_url": "h:1"}, "must look like http"),
        ({**HERE, "base_url": "http://me:key@h/v1"}, "must hold no secret"),
        ({**HERE, "extra_body": {"seed": 1}}, r"extra_body\.seed is what the engine itself sends"),
        ({"kind": "transformers", "timeout": 3}, "timeout has no effect with kind transformers"),
        ({"kind": "transformers", "model": "m"}, "model has no effect with kind transformers"),
        ({"kind": "opena"}, "kind: input should be"),
        (HERE, r"also samples from the generator, the trained policy \(evaluation\).*launch"),
    ],
)
def test_engines_that_cannot_be_honoured(engine: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(sampling={"max_new_tokens": 96, "engine": engine})


def test_one_server_is_enough_where_nothing_trained_answers() -> None:
    sampling = {"max_new_tokens": 96, "engine": HERE}
    import yaml

    values = yaml.safe_load(recipe_text("smoke"))
    del values["generator"], values["baseline"]
    values["principles"].pop("batch_size")
    values |= {"method": "pbaa", "evaluation": None, "sampling": sampling}

    def made(*more: str) -> Any:
        return recipe_of(merge(values, more), "r")

    assert made().sampling.engine.base_url == HERE["base_url"]
    with pytest.raises(ConfigError, match=r"principles\.batch_size has no effect"):
        made("principles.batch_size=3")
    with pytest.raises(ConfigError, match=r"sampling\.batch_size has no effect"):
        made("sampling.batch_size=3", "training.selection.points=0")
    chosen = made("sampling.batch_size=3")
    assert chosen.sampling.batch_size == 3, "the selection's candidates answer in process"
    with pytest.raises(ConfigError, match="policies of earlier iterations"):
        made("iterations=2")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), None),
        (("policy.lora=null",), r"adapters needs policy\.lora"),
        (("iterations=2",), "with iterations 2, those of later rounds"),
        (("sampling.engine.batch=true",), "adapters has no effect with batch"),
        (
            ("sampling.engine.base_url=null", "sampling.engine.launch='s {model} {port}'"),
            "adapters has no effect without base_url",
        ),
        (
            ("principles.writer={kind: openai, base_url: 'http://h', adapters: true, model: m}",),
            r"writer\.adapters has no effect for a model that the run does not train",
        ),
    ],
)
def test_adapters_make_one_server_enough(more: tuple[str, ...], said: str | None) -> None:
    values = recipe(sampling={"max_new_tokens": 96, "engine": LAUNCH}).model_dump(
        exclude_unset=True
    )
    values["sampling"]["engine"] = {**HERE, "adapters": True}
    values["policy"]["lora"] = {"rank": 8}
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        recipe_of(merge(values, more), "recipe")


def test_the_writer_is_a_model_or_an_engine_with_one() -> None:
    def writer(value: Any) -> Any:
        return recipe(principles={"writer": value}).principles.writer

    assert writer("some/model").identity == {
        "kind": "transformers",
        "model": "some/model",
        "base_url": None,
        "launch": None,
        "extra_body": {},
        "tensor_parallel": 1,
        "max_model_len": None,
        "engine_args": {},
        "chat_template_kwargs": {},
    }
    assert writer({**LAUNCH, "model": "some/model"}).model == "some/model"
    assert writer(HERE).base_url == HERE["base_url"]
    for value, said in (
        (LAUNCH, r"writer\.model is missing"),
        ({"kind": "transformers"}, r"writer\.model is missing"),
        ({"model": "m", "retries": 2}, "retries has no effect"),
    ):
        with pytest.raises(ConfigError, match=said):
            writer(value)


def test_identity_is_what_answers_depend_on() -> None:
    base = EngineConfig(**HERE)
    for same in ({"concurrency": 3}, {"retries": 1}, {"timeout": 9}, {"max_requests": 5}):
        assert EngineConfig(**{**HERE, **same}).identity == base.identity
    for other in ({"model": "n"}, {"extra_body": {"top_k": 3}}, {"base_url": "http://h/v1"}):
        assert EngineConfig(**{**HERE, **other}).identity != base.identity


def test_a_judge_asked_of_a_server(server: Server, tmp_path: Path) -> None:
    """It prefers the longer answer; a failed request is unparseable and asked again later."""

    def decide(body: dict[str, Any]) -> str:
        asked = body["messages"][-1]["content"]
        a, _, rest = asked.partition("=== Answer A ===")[2].partition("=== Answer B ===")
        b = rest.partition("=== Your decision")[0]
        return "Verdict: " + ("A" if len(a) > len(b) else "B")

    server.answer = decide
    engine = {"kind": "openai", "base_url": server.url, "retries": 0, "concurrency": 1}
    values = {"kind": "chat", "model": "canned", "engine": engine}
    settings = validate(JudgeConfig, values, "judge")
    pairs = [
        Pair(Query(f"q{i}", (Message("user", f"Query {i}"),)), "long " * (i + 1), "no")
        for i in range(3)
    ]
    server.faults = {2: status(500)}  # the second pair, first order
    judge = load_judge(settings, tmp_path)
    assert judge is not None
    judge.check(())
    found = judge.compare_all(pairs)
    assert [j.verdict for j in found] == [Verdict.FIRST, Verdict.UNPARSEABLE, Verdict.FIRST]
    assert found[1].reason == "request_failed:http_500"
    asked = len(server.asked)
    again = load_judge(settings, tmp_path)
    assert again is not None
    assert [j.verdict for j in again.compare_all(pairs)] == [Verdict.FIRST] * 3
    assert len(server.asked) == asked + 1
    one, *others = (
        identity(validate(JudgeConfig, {**values, "engine": {**engine, **more}}, "judge"))
        for more in ({}, {"concurrency": 9}, {"extra_body": {"top_k": 1}})
    )
    assert [other == one for other in others] == [True, False]
    with pytest.raises(ConfigError, match="batch_size has no effect with an engine of kind openai"):
        validate(JudgeConfig, {**values, "batch_size": 3}, "judge")
    with pytest.raises(ConfigError, match=r"judge\.model names the model"):
        validate(JudgeConfig, {**values, "engine": HERE}, "judge")


def test_it_answers_beside_a_loop_that_runs_already(engine: Make) -> None:
    """As in a notebook, where each cell runs inside a loop."""
    alone = ask(engine(), GREEDY, 0)

    async def cell() -> list[Completion]:
        one = engine()
        try:
            return ask(one, GREEDY, 0)
        finally:
            one.close()

    with ThreadPoolExecutor(1) as apart:  # browser tests leave a loop in the main thread
        assert apart.submit(asyncio.run, cell()).result() == alone


def test_prompts_go_to_no_server_that_was_not_named(
    server: Server, engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    with serving() as other:
        place = f"{other.url}/chat/completions?key=sk-0123456789abcdef"
        server.always = status(307, "elsewhere", location=place)
        with pytest.raises(EngineError, match=f"307: it sends requests on to {other.url}") as e:
            ask(engine(), GREEDY, 0)
        assert not other.asked
    assert "key=[key]" in str(e.value)
    assert "0123456789" not in str(e.value)


@pytest.mark.parametrize(
    ("choice", "usage", "said"),
    [
        ({"message": {"content": "So."}}, {}, "no finish_reason, so it is unknown"),
        ({"message": {"content": "So."}, "finish_reason": None}, {}, "finish_reason is None"),
        ({"message": {"content": ["So."]}, "finish_reason": "stop"}, {}, "content is no text"),
        ({"message": {"content": "So."}, "finish_reason": "stop"}, {}, "no usage with prompt_"),
        ({"finish_reason": "stop"}, {}, "no choice with a message"),
    ],
)
def test_what_a_reply_lacks_is_named(
    choice: dict[str, Any], usage: dict[str, Any], said: str
) -> None:
    with pytest.raises(Fault, match=said):
        read_reply(json.dumps({"choices": [choice], "usage": usage}).encode())
