"""`scripts/release.py`: each reason why no release can be made is said, and nothing else is."""

import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    "pyproject.toml": '[project]\nname = "selfsteer"\nversion = "1.2.3"\n',
    "src/selfsteer/__init__.py": '"""Docs."""\n\n__version__ = "1.2.3"\n',
    "CHANGELOG.md": "# Changelog\n\n## 1.2.3 (2026-12-01)\n\n- Better.\n",
}


@pytest.fixture
def release() -> Any:
    return runpy.run_path(str(ROOT / "scripts/release.py"))


def commit(root: Path) -> None:
    for args in (
        ("add", "-A"),
        ("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "all"),
    ):
        subprocess.run(["git", *args], cwd=root, check=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    commit(tmp_path)
    return tmp_path


def test_a_checkout_that_is_ready_has_no_fault(release: Any, checkout: Path) -> None:
    assert release["faults"](checkout) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("src/selfsteer/__init__.py", "1.2.3", "1.2.2", "has version 1.2.2"),
        ("src/selfsteer/__init__.py", "__version__", "version", "has version none"),
        ("CHANGELOG.md", "2026-12-01", "unreleased", "no heading"),
        ("CHANGELOG.md", "1.2.3", "1.2.30", "no heading"),
        ("pyproject.toml", "1.2.3", "1.2", "MAJOR.MINOR.PATCH"),
    ],
)
def test_a_version_that_is_not_the_same_everywhere_is_a_fault(
    release: Any, checkout: Path, name: str, old: str, new: str, said: str
) -> None:
    path = checkout / name
    path.write_text(path.read_text().replace(old, new))
    (unclean, *found) = release["faults"](checkout)
    assert name in unclean
    assert said in " ".join(found)
    commit(checkout)
    assert release["faults"](checkout) == found


def test_a_tag_that_is_there_is_a_fault(release: Any, checkout: Path) -> None:
    subprocess.run(["git", "tag", "v1.2.3"], cwd=checkout, check=True)
    (fault,) = release["faults"](checkout)
    assert "v1.2.3 is there already" in fault


def test_this_checkout_has_one_version(release: Any) -> None:
    """What is left on the way to a release is its day, and a clean tree."""
    said = " ".join(release["faults"](ROOT))
    assert "make them equal" not in said
    assert "MAJOR.MINOR.PATCH" not in said
