"""`selfsteer run`: the whole method, again, interrupted, contradicted."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from selfsteer.report.tables import sentence
from selfsteer.view import RunView
from tests.e2e.support import (
    PAUSING,
    TINY,
    Here,
    artefacts,
    environment,
    fails,
    finished,
    ledger,
    process,
    spawn,
    wait_until_stopped,
)


def test_a_smoke_run_leaves_everything_design_promises(smoke: Path) -> None:
    for name in (
        "recipe.yaml",
        "resolved.json",
        "ledger.jsonl",
        "metrics.jsonl",
        "evaluation.json",
        "iteration-1/principles.jsonl",
        "iteration-1/triples/shard-00000.jsonl",
        "iteration-1/triples/shard-00001.jsonl",
        "iteration-1/generator/model.safetensors",
        "iteration-1/samples/shard-00000.jsonl",
        "iteration-1/preferences/shard-00000.jsonl",
        "iteration-1/quality.json",
        "iteration-1/policy/model.safetensors",
        "baseline/iteration-1/preferences/shard-00000.jsonl",
        "baseline/iteration-1/policy/model.safetensors",
    ):
        assert (smoke / name).is_file(), name
    assert not list(smoke.rglob("*.partial"))


def test_every_stage_accounts_for_each_record(smoke: Path) -> None:
    entries = finished(smoke)
    assert list(entries)[:3] == ["queries", "iteration-1/principles", "iteration-1/triples"]
    for entry in entries.values():
        assert entry["n_in"] == entry["n_out"] + sum(entry["dropped"].values()), entry
    lines = (smoke / "iteration-1/preferences/shard-00000.jsonl").read_text().splitlines()
    assert len(lines) <= entries["iteration-1/preferences"]["n_out"]
    record = json.loads(lines[0])
    assert [t["role"] for t in record["prompt"]] == ["user"]
    assert record["chosen"][0]["role"] == "assistant"
    assert "principles" not in record


def test_the_ledger_counts_what_became_of_each_principle(smoke: Path) -> None:
    entry = finished(smoke)["iteration-1/principles"]
    assert sum(entry["notes"]["sources"].values()) == entry["n_out"] == 16


def test_quality_reports_every_figure(smoke: Path) -> None:
    report = json.loads((smoke / "iteration-1" / "quality.json").read_text())
    for kind in ("preferences", "triples"):
        figures = report[kind]
        assert 0 <= figures["accuracy"] <= 1
        assert sum(figures["verdicts"].values()) == figures["pairs"]
        assert 0 < figures["on_policyness"]["rejected"] < 1
        assert set(figures["steering_gap"]) == {"good", "bad"}
    assert "plain" in report["triples"]["on_policyness"]


def test_every_file_has_the_mode_that_the_umask_gives(smoke: Path) -> None:
    wanted = (smoke / "ledger.jsonl").stat().st_mode
    assert [p for p in smoke.rglob("*") if p.is_file() and p.stat().st_mode != wanted] == []


def test_the_same_command_again_has_nothing_to_do(smoke: Path, here: Here) -> None:
    before = artefacts(smoke)
    ended = here("run", "smoke", f"runs_dir={smoke.parent}", "name=done", "seed=7", *TINY)
    assert ended.code == 0
    assert "nothing to do" in ended.err
    assert "to watch:" not in ended.err
    assert artefacts(smoke) == before


def test_a_run_says_what_is_about_to_happen_and_shows_what_became_of_an_answer(
    tmp_path: Path, here: Here
) -> None:
    more = (f"runs_dir={tmp_path}", "seed=7", *TINY)
    assert here("run", "smoke", "--until", "queries", *more).code == 0
    ended = here("run", "smoke", *more)
    first, second, *_ = ended.err.splitlines()
    assert first.startswith("sso, with pbaa beside it: 14 stages, 1 of them done, in ")
    assert second.startswith(f"to watch: selfsteer view {tmp_path}")
    assert "Before and after" in ended.out


def test_a_run_folder_can_be_given_instead_of_its_recipe(smoke: Path, here: Here) -> None:
    ended = here("run", smoke, "--dry-run", "--json")
    assert ended.code == 0
    assert set(json.loads(ended.out).values()) == {"done"}


def test_a_run_that_goes_on_by_its_folder_supersedes_nothing(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert here("run", "smoke", "--until", "queries", *TINY).code == 0
    assert here("run", "runs/smoke", "--until", "queries").code == 0
    assert not Path("runs/smoke/superseded").exists()
    assert here("run", "runs/smoke", "--until", "queries", "training.row_tokens=512").code == 0
    (_kept,) = Path("runs/smoke/superseded").glob("recipe-*")


def test_a_recipe_that_would_change_finished_work_is_refused(smoke: Path, here: Here) -> None:
    before = artefacts(smoke)
    ended = here("run", smoke, "sampling.temperature=0.5")
    fails(ended, 2, "iteration-1/triples", "--redo")
    assert artefacts(smoke) == before


def test_redo_moves_the_old_work_aside_and_does_it_again(tmp_path: Path, here: Here) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=r", "--until", "triples", *TINY)
    assert here(*args).code == 0
    old = (tmp_path / "r/iteration-1/triples/shard-00000.jsonl").read_bytes()
    principles = (tmp_path / "r/iteration-1/principles.jsonl").read_bytes()
    assert here(*args, "sampling.temperature=0.2", "--redo").code == 0
    assert (tmp_path / "r/iteration-1/triples/shard-00000.jsonl").read_bytes() != old
    assert (tmp_path / "r/iteration-1/principles.jsonl").read_bytes() == principles
    kept = list((tmp_path / "r/superseded").glob("*/iteration-1/triples/shard-00000.jsonl"))
    assert [p.read_bytes() for p in kept] == [old]


def test_until_stops_behind_the_stage_and_the_rest_follows(tmp_path: Path, here: Here) -> None:
    args = ("run", "pbaa", "policy.model=package:selfsteer.testbed/checkpoint", "name=u")
    data = ("queries.path=package:selfsteer.testbed/queries/align.jsonl", "queries.limit=8")
    small = ("sampling.max_new_tokens=64", "principles.max_new_tokens=64", f"runs_dir={tmp_path}")
    assert here(*args, *data, *small, "--until", "samples").code == 0
    assert list(finished(tmp_path / "u"))[-1] == "iteration-1/samples"
    assert here(*args, *data, *small).code == 0
    assert list(finished(tmp_path / "u"))[-1] == "iteration-1/policy"
    fails(here(*args, *data, *small, "--until", "smaples"), 2, "smaples", "principles")


@pytest.mark.parametrize(
    ("stage", "seconds"),
    [
        pytest.param("iteration-1/principles", 0.3, marks=pytest.mark.slow),
        pytest.param("iteration-1/triples", 0.6, marks=pytest.mark.slow),
        pytest.param("iteration-1/generator", 0.4, marks=pytest.mark.slow),
        pytest.param("iteration-1/policy", 0.3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_like_an_undisturbed_one(
    smoke: Path, tmp_path: Path, stage: str, seconds: float
) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=done", "seed=7", *TINY)
    with process(*args) as running:
        path = tmp_path / "done" / "ledger.jsonl"
        for _ in range(6000):
            if path.exists() and f'"begin", "stage": "{stage}"' in path.read_text():
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"{stage} never began")
        time.sleep(seconds)
        running.kill()
    assert "evaluation" not in finished(tmp_path / "done")
    ended = spawn(*args)
    assert ended.returncode == 0, ended.stderr
    mine, undisturbed = artefacts(tmp_path / "done"), artefacts(smoke)
    assert mine.keys() == undisturbed.keys()
    assert [n for n in mine if mine[n] != undisturbed[n]] == []


def test_ctrl_c_says_so_and_loses_nothing(tmp_path: Path) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=c", *TINY)
    with process(*args) as running:
        path = tmp_path / "c" / "ledger.jsonl"
        while not (path.exists() and '"stage": "iteration-1/triples"' in path.read_text()):
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    last = err.strip().splitlines()[-1]
    assert last.startswith("selfsteer: interrupted")
    assert last.endswith(f"Go on with: selfsteer run {tmp_path / 'c'}")
    assert "Traceback" not in err
    assert "iteration-1/principles" in finished(tmp_path / "c")


# an interrupt anywhere may leave a file to the collector, or the console in the middle of a line,
# which ends with a process of its own, but not here
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_stops_in_time_and_the_same_command_ends_it(tmp_path: Path, here: Here) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=t", *TINY, "--until-time")
    fails(here(*args, "1s"), 75, "the time is up", "Go on with", str(tmp_path / "t"))
    done = finished(tmp_path / "t")
    assert "evaluation" not in done
    ended = here(*args, "1h")
    assert ended.code == 0, ended.err
    again = finished(tmp_path / "t")
    assert "evaluation" in again
    assert {n: again[n] for n in done} == done
    fails(here(*args, "soon"), 2, "--until-time takes a time such as 110m", "'soon'")


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=l", *TINY)
    with process(*args) as running:
        while not (tmp_path / "l" / "ledger.jsonl").exists():
            assert running.poll() is None
            time.sleep(0.05)
        second = spawn(*args)
        assert running.poll() is None, "the first run ended before the second was tried"
        assert second.returncode == 3
        assert f"process {running.pid} on" in second.stderr


@pytest.mark.slow
def test_two_runs_at_once_do_not_disturb_each_other(tmp_path: Path, here: Here) -> None:
    """In one ``runs_dir``, on the same queries: the first ends while the second is in a stage."""
    tiny = [s for s in TINY if not s.startswith(("generator", "evaluation"))]
    only = ("baseline=null", "generator=null", "evaluation=null", "judge=null")

    def arguments(method: str, runs: Path) -> tuple[str, ...]:
        given = (f"runs_dir={runs}", f"name={method}", f"method={method}")
        return ("run", "smoke", *given, *only, *tiny)

    def made(run: Path) -> dict[str, bytes]:
        found = (run / "iteration-1").rglob("*.*")
        wanted = (p for p in found if p.suffix in (".jsonl", ".safetensors"))
        return {str(p.relative_to(run)): p.read_bytes() for p in wanted}

    methods, alone, both = ("pbaa", "contrast"), tmp_path / "alone", tmp_path / "both"
    for method in methods:
        ended = here(*arguments(method, alone))
        assert ended.code == 0, ended.err
    first, second = (arguments(method, both) for method in methods)
    with (
        process("iteration-1/samples", *first, program=PAUSING) as one,
        process("iteration-1/policy", *second, program=PAUSING) as two,
    ):
        for running in (one, two):
            wait_until_stopped(running)
        for running in (one, two):
            running.send_signal(signal.SIGCONT)
            _, said = running.communicate()
            assert running.returncode == 0, said
    for method in methods:
        assert made(both / method) == made(alone / method)
        assert "iteration-1/policy/model.safetensors" in made(both / method)


def test_the_method_is_named_by_the_recipe(tmp_path: Path, here: Here) -> None:
    """Online: disjoint slices, six sequences, the filter counted, PBAA beside it."""
    ended = here(
        "run",
        "smoke",
        f"runs_dir={tmp_path}",
        "name=online",
        "method=sso-online",
        "generator=null",
        "iterations=2",
        "training.base=ipo",
        "training.beta=0.2",
        *[s for s in TINY if not s.startswith("generator")],
        "queries.limit=49",
        "sampling.shard_size=24",
        "filter.near_on_policy={quantile: 0.1}",  # the means would leave two or none of 24
        "filter.gap={quantile: 0.1}",
    )
    assert ended.code == 0, ended.err
    run = tmp_path / "online"
    ids = [
        {
            json.loads(line)["id"]
            for line in (run / f"iteration-{k}/principles.jsonl").read_text().splitlines()
        }
        for k in (1, 2)
    ]
    assert [len(i) for i in ids] == [24, 25], "no query is left out"
    assert not ids[0] & ids[1]
    assert max(ids[0]) < min(ids[1])
    entry = finished(run)["iteration-1/filter"]
    steps = entry["notes"]["survivors"]
    assert list(steps) == ["in", "hygiene", "steering_order", "off_policy", "small_gap", "lengths"]
    left = list(steps.values())
    assert left == sorted(left, reverse=True)
    assert (left[0], left[-1]) == (24, entry["n_out"])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mine = [m for m in metrics if m["stage"] == "iteration-1/policy"]
    assert {"rewards/margins/plain", "rewards/margins/good", "rewards/margins/bad"} <= set(mine[0])
    assert "weight" in mine[0]
    theirs = [m for m in metrics if m["stage"] == "baseline/iteration-1/policy"]
    assert "rewards/margins" in theirs[0]
    models = json.loads((run / "evaluation.json").read_text())["models"]
    assert list(models) == [
        "base",
        "sso-online/iteration-1",
        "sso-online/iteration-2",
        "pbaa/iteration-1",
        "pbaa/iteration-2",
    ]


def test_a_run_folder_keeps_the_order_of_its_baselines(tmp_path: Path, here: Here) -> None:
    """The first one's rounds are in ``baseline/``, whatever it is called."""
    given = ("smoke", f"runs_dir={tmp_path}", "name=b", "baseline={pbaa: {}, contrast: {}}")
    ended = here("run", *given, "--until", "queries")
    assert ended.code == 0, ended.err
    plans = (here("run", *args, "--dry-run", "--json") for args in ((*given,), (tmp_path / "b",)))
    of_recipe, of_folder = (json.loads(ended.out) for ended in plans)
    assert of_folder == of_recipe
    assert list(RunView.open(tmp_path / "b").recipe.homes) == ["sso", "pbaa", "contrast"]


