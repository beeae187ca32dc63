"""One finished tiny run, shared by the tests that only look at it."""

from pathlib import Path

import pytest

from tests.e2e.support import TINY, Here, spawn


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setenv("COLUMNS", "120")
    return Here(capsys)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished smoke run."""
    folder = tmp_path_factory.mktemp("smoke")
    ended = spawn("run", "smoke", f"runs_dir={folder}", "name=done", "seed=7", *TINY)
    assert ended.returncode == 0, ended.stderr
    return folder / "done"
