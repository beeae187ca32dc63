"""The work on shards, in turn and many at once; settings of engines vllm and ray."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.records import Message
from selfsteer.engines import load, shards
from selfsteer.engines.base import Advance, Completion, SamplingParams, check_probe, no_news, probe
from selfsteer.engines.ray import check_room, weights_digest
from selfsteer.engines.shards import Ask, ShardEngine, Work, at_once, do
from selfsteer.errors import ConfigError, EngineError
from selfsteer.methods import recipe_of
from selfsteer.recipe.read import merge
from selfsteer.recipe.sections import EngineConfig, JudgeConfig

PARAMS = SamplingParams()


class Echo:
    """Says what it was asked, and notes who asked when."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: SamplingParams,
        seed: int,
        advance: Advance = no_news,
    ) -> list[Completion]:
        texts = [c[-1].content for c in conversations]
        self.heard.append("+".join(texts))
        advance(len(texts), 1)
        return [Completion(f"{t}/{seed}", "stop", 1, 1) for t in texts]


class Crowd(Echo):
    """Answers all asks that it gets, the last one first."""

    def generate_shards(self, asks: Sequence[Ask]) -> Iterator[tuple[int, list[Completion]]]:
        self.heard.append(f"{len(asks)} at once")
        for place in reversed(range(len(asks))):
            a = asks[place]
            yield place, self.generate(a.conversations, a.sampling, a.seed, a.advance)


def worker(*engines: Any) -> Any:
    """Work that asks each engine in turn, the next about the answers of the one before."""

    def work(number: int, part: Sequence[str]) -> Work[str]:
        texts = list(part)
        for step, engine in enumerate(engines):
            if step == 1 and number == 1:
                continue  # one shard has less to ask
            asked = [[Message("user", t)] for t in texts]
            found = yield Ask(engine, asked, PARAMS, 10 * number + step)
            texts = [c.text for c in found]
        return "+".join(texts)

    return work


SHARDS = [(0, ["a", "b"]), (1, ["c"]), (2, ["d"])]
MADE = {0: "a/0/1+b/0/1", 1: "c/10", 2: "d/20/21"}


def test_only_an_engine_that_answers_many_counts_as_one() -> None:
    assert isinstance(Crowd(), ShardEngine)
    assert not isinstance(Echo(), ShardEngine)


def test_in_turn_a_shard_is_finished_before_the_next_is_taken() -> None:
    engine, order = Echo(), []

    def taken() -> Iterator[tuple[int, list[str]]]:
        for number, part in SHARDS:
            order.append(f"take {number}")
            yield number, part

    for number, made in at_once(worker(engine, engine), taken()):
        order.append(f"made {number}")
        assert made == MADE[number]
    assert order == ["take 0", "made 0", "take 1", "made 1", "take 2", "made 2"]


def test_many_at_once_make_the_same_of_the_same_seeds() -> None:
    engine = Crowd()
    assert dict(at_once(worker(engine, engine), SHARDS)) == MADE
    assert [h for h in engine.heard if "once" in h] == ["3 at once", "2 at once"]


@pytest.mark.parametrize("first_many", [True, False])
def test_engines_of_both_sorts_in_one_stage(first_many: bool) -> None:
    many, few = Crowd(), Echo()
    engines = (many, few) if first_many else (few, many)
    assert dict(at_once(worker(*engines), SHARDS)) == MADE
    assert len(many.heard) - 1 == (3 if first_many else 2)


def test_no_more_than_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "AT_ONCE", 2)
    engine = Crowd()
    assert dict(at_once(worker(engine), [(i, ["x"]) for i in range(5)])) == {
        i: f"x/{10 * i}" for i in range(5)
    }
    assert [h for h in engine.heard if "once" in h] == ["2 at once", "2 at once", "1 at once"]


def test_one_shard_by_itself() -> None:
    assert do(worker(Echo())(3, ["x"])) == "x/30"


def test_a_shard_that_fails_leaves_those_before_it() -> None:
    class Dies(Crowd):
        def generate_shards(self, asks: Sequence[Ask]) -> Iterator[tuple[int, list[Completion]]]:
            yield from list(super().generate_shards(asks))[:1]
            raise EngineError("gone")

    found: list[Any] = []
    with pytest.raises(EngineError, match="gone"):
        found.extend(at_once(worker(Dies()), SHARDS))
    assert found == [(2, "d/20")]


# -- the probe ------------------------------------------------------------------------------------


def answers(*texts: str) -> list[Completion]:
    return [Completion(t, "stop", 1, 1) for t in texts]


def test_a_probe_fails_only_where_every_pair_is_alike() -> None:
    asked, params = probe(0.2)
    assert (len(asked), params.temperature, params.top_p) == (8, 1.0, 1.0)
    assert asked[::2] == asked[1::2]
    check_probe(answers("a", "a", "b", "c"), "X", "Y.")
    check_probe([Completion("", "request_failed:x", 0, 0)] * 2, "X", "Y.")
    with pytest.raises(EngineError, match=r"^X ignores temperature: 2 prompts.* Y\.$"):
        check_probe(answers("a", "a", "b", "b"), "X", "Y.")


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