@pytest.mark.slow
def test_several_baselines_stand_beside_the_method(tmp_path: Path, here: Here) -> None:
    ended = here(
        "run",
        "smoke",
        f"runs_dir={tmp_path}",
        "name=b",
        "baseline={good-over-plain: {}, contrast: {contrast: {top_k: 64}}}",  # not in ABC order
        *TINY,
    )
    assert ended.code == 0, ended.err
    folder = tmp_path / "b"
    found = json.loads((folder / "evaluation.json").read_text())
    others = ("good-over-plain", "contrast")
    assert list(found["finals"]) == ["sso", *others]
    assert [d["of"] for d in found["differences"]] == [f"sso - {other}" for other in others]
    said = sentence(RunView.open(folder))
    assert said in " ".join(ended.out.split())
    for other, difference in zip(others, found["differences"], strict=True):
        assert f"{abs(difference['score'][0]):.3f}" in said
        assert other in said
    again = here("run", folder)
    assert again.code == 0, again.err
    shown = here("show", folder)
    for home in ("baseline", "contrast"):
        assert (folder / home / "iteration-1" / "policy" / "model.safetensors").is_file()
        assert f"{home}/iteration-1/policy" in shown.out
    asked = here("chat", folder, "--question", "What does the bee eat?")
    assert all(word in asked.out for word in ("base", "policy", "baseline", "contrast"))
    compared = json.loads(here("compare", folder, "--json").out)
    assert list(compared["entrants"]) == [*others, "sso", "base"]
    page = here("report", folder)
    assert page.code == 0, page.err
    times = (folder / "report" / "times.svg").read_text()
    assert times.count("#8a6d00") > 0, "a third method has a colour of its own"


