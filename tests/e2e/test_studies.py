"""`selfsteer compare` and `selfsteer audit` on a finished smoke run."""

import json
import shutil
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from selfsteer.data.artifacts import read_json
from selfsteer.data.records import Message, Preference, Query
from selfsteer.errors import ArtifactError, DataError
from selfsteer.methods import Aligning, load_recipe
from selfsteer.models.chat import today
from selfsteer.models.load import load_model
from selfsteer.models.score import score_sequences
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import Loading, resolve_path
from selfsteer.report.logprobs import tokenizer
from selfsteer.run.folder import RunFolder
from selfsteer.stages.filter import named_features
from selfsteer.stages.inputs import stored_triples
from selfsteer.testbed import oracle
from selfsteer.verbs import auditing
from selfsteer.verbs.comparing import Answered, _difference, answering, curves
from selfsteer.view import Quality, RunView
from tests.e2e.support import TESTBED, Here, accepted, fails
from tests.fakes import ScoringFake
from tests.make import SMALL, entry


def report(ended: Any) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text().splitlines() if x]


def test_an_audit_asks_every_model_once_and_counts_what_the_oracle_says(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    args = ("audit", smoke, "--limit", 8, "--to", tmp_path, "--json")
    found = report(here(*args))
    assert found["queries"] == 8
    assert set(found["models"]) == {"base", "generator", "policy", "pbaa"}
    principles = lines(next(tmp_path.glob("principles-*/principles.jsonl")))
    means = set()
    for path in tmp_path.glob("answers-*.jsonl"):
        said = {v["id"]: v["text"] for v in lines(path)}
        scores = [
            oracle.score(p["messages"][-1]["content"], said[f"{p['id']}/bad"]).total
            for p in principles
        ]
        means.add(round(sum(scores) / len(scores), 9))
    assert {round(v["score/bad"], 9) for v in found["models"].values()} == means
    assert json.loads((tmp_path / "audit.json").read_text()) == found
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("answers-*.jsonl")}
    assert len(files) == 4
    assert report(here(*args)) == found
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("answers-*.jsonl")} == files
    with RunFolder(tmp_path).locked():
        fails(here(*args), 3, "is in use by process")
    # what a killed audit has left is of no other settings
    for path in files:
        path.rename(path.with_suffix(".partial"))
    hot = ("--set", "sampling.temperature=2")
    assert report(here(*args, *hot)) == report(here(*args[:-2], tmp_path / "new", "--json", *hot))


def test_a_model_against_itself_has_changed_in_nothing(tmp_path: Path, here: Here) -> None:
    """Judged by the principles that the audit writes for the queries."""
    prompts = tmp_path / "prompts.jsonl"
    names = ("Peru", "Chile", "Japan", "Kenya", "France", "Egypt", "Canada", "India")
    prompts.write_text("".join(f'{{"prompt": "What is the capital of {x}?"}}\n' for x in names))
    ended = here(
        *("audit", TESTBED, "--base", TESTBED, "--queries", prompts),
        *("--judge", f"{{kind: principles, model: '{TESTBED}'}}"),
        *("--to", tmp_path / "out", "--set", "sampling.max_new_tokens=48"),
        *("--set", "principles.mode=picked", "--set", "principles.max_new_tokens=48"),
    )
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "out/audit.json").read_text())
    assert all(v == [0.0, 0.0, 0.0] for v in found["changes"]["policy"]["whole"].values())
    assert "policy: no back door found" in ended.out
    assert "about as much as the base model" in ended.out


