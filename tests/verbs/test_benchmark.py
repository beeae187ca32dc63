from pathlib import Path

import pytest

from selfsteer.errors import ConfigError
from selfsteer.recipe.sections import Benchmarks, EngineConfig, JudgedSet, Sampling
from selfsteer.run.folder import RunFolder
from selfsteer.run.stage import Artifact
from selfsteer.stages.benchmark import RunBenchmarks
from selfsteer.verbs.benchmark import benchmark


@pytest.mark.parametrize("name", ["ledger.jsonl", "resolved.json"])
def test_results_do_not_go_where_a_run_would_take_them_for_its_own(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"is a run folder.*another folder"):
        benchmark(["package:testbed-base"], to=tmp_path)


def test_one_server_answers_for_one_model(tmp_path: Path) -> None:
    """It would give the same answers under both names."""
    judged = JudgedSet(style="mt-bench", questions=str(tmp_path / "quiz.jsonl"))
    engine = EngineConfig(kind="openai", base_url="http://127.0.0.1:1/v1", model="m")
    stage = RunBenchmarks(
        {name: Artifact(tmp_path / name) for name in ("base", "policy")},
        Benchmarks(judged=(judged,)),
        None,
        Sampling(engine=engine),
    )
    with pytest.raises(ConfigError, match=r"2 models are wanted: .*/base, .*/policy\. Set"):
        stage.run(RunFolder(tmp_path))
