"""What holds for the recipes of all methods, and which stages each of them comes to."""

import ast
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import selfsteer
from selfsteer.errors import ConfigError, SelfsteerError
from selfsteer.formats.cards import compared, model_card
from selfsteer.methods import METHODS, load_recipe, recipe_of
from selfsteer.methods.base import Plan, plain_pair
from selfsteer.methods.pbaa import PBAA
from selfsteer.methods.sso import SSO
from selfsteer.recipe.read import known_keys, load_values, method_of, recipe_names
from selfsteer.recipe.sections import Filter
from selfsteer.run.stage import Artifact
from selfsteer.stages.evaluate import Evaluate
from selfsteer.stages.filter import FilterTriples
from selfsteer.stages.rank import RankAnswers
from selfsteer.stages.sample import Sample
from selfsteer.stages.train import Train, TrainReward
from selfsteer.verbs.run import run
from selfsteer.view import RoundView, RunView
from tests.make import recipe, smoke, stages_of

NAMES = [method_of(m) for m in METHODS]

#: What a shipped recipe leaves to its user.
LEFT = {
    "reward": ["reward.data=pairs.jsonl"],
    "best-of-n": ["ranking.judge=oracle"],
    "spin-judged": ["judge=oracle"],
}


def shipped(name: str) -> Any:
    values, more = load_values(name), LEFT.get(name, [])
    if not values["policy"]["model"] or name == "smollm2":  # whose model may not be there
        more = [*more, "policy.model=some/model"]
    if "queries" in values and not values["queries"]["path"]:
        more = [*more, "queries.path=q.jsonl"]
    return load_recipe(name, more)


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_comes_to_stages_of_different_names(name: str) -> None:
    made = shipped(name)
    assert made.name == name
    names = [stage.name for stage in made.plan()]
    assert names
    assert len(set(names)) == len(names)


def test_every_method_has_a_shipped_recipe_and_a_name_of_its_own() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {shipped(name).method for name in recipe_names()} == set(NAMES)
    unnamed = recipe_of({"name": "n", "policy": {"model": "m"}, "queries": {"path": "q"}}, "x")
    assert type(unnamed) is METHODS[0] is SSO


def test_the_help_of_run_names_every_shipped_recipe() -> None:
    said = " ".join(str(run.__doc__).split())
    _, _, names = said.partition("Shipped recipes: ")
    assert sorted(names.rstrip(".").split(", ")) == recipe_names()


# -- settings --------------------------------------------------------------------------------------


def nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def strangers() -> list[tuple[str, str, list[str]]]:
    """(method, setting of others, those others); of a section that is strange, itself alone."""
    keys = {method_of(m): set(known_keys(m)) for m in METHODS}
    found = []
    for name, key in product(NAMES, sorted(set().union(*keys.values()))):
        parent = key.rpartition(".")[0]
        if key not in keys[name] and (not parent or parent in keys[name]):
            found.append((name, key, [other for other in NAMES if key in keys[other]]))
    return found


STRANGERS = strangers()


@pytest.mark.parametrize(
    ("method", "key", "others"), STRANGERS, ids=[f"{m}: {k}" for m, k, _ in STRANGERS]
)
def test_a_setting_of_other_methods_is_refused_and_they_are_named(
    method: str, key: str, others: list[str]
) -> None:
    given = nested(key, {})
    for name, needed in (("queries", {"path": "q"}), ("policy", {"model": "m"})):
        if name in given:
            given[name] = {**needed, **given[name]}
    with pytest.raises(ConfigError) as caught:
        recipe(method, **given)
    said = str(caught.value)
    assert f"{key} has no effect with method {method}" in said
    assert said.partition("a setting of ")[2].partition(")")[0] == ", ".join(others)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("sso-onlin", "sso-online"), ("spinn", "spin"), ("best_of_n", "best-of-n"), ("PBAA", None)],
)
def test_an_unknown_method_names_the_nearest(wrong: str, near: str | None) -> None:
    with pytest.raises(ConfigError, match=f"unknown method {wrong!r}") as caught:
        recipe(wrong)
    said = str(caught.value)
    assert all(name in said for name in NAMES)
    assert said.endswith(f"Did you mean {near}?") == (near is not None)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'generator.gama' \(did you mean 'generator.gamma'\?\)"):
        recipe(generator={"gama": 1})


