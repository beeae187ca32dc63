"""Replicas on a cluster of this machine: the texts of one process, batch by batch."""

from collections.abc import Iterator

import pytest

from selfsteer.data.records import Message
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.ray import Model, RayEngine
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.errors import ArtifactError
from selfsteer.models.load import load_model
from selfsteer.recipe.sections import EngineConfig, EngineSettings, Loading, resolve_path

ray = pytest.importorskip("ray", reason="the engine ray needs ray: pip install 'selfsteer[ray]'")

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
    found = RayEngine(SETTINGS, Model(EngineSettings(), SOURCE, LOADING, 4, True))
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
    pool = engine._replicas()
    assert answers(engine, REQUESTS[::-1], PARAMS) == expected
    assert engine._replicas() is pool, "replicas stay between two calls"


def test_two_engines_that_do_not_fit_take_turns(
    engine: RayEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RayEngine(SETTINGS, engine.model)
    expected = answers(engine, REQUESTS[:3], PARAMS)
    assert answers(other, REQUESTS[:3], PARAMS) == expected
    assert engine in RayEngine._with_replicas
    other._dismiss()
    monkeypatch.setattr("selfsteer.engines.ray.room", lambda settings, nodes: 3)
    assert answers(other, REQUESTS[:3], PARAMS) == expected
    assert RayEngine._with_replicas == [other]
    other.close()


def test_what_a_replica_cannot_do_is_its_own_error(engine: RayEngine) -> None:
    lost = RayEngine(SETTINGS, Model(EngineSettings(), "no/such-model", LOADING, 4, True))
    with pytest.raises(ArtifactError, match="no/such-model cannot be loaded"):
        answers(lost, REQUESTS[:2], PARAMS)
    lost.close()