def test_two_generators_one_per_half(tmp_path: Path, here: Here) -> None:
    ended = here(
        "run",
        "smoke",
        f"runs_dir={tmp_path}",
        "name=h",
        "baseline=null",
        "generator.per_half=true",
        "--until",
        "samples",
        *TINY,
    )
    assert ended.code == 0, ended.err
    halves = tmp_path / "h" / "iteration-1" / "generator"
    plus, minus = (halves / h / "model.safetensors" for h in ("plus", "minus"))
    assert plus.read_bytes() != minus.read_bytes()
    record = json.loads(
        (tmp_path / "h/iteration-1/samples/shard-00000.jsonl").read_text().splitlines()[0]
    )
    assert set(record["responses"]) == {"good", "bad"}


@pytest.mark.slow
def test_the_generator_can_be_dropped_at_the_end(tmp_path: Path, here: Here) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=k", "keep.generator=false", *TINY)
    assert here(*args, "baseline=null").code == 0
    generator = tmp_path / "k" / "iteration-1" / "generator"
    assert not list(generator.glob("*.safetensors"))
    ended = here(*args, "baseline=null")
    assert ended.code == 0
    assert "nothing to do" in ended.err
    shown = here("chat", tmp_path / "k", "--question", "What does the bee eat?")
    assert shown.code == 0, shown.err
    assert "generator" not in shown.out
    # an exhibit is not worth its training, what it sampled is
    ended = here(*args, "baseline=null", "evaluation.bootstrap=500", "--redo")
    assert ended.code == 0, ended.err
    assert "[1/1] evaluation" in ended.err
    assert "no exhibit: the weights of the generator were removed" in ended.err
    shutil.rmtree(tmp_path / "k" / "iteration-1" / "samples")
    listed = here("run", tmp_path / "k", "--dry-run").out
    assert "to do      iteration-1/generator" in listed
    ended = here("run", tmp_path / "k")
    assert ended.code == 0, ended.err
    assert "[1/2] iteration-1/generator" in ended.err
    assert "[2/2] iteration-1/samples" in ended.err
    assert not list(generator.glob("*.safetensors"))


