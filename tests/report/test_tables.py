"""What the tables of a run hold, for the terminal and the page alike."""

from pathlib import Path

import pytest

from selfsteer.data.jsonl import dump_lines
from selfsteer.report import summary, tables
from selfsteer.report.document import content
from selfsteer.view import RunView
from tests.make import entry
from tests.test_view import make


def test_what_stages_warned_of_is_shown_wherever_a_run_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = {
        "iteration-1/triples": {"warnings": ["12% of 50 good answers are empty."]},
        "iteration-1/policy": {"selection": {"text": "step 1 kept", "warnings": ["it loses"]}},
        "iteration-1/quality": {},
    }
    lines = [entry("finish", stage, "Sample", notes=said) for stage, said in notes.items()]
    run = RunView.open(make(tmp_path, dump_lines(lines)))
    rows = [
        ("iteration-1/triples", "12% of 50 good answers are empty."),
        ("iteration-1/policy", "it loses"),
    ]
    assert tables.warnings(run).rows == rows
    summary.print_show(run)
    said = " ".join(capsys.readouterr().out.split())
    for stage, text in rows:
        assert f"warning: {stage}: {text}" in said
    (result,) = (s for s in content(run, [], [])["sections"] if s["anchor"] == "result")
    assert tables.warnings(run) in result["sheets"]
