"""What a user installs: the wheel holds all that the program reads, and runs away from here."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import TINY

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "selfsteer"


def started(*command: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **more)


def away(**more: str) -> dict[str, str]:
    """An environment in which the sources are not found."""
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **more}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder)
    ended = started(*build, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of an environment that has the wheel, and ours for what it depends on."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    assert started(sys.executable, "-m", "venv", "--without-pip", home).returncode == 0
    (packages,) = home.glob("lib/python*/site-packages")
    ours = [p for p in sys.path if Path(p).name == "site-packages"]
    (packages / "dependencies.pth").write_text("".join(f"{p}\n" for p in ours))
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    ended = started(*pip, "--ignore-installed", wheel, env=away())
    assert ended.returncode == 0, ended.stderr
    return home / "bin" / "selfsteer"


def test_the_wheel_holds_every_file_and_is_small(wheel: Path) -> None:
    held = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("selfsteer/")}
    files = (p for p in SOURCE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert held == {p.relative_to(SOURCE.parent).as_posix() for p in files}
    kinds = {Path(name).suffix for name in held}
    assert kinds >= {".css", ".j2", ".js", ".jsonl", ".safetensors", ".typed", ".yaml"}
    assert wheel.stat().st_size <= 15e6


def test_the_wheel_works_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    python = installed.with_name("python")
    where = started(python, "-c", "import selfsteer; print(selfsteer.__file__)", env=away())
    assert where.stdout.startswith(str(installed.parents[1])), where
    ended = started(installed, "run", "smoke", "--dry-run", cwd=tmp_path, env=away())
    assert ended.returncode == 0, ended.stderr
    assert "to do      evaluation" in ended.stdout


@pytest.mark.slow
def test_a_recipe_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    ended = started(installed, "run", "smoke", *TINY, cwd=tmp_path, env=away(OMP_NUM_THREADS="1"))
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs/smoke/iteration-1/policy/model.safetensors").exists()
    page = started(installed, "report", "runs/smoke", cwd=tmp_path, env=away())
    assert page.returncode == 0, page.stderr


def test_a_system_without_file_locks_is_told_in_one_line() -> None:
    """As on Windows: Python has no fcntl there."""
    code = (
        "import runpy, sys; sys.modules['fcntl'] = None; sys.argv = ['selfsteer', '--version']; "
        "runpy.run_module('selfsteer', run_name='__main__')"
    )
    ended = started(sys.executable, "-c", code)
    assert ended.returncode == 3
    assert re.fullmatch(r"selfsteer: selfsteer runs on Linux and macOS \(.+\n", ended.stderr)


def test_the_image_copies_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    sources = [w for line in re.findall(r"^COPY (.+)", text, re.M) for w in line.split()[:-1]]
    assert "src" in sources
    assert all((ROOT / name).exists() for name in sources), sources
