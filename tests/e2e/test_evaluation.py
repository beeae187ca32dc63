"""What an evaluation says where there is little to go by."""

import json
from pathlib import Path
from typing import Any

from tests.e2e.support import TINY, Here, finished


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def test_one_query_has_figures_without_intervals_and_long_prompts_are_counted(
    tmp_path: Path, here: Here
) -> None:
    """The model's context is 512 tokens; the long prompt has more, the short one is answered."""
    held_out = tmp_path / "held-out.jsonl"
    prompts = ["What does the bee eat?", "What does the bee eat? " * 100]
    lines = [{"id": f"h{i}", "prompt": p} for i, p in enumerate(prompts)]
    held_out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "runs" / "one"
    ended = here(
        "run", "smoke", f"runs_dir={run.parent}", "name=one", *TINY, "queries.limit=8",
        f"evaluation.queries.path={held_out}", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    json.loads(ended.out, parse_constant=no_constant)
    text = (run / "evaluation.json").read_text()
    found = json.loads(text, parse_constant=no_constant)
    assert found["queries"] == 1
    assert finished(run)["evaluation"]["dropped"] == {"prompt_too_long": 1}
    for figures in found["models"].values():
        assert figures["score"][0] > 0
        assert figures["score"][1:] == [None, None]
    assert found["models"]["sso/iteration-1"]["win_rate"][1:] == [None, None]
    assert found["differences"][0]["score"][1:] == [None, None]
    shown = here("show", run)
    assert "nan" not in shown.out
    assert "one query decides nothing" in shown.out
    card = tmp_path / "card"
    assert here("export", run, "--model", "--to", card).code == 0
    assert "nan" not in (card / "README.md").read_text()