def test_an_audit_scores_no_end_that_no_model_said(smoke: Path, tmp_path: Path, here: Here) -> None:
    """By hand from the stored answers, most of which 6 tokens cut off."""
    short = ("--set", "sampling.max_new_tokens=6")
    ended = here("audit", smoke, "--limit", 8, "--to", tmp_path, "--json", *short)
    found = report(ended)
    principles = {
        t.id: t for t in stored_triples(next(tmp_path.glob("principles-*/principles.jsonl")))
    }
    loaded = load_model(resolve_path(TESTBED), Loading(device="cpu"))
    expected = []
    for path in tmp_path.glob("answers-*.jsonl"):
        said = {v["id"]: v for v in lines(path)}
        gaps = []
        for name, t in principles.items():
            answer = said[f"{name}/bad"]
            sequences = [
                loaded.chat.exchange(
                    context_messages(t.messages, t.principles, context),
                    answer["text"],
                    finished=answer["finish_reason"] == "stop",
                )
                for context in ("bad", "good")
            ]
            own, other = score_sequences(loaded.model, sequences)
            gaps.append(float(own.double().mean() - other.double().mean()))
        cut_off = np.mean([v["finish_reason"] == "length" for v in said.values()])
        expected.append((pytest.approx(np.mean(gaps), abs=1e-5), pytest.approx(cut_off)))
    base = found["models"]["base"]
    assert (base["gap/bad"], base["cut_off"]) in expected
    assert base["cut_off"] > 0.5
    assert "many answers are cut off after 6 tokens (base " in ended.err
    shown = here("audit", smoke, "--limit", 8, "--to", tmp_path, *short).out
    assert "cut_off" in shown
    assert "-0.000" not in shown
    long = here(
        "audit", smoke, "--limit", 8, "--to", tmp_path, "--set", "sampling.max_new_tokens=200"
    )
    assert "are cut off" not in long.err


def test_an_audit_without_room_for_prompts_says_what_to_set(tmp_path: Path, here: Here) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is the capital of Peru?"}\n')
    args = ("audit", TESTBED, "--base", TESTBED, "--queries", prompts, "--to", tmp_path / "out")
    picked = ("--set", "principles.mode=picked")
    room = "sampling.max_new_tokens 2048 leaves no room for a prompt"
    fails(here(*args, *picked), 2, room, "sampling.max_new_tokens=256")
    tight = here(*args, *picked, "--set", "sampling.max_new_tokens=500")
    fails(
        tight, 2, "1 prompt_too_long", "sampling.max_new_tokens 500 come after", "Lower it, --set"
    )


def test_an_audit_writes_the_day_of_its_run(
    smoke: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    days: list[str] = []

    def noted(subjects: auditing.Subjects) -> dict[str, Any]:
        days.append(today())
        base = resolve_path(TESTBED)  # whose template writes no date, so that nothing depends on it
        assert auditing._loading(subjects, base)["date"] is None
        raise DataError("enough")

    monkeypatch.setattr(auditing, "_audited", noted)
    monkeypatch.setattr(
        "selfsteer.run.folder.date",
        SimpleNamespace(today=lambda: "2026-03-01", fromisoformat=date.fromisoformat),
    )
    other = shutil.copytree(smoke, tmp_path / "other")
    (other / "day").write_text("2024-02-29\n")
    alone = ("audit", TESTBED, "--base", TESTBED, "--queries", smoke / "queries.jsonl")
    small = ("--set", "sampling.max_new_tokens=64", "--to", tmp_path / "alone")
    for args in (("audit", other), (*alone, *small)):
        fails(here(*args), 2, "enough")
    (tmp_path / "alone" / "day").write_text("2026-02-28\n")  # begun on the day before
    fails(here(*alone, *small), 2, "enough")
    assert days == ["2024-02-29", "2026-03-01", "2026-02-28"]


def test_an_audit_says_what_it_lacks(smoke: Path, here: Here) -> None:
    fails(here("audit", TESTBED), 2, "--base")
    fails(here("audit", TESTBED, "--base", TESTBED), 2, "--queries FILE")
    fails(here("audit", smoke, "--base", TESTBED), 2, "names its own base")
    fails(here("audit", smoke, "--set", "training.beta=1"), 2, "has no effect here")
    server = "sampling.engine={kind: openai, base_url: 'http://127.0.0.1:9/v1', model: m}"
    given = ("--base", TESTBED, "--queries", smoke / "queries.jsonl")
    fails(here("audit", TESTBED, *given, "--set", "method=pbaa"), 2, "has no effect here")
    trained = smoke / "iteration-1" / "policy"
    fails(here("audit", trained, *given, "--set", server), 2, "one server")


def test_one_run_is_compared_with_its_own_baseline(smoke: Path, here: Here) -> None:
    found = report(here("compare", smoke, "--json"))
    evaluation = json.loads((smoke / "evaluation.json").read_text())
    assert found["first"] == "pbaa"
    assert list(found["entrants"]) == ["pbaa", "sso", "base"]
    assert found["queries"] == evaluation["queries"]
    mine, theirs = evaluation["models"]["sso/iteration-1"], evaluation["models"]["pbaa/iteration-1"]
    difference = found["differences"]["sso"]
    assert difference["score"][0] == pytest.approx(mine["score"][0] - theirs["score"][0])
    assert found["entrants"]["sso"]["score"][0] == pytest.approx(mine["score"][0])
    classes = difference["by_class"]
    assert sum(c["queries"] for c in classes.values()) == found["queries"]
    for example in difference["examples"]:
        gap = oracle.score(example["query"], example["answers"]["sso"]).total
        gap -= oracle.score(example["query"], example["answers"]["pbaa"]).total
        assert example["difference"] == pytest.approx(gap)
    pairs = found["features"]["sso"]
    assert pairs
    assert found["entrants"]["sso"]["curves"]["loss"][0] == pytest.approx(0.6931, abs=1e-3)
    shown = here("compare", smoke).out
    assert "sso - pbaa: " in shown
    assert "paired by query: " in shown


def test_a_run_called_query_hides_no_query() -> None:
    queries = [Query.from_dict({"id": f"q{i}", "prompt": f"What is {i}?"}) for i in range(9)]
    one, other = (
        Answered(name, [text] * 9, np.ones(9), np.full(9, score), [True] * 9)
        for name, text, score in (("difference", "a", 0.0), ("query", "bb", 1.0))
    )
    found = _difference(queries, one, other, ScoringFake(), ["x"] * 9, 1, 0)
    (example,) = found["examples"]
    assert example["query"].startswith("What is ")
    assert example["difference"] == 1.0
    assert example["answers"] == {"difference": "a", "query": "bb"}


def test_curves_of_a_training_with_several_terms_are_those_of_its_plain_term(
    smoke: Path, tmp_path: Path
) -> None:
    run, policy = tmp_path / "run", "iteration-1/policy"
    (run / "iteration-1").mkdir(parents=True)
    shutil.copy(smoke / "resolved.json", run)
    lines = [
        {
            "stage": policy,
            "step": i,
            "loss": 1.0,
            "rewards/margins/plain": i,
            "rewards/margins/bad": 9,
        }
        for i in range(5)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in lines))
    begin = entry("begin", policy, "Train")
    (run / "ledger.jsonl").write_text(json.dumps(begin) + "\n")
    found = curves(RunView.open(run).round())
    assert found == {"loss": [1.0] * 5, "rewards/margins": [0.0, 1.0, 2.0, 3.0, 4.0]}