def test_help_and_config_load_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, selfsteer.recipe.sections\n"
        "from selfsteer import cli\n"
        "sys.argv = ['selfsteer', 'run', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "--dry-run" in ended.stdout


def test_a_torn_ledger_line_does_not_stop_the_run(tmp_path: Path, here: Here) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=t", "--until", "principles", *TINY)
    assert here(*args).code == 0
    path = tmp_path / "t" / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert here(*args).code == 0
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert json.loads(whole[-1])["event"] == "finish"
    with pytest.raises(json.JSONDecodeError):
        ledger(tmp_path / "t")  # the torn line is still there, and still ignored


@pytest.mark.slow
def test_redo_puts_everything_of_the_old_recipe_aside_even_what_it_does_not_redo(
    tmp_path: Path, here: Here
) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=m", "baseline=null", *TINY)
    assert here(*args, "generator.per_half=true", "--until", "preferences").code == 0
    run = tmp_path / "m"
    plus = (run / "iteration-1/generator/plus/model.safetensors").read_bytes()
    assert here(*args, "--redo", "--until", "triples").code == 0
    assert not (run / "iteration-1/preferences").exists()
    kept = list(run.glob("superseded/*/iteration-1/generator/plus/model.safetensors"))
    assert [p.read_bytes() for p in kept] == [plus]
    assert "iteration-1/preferences" not in here("show", run).out


