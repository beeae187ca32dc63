"""A conversation that the chat template refuses in one context only, beside others it takes."""

import shutil
from pathlib import Path

import pytest

from selfsteer.methods import load_recipe
from selfsteer.recipe.sections import resolve_path
from selfsteer.run.execute import execute
from selfsteer.view import RunView
from tests.make import SMALL

#: Put before a template, it refuses some questions beside a system turn, or without one.
REFUSING = (
    "{{% if 'What' in messages[-1].content and (messages[0].role == 'system') is {} %}}"
    "{{{{ raise_exception('not this') }}}}{{% endif %}}"
)


@pytest.mark.parametrize(
    ("method", "steered", "dropped"),
    [
        ("contrast", "true", {"teacher": "template_refuses", "policy": "no_targets"}),
        ("pbaa", "true", {"samples": "request_failed:template"}),
        ("pbaa", "false", {"policy": "template_refuses"}),
        ("dlma", "false", {"figures": "template_refuses", "policy": "no_figures"}),
    ],
)
def test_a_context_that_the_template_refuses_drops_its_record(
    tmp_path: Path, method: str, steered: str, dropped: dict[str, str]
) -> None:
    tiny = resolve_path("package:selfsteer.testbed/checkpoint")
    model = Path(shutil.copytree(tiny, tmp_path / "m"))
    template = model / "chat_template.jinja"
    template.write_text(REFUSING.format(steered) + template.read_text())
    own = (f"runs_dir={tmp_path}", f"policy.model={model}", "queries.limit=24", "evaluation=null")
    recipe = load_recipe(method, [*SMALL, *own])
    execute(recipe, {"name": "given"})
    run = RunView.open(recipe.folder)
    found = {s.name: dict(s.dropped) for s in run.stages if s.dropped and s.name != "queries"}
    assert found == {f"iteration-1/{name}": {reason: 7} for name, reason in dropped.items()}