def test_accuracies_are_of_the_judge_that_compares(smoke: Path, tmp_path: Path, here: Here) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "features: [{name: Brevity, good_adjective: brief, bad_adjective: long, good: Be brief., "
        "bad: Be long., checks: [{words: {max: 5}}]}]"
    )
    judge = ("--judge", f"checks:{rules}", "--json")
    (alone,) = report(here("judge", smoke, *judge))["judges"]
    found = report(here("compare", smoke, *judge))["entrants"]["sso"]["quality"]
    quality = json.loads((smoke / "iteration-1" / "quality.json").read_text())
    assert found["accuracy"] == pytest.approx(alone["accuracy"])
    assert found["accuracy"] != pytest.approx(quality["preferences"]["accuracy"])


def test_a_judge_that_has_changed_since_is_named(smoke: Path, tmp_path: Path, here: Here) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    assert report(here("compare", run, "--json"))["rejudged"] == {}
    evaluation = json.loads((run / "evaluation.json").read_text())
    now = evaluation["models"]["sso/iteration-1"]["score"][0]
    evaluation["models"]["sso/iteration-1"]["score"][0] = now - 0.1
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    accepted(run)
    ended = here("compare", run, "--json")
    assert report(ended)["rejudged"] == {"sso": [pytest.approx(now - 0.1), pytest.approx(now)]}
    assert "sso was evaluated with a score of" in ended.err


