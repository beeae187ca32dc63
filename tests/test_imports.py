"""The arrows between the rooms of the house: each module imports only from rooms above it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import selfsteer

ROOT = Path(selfsteer.__file__).parent

#: From the top down; a room may import from itself and from those before it.
ROOMS = (
    "errors",
    "stopping",
    "terminal",
    "objectives",
    "recipe",
    "data",
    "principles",
    "models",
    "engines",
    "testbed",
    "judges",
    "evaluation",
    "run",
    "training",
    "stages",
    "methods",
    "view",
    "report",
    "formats",
    "verbs",
    "cli",
    "__main__",
)


def modules() -> list[Path]:
    found = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]
    return sorted(p for p in found if not any(x.startswith(".") for x in p.parts))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a module, also inside functions."""
    package = ["selfsteer", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def imported_rooms(source: str, path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imported_modules(ast.parse(source), path):
        parts = name.split(".")
        if parts[0] != "selfsteer":
            continue
        room = parts[1] if len(parts) > 1 else ""
        # names that the package itself offers come from the rooms that define them
        home = selfsteer._HOMES.get(room, f"selfsteer.{room}").split(".")[1]
        if home and not home.startswith("__version"):
            yield line, home


def upward_arrows(source: str, path: Path) -> list[str]:
    here = ROOMS.index(room_of(path))
    return [
        f"{path.relative_to(ROOT)}:{line} ({room_of(path)}) imports from {room}"
        for line, room in imported_rooms(source, path)
        if room not in ROOMS or ROOMS.index(room) > here
    ]


def test_every_module_is_in_a_room() -> None:
    assert len(modules()) > 20
    assert {room_of(p) for p in modules()} <= set(ROOMS)


def test_no_arrow_points_upwards() -> None:
    found = [a for p in modules() for a in upward_arrows(p.read_text("utf-8"), p)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("import selfsteer.cli", "cli"),
        ("from selfsteer.stages.filter import clean", "stages"),
        ("from selfsteer import view", "view"),
        ("from selfsteer import score_records", "models"),
        ("def f():\n    from selfsteer.models.chat import ChatFormat", "models"),
        ("from ..engines import base", "engines"),
        ("from .. import training", "training"),
        ("from importlib import import_module\nimport_module('selfsteer.report.page')", "report"),
    ],
)
def test_an_arrow_that_points_upwards_is_named(source: str, room: str) -> None:
    """As if the text stood in a module of the room ``recipe``."""
    path = ROOT / "recipe" / "odd.py"
    (arrow,) = upward_arrows(source, path)
    assert arrow.endswith(f"(recipe) imports from {room}")


@pytest.mark.parametrize(
    "source",
    [
        "import json",
        "from selfsteer.errors import DataError",
        "from . import other",
        "import torch",
    ],
)
def test_arrows_downwards_sideways_and_outwards_are_fine(source: str) -> None:
    assert upward_arrows(source, ROOT / "recipe" / "odd.py") == []


def heavy(name: str) -> list[str]:
    """The slow libraries that importing a module loads."""
    code = (
        f"import sys, {name}\n"
        "slow = {'torch', 'transformers', 'datasets', 'peft', 'numpy', 'pyarrow', 'openai'}\n"
        "print(*sorted(slow & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.split()


LIGHT = tuple(
    f"selfsteer{name}"
    for name in (
        "",
        ".objectives",
        ".recipe.sections",
        ".recipe.read",
        ".data.records",
        ".run.folder",
    )
)


@pytest.mark.parametrize(
    "name",
    [*LIGHT, "selfsteer.principles.catalogue", "selfsteer.principles.contexts", "selfsteer.cli"],
)
def test_light_modules_load_no_torch(name: str) -> None:
    assert heavy(name) == []


@pytest.mark.parametrize("name", ["selfsteer.methods", "selfsteer.run.execute", "selfsteer.view"])
def test_plans_load_numpy_at_most(name: str) -> None:
    """So that `plan`, `--dry-run` and a look at a run begin at once."""
    assert heavy(name) in ([], ["numpy"])


def test_the_trainer_knows_neither_stages_nor_engines_nor_judges() -> None:
    code = "import sys, selfsteer.training.trainer; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = [name for name in ran.stdout.split() if name.partition(".")[0] == "selfsteer"]
    assert len(ours) <= 22, sorted(ours)
    unknown = ("stages", "engines", "judges", "evaluation")
    found = {name for name in ours if name.startswith(tuple(f"selfsteer.{u}" for u in unknown))}
    # of engines it knows how a rank says that it is one
    assert found <= {"selfsteer.engines", "selfsteer.engines.launch"}


def test_names_of_the_package_are_those_of_their_homes() -> None:
    for name in selfsteer.__all__:
        assert getattr(selfsteer, name).__module__ == selfsteer._HOMES[name]
    with pytest.raises(AttributeError, match="Trainer"):
        _ = selfsteer.Trainer


def test_the_page_about_the_house_names_every_room_in_order() -> None:
    page = (Path(__file__).parents[1] / "docs/house.md").read_text("utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [n.rstrip("/") for cell in cells for n in re.findall(r"`([^`]+)`", cell)]
    assert named == [room for room in ROOMS if room != "__main__"]