def test_a_colon_without_its_space_is_pointed_out() -> None:
    with pytest.raises(ConfigError, match=r"'queries.limit:9' \(YAML needs a space after a colon"):
        load_recipe("demo", ["queries={path: q, limit:9}"])


# -- cards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "sections", "said"),
    [
        ("pbaa", {}, "No person compared the answers."),
        ("self-rewarding", {}, "No person compared the answers."),
        (
            "best-of-n",
            {"ranking": {"judge": "reward:some/model"}},
            "The judge was the model some/model (reward). No person compared these answers, but",
        ),
        (
            "best-of-n",
            {"judge": "oracle"},
            "The judge was the testbed's oracle; no person compared the answers.",
        ),
        ("spin-judged", {"judge": "chat:some/model"}, "The judge was the model some/model (chat)."),
    ],
)
def test_cards_say_who_compared(method: str, sections: dict[str, Any], said: str) -> None:
    assert compared(recipe(method, **sections)).startswith(said)


# -- nobody else asks for a method by name ---------------------------------------------------------


def compared_methods(source: str) -> list[int]:
    """Lines that compare something called method with a name of one."""

    def is_method(node: ast.AST) -> bool:
        name = node.attr if isinstance(node, ast.Attribute) else None
        name = node.id if isinstance(node, ast.Name) else name
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            name = str(node.slice.value)
        return name == "method"

    def names_one(node: ast.AST) -> bool:
        constants = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
        return any(value in NAMES for value in constants)

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = (node.left, *node.comparators)
            if any(map(is_method, parts)) and any(map(names_one, parts)):
                found.append(node.lineno)
        if isinstance(node, ast.Match) and is_method(node.subject):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('if recipe.method == "sso": pass', True),
        ('x = run["method"] in ("spin", "sgpo")', True),
        ('x = "pbaa" != method', True),
        ('match recipe.method:\n    case "sso": pass', True),
        ('x = stage.method == recipe["method"]', False),
        ('x = request.method == "GET"', False),
    ],
)
def test_a_comparison_is_found(source: str, found: bool) -> None:
    assert bool(compared_methods(source)) == found


def test_nothing_outside_the_methods_asks_which_one_it_is() -> None:
    root = Path(selfsteer.__file__).parent
    paths = (p for p in root.rglob("*.py") if p.relative_to(root).parts[0] != "methods")
    found = [f"{p.relative_to(root)}:{n}" for p in paths for n in compared_methods(p.read_text())]
    assert found == []


# -- the data flow of each -------------------------------------------------------------------------

TAIL = ("preferences", "quality", "policy")
ROUNDS = {
    "sso": ("principles", "triples", "filter", "generator", "samples", *TAIL),
    "sso-online": ("principles", "triples", "filter", *TAIL),
    "pbaa": ("principles", "samples", *TAIL),
    "dlma": ("principles", "samples", "preferences", "quality", "figures", "policy"),
    "contrast": ("principles", "samples", "teacher", "policy"),
    "distil": ("principles", "samples", "teacher", "policy"),
    "good-over-plain": ("principles", "samples", *TAIL),
    "bad-to-plain": ("principles", "samples", *TAIL),
    "best-of-n": ("ranked", *TAIL),
    "best-of-n-principles": ("principles", "ranked", *TAIL),
    "pbaa-best-of-n": ("principles", *(f"answers/{i}" for i in (1, 2, 3, 4)), "samples", *TAIL),
    "rlcd": ("ranked", *TAIL),
    "self-rewarding": ("ranked", *TAIL),
    "sgpo": ("samples", "improved", *TAIL),
    "spin": ("samples", "opponents", *TAIL),
    "spin-judged": ("samples", "opponents", "relabelled", *TAIL),
    "irft": ("samples", "opponents", *TAIL),
}