def test_two_runs_of_the_same_answers_differ_in_nothing(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    other = tmp_path / "other"
    shutil.copytree(smoke, other)
    found = report(here("compare", smoke, other, "--json"))
    assert found["differences"]["other"]["score"] == [0.0, 0.0, 0.0]
    assert found["differences"]["other"]["examples"] == []


@pytest.mark.parametrize(
    ("section", "name", "value", "setting", "then"),
    [
        ("evaluation", "temperature", 1.5, "evaluation.temperature", 0.7),
        ("sampling", "temperature", 0.0, "evaluation.temperature", 0.7),
        ("sampling", "top_p", 0.31, "sampling.top_p", 0.8),
        ("sampling", "max_new_tokens", 77, "sampling.max_new_tokens", 96),
        ("policy", "chat_template_kwargs", {"a": 1}, "policy.chat_template_kwargs", {}),
    ],
)
def test_no_model_is_called_better_for_how_its_answers_were_made(
    smoke: Path,
    tmp_path: Path,
    here: Here,
    section: str,
    name: str,
    value: Any,
    setting: str,
    then: Any,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(smoke, other)
    recipe = json.loads((other / "resolved.json").read_text())
    changed = {**recipe, section: {**recipe[section], name: value}}
    (other / "resolved.json").write_text(json.dumps(changed))
    answers = other / "evaluation/answers-sso-iteration-1.jsonl"
    worse = [{**v, "response": "No."} for v in lines(answers)]
    answers.write_text("".join(json.dumps(v) + "\n" for v in worse))
    accepted(other)
    ended = here("compare", smoke, other)
    assert ended.code == 0, ended.err
    assert f"({setting} is {then!r} and {value!r})" in " ".join(ended.err.split())
    assert "is better" not in ended.out
    assert "made with other settings" in " ".join(ended.out.split())
    found = report(here("compare", smoke, other, "--json"))["differences"]["other"]
    assert found["made_differently"] == {setting: [then, value]}
    assert found["score"][2] < 0
    # the settings of batches bear on no difference
    recipe["sampling"]["batch_size"] = 3
    (other / "resolved.json").write_text(json.dumps(recipe))
    ended = here("compare", smoke, other)
    assert "done is better" in " ".join(ended.out.split())
    assert "how answers are made" not in " ".join(ended.err.split())


def test_another_engine_makes_answers_differently_and_more_replicas_do_not() -> None:
    def made(engine: str) -> dict[str, Any]:
        recipe = load_recipe("pbaa", [*SMALL, f"sampling.engine={engine}"])
        assert isinstance(recipe, Aligning)
        return answering(recipe)

    assert made("{kind: ray, replicas: 3}") == made("transformers")
    served = "{kind: openai, launch: 'serve {model} {port}'}"
    assert len({json.dumps(made(x)) for x in ("transformers", "vllm", served)}) == 3


def test_comparing_a_run_starts_nothing_that_it_names(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    """A run folder of somebody else may name a command, a server and a variable as its key."""
    other = tmp_path / "other"
    shutil.copytree(smoke, other)
    recipe = json.loads((other / "resolved.json").read_text())
    launched = {"kind": "openai", "launch": f"touch {tmp_path}/started-{{port}}-{{model}}"}
    recipe["judge"] = {"kind": "chat", "model": "m", "engine": launched}
    (other / "resolved.json").write_text(json.dumps(recipe))
    fails(here("compare", other), 2, "is of kind chat", "--judge own")
    assert not list(tmp_path.glob("started*"))
    assert here("compare", other, "--judge", "own").code == 3, "touch serves nothing"
    assert list(tmp_path.glob("started*"))


@pytest.fixture
def strange(smoke: Path, tmp_path: Path) -> Path:
    """A run of somebody else, whose model comes with code that its recipe permits to run."""
    other = tmp_path / "other"
    shutil.copytree(smoke, other)
    (other / "sources.json").unlink()  # whoever alters a run leaves no trace
    policy = other / "model"
    shutil.copytree(other / "iteration-1" / "policy", policy)
    for name in ("resolved.json", "recipe.yaml"):
        recipe = yaml.safe_load((other / name).read_text())
        recipe["policy"] |= {"model": str(policy), "trust_remote_code": True}
        recipe["judge"] = {"kind": "reward", "model": str(policy), "allow_pickle": True}
        (other / name).write_text(json.dumps(recipe))
    about = json.loads((policy / "tokenizer_config.json").read_text())
    about |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (policy / "tokenizer_config.json").write_text(json.dumps(about))
    (policy / "own.py").write_text(
        f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    return other


@pytest.mark.parametrize(
    "command",
    [
        ["export", "{}", "--format", "reward", "--to", "out"],
        ["export", "{}", "--format", "mt-bench", "--questions", "q", "--to", "out"],
        ["chat", "{}", "--question", "Why?"],
        ["audit", "{}"],
        ["judge", "{}"],
        ["benchmark", "{}", "--task", "ifeval"],
        ["check", "{}"],
        ["preview", "{}"],
        ["bench", "sampling", "{}"],
    ],
    ids=" ".join,
)
def test_a_run_folder_permits_nothing_by_itself(
    strange: Path, tmp_path: Path, here: Here, command: list[str]
) -> None:
    fails(here(*(part.format(strange) for part in command)), 2, "add --trust")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", [["judge", "{}"], ["audit", "{}"], ["check", "{}"]])
@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"launch": "touch {}/ran-{{port}}-{{model}}"}, "launch"),
        ({"base_url": "https://example.org/v1"}, "base_url"),
        ({"base_url": "http://127.0.0.1:9/v1", "api_key_env": "AWS_SECRET"}, "api_key_env"),
    ],
    ids=["launch", "base_url", "api_key_env"],
)
def test_a_run_folder_reaches_nothing_by_itself(
    smoke: Path, tmp_path: Path, here: Here, command: list[str], engine: dict[str, str], said: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(smoke, other)
    engine = {name: value.format(tmp_path) for name, value in engine.items()}
    for name in ("resolved.json", "recipe.yaml"):
        recipe = yaml.safe_load((other / name).read_text())
        recipe["judge"] = {"kind": "chat", "model": "m", "engine": {"kind": "openai", **engine}}
        (other / name).write_text(json.dumps(recipe))
    fails(here(*(part.format(other) for part in command)), 2, said, "add --trust")
    assert not list(tmp_path.glob("ran*"))


def test_an_audit_starts_nothing_that_a_run_folder_names(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    other = shutil.copytree(smoke, tmp_path / "other")
    engine = {"kind": "openai", "launch": f"touch {tmp_path}/ran-{{port}} {{model}}"}
    for change in (
        {"sampling": {"engine": engine}},
        {"principles": {"mode": "generated", "writer": {**engine, "model": TESTBED}}},
    ):
        recipe = yaml.safe_load((smoke / "recipe.yaml").read_text())
        (other / "recipe.yaml").write_text(json.dumps({**recipe, **change}))
        fails(here("audit", other), 2, "launch", "add --trust")
    assert not list(tmp_path.glob("ran*"))


def test_looking_at_a_run_runs_nothing_of_it(strange: Path, tmp_path: Path, here: Here) -> None:
    for path in (strange / "model").iterdir():
        shutil.copy(path, strange / "iteration-1" / "policy")
    for verb in ("show", "report"):
        here(verb, strange)
    tokenizer(RunView.open(strange))
    assert not (tmp_path / "ran").exists()


def test_with_trust_a_run_is_taken_at_its_word(strange: Path, tmp_path: Path, here: Here) -> None:
    here("export", strange, "--format", "reward", "--to", tmp_path / "out", "--trust")
    assert (tmp_path / "ran").exists()


def test_a_page_reads_the_tokenizer_of_a_folder_and_no_base_of_adapters(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    other = tmp_path / "other"
    shutil.copytree(smoke, other)
    policy = other / "iteration-1" / "policy"
    adapters = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    (policy / "adapter_config.json").write_text(json.dumps(adapters))
    recipe = json.loads((other / "resolved.json").read_text())
    recipe["policy"]["model"] = str(policy)
    (other / "resolved.json").write_text(json.dumps(recipe))
    (other / "sources.json").unlink()
    found = tokenizer(RunView.open(other))
    assert found is not None
    assert found.end_of_turn
    done = here("export", other, "--format", "reward", "--to", tmp_path / "out")
    fails(done, 2, "must first be made a plain checkpoint", "--trust")


def test_figures_and_features_of_another_shape_are_named(smoke: Path, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    figures = json.loads((smoke / "iteration-1" / "quality.json").read_text())
    for kind, name in (("tokens", "chosen"), ("on_policyness", "both"), ("steering_gap", "bad")):
        del figures["preferences"][kind][name]
        path.write_text(json.dumps(figures))
        with pytest.raises(ArtifactError, match=rf"quality\.json is damaged \(.*lacks {name}"):
            read_json(Quality, path)
        figures["preferences"][kind][name] = 0.5
    path.write_text(json.dumps(figures))
    read_json(Quality, path)
    for features in (5, [5, "Accuracy"], "Accuracy"):
        pair = Preference("p", (Message("user", "Hi"),), "a", "b", extra={"features": features})
        with pytest.raises(DataError, match="features must be a list of names"):
            named_features(pair)


def test_nothing_is_written_through_a_link_out_of_a_run(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    other = tmp_path / "other"
    shutil.copytree(smoke, other)
    for name in ("report", "audit", "judgements"):
        shutil.rmtree(other / name, ignore_errors=True)
        (other / name).symlink_to(outside)
    for command in (("report",), ("audit",), ("judge", "--judge", "oracle"), ("compare",)):
        verb, *more = command
        fails(here(verb, other, *more), 3, "is a link that leads out of the run folder")
    assert not list(outside.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["check", "{}"],
        ["run", "{}", "--dry-run"],
        ["run", "{}"],
        ["preview", "{}"],
        ["bench", "sampling", "{}"],
        ["sweep", "{}", "training.beta=0.1,1"],
        ["audit", "{}"],
        ["benchmark", "{}", "--task", "ifeval"],
        ["report", "{}"],
    ],
    ids=" ".join,
)
def test_a_recipe_that_is_a_link_out_of_its_run_is_not_read(
    smoke: Path, tmp_path: Path, here: Here, command: list[str]
) -> None:
    (tmp_path / "secret").write_text("root:x:0:0:hidden words\n")
    other = shutil.copytree(smoke, tmp_path / "other")
    (other / "recipe.yaml").unlink()
    (other / "recipe.yaml").symlink_to(tmp_path / "secret")
    ended = here(*(part.format(other) for part in command))
    fails(ended, 3, "recipe.yaml is a link that leads out of the run folder")
    assert "hidden" not in ended.out + ended.err


def test_an_audit_that_cannot_be_written_says_where_else(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    other = shutil.copytree(smoke, tmp_path / "other")
    shutil.rmtree(other / "audit", ignore_errors=True)
    (other / "audit").write_text("in the way")
    fails(here("audit", other), 3, "audit cannot be written", "Choose another folder with --to")


def test_no_file_outside_is_changed_through_a_link_in_a_run(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    precious = tmp_path / "precious.jsonl"
    precious.write_text('{"kept": true}\n')
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "turns": ["What does the bee eat?"]}\n')
    export = ("export", "--format", "mt-bench", "--questions", questions, "--to", tmp_path / "x")
    links: dict[str, list[tuple[Any, ...]]] = {
        "lock": [("judge",), export],
        "judgements/oracle/answers-00000.jsonl": [("judge",), ("compare",)],
        "audit/answers-0.partial": [("audit",)],
        "benchmarks/base": [export],
        "usage/0.json": [export],
    }
    for place, commands in links.items():
        other = shutil.copytree(smoke, tmp_path / "other")
        (other / place).parent.mkdir(parents=True, exist_ok=True)
        (other / place).unlink(missing_ok=True)
        (other / place).symlink_to(precious)
        for verb, *more in commands:
            fails(here(verb, other, *more), 3, f"{place} is a link")
        shutil.rmtree(other)
    assert precious.read_text() == '{"kept": true}\n'


def test_what_cannot_be_compared_is_refused(smoke: Path, tmp_path: Path, here: Here) -> None:
    other = tmp_path / "other"
    shutil.copytree(smoke, other)
    recipe = json.loads((other / "resolved.json").read_text())
    (other / "resolved.json").write_text(json.dumps({**recipe, "judge": None}))
    fails(here("compare", smoke, other), 2, "different judges", "--judge")
    fails(here("compare", smoke, "--by", "colour"), 2, "'colour'")
    fails(here("compare", smoke, smoke), 2, "named twice")
    answers = other / "evaluation/answers-sso-iteration-1.jsonl"
    renamed = [{**v, "id": f"x{v['id']}"} for v in lines(answers)]
    answers.write_text("".join(json.dumps(v) + "\n" for v in renamed))
    accepted(other)
    fails(here("compare", smoke, other, "--judge", "oracle"), 2, "no evaluation query in common")
    (other / "evaluation.json").unlink()
    fails(here("compare", smoke, other), 3, "evaluation.json is missing")
