"""The style sheet's colours, and how a drawing comes into a page."""

import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfsteer.methods import load_recipe
from selfsteer.report.figures import CURVES, curve, drawing_style, looks, palette, svg_inline
from selfsteer.report.page import asset, environment, security_policy
from selfsteer.report.tables import Sheet, show_cell
from selfsteer.view import RunView
from tests.make import SMALL, entry, write_jsonl

MARKS = ("plain", "good", "bad", "base", "method-1", "method-2", "method-3")


def tokens(scheme: int) -> dict[str, str]:
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", asset("style.css"))
    return {name: both[scheme] for name, *both in pairs}


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_marks_and_text_can_be_told_from_their_ground(scheme: int) -> None:
    c = tokens(scheme)
    for ground in ("ground", "surface"):
        assert min(contrast(c[name], c[ground]) for name in MARKS) >= 3
        assert min(contrast(c[name], c[ground]) for name in ("text", "muted", "link")) >= 4.5


def test_a_colour_stands_for_one_token() -> None:
    """A drawing's colours are turned back into tokens."""
    assert set(MARKS) <= set(palette())
    assert all(a.lower() != b.lower() for a, b in combinations(palette().values(), 2))


def test_an_inline_drawing_has_variables_and_ids_of_its_own() -> None:
    file = (
        '<?xml version="1.0"?><svg width="9pt" viewBox="0 0 9 9"><metadata>x</metadata>'
        f'<g id="mark-0"><path style="fill: {palette()["good"]}"/></g>'
        '<g id="patch_1"><use xlink:href="#p1" clip-path="url(#c1)"/></g>'
        "<text style=\"font: 8px 'DejaVu Sans'; text-anchor: middle\">a</text></svg>"
    )
    found = svg_inline("loss", file)
    assert found.startswith('<svg viewBox="0 0 9 9" role="img" aria-labelledby="loss-title"')
    assert '<g class="mark" id="loss-mark-0"><path style="fill: var(--good)"/>' in found
    assert 'id="loss-patch_1"><use xlink:href="#loss-p1" clip-path="url(#loss-c1)"/>' in found
    assert "metadata" not in found
    assert 'style="font-size: 8px; text-anchor: middle"' in found


def test_the_policy_allows_the_page_s_own_script_and_no_network() -> None:
    policy = security_policy(["1"])
    assert "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert environment().from_string("{{ x }}").render(x="</script>") == "&lt;/script&gt;"


def test_cells() -> None:
    shown: list[Any] = [0.5, 12.34, 1326, 12345.6, 2.0, 0.0, [0.1, None, None], None, "x"]
    assert [show_cell(v) for v in shown] == [
        "0.500", "12.3", "1,326", "12,346", "2.000", "0.000", "0.100", "", "x",
    ]  # fmt: skip
    sheet = Sheet("", ("a", "b", "c"), [("x", 1, None), ("y", None, None)])
    assert [sheet.is_number(i) for i in range(3)] == [False, True, False]


def test_no_two_methods_of_a_run_look_the_same() -> None:
    run: Any = SimpleNamespace(methods=tuple("abcdefgh"))
    found = looks(run)
    assert list(found) == ["base", *"abcdefgh"]
    assert len(set(found.values())) == 9


@pytest.mark.parametrize(
    ("given", "said", "unsaid"),
    [
        (["training.reference=iteration"], ["starts at zero"], ["per token", "first policy"]),
        (["training.reference=first"], ["starts at zero", "the first policy"], ["per token"]),
        (["training.base=simpo"], ["per token"], ["at zero", "moved apart", "first policy"]),
        (["training.base=orpo"], ["per token", "should rise"], ["zero", "first"]),
        (
            ["training.base=simpo", "baseline={sso-online: {training: {base: ipo}}}"],
            ["starts at zero", "With base simpo: β times how much likelier per token"],
            [],
        ),
    ],
)
def test_the_caption_of_margins_says_what_the_base_compares(
    tmp_path: Path, given: list[str], said: list[str], unsaid: list[str]
) -> None:
    recipe = load_recipe("pbaa", [*SMALL, "iterations=2", "training.beta=2", *given])
    line = {"stage": "iteration-1/policy", "step": 1, "loss": 0.4, "rewards/margins": 1.2}
    write_jsonl(tmp_path / "metrics.jsonl", line)
    (tmp_path / "resolved.json").write_text(recipe.model_dump_json())
    stage = entry("finish", "iteration-1/policy", "Train") | {"method": "pbaa"}
    write_jsonl(tmp_path / "ledger.jsonl", stage)
    (margins,) = (spec for spec in CURVES if spec.name == "margins")
    with drawing_style():
        caption = curve(RunView.open(tmp_path), margins).caption
    assert all(text in caption for text in said)
    assert not any(text in caption for text in unsaid)
