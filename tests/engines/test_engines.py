"""What all engines share: the probe, batches, settings."""

import random
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.records import Message
from selfsteer.engines import load
from selfsteer.engines.base import Completion, Request, check_probe, cut, probe
from selfsteer.engines.ray import check_room, weights_digest
from selfsteer.errors import ConfigError, EngineError
from selfsteer.methods import recipe_of
from selfsteer.recipe.read import merge
from selfsteer.recipe.sections import EngineConfig, JudgeConfig

# -- the probe ------------------------------------------------------------------------------------


def said(*texts: str, reason: str = "stop") -> list[Completion]:
    """Answers to the probe's first questions, two each."""
    asked, _ = probe(0.7)
    return [Completion(r.id, t, reason, 1, 1) for r, t in zip(asked, texts, strict=False)]


def test_a_probe_fails_only_where_every_pair_is_alike() -> None:
    asked, params = probe(0.2)
    assert (len(asked), params.temperature, params.top_p) == (8, 1.0, 1.0)
    assert [r.messages for r in asked[::2]] == [r.messages for r in asked[1::2]]
    assert len({r.id for r in asked}) == 8
    check_probe(said("a", "a", "b", "c"), "X", "Y.")
    check_probe(said("", "", reason="request_failed:x"), "X", "Y.")
    with pytest.raises(EngineError, match=r"^X ignores temperature: 2 prompts.* Y\.$"):
        check_probe(said("a", "a", "b", "b")[::-1], "X", "Y.")


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


def test_weights_are_told_apart_by_their_files(tmp_path: Path) -> None:
    assert weights_digest(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12")
    first = weights_digest(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert first != weights_digest(str(tmp_path))


def test_gpus_that_nobody_takes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    check_room(EngineConfig(kind="ray"), [{"CPU": 4.0, "GPU": 8.0}])
    assert "has 8 GPUs and its replicas use none" in capsys.readouterr().err


def test_a_judge_answers_in_no_shards() -> None:
    with pytest.raises(ValueError, match="which a judge has none of"):
        JudgeConfig.model_validate({"kind": "chat", "model": "m", "engine": "ray"})
    with pytest.raises(ValueError, match="batch_size has no effect with an engine of kind vllm"):
        JudgeConfig.model_validate(
            {"kind": "chat", "model": "m", "engine": "vllm", "batch_size": 3}
        )


@pytest.mark.parametrize(
    ("replicas", "cpus", "gpus", "fits"),
    [
        (4, 1, 0, True),
        (5, 1, 0, False),
        (3, 1, 1, True),  # two on the first node, one on the second
        (4, 1, 1, False),
        (6, 0.5, 0.5, True),
        (1, 8, 0, False),  # no single node has so many
        (99, 0, 0, True),
    ],
)
def test_room_is_counted_node_by_node(replicas: int, cpus: float, gpus: float, fits: bool) -> None:
    nodes = [{"CPU": 3.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}]
    settings = EngineConfig.model_validate(
        {
            "kind": "ray",
            "replicas": replicas,
            "resources": {"num_cpus": cpus, "num_gpus": gpus},
        }
    )
    if fits:
        check_room(settings, nodes)
        return
    with pytest.raises(ConfigError, match="have 4 CPUs and 3 GPUs"):
        check_room(settings, nodes)


@pytest.mark.parametrize("kind", ["vllm", "ray"])
def test_a_missing_package_is_told_with_its_install_line(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'selfsteer\[{kind}\]'"):
        load.check_engine(EngineConfig.model_validate(kind))
