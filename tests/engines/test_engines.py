"""What all engines share: the probe, batches, settings."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from selfsteer.data.records import Message
from selfsteer.engines import load
from selfsteer.engines.base import Advance, Completion, ProbedEngine, Request, SamplingParams, cut
from selfsteer.errors import ConfigError, EngineError
from selfsteer.methods import recipe_of
from selfsteer.recipe.read import merge
from selfsteer.recipe.sections import EngineConfig, JudgeConfig

# -- the probe ------------------------------------------------------------------------------------


class Scripted(ProbedEngine):
    who, remedy = "X", "Do Y."

    def __init__(self, *said: tuple[str, str]) -> None:
        self.said, self.asked = said, list[Request]()

    def _answer(
        self, requests: Sequence[Request], sampling: SamplingParams, advance: Advance
    ) -> Iterator[Completion]:
        self.asked += requests
        self.sampling = sampling
        for request, (text, reason) in zip(requests[::-1], self.said[::-1], strict=False):
            yield Completion(request.id, text, reason, 1, 1)


def said(*texts: str, reason: str = "stop") -> list[tuple[str, str]]:
    return [(text, reason) for text in texts]


def test_an_engine_is_asked_first_whether_it_samples() -> None:
    engine = Scripted(*said(*"aabcddee"))
    assert not engine.asked
    assert list(engine.generate([], SamplingParams(0.2, 0.8, 9))) == []
    assert len(engine.asked) == len({r.id for r in engine.asked}) == 8
    assert [r.messages for r in engine.asked[::2]] == [r.messages for r in engine.asked[1::2]]
    list(engine.generate([], SamplingParams(0.2)))
    assert len(engine.asked) == 8, "once is enough"
    greedy = Scripted(*said(*"aabbccdd"))
    list(greedy.generate([], SamplingParams(0.0)))
    assert not greedy.asked, "greedy is what was asked for"


def test_a_probe_fails_only_where_every_pair_is_alike() -> None:
    hot = SamplingParams(0.7)
    list(Scripted(*said(*"aabcddee")).generate([], hot))
    list(Scripted(*said(*"aabbccdd", reason="request_failed:x")).generate([], hot))
    half = Scripted(*said("", "", reason="request_failed:x"), *said(*"bbccdd"))
    with pytest.raises(EngineError, match=r"^X ignores temperature: 3 prompts.* Do Y\.$"):
        list(half.generate([], hot))


# -- batches --------------------------------------------------------------------------------------


def requests(*texts: str) -> list[Request]:
    return [Request(f"r{i}", (Message("user", t),), i) for i, t in enumerate(texts)]


def test_batches_hold_requests_of_similar_length() -> None:
    found = cut(requests("aa", "a", "aaaa", "aa", "aaa"), 2)
    assert [[r.id for r in batch] for batch in found] == [["r2", "r4"], ["r0", "r3"], ["r1"]]
    assert cut([], 2) == []


def test_batches_that_are_gone_leave_the_others_as_they_are() -> None:
    rng = random.Random(0)
    some = requests(*("a" * rng.randrange(9) for _ in range(50)))
    whole = cut(some, 8)
    rng.shuffle(some)
    assert cut(some, 8) == whole
    left = [whole[0], *whole[3:5], whole[-1]]
    assert cut([r for batch in left for r in batch], 8) == left


# -- settings -------------------------------------------------------------------------------------

MINIMAL: dict[str, Any] = {
    "name": "n",
    "policy": {"model": "m"},
    "queries": {"path": "q.jsonl"},
    "training": {"selection": {"points": 0}},
    "generator": {"selection": {"points": 0}},
}


def recipe(*more: str) -> Any:
    return recipe_of(merge(MINIMAL, more), "recipe")


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("{kind: vllm, concurrency: 3}", "concurrency has no effect with kind vllm"),
        ("{kind: transformers, replicas: 3}", "replicas has no effect with kind transformers"),
        ("{kind: vllm, engine_args: {seed: 3}}", "engine_args.seed is what the engine itself sets"),
        ("{kind: ray, replica: ray}", "a cluster in a cluster"),
        ("{kind: ray, replica: {kind: openai, base_url: 'http://h/v1', model: m}}", "one server"),
        (
            "{kind: ray, replica: {kind: openai, launch: 'a {model} {port}', max_requests: 3}}",
            "max_requests would count for each replica",
        ),
        ("{kind: ray, replica: {kind: vllm, retries: 3}}", "replica.retries has no effect"),
        ("{kind: ray, model: x}", "engine.model has no effect with kind ray"),
        ("{kind: ray, memory: 0.5}", "memory has no effect with kind ray"),
        ("{kind: ray, replicas: 0}", "replicas"),
        ("{kind: vllm, max_model_len: 2048}", "no room for a prompt beside"),
    ],
)
def test_settings_without_effect_are_refused(engine: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(f"sampling.engine={engine}")


def test_batches_belong_to_transformers_alone_wherever_it_runs() -> None:
    recipe("sampling.engine={kind: ray, replicas: 2}", "sampling.batch_size=8")
    for engine in ("vllm", "{kind: ray, replica: vllm}"):
        with pytest.raises(ConfigError, match=r"sampling\.batch_size has no effect .* vllm"):
            recipe(f"sampling.engine={engine}", "sampling.batch_size=8")


def test_a_cluster_changes_no_answers_so_no_identity() -> None:
    plain = EngineConfig()
    spread = EngineConfig(kind="ray", replicas=4, address="auto")
    assert spread.identity == plain.identity
    vllm = EngineConfig(kind="vllm", engine_args={"quantization": "fp8"})
    many = EngineConfig(kind="ray", replica=vllm)
    assert many.identity == vllm.identity != plain.identity
    assert EngineConfig(kind="vllm", memory=0.5).identity == EngineConfig(kind="vllm").identity
    named = EngineConfig(kind="ray", model="x", replica=vllm)
    assert named.answering.model == "x"


def test_a_writer_on_the_cluster_names_its_model() -> None:
    made = recipe("principles.writer={kind: ray, model: strong, replica: vllm}")
    writer = made.principles.writer
    assert writer is not None
    assert (writer.answering.kind, writer.answering.model) == ("vllm", "strong")
    with pytest.raises(ConfigError, match=r"principles\.writer\.model is missing"):
        recipe("principles.writer={kind: ray, replica: vllm}")


def test_a_stage_joins_one_cluster() -> None:
    writer = "principles.writer={kind: ray, model: strong, address: auto}"
    with pytest.raises(ConfigError, match="give both the same address"):
        recipe(writer, "sampling.engine=ray")
    recipe(writer, "sampling.engine={kind: ray, address: auto}")


def test_a_judge_answers_in_no_shards() -> None:
    with pytest.raises(ValueError, match="cannot use an engine of kind ray"):
        JudgeConfig.model_validate({"kind": "chat", "model": "m", "engine": "ray"})
    with pytest.raises(ValueError, match="batch_size has no effect with an engine of kind vllm"):
        JudgeConfig.model_validate(
            {"kind": "chat", "model": "m", "engine": "vllm", "batch_size": 3}
        )


@pytest.mark.parametrize("kind", ["vllm", "ray"])
def test_a_missing_package_is_told_with_its_install_line(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'selfsteer\[{kind}\]'"):
        load.check_engine(EngineConfig.model_validate(kind))
