"""Replicas on a cluster of this machine: the texts of one process, batch by batch."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from selfsteer.data.records import Message
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.models.chat import DAY
from selfsteer.models.load import load_model
from selfsteer.recipe.sections import EngineConfig, Loading, resolve_path

pytest.importorskip("ray", reason="the engine ray needs ray: pip install 'selfsteer[ray]'")

from selfsteer.engines.load import make_engine
from selfsteer.engines.ray import RayEngine, check_room, weights_digest

SOURCE = resolve_path("package:selfsteer.testbed/checkpoint")
LOADING = Loading(device="cpu", threads=1)
SETTINGS = EngineConfig.model_validate(
    {"kind": "ray", "replicas": 2, "resources": {"num_cpus": 0.25}}
)
PARAMS = SamplingParams(0.9, 0.95, 24)
QUESTIONS = ("What does the bear eat?", "Name three animals.", "What is the capital of France?")
REQUESTS = [Request(f"r{i}", (Message("user", QUESTIONS[i % 3]),), i) for i in range(14)]


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    found = RayEngine(SETTINGS, SOURCE, LOADING, 4, at_hand=True, make=make_engine)
    yield found
    found.close()


def test_replicas_give_the_texts_of_one_process(engine: RayEngine) -> None:
    here = TransformersEngine(load_model(SOURCE, LOADING, inference=True), 4)
    assert engine.batch_size == here.batch_size == 4
    news: list[int] = []
    expected = answers(here, REQUESTS, PARAMS)
    found = answers(engine, REQUESTS, PARAMS, advance=lambda n, tokens: news.append(n))
    assert found == expected
    assert sorted(news) == [2, 4, 4, 4]
    assert len({c.text for c in found.values()}) > 7
    replicas = list(engine.replicas())
    assert answers(engine, REQUESTS[::-1], PARAMS) == expected
    assert engine.replicas() == replicas, "replicas stay between two calls"


@pytest.mark.slow
def test_two_engines_that_do_not_fit_take_turns(
    engine: RayEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RayEngine(SETTINGS, SOURCE, LOADING, 4, at_hand=True, make=make_engine)
    expected = answers(engine, REQUESTS[:3], PARAMS)
    assert answers(other, REQUESTS[:3], PARAMS) == expected
    assert engine in RayEngine._with_replicas
    other._dismiss()
    monkeypatch.setattr("selfsteer.engines.ray.room", lambda settings, nodes: 3)
    assert answers(other, REQUESTS[:3], PARAMS) == expected
    assert RayEngine._with_replicas == [other]
    other.close()


@pytest.mark.slow
def test_what_a_replica_cannot_do_is_its_own_error(engine: RayEngine) -> None:
    lost = RayEngine(SETTINGS, "no/such-model", LOADING, 4, at_hand=True, make=make_engine)
    with pytest.raises(ArtifactError, match="no/such-model cannot be loaded"):
        answers(lost, REQUESTS[:2], PARAMS)
    lost.close()


def test_replicas_write_the_day_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsteer.engines.ray.joined", lambda settings: nullcontext([{"CPU": 4}]))
    monkeypatch.setattr("selfsteer.engines.ray.check_nodes", lambda source: None)
    monkeypatch.setenv(DAY, "2024-02-29")
    for loading, day in ((LOADING, "2024-02-29"), (Loading(date="2020-01-01"), "2020-01-01")):
        engine = RayEngine(SETTINGS, SOURCE, loading, 4, at_hand=True, make=make_engine)
        assert engine.model["loading"] == loading.model_copy(update={"date": day})


# -- room and weights ------------------------------------------------------------------------------


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