#: What precedes the rounds.
BEFORE = {
    "rlcd": (
        *(f"ranker/{title}" for title in ("principles", "samples", "filter")),
        "train_reward",
    )
}


@pytest.mark.parametrize("method", [n for n in NAMES if n != "reward"])
def test_the_stages_of_a_round(method: str) -> None:
    made = recipe(method, iterations=2, judge="oracle")
    expected = [f"iteration-{k}/{title}" for k in (1, 2) for title in ROUNDS[method]]
    before = BEFORE.get(method, ())
    assert list(stages_of(made)) == ["queries", *before, *expected]
    assert {s.where.method for s in made.plan()[1:]} == {method}
    rounds = [k for k in (1, 2) for _ in ROUNDS[method]]
    assert [s.where.round for s in made.plan()] == [None, *(None for _ in before), *rounds]


@pytest.mark.parametrize("method", [n for n in NAMES if n != "reward"])
def test_each_round_begins_with_the_policy_of_the_one_before(method: str) -> None:
    for reference in ("iteration", "first"):
        training = {"reference": reference}
        made = stages_of(recipe(method, iterations=2, judge="oracle", training=training))
        first, second = (made[f"iteration-{k}/policy"] for k in (1, 2))
        assert isinstance(first, Train)
        assert isinstance(second, Train)
        assert first.start.path == Path("m")
        assert second.start.maker == first
        assert second.start.path == Path("runs/n/iteration-1/policy")
        assert second.reference == (first.start if reference == "first" else second.start)


def test_a_round_that_would_overwrite_or_lack_something_is_refused_where_it_is_planned() -> None:
    made = recipe("pbaa")
    plan = Plan(made)
    sample = Sample(plan.base, {"good": plan.base}, made.sampling)
    with plan.at("pbaa", 1, "iteration-1"):
        plan(sample)
        plan(replace(sample, title="more"))
        with pytest.raises(ValueError, match="two stages are called iteration-1/samples, so one"):
            plan(sample)
        objective = replace(plain_pair(made.training), weighting="dora")
        with pytest.raises(ValueError, match=r"reads good/good, bad/bad, and .*principled=asked"):
            made.train(plan, plan.base, plan.base, objective, made.training)


def test_optional_parts_are_stages_where_they_are_asked_for() -> None:
    more: dict[str, Any] = {
        "queries": {"path": "q", "augment": {"to": 9}},
        "reward": {},
        "baseline": "pbaa",
        "evaluation": {"queries": {"path": "e"}},
        "benchmarks": {"tasks": ["ifeval"]},
    }
    names = list(stages_of(recipe(**more)))
    assert names[:2] == ["queries", "augment"]
    after = names.index("iteration-1/policy") + 1
    assert names[after:] == [
        "train_reward",
        *(f"baseline/iteration-1/{title}" for title in ("samples", *TAIL)),
        "evaluation",
        "benchmarks",
    ]


def test_the_baseline_has_the_same_queries_and_principles() -> None:
    made = stages_of(recipe(baseline="pbaa", iterations=2))
    for k in (1, 2):
        asked = made[f"iteration-{k}/principles"]
        assert (asked.where.method, asked.where.round) == (None, k), "it serves both"
        theirs = made[f"baseline/iteration-{k}/samples"]
        assert isinstance(theirs, Sample)
        assert theirs.where.method == "pbaa"
        assert theirs.queries.maker == asked
    trained = made["baseline/iteration-2/policy"]
    assert isinstance(trained, Train)
    assert trained.start.maker == made["baseline/iteration-1/policy"]