def test_a_run_folder_can_move(smoke: Path, tmp_path: Path, here: Here) -> None:
    import shutil

    moved = shutil.copytree(smoke, tmp_path / "elsewhere" / "renamed")
    ended = here("run", moved, "--dry-run", "--json")
    assert set(json.loads(ended.out).values()) == {"done"}


def test_more_iterations_keep_the_ones_there_are(smoke: Path, tmp_path: Path, here: Here) -> None:
    import shutil

    more = shutil.copytree(smoke, tmp_path / "more")
    states = json.loads(here("run", more, "iterations=2", "--dry-run", "--json").out)
    assert states["iteration-1/policy"] == "done"
    assert states["iteration-2/principles"] == "to do"
    assert states["evaluation"] == "conflict"


def test_the_judge_is_asked_before_anything_is_sampled(tmp_path: Path, here: Here) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Why is the sky blue?"}\n')
    ended = here("run", "smoke", f"runs_dir={tmp_path}", "name=j", f"queries.path={path}", *TINY)
    assert ended.code == 2
    assert "Why is the sky blue?" in ended.err
    assert not finished(tmp_path / "j")


@pytest.mark.slow
def test_a_kill_while_cleaning_up_after_training_does_no_harm(tmp_path: Path, here: Here) -> None:
    """Checkpoints lose their mark before their files, so a leftover is never resumed from."""
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=w", "baseline=null", *TINY)
    assert here(*args, "--until", "filter").code == 0
    leftover = tmp_path / "w" / "iteration-1" / "generator.partial" / "checkpoint-2"
    leftover.mkdir(parents=True)
    (leftover / "optimizer.pt").write_bytes(b"half")
    assert here(*args, "--until", "generator").code == 0
    assert not leftover.exists()
