"""What becomes of a query set before anything is asked of it."""

from pathlib import Path

import pytest

from selfsteer.data.jsonl import read_jsonl
from selfsteer.errors import DataError
from selfsteer.recipe.sections import JudgeConfig, Queries
from selfsteer.run.folder import RunFolder, read_dropped
from selfsteer.stages.queries import ReadQueries
from tests.make import write_jsonl


def prompts(path: Path, *texts: str) -> str:
    return str(write_jsonl(path, *({"prompt": t} for t in texts)))


def test_what_is_read_and_what_is_dropped_are_both_written(tmp_path: Path) -> None:
    path = prompts(tmp_path / "q.jsonl", "What is a bee?", "Eh?", "What is a bee?", "Who is it?")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    stage = ReadQueries(Queries(path=path, min_chars=5))
    result = run.execute(stage)
    assert (result.n_in, result.n_out) == (4, 2)
    assert result.dropped == {"too_short": 1, "duplicate": 1}
    ids = [v["id"] for _, v in read_jsonl(run / "queries.jsonl")]
    assert ids == sorted(ids)
    dropped = list(read_dropped(run / "queries.dropped.jsonl"))
    assert sorted(d.reason for d in dropped) == ["duplicate", "too_short"]
    assert stage.outputs == ("queries.jsonl",)


def test_what_is_kept_out_of_evaluation_sets_is_told_beside(tmp_path: Path) -> None:
    shared = "how many bees are there in a hive"
    path = prompts(tmp_path / "q.jsonl", f"Say {shared} in spring", "Who is it?")
    against = prompts(tmp_path / "e.jsonl", f"Tell me {shared}")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    stage = ReadQueries(Queries(path=path, against=(against,)))
    result = run.execute(stage)
    assert result.dropped == {"contaminated": 1}
    assert stage.outputs == ("queries.jsonl", "contaminated.jsonl")
    ((_, overlap),) = read_jsonl(run / "contaminated.jsonl")
    assert shared in str(overlap)


def test_a_query_that_the_judge_cannot_judge_ends_the_run_here(tmp_path: Path) -> None:
    path = prompts(tmp_path / "q.jsonl", "What is the meaning of it all?")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with pytest.raises(DataError):
        ReadQueries(Queries(path=path), (JudgeConfig(kind="oracle"),)).run(run)
    assert not (run / "queries.jsonl").exists()
    with pytest.raises(DataError, match="queries but no answers"):
        ReadQueries(Queries(path=path), with_answers=True).run(run)
