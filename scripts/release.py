"""Checks that a release can be made, and builds it into ``dist/``; nothing is uploaded.

python scripts/release.py
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: Files that a message names.
NAMED = 12
#: The heading of a release in CHANGELOG.md: version and day.
HEADING = r"^## {version} \((\d{{4}}-\d\d-\d\d)\)$"


def faults(root: Path) -> list[str]:
    """Why no release can be made of a checkout, each in a sentence."""
    found = []
    if changed := git(root, "status", "--porcelain"):
        names = [line[3:] for line in changed.splitlines()]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        found.append(f"The tree is not clean; commit or remove {', '.join(names[:NAMED])}{more}.")
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    version = project["version"]
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        found.append(f"pyproject.toml has version {version}; write MAJOR.MINOR.PATCH.")
    package = (root / "src/selfsteer/__init__.py").read_text("utf-8")
    own = re.search(r'^__version__ = "(.*)"$', package, re.MULTILINE)
    if own is None or own[1] != version:
        found.append(
            f"src/selfsteer/__init__.py has version {own[1] if own else 'none'}, pyproject.toml "
            f"{version}; make them equal."
        )
    changelog = (root / "CHANGELOG.md").read_text("utf-8")
    if not re.search(HEADING.format(version=re.escape(version)), changelog, re.MULTILINE):
        found.append(
            f"CHANGELOG.md has no heading '## {version} (YYYY-MM-DD)'; put the day of the release "
            "in the place of 'unreleased'."
        )
    if git(root, "tag", "--list", f"v{version}"):
        found.append(f"The tag v{version} is there already; raise the version.")
    return found


def git(root: Path, *args: str) -> str:
    """What git says."""
    ended = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
    return ended.stdout.strip("\n")


def main() -> None:
    """Builds wheel and source distribution, or says why not."""
    if found := faults(ROOT):
        sys.exit("\n".join(found))
    subprocess.run([sys.executable, "-m", "build", "--outdir", "dist"], cwd=ROOT, check=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    print(
        f"dist/ has {version}. To publish it: git tag v{version} && git push --tags, then upload."
    )


if __name__ == "__main__":
    main()
