"""A standing vLLM that loads what a run trains as LoRA adapters of its one model."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request as Asked
from urllib.request import urlopen

import pytest
import torch

from selfsteer.data.records import Message
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Completion, Engine, Request, SamplingParams
from selfsteer.engines.launch import LaunchedServer
from selfsteer.engines.load import Engines, check_engine
from selfsteer.engines.openai import OpenAIEngine
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.errors import EngineError
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.save import add_lora, save_model
from selfsteer.recipe.sections import EngineConfig, Lora, Policy, resolve_path
from tests.e2e.support import finished, spawn
from tests.vllm.test_vllm import SERVE

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None,
    reason="vllm is not installed here; `make test-vllm` sets up an environment that has it",
)

BASE = resolve_path("package:selfsteer.testbed/checkpoint")
POLICY = Policy(model=BASE, device="cpu")
#: Longer than two of vLLM's blocks, so that what was computed of it is used again.
SYSTEM = Message("system", "Answer in a friendly and helpful way, and in whole sentences. " * 24)
QUESTIONS = ("What does the bear eat?", "Name three animals.", "Is the owl bigger than the goat?")
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM that holds the tiny model and takes adapters."""
    log = tmp_path_factory.mktemp("served") / "vllm.log"
    command = f"{SERVE} --served-model-name tiny --enable-lora --max-lora-rank 16 --max-loras 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
        started = LaunchedServer(command, BASE, log)
    with started:
        started.wait(900)
        yield started.base_url


def trained(folder: Path, seed: int) -> str:
    """A model as a run saves it, with adapters that change its answers beside merged weights."""
    torch.manual_seed(seed)
    loaded = load_model(BASE, POLICY)
    model = add_lora(loaded.model, Lora(rank=8))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.07)
    save_model(model, loaded.chat, folder, torch.float32)
    return str(folder)


def served(url: str) -> set[str]:
    with urlopen(f"{url}/models", timeout=60) as reply:
        return {model["id"] for model in json.load(reply)["data"]}


def hits(url: str) -> float:
    """Tokens of prompts that vLLM did not compute again."""
    with urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=60) as reply:
        found = re.search(r"^vllm:prefix_cache_hits_total\S* (\S+)$", reply.read().decode(), re.M)
    assert found
    return float(found[1])


def ask(engine: Engine) -> list[Completion]:
    requests = [Request(q, (SYSTEM, Message("user", q)), 0) for q in QUESTIONS]
    return list(answers(engine, requests, GREEDY).values())


def logprobs(url: str, model: str, question: str) -> list[float]:
    """Log-probs of the greedy answer's tokens, as the server gives them."""
    body = {
        "model": model,
        "messages": [SYSTEM.to_dict(), Message("user", question).to_dict()],
        **{"temperature": 0, "max_tokens": GREEDY.max_new_tokens, "logprobs": True},
    }
    headers = {"Content-Type": "application/json"}
    asked = Asked(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urlopen(asked, timeout=600) as reply:
        content = json.load(reply)["choices"][0]["logprobs"]["content"]
    return [token["logprob"] for token in content]


def own_logprobs(loaded: LoadedModel, question: str, tokens: int) -> list[float]:
    """The same by a whole forward of the merged weights, token after token."""
    ids = list(loaded.chat.prompt_ids((SYSTEM, Message("user", question))))
    found = []
    with torch.no_grad():
        for _ in range(tokens):
            last = loaded.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            value, token = last.max(-1)
            found.append(float(value))
            ids.append(int(token))
    return found


def test_adapters_answer_as_the_weights_that_they_are_merged_into(
    server: str, tmp_path: Path
) -> None:
    """One after the other on the same prompts: nothing that vLLM keeps of one reaches the other."""
    settings = EngineConfig(kind="openai", base_url=server, model="tiny", adapters=True)
    sources = {"base": BASE, **{n: trained(tmp_path / n, i) for i, n in enumerate("AB")}}
    merged = {n: load_model(source, POLICY, inference=True) for n, source in sources.items()}
    expected = {n: ask(TransformersEngine(loaded, 4)) for n, loaded in merged.items()}
    assert len({tuple(c.text for c in found) for found in expected.values()}) == 3
    before = hits(server)
    for name in ("A", "B", "A", "base", "B"):
        with Engines(tmp_path) as engines:
            engine = engines.get(settings, sources[name], POLICY, 4, at_hand=True)
            assert isinstance(engine, OpenAIEngine)
            said: list[Any] = [
                (c.id, c.text, c.finish_reason, c.prompt_tokens) for c in ask(engine)
            ]
            assert said == [
                (c.id, c.text, c.finish_reason, c.prompt_tokens) for c in expected[name]
            ]
            there = logprobs(server, engine.model, QUESTIONS[0])
            here = own_logprobs(merged[name], QUESTIONS[0], len(there))
            assert there == pytest.approx(here, abs=1e-3)
        assert served(server) == {"tiny"}
    assert hits(server) > before + 5 * 128, "it computed every prompt again: nothing was proved"


def test_a_whole_run_asks_one_server(server: str, tmp_path: Path) -> None:
    engine = {"kind": "openai", "base_url": server, "model": "tiny", "adapters": True}
    given = (
        *(f"runs_dir={tmp_path}", "name=r", f"sampling.engine={json.dumps(engine)}"),
        *("policy.lora.rank=8", "queries.limit=16", "evaluation.queries.limit=8"),
        *("sampling.batch_size=null", "sampling.shard_size=8", "principles.batch_size=null"),
        *("generator.selection.points=0", "training.selection.points=0", "generator.per_half=true"),
        *("generator.learning_rate=5e-3", "training.learning_rate=5e-3"),
    )
    ended = spawn("run", "smoke", *given)
    assert ended.returncode == 0, ended.stderr
    stages = finished(tmp_path / "r")
    assert stages["iteration-1/samples"]["n_out"] > 8
    assert stages["evaluation"]["n_out"] == 8
    assert served(server) == {"tiny"}
    asked = [json.loads(p.read_text()) for p in (tmp_path / "r" / "usage").iterdir()]
    assert [counts["failed"] for counts in asked] == [{}]
    answered = (tmp_path / "r" / "evaluation").glob("answers-*.jsonl")
    texts = [
        [json.loads(line)["response"] for line in p.read_text().splitlines()] for p in answered
    ]
    assert len(set(map(tuple, texts))) == len(texts) == 3, "base, policy and baseline"


@pytest.mark.parametrize("allowed", ["True", "False"])
def test_a_server_that_loads_no_adapters_is_told_at_once(
    allowed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --enable-lora, whether or not it has the address."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", allowed)
    with LaunchedServer(SERVE, BASE, tmp_path / "vllm.log") as started:
        started.wait(900)
        own: dict[str, Any] = {"kind": "openai", "base_url": started.base_url, "model": BASE}
        check_engine(EngineConfig(**own))
        with pytest.raises(EngineError, match="--enable-lora"):
            check_engine(EngineConfig(**own, adapters=True))
