"""Benchmarks through the command line: own tasks of the harness, and judged sets."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsteer.evaluation import harness
from selfsteer.methods import load_recipe
from selfsteer.recipe.read import recipe_text
from tests.e2e.support import TESTBED, Here, fails, finished
from tests.fakes import serving

QUIZ = [
    {"q": "What does the bee eat?", "a": "nectar", "choices": ["nectar", "bricks"], "gold": 0},
    {"q": "What does the owl eat?", "a": "mice", "choices": ["stones", "mice"], "gold": 1},
    {"q": "Is the owl bigger than the goat?", "a": "No", "choices": ["Yes", "No"], "gold": 1},
    {"q": "Is the goat bigger than the owl?", "a": "Yes", "choices": ["Yes", "No"], "gold": 0},
]
SMALL = ("--set", "policy.threads=1", "--set", "sampling.max_new_tokens=48")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task of each kind, on a local file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows(folder / "quiz.jsonl", *QUIZ)
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "quiz.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    say = {
        **shared,
        "task": "tiny_say",
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48},
        "filter_list": [
            {
                "name": "word",
                "filter": [
                    {"function": "regex", "regex_pattern": "(nectar|mice|No|Yes)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    pick = {
        **shared,
        "task": "tiny_pick",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    missing = {
        **pick,
        "task": "tiny_missing",
        "dataset_kwargs": {"data_files": {"test": "no.jsonl"}},
    }
    roll = {
        **shared,
        "task": "tiny_roll",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    mcc = {**pick, "task": "tiny_mcc", "metric_list": [{"metric": "mcc"}]}
    for task in (say, pick, missing, roll, mcc):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


def rows(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "benchmarks.json").read_text())
    return found


def column(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = [c for c in found["benchmarks"] if c["name"] == name]
    return dict(one["models"])


def test_a_run_ends_with_one_table_of_tasks_and_judged_sets(
    smoke: Path, tasks: Path, tmp_path: Path, here: Here
) -> None:
    questions = rows(
        tmp_path / "hard.jsonl",
        *({"id": str(i), "turns": [r["q"], "Describe Vietnam."]} for i, r in enumerate(QUIZ)),
    )
    single = rows(tmp_path / "easy.jsonl", *({"prompt": r["q"]} for r in QUIZ))
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    judged = [f"alpaca-eval:{single}", f"mt-bench:{questions}"]
    asked = {"tasks": ["tiny_say", "tiny_pick"], "task_folders": [str(tasks)], "judged": judged}
    ended = here("run", run, f"benchmarks={json.dumps(asked)}", "--json")
    assert ended.code == 0, ended.err
    assert finished(run)["benchmarks"]["n_out"] == 12
    found = report(run)
    assert json.loads(ended.out)["benchmarks"] == found
    assert list(found["models"]) == ["base", "pbaa", "sso"]
    for name in ("tiny_say", "tiny_pick"):
        for figures in column(found, name).values():
            right = figures["score"] * 4
            assert right == round(right)
            # the harness' standard error of a share of n: sqrt(p (1 - p) / (n - 1))
            p = figures["score"]
            assert figures["stderr"] == pytest.approx((p * (1 - p) / 3) ** 0.5)
    assert column(found, "tiny_pick")["base"]["metric"] == "acc,none"
    assert "acc_norm,none" in column(found, "tiny_pick")["base"]["all"]
    assert set(column(found, "easy")) == {"pbaa", "sso"}  # base is what they are held against
    assert set(column(found, "hard")["base"]["turns"]) == {"1", "2"}
    pairs = {(d["benchmark"], *d["of"]) for d in found["differences"]}
    assert ("tiny_say", "sso", "base") in pairs
    assert ("easy", "sso", "pbaa") in pairs
    # the verb finds the run's models and settings, and what they did
    again = here("benchmark", run, "--task", "tiny_say", "--task-folder", tasks, "--to", run / "b",
                 "--json")  # fmt: skip
    assert column(json.loads(again.out), "tiny_say") == column(found, "tiny_say")
    table = (run / "benchmarks.md").read_text()
    heads = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert heads == ["model", "tiny_say", "tiny_pick", "easy LC win rate", "easy win rate", "hard"]
    assert table in here("show", run).out
    # a benchmark that is added costs only itself; what is there is not computed again
    cells = {p: p.stat().st_mtime_ns for p in run.glob("benchmarks/*/tiny_*.json")}
    assert len(cells) == 6
    more = {**asked, "tasks": ["tiny_say", {"name": "tiny_pick", "fewshot": 1}]}
    fails(here("run", run, f"benchmarks={json.dumps(more)}"), 2, "made with other settings")
    ended = here("run", run, f"benchmarks={json.dumps(more)}", "--redo")
    assert ended.code == 0, ended.err
    assert len(list(run.glob("benchmarks/*/tiny_*.json"))) == 9
    assert {p: p.stat().st_mtime_ns for p in cells} == cells
    assert column(report(run), "tiny_say") == column(found, "tiny_say")


def test_a_task_is_asked_again_once_its_data_is_another(
    tasks: Path, tmp_path: Path, here: Here
) -> None:
    own = rows(tmp_path / "elsewhere.jsonl", *QUIZ[:2])
    task = yaml.safe_load((tasks / "tiny_say.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(own)
    folder = tmp_path / "own"
    folder.mkdir()
    tagged = "process_docs: !function none.fn\n"  # not what its data is read without
    (folder / "tiny_other.yaml").write_text(f"task: tiny_other\n{tagged}")
    (folder / "tiny_say.yaml").write_text(yaml.safe_dump(task))
    args = ("benchmark", TESTBED, "--task", "tiny_say", "--task-folder", folder,
            "--to", tmp_path / "out", *SMALL, "--json")  # fmt: skip
    assert column(json.loads(here(*args).out), "tiny_say")[TESTBED]["questions"] == 2
    rows(own, *QUIZ[:3])
    assert column(json.loads(here(*args).out), "tiny_say")[TESTBED]["questions"] == 3
    # the file that a task includes is no .yaml, as in the harness itself
    (folder / "tiny_say.yaml").rename(folder / "_say")
    (folder / "tiny_say.yaml").write_text("include: _say\ntask: tiny_say\n")
    assert column(json.loads(here(*args).out), "tiny_say")[TESTBED]["questions"] == 3
    rows(own, *QUIZ[:4])
    assert column(json.loads(here(*args).out), "tiny_say")[TESTBED]["questions"] == 4


def test_data_count_of_tasks_within_a_group_and_beside_the_results(
    tasks: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = yaml.safe_load((tasks / "tiny_say.yaml").read_text()) | {"task": "inner_say"}
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    own, folder = tmp_path / "project/test.jsonl", tmp_path / "own"
    folder.mkdir()
    args = ("benchmark", TESTBED, "--task", "mine", "--task-folder", folder, *SMALL, "--json")
    for name, where in (
        ("file", {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(own)}}}),
        ("folder", {"dataset_path": str(own.parent), "dataset_kwargs": None}),
    ):
        group = {
            "group": "mine",
            "task": [task | where],
            "aggregate_metric_list": [{"metric": "exact_match", "weight_by_size": True}],
        }
        (folder / "mine.yaml").write_text(yaml.safe_dump(group))
        for count in (2, 3):
            rows(own, *QUIZ[:count])
            ended = here(*args, "--to", f"out-{name}")
            assert ended.code == 0, ended.err
            assert column(json.loads(ended.out), "mine")[TESTBED]["questions"] == count
        told = "in which this command runs" in " ".join(ended.err.split())
        assert told == (name == "folder")


def test_a_task_whose_scoring_lacks_its_data_is_named(
    tasks: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*args: Any, **more: Any) -> None:
        raise LookupError("Resource punkt_tab not found.")

    monkeypatch.setattr("lm_eval.evaluator.evaluate", lacking)
    named = ("--task", "tiny_say", "--task-folder", tasks)
    ended = here("benchmark", TESTBED, *named, "--to", tmp_path / "out", *SMALL)
    fails(ended, 3, "tiny_say cannot be asked here: Resource punkt_tab not found")


def test_a_request_that_failed_is_sent_again(tmp_path: Path, here: Here) -> None:
    two = ({"turns": [r["q"], "Describe Vietnam."]} for r in QUIZ[:2])
    questions = rows(tmp_path / "q.jsonl", *two)
    args = ("benchmark", TESTBED, "--judged", f"mt-bench:{questions}", "--judge", "oracle",
            "--to", tmp_path / "out", *SMALL, "--json")  # fmt: skip
    before = here(*args)
    assert before.code == 0, before.err
    (stored,) = (tmp_path / "out").glob("benchmarks/*/q-*.answers.jsonl")
    text = stored.read_text()
    first, second = map(json.loads, text.splitlines())
    lost = {**second, "responses": [], "finish_reasons": [], "missing": "request_failed:timeout"}
    rows(stored, first, lost)
    assert here(*args).out == before.out
    assert [json.loads(line) for line in stored.read_text().splitlines()] == [first, second]


def test_tasks_without_answers_and_metrics_without_a_mean_leave_stdout_to_the_results(
    tasks: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESAMPLES", 10)

    def forked(*args: Any) -> None:
        raise AssertionError("a pool forks the model")

    monkeypatch.setattr("multiprocessing.Pool", forked)
    names = ("--task", "tiny_roll", "--task", "tiny_mcc", "--task-folder", tasks)
    ended = here("benchmark", TESTBED, *names, "--to", tmp_path / "out", *SMALL, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    rolled = column(found, "tiny_roll")[TESTBED]
    assert rolled["metric"] == "bits_per_byte,none"
    assert rolled["score"] > 0
    assert column(found, "tiny_mcc")[TESTBED]["stderr"] is not None


@pytest.mark.parametrize("template", [True, False])
def test_tasks_are_asked_through_the_chat_template(
    tasks: Path, tmp_path: Path, here: Here, template: bool
) -> None:
    one_example = "{name: tiny_pick, fewshot: 1}"
    asked = ("--task", "tiny_say", "--task", one_example, "--task-folder", tasks, "--to", tmp_path)
    ended = here(
        "benchmark", TESTBED, *asked, "--set", f"benchmarks.chat_template={template}", *SMALL
    )
    assert ended.code == 0, ended.err
    say, pick = (
        json.loads(next(tmp_path.glob(f"benchmarks/*/{name}-*.json")).read_text())["examples"]
        for name in ("tiny_say", "tiny_pick")
    )
    assert [e["target"] for e in say] == [r["a"] for r in QUIZ]
    question = QUIZ[0]["q"]
    if template:
        assert say[0]["prompt"] == f"<user>{question}<asst>"
        # the worked example is an exchange of its own, ended as the template ends one
        shown, _, asked = pick[0]["prompt"].partition("<eos>")
        assert shown.count("<user>") == shown.count("<asst>") == 1
        assert asked == f"<user>{question}<asst>"
    else:
        assert say[0]["prompt"] == question
        assert "<user>" not in pick[0]["prompt"]


def test_a_task_without_data_is_named_and_the_others_still_run(
    tasks: Path, tmp_path: Path, here: Here
) -> None:
    to = tmp_path / "out"
    names = ("--task", "tiny_missing", "--task", "tiny_pick")
    args = ("benchmark", TESTBED, *names, "--task-folder", tasks, "--to", to, *SMALL)
    fails(here(*args), 3, "Task tiny_missing cannot be asked here", "no.jsonl", "1 of 2 are in")
    assert column(report(to), "tiny_pick")[TESTBED]["score"] >= 0.5
    rows(tasks / "no.jsonl", *QUIZ)
    text = (tasks / "tiny_missing.yaml").read_text()
    (tasks / "tiny_missing.yaml").write_text(text.replace("no.jsonl", str(tasks / "no.jsonl")))
    assert here(*args).code == 0
    found = report(to)
    assert column(found, "tiny_missing")[TESTBED]["score"] == pytest.approx(
        column(found, "tiny_pick")[TESTBED]["score"]
    )


def test_what_cannot_work_is_said_before_anything_is_asked(
    tasks: Path, tmp_path: Path, here: Here
) -> None:
    def ended(*args: Any) -> Any:
        return here("benchmark", TESTBED, "--to", tmp_path / "out", *SMALL, *args)

    pick = ("--task", "tiny_pick", "--task-folder", tasks)
    fails(ended(), 2, "names neither tasks nor judged sets")
    fails(ended(*pick, "--task", "tiny_pick"), 2, "two benchmarks are called 'tiny_pick'")
    fails(ended("--task", "tiny_pick", "--task-folder", tmp_path / "no"), 2, "there is no folder")
    fails(
        ended(*pick, "--set", "benchmarks.temperature=1"),
        2,
        "temperature has no effect without judged",
    )
    fails(ended(*pick, "--set", "training.beta=1"), 2, "has no effect here")
    questions = rows(tmp_path / "q.jsonl", {"prompt": "What does the bee eat?"})
    fails(ended("--judged", f"alpaca-eval:{questions}"), 2, "needs a judge")
    fails(ended("--judged", f"alpaca-eval:{questions}", "--judge", "oracle"), 2, "no baseline")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text(recipe_text("smoke"))
    (unfinished / "resolved.json").write_text(load_recipe("smoke").model_dump_json())
    fails(here("benchmark", unfinished, *pick), 2, "no trained policy yet")
    fails(ended("--judged", f"chatbot:{questions}", "--judge", "oracle"), 2, "alpaca-eval")
    fails(ended("--judged", "mt-bench:no.jsonl", "--judge", "oracle"), 2, "no.jsonl")
    odd = rows(tmp_path / "odd.jsonl", {"prompt": "What is the meaning of life?"})
    fails(ended("--judged", f"mt-bench:{odd}", "--judge", "oracle"), 2, "meaning of life")
    wrong = "{name: tiny_pick, metric: f1}"
    fails(ended("--task", wrong, "--task-folder", tasks), 2, "no metric f1", "acc,none")
    fails(here("benchmark", tmp_path / "none", *pick), 3, "no model folder")
    assert not (tmp_path / "out" / "benchmarks.json").exists()


def test_a_chat_judge_on_a_server_is_asked_once(tmp_path: Path, here: Here) -> None:
    """Both orders, ratings of both turns, margins; a second try asks nothing."""
    single = rows(
        tmp_path / "easy.jsonl", *({"id": str(i), "prompt": r["q"]} for i, r in enumerate(QUIZ))
    )
    stored = rows(
        tmp_path / "stored.jsonl",
        *({"id": str(i), "output": "Purple." if i else "It eats nectar."} for i in range(3)),
    )
    two = rows(
        tmp_path / "two.jsonl",
        {"id": "t", "turns": [QUIZ[0]["q"], QUIZ[1]["q"]], "category": "food"},
    )

    def answer(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        if "Your rating" in text:
            return "Fair.\nRating: " + ("6" if "assistant:" in text else "9")
        a = text.partition("=== Answer A ===\n")[2]
        known = a.startswith(("Purple.", "It eats nectar."))  # the stored answers always lose
        return f"Reasons.\nMargin: large\nVerdict: {'B' if known else 'A'}"

    with serving() as server:
        server.answer = answer
        judge = f"{{kind: chat, model: canned, engine: {{kind: openai, base_url: '{server.url}'}}}}"
        judged = (
            "--judged", f"{{style: alpaca-eval, questions: {single}, baseline: {stored}}}",
            "--judged", f"{{style: arena-hard, questions: {single}, baseline: {stored}, label: a}}",
            "--judged", f"mt-bench:{two}",
        )  # fmt: skip
        args = ("benchmark", TESTBED, *judged, "--judge", judge, "--to", tmp_path / "out", *SMALL)
        ended = here(*args, "--json")
        assert ended.code == 0, ended.err
        assert len(server.asked) == 2 * 3 + 2 * 3 + 2
        assert here(*args, "--json").out == ended.out
        assert len(server.asked) == 14
    found = json.loads(ended.out)
    for name in ("easy", "a"):
        figures = column(found, name)[TESTBED]
        assert figures["win_rate"][0] == 1.0
        assert figures["dropped"] == {"no_baseline_answer": 1}
        assert figures["length_controlled"]["win_rate"] is None
        assert "found 3 and 0" in figures["length_controlled"]["reason"]
    rated = column(found, "two")[TESTBED]
    assert [rated["turns"]["1"][0], rated["turns"]["2"][0]] == [9.0, 6.0]
    assert rated["score"][0] == rated["categories"]["food"][0] == 7.5
    answers = next((tmp_path / "out").glob("benchmarks/*/two-*.answers.jsonl"))
    (line,) = map(json.loads, answers.read_text().splitlines())
    assert len(line["responses"]) == 2


def test_answers_of_a_run_go_to_the_official_tools(
    smoke: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    questions = rows(
        tmp_path / "question.jsonl",
        *({"question_id": 81 + i, "turns": [r["q"], r["q"]]} for i, r in enumerate(QUIZ[:2])),
    )
    args = ("export", run, "--format", "mt-bench", "--to", tmp_path / "to")
    fails(here(*args), 2, "--questions FILE")
    ended = here(*args, "--questions", questions, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["answers"] == 6
    assert [Path(p).stem for p in found["paths"]] == ["done-base", "done-pbaa", "done-sso"]
    for path in found["paths"]:
        lines = list(map(json.loads, Path(path).read_text().splitlines()))
        assert [line["question_id"] for line in lines] == [81, 82]
        assert all(len(line["choices"][0]["turns"]) == 2 for line in lines)
    # stored in the run: not sampled a second time, and the baseline of other judged sets
    stored = sorted(run.glob("benchmarks/*/question-*.answers.jsonl"))
    assert len(stored) == 3
    monkeypatch.setattr("selfsteer.engines.load.Engines.sampler", None)
    shown = here(*args, "--questions", questions)
    assert shown.code == 0, shown.err
    assert "gen_judgment.py --model-list done-base done-pbaa done-sso" in shown.out
    fails(here(*args, "--questions", questions, "--baseline"), 2, "--baseline")
    fails(here("export", run, "--to", tmp_path / "x", "--questions", questions), 2, "mt-bench")