def test_several_baselines_have_settings_of_their_own() -> None:
    baseline = {"pbaa": {}, "contrast": {"training": {"epochs": 2}, "contrast": {"clip": 0.5}}}
    training = {"learning_rate": 0.3, "beta": 0.7}
    made = recipe(baseline=baseline, training=training, iterations=2, reward={})
    assert made.methods == ("sso", "pbaa", "contrast")
    found = stages_of(made)
    assert [n for n in found if n.startswith("contrast/")] == [
        f"contrast/iteration-{k}/{title}"
        for k in (1, 2)
        for title in ("samples", "teacher", "policy")
    ]
    assert list(found).count("train_reward") == 1
    for k in (1, 2):
        asked = found[f"contrast/iteration-{k}/samples"]
        assert isinstance(asked, Sample)
        assert asked.queries.maker == found[f"iteration-{k}/principles"]
    theirs, distilled = (found[f"{home}/iteration-1/policy"] for home in ("baseline", "contrast"))
    assert isinstance(theirs, Train)
    assert isinstance(distilled, Train)
    own = (theirs.settings, distilled.settings)
    assert [(s.learning_rate, s.epochs) for s in own] == [(0.3, 1), (0.3, 2)]
    assert theirs.objective.base.beta == 0.7  # type: ignore[union-attr]
    assert distilled.objective.clip == 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ("pbba", "baseline pbba cannot be used: unknown method 'pbba'"),
        ("sso", "baseline sso cannot be used: .* sso is the recipe's own"),
        ("spin", "baseline spin cannot be used: .* spin is none"),
        ({"contrast": {"generator": {}}}, "generator has no effect with method contrast"),
        ({"pbaa": {"training": {"betta": 1}}}, "did you mean 'training.beta'"),
        ({"pbaa": {"iterations": 2, "seed": 1}}, "iterations, seed would have no effect there"),
        ({"pbaa": {"principles": {"mode": "picked"}}}, "principles would have no effect"),
        ({"pbaa": {"policy": {"model": "x", "lora": {}}}}, "policy.model would have no effect"),
        ({"pbaa": {"reward": {}}}, "reward would have no effect"),
        ({"contrast": {"reward": {}}}, "reward has no effect with method contrast"),
        ({"pbaa": {"policy": "x"}}, "baseline pbaa cannot be used: policy is a section"),
        ({"pbaa": None}, "it takes the name of a method, or several"),
        (["pbaa", "contrast"], "it takes the name of a method, or several"),
    ],
)
def test_a_baseline_that_cannot_be_run_is_refused(baseline: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(baseline=baseline)


def test_a_baseline_may_have_its_own_reward_adapter_and_judge() -> None:
    own = {"reward": {"epochs": 2}, "policy": {"lora": {"rank": 3}}, "judge": "oracle"}
    found = stages_of(recipe(baseline={"rlcd": own}))
    assert found["train_reward"].settings.epochs == 2  # type: ignore[attr-defined]
    assert found["baseline/iteration-1/policy"].lora.rank == 3  # type: ignore[attr-defined]
    assert found["baseline/iteration-1/quality"].judge.kind == "oracle"  # type: ignore[attr-defined]
    assert found["iteration-1/policy"].lora is None  # type: ignore[attr-defined]


def test_the_card_of_a_baseline_tells_its_own_settings(tmp_path: Path) -> None:
    own = {"training": {"beta": 0.3}, "hygiene": {"export_unsafe": False}}
    made = recipe("contrast", baseline={"pbaa": own}, training={"learning_rate": 0.5})
    (tmp_path / "resolved.json").write_text(made.model_dump_json())
    round_ = RoundView(RunView.open(tmp_path), "pbaa", 1, tmp_path)
    assert "base sigmoid, beta 0.3, learning_rate 0.5" in model_card(round_)
    assert isinstance(round_.recipe, PBAA)
    assert not round_.recipe.hygiene.export_unsafe


def writers(stage: Any) -> dict[str, str]:
    """Response name → the stage that made the model that writes it; the base has none."""
    assert isinstance(stage, Sample)
    return {name: m.maker.name if m.maker else "base" for name, m in stage.writers.items()}


def test_who_writes_which_response() -> None:
    first, generator = "iteration-1/", "iteration-1/generator"
    made = stages_of(recipe())
    assert writers(made[f"{first}triples"]) == dict.fromkeys(("plain", "good", "bad"), "base")
    assert writers(made[f"{first}samples"]) == dict.fromkeys(("good", "bad"), generator)
    halves = stages_of(recipe(generator={"per_half": True}))
    assert writers(halves[f"{first}samples"]) == {
        "good": f"{generator}/plus",
        "bad": f"{generator}/minus",
    }
    assert writers(stages_of(recipe("pbaa"))[f"{first}samples"]) == {"good": "base", "bad": "base"}
    plus, minus = halves[f"{generator}/plus"], halves[f"{generator}/minus"]
    assert isinstance(plus, Train)
    assert isinstance(minus, Train)
    assert (plus.contexts, minus.contexts) == (("good",), ("bad",))
    assert (plus.objective.name, minus.objective.name) == ("sso-plus-only", "sso-minus-only")


def test_objectives_have_the_constants_of_their_settings() -> None:
    def trained(method: str, **more: Any) -> dict[str, Any]:
        stages = stages_of(recipe(method, **more)).values()
        return {s.title: s for s in stages if isinstance(s, Train)}

    given: dict[str, Any] = {"generator": {"gamma": 0.7, "beta": 0.3}, "training": {"beta": 0.2}}
    found = trained("sso", **given)
    assert found["generator"].objective.name == "sso"
    assert found["generator"].objective.base.beta == 0.3
    assert (found["policy"].objective.name, found["policy"].objective.base.beta) == ("pbaa", 0.2)
    online = trained("sso-online", training={"steer": 0.5, "base": "ipo"})["policy"].objective
    assert (online.name, online.base.name) == ("sso-online", "ipo")
    assert len(online.sequences) == 6
    plain = trained("sso-online", training={"use_steer": False})["policy"].objective
    assert sorted(plain.sequences) == ["plain/bad", "plain/good"]


def test_v1s_filter_is_on_as_released_in_the_online_way_alone() -> None:
    for method, given, expected in (
        ("sso", None, None),
        ("sso", True, Filter()),
        ("sso", False, None),
        ("sso-online", None, Filter()),
        ("sso-online", False, None),
        ("sso-online", {"gap": "off"}, Filter.model_validate({"gap": "off"})),
    ):
        stage = stages_of(recipe(method, **({} if given is None else {"filter": given})))
        filtering = stage["iteration-1/filter"]
        assert isinstance(filtering, FilterTriples)
        assert filtering.filter == expected


def test_who_ranks() -> None:
    def judge(method: str, **more: Any) -> Any:
        stage = stages_of(recipe(method, **more))["iteration-1/ranked"]
        assert isinstance(stage, RankAnswers)
        return stage.judge and stage.judge.model

    both = {"judge": "reward:a", "ranking": {"judge": "reward:b"}}
    assert judge("best-of-n", judge="reward:a") == "a"
    assert judge("best-of-n", **both) == "b"
    assert judge("self-rewarding", judge="reward:a") is None, "the policy itself"


def test_candidates_answer_in_process_with_the_settings_of_sampling() -> None:
    given: dict[str, Any] = {"sampling": {"temperature": 0.3, "engine": "vllm"}}
    made = stages_of(recipe("pbaa", judge="oracle", **given))["iteration-1/policy"]
    assert isinstance(made, Train)
    assert made.sampling is not None
    assert (made.sampling.temperature, made.sampling.engine.kind) == (0.3, "transformers")
    assert made.judge is not None
    off = {"selection": {"points": 0}}
    made = stages_of(recipe("pbaa", judge="oracle", training=off, **given))["iteration-1/policy"]
    assert isinstance(made, Train)
    assert (made.sampling, made.judge) == (None, None)


def test_what_is_evaluated() -> None:
    evaluation = {"queries": {"path": "e"}}
    made = recipe(baseline="pbaa", iterations=2, evaluation=evaluation).plan()[-1]
    assert isinstance(made, Evaluate)
    assert list(made.models) == [
        "base",
        "sso/iteration-1",
        "sso/iteration-2",
        "pbaa/iteration-1",
        "pbaa/iteration-2",
    ]
    assert made.finals == {"sso": "sso/iteration-2", "pbaa": "pbaa/iteration-2"}
    assert made.exhibit is not None
    assert list(made.exhibit.models) == ["policy", "generator"]


def test_a_reward_model_is_trained_on_own_and_given_pairs(tmp_path: Path) -> None:
    made = smoke(tmp_path, "reward={data: [{path: a.jsonl, weight: 2}], own_weight: 0.5}")
    stage = stages_of(made)["train_reward"]
    assert isinstance(stage, TrainReward)
    own, given = stage.sets
    assert (own.name, own.weight) == ("sso", 0.5)
    assert own.own is not None
    assert own.own.maker == stages_of(made)["iteration-1/preferences"]
    assert (given.name, given.weight, given.source) == ("a.jsonl", 2, "a.jsonl")
    alone = recipe("reward", reward={"data": "a.jsonl"})
    assert [s.name for s in alone.plan()] == ["train_reward"]


def test_a_reward_model_that_the_device_cannot_train_is_refused_before_it_loads() -> None:
    policy = {"model": "m", "device": "cpu", "lora": {"bits": 4}}
    (stage,) = recipe("reward", policy=policy, reward={"data": "a.jsonl"}).plan()
    with pytest.raises(ConfigError, match=r"lora\.bits 4"):
        list(stage.check())


@pytest.mark.parametrize("points", [0, 4])
def test_a_judge_of_candidates_that_is_not_there_is_told_before_a_training(points: int) -> None:
    judge = {"kind": "reward", "model": "/nowhere"}
    policy = {"model": "package:selfsteer.testbed/checkpoint"}
    selection = {"selection": {"points": points}}
    made = recipe("pbaa", policy=policy, judge=judge, training=selection)
    training = stages_of(made)["iteration-1/policy"]
    with pytest.raises(SelfsteerError, match="/nowhere") if points else nullcontext():
        list(training.check())


def test_a_given_file_counts_in_a_mixture_by_content(tmp_path: Path) -> None:
    def fingerprint(name: str) -> str:
        given = {"path": str(tmp_path / name), "name": "given"}
        (stage,) = recipe("reward", reward={"data": [given]}).plan()
        return str(stage.fingerprint)

    for name in ("a", "b"):
        (tmp_path / name).write_text("{}\n")
    assert fingerprint("a") == fingerprint("b")
    (tmp_path / "b").write_text("{}\n{}\n")
    assert fingerprint("a") != fingerprint("b")


def test_an_artifact_is_where_its_maker_writes() -> None:
    for name in recipe_names():
        made = shipped(name)
        for stage in made.plan():
            for value in (getattr(stage, f.name) for f in fields(stage)):
                if isinstance(value, Artifact) and value.maker:
                    assert value.path == made.folder / value.maker.outputs[0]


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("vllm", "vllm"),
        ({"kind": "openai", "launch": "serve {model} {port}"}, "openai"),
        ({"kind": "ray", "replica": "vllm"}, "vllm"),
    ],
)
def test_contrasts_need_the_logits_of_an_engine_in_process(engine: Any, kind: str) -> None:
    for name in ("contrast", "contrast_bad"):
        with pytest.raises(ConfigError, match=f"an engine of kind {kind} answers in text alone"):
            recipe("pbaa", sampling={name: 2, "engine": engine})
    assert recipe("pbaa", sampling={"contrast": 0, "engine": engine})
    replicas = {"kind": "ray", "replica": "transformers"}
    made = recipe("pbaa", sampling={"contrast": 2, "engine": replicas})
    assert made.sampling.ratios == {"good": 2.0}
    with pytest.raises(ConfigError, match="good-over-plain, which asks for no bad answers"):
        recipe("good-over-plain", sampling={"contrast_bad": 2})


def test_what_is_written_by_contrast_is_another_stage() -> None:
    plain, pushed = (
        stages_of(recipe("pbaa", sampling={"contrast": r}))["iteration-1/samples"] for r in (0, 3)
    )
    assert plain.fingerprint != pushed.fingerprint
