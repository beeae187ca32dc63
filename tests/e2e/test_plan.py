"""`selfsteer plan` of the smoke recipe, and what a smoke run then made."""

import json
from pathlib import Path

import pytest

from selfsteer.run.folder import RunFolder
from tests.e2e.support import TINY, Here, spawn

SIZES = ("--params", "8.03e9", "--layers", "32", "--hidden", "4096", "--vocabulary", "128256")


def test_a_plan_is_near_what_the_run_made(smoke: Path, here: Here) -> None:
    lengths = ("--query-tokens", "20", "--principle-tokens", "60", "--response-tokens", "20")
    given = (f"runs_dir={smoke.parent}", "name=done", "seed=7", *TINY)
    ended = here("plan", "smoke", *given, *lengths, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    made = {e["stage"]: e for e in RunFolder(smoke).ledger() if e["event"] == "finish"}
    rows = {r["stage"]: r for r in found["stages"]}
    assert rows.keys() == made.keys()
    assert rows["queries"]["records"] == 16
    for name, row in rows.items():
        # drops, and what the selection holds out, are not foreseen
        assert 0.5 * row["records"] <= made[name]["n_out"] <= row["records"], name
    models = sum(p.stat().st_size for p in smoke.rglob("*.safetensors"))
    again = here("plan", str(smoke), *lengths, "--json")
    assert json.loads(again.out) == found, "a run folder stands for the recipe in it"
    assert 2 * found["disk"]["models"] == pytest.approx(models, rel=0.02), "bfloat16, but on a CPU"
    data = [p for p in smoke.rglob("*") if p.suffix in (".jsonl", ".npz")]
    texts = sum(p.stat().st_size for p in data if "iteration-1" in p.parts or "scores" in p.parts)
    planned = sum(found["disk"][k] for k in ("samples", "scores", "queries and principles"))
    assert texts / 3 <= planned <= 3 * texts


def test_the_plan_is_printed_with_what_dominates_and_what_was_assumed(
    here: Here, tmp_path: Path
) -> None:
    ended = here("plan", "sso", "--queries", "60000", *SIZES, "--gpus", "8", f"runs_dir={tmp_path}")
    assert ended.code == 0, ended.err
    shown = ended.out
    assert "an estimate" in shown
    assert "sharded" in shown
    assert "over 8" in shown
    assert "most of the time: iteration-1/" in shown
    assert "assumed: 8.03B parameters" in shown
    assert "too much" in shown, "a row of 16,384 tokens without checkpointing"
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_judge_at_a_server_is_in_the_plan(here: Here, tmp_path: Path) -> None:
    engine = "{kind: openai, base_url: 'http://h/v1', price: {input: 1, output: 4}, batch: true}"
    judge = f"judge={{kind: chat, model: m, engine: {engine}}}"
    given = ("plan", "sso", "--queries", "60000", *SIZES, f"runs_dir={tmp_path}", judge)
    ended = here(*given)
    assert ended.code == 0, ended.err
    found = json.loads(here(*given, "--json").out)["totals"]
    assert found["judge"]["requests"] > 0
    shown = " ".join(ended.out.split())
    assert f"judge: {found['judge']['requests']:,} requests, " in shown
    assert f"servers: {found['cost']:,.2f} at their price: judge of iteration-1/quality" in shown


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("sso", "policy.model=some-lab/some-8b", "--queries", "10"), "Give --params"),
        (("sso", "--queries", "10", *SIZES, "--gpu", "k80"), "Unknown GPU 'k80'"),
        (("sso", "policy.model=some-lab/some-8b", *SIZES), "queries.path"),
        (("sso", "--queries", "10"), "policy.model"),
        (("reward", "--queries", "10", *SIZES), "no effect with method reward"),
        (("sso", "--queries", "10", *SIZES, "--params", "1e6"), "leave nothing for its layers"),
        (("sso", "--queries", "10", *SIZES, "--params", "nan"), "--params"),
        (("sso", "--queries", "10", *SIZES, "--params", "0"), "--params"),
        (("sso", "--queries", "10", *SIZES, "--params", "inf"), "--params"),
        (("smoke", "--params", "1e400"), "--params"),
        *(
            (("smoke", f"--{name}", "1" + "0" * 400), f"--{name}")
            for name in (
                *("gpus", "queries", "layers", "hidden", "vocabulary"),
                *("query-tokens", "principle-tokens", "response-tokens"),
            )
        ),
    ],
)
def test_a_plan_says_what_it_lacks(here: Here, args: tuple[str, ...], said: str) -> None:
    ended = here("plan", *args)
    assert ended.code == 2
    assert said in ended.err.replace("\n", " ")


def test_help_of_plan_needs_no_torch() -> None:
    ended = spawn("plan", "--help")
    assert ended.returncode == 0
    assert "--sampling-utilisation" in ended.stdout
