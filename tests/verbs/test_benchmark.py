from pathlib import Path

import pytest

from selfsteer.errors import ConfigError
from selfsteer.verbs.benchmark import benchmark


@pytest.mark.parametrize("name", ["ledger.jsonl", "resolved.json"])
def test_results_do_not_go_where_a_run_would_take_them_for_its_own(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"is a run folder.*another folder"):
        benchmark(["package:testbed-base"], to=tmp_path)
