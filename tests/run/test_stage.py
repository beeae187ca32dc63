"""A stage's fingerprint changes when, and only when, its result would."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

import selfsteer.run.stage as stage_module
from selfsteer.data.digests import digest
from selfsteer.methods import load_recipe
from selfsteer.objectives import ContrastObjective, Objective, TokenObjective
from selfsteer.recipe import sections
from selfsteer.recipe.read import recipe_names
from selfsteer.recipe.sections import (
    Benchmarks,
    EngineConfig,
    EngineSettings,
    JudgeConfig,
    JudgedSet,
    PrinciplesConfig,
    Queries,
    Section,
    WriterConfig,
    mark,
)
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage, Where, identity
from selfsteer.stages.improve import ImprovePrinciple
from selfsteer.stages.oppose_rules import OpposeRules
from selfsteer.stages.sample import Sample
from tests.make import recipe, smoke, stages_of

#: Settings that must be given, and those without which a section says nothing.
NEEDED: dict[str, dict[str, Any]] = {
    "Price": {"input": 1.0, "output": 2.0},
    "Augment": {"to": 9},
    "BenchmarkConfig": {"policy": {"model": "m"}, "benchmarks": {"tasks": ["ifeval"]}},
    "Benchmarks": {"tasks": ["ifeval"]},
    "Bound": {"rule": "mean"},
    "Evaluation": {"queries": {"path": "q"}},
    "GrownQueries": {"path": "q"},
    "HarnessTask": {"name": "t"},
    "JudgeConfig": {"kind": "oracle"},
    "JudgedSet": {"style": "mt-bench", "questions": "q"},
    "OnlineQueries": {"path": "q"},
    "Improvement": {"good": "g"},
    "Policy": {"model": "m"},
    "Queries": {"path": "q"},
    "RewardData": {"path": "p"},
    "RulesConfig": {"writer": "w"},
    "Schedule": {"batch_size": 8},
    "Optimisation": {"batch_size": 8},
    "Rows": {"batch_size": 8},
    "TrainConfig": {"output": "o"},
}

SECTIONS = [
    found
    for _, found in inspect.getmembers(sections, inspect.isclass)
    if issubclass(found, Section) and found is not Section
]

#: Where any other value will not do.
OTHERS: dict[str, Any] = {
    "PrinciplesConfig.append": {"Safety": 0.5},
    "Benchmarks.task_folders": ("package:selfsteer/recipes",),
}


def example(kind: type[Section]) -> Section:
    return kind.model_validate(NEEDED.get(kind.__name__, {}))


def other(value: Any, annotation: Any) -> Any:
    """A value of this type that is not the given one; it need not make sense."""
    kinds = [a for a in get_args(annotation) if a is not type(None)]
    origin = get_origin(annotation)
    if isinstance(value, Artifact) or annotation is Artifact:
        return Artifact(Path("elsewhere"))
    if origin is Literal:
        return next(choice for choice in kinds if choice != value)
    if origin in (Union, UnionType):
        return other(value, next((k for k in kinds if _is_a(value, k)), kinds[0]))
    if origin in (tuple, list):
        return (*(value or ()), other(None, kinds[0]))
    if origin in (dict, Mapping) or (origin and issubclass(origin, Mapping)):
        return {**(value or {}), "another": other(None, kinds[1])}
    if origin is not None and get_args(annotation):  # Annotated
        return other(value, kinds[0])
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        if value is None:
            return example(annotation)
        name = next(n for n, i in annotation.model_fields.items() if not mark(i, "costs_only"))
        return value.model_copy(update={name: changed(value, name)})
    if annotation is bool:
        return not value
    if annotation in (int, float):
        return (value or 0) + annotation(1)
    if annotation is Objective:
        return Objective.named("pbaa", beta=0.31)
    if annotation is TokenObjective:
        return ContrastObjective(strength=0.31)
    return "elsewhere"


def _is_a(value: Any, kind: Any) -> bool:
    return inspect.isclass(kind) and isinstance(value, kind)


def changed(section: Section, name: str) -> Any:
    """Another value of a section's field."""
    special = OTHERS.get(f"{type(section).__name__}.{name}")
    annotation = type(section).model_fields[name].annotation
    return special or other(getattr(section, name), annotation)


#: A catalogue counts by what is in it, in `test_a_catalogue_counts_by_content_in_every_stage`.
FIELDS = [(kind, n) for kind in SECTIONS for n in kind.model_fields if n != "catalogue"]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{k.__name__}.{n}" for k, n in FIELDS])
def test_a_setting_counts_unless_it_only_costs(kind: type[Section], name: str) -> None:
    section = example(kind)
    moved = section.model_copy(update={name: changed(section, name)})
    assert getattr(moved, name) != getattr(section, name)
    # an engine holds no replicas unless its kind is ray
    counts = not mark(kind.model_fields[name], "costs_only") and name != "replica"
    assert (identity(moved) != identity(section)) == counts


def test_what_is_marked_as_cost_is_known_by_name() -> None:
    """A mark that slips in would let a run go on with another result."""
    marked = {(k, n) for k, n in FIELDS if mark(k.model_fields[n], "costs_only")}
    assert {n for k, n in marked if not issubclass(k, EngineSettings)} == {
        "threads",
        "export_unsafe",
        "gradient_checkpointing",
        "save_every_steps",
        "row_tokens",
        "output",
        "batch_size",
    }
    assert {n for k, n in marked if issubclass(k, EngineSettings)} == {
        "adapters",
        "launch_timeout",
        "api_key_env",
        "concurrency",
        "retries",
        "backoff",
        "timeout",
        "max_requests",
        "max_tokens_total",
        "price",
        "max_cost",
        "batch",
        "memory",
        "replicas",
        "resources",
        "address",
    }
    # elsewhere rounding depends on what is computed together
    assert [k for k, n in FIELDS if n == "batch_size" and (k, n) in marked] == [Benchmarks]


# -- engines and judges ----------------------------------------------------------------------------


def test_an_engine_counts_by_what_answers_depend_on() -> None:
    def of(**settings: Any) -> Any:
        return identity(EngineConfig.model_validate({"kind": "vllm", **settings}))

    assert of() == of(memory=0.5)
    assert of() != of(tensor_parallel=2)
    assert of() != of(max_model_len=64)
    assert of() != of(engine_args={"quantization": "fp8"})


def test_replicas_count_as_the_engine_that_each_of_them_holds() -> None:
    ray = EngineConfig.model_validate({"kind": "ray", "replicas": 4, "address": "auto"})
    assert identity(ray) == identity(EngineConfig())
    held = EngineConfig.model_validate({"kind": "ray", "replica": "vllm"})
    assert identity(held) == identity(EngineConfig(kind="vllm"))


def test_a_writers_model_counts_by_content_unless_a_server_has_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_text("1")

    def of(**more: Any) -> Any:
        return identity(WriterConfig.model_validate({"model": str(tmp_path / "a"), **more}))

    server = {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"}
    here, there = of(), of(**server)
    (tmp_path / "a" / "weights").write_text("2")
    assert of() != here
    assert of(**server) == there


def test_a_judge_counts_by_its_labels_or_its_model(tmp_path: Path) -> None:
    labels, model = tmp_path / "labels.jsonl", tmp_path / "model"
    model.mkdir()
    judges = (f"human:{labels}", f"reward:{model}", f"chat:{model}")
    found = []
    for text in ("1", "22"):
        labels.write_text(text)
        (model / "weights").write_text(text)
        found.append([identity(JudgeConfig.model_validate(judge)) for judge in judges])
    assert all(a != b for a, b in zip(*found, strict=True))


# -- files -----------------------------------------------------------------------------------------


def test_what_a_setting_names_counts_by_content_and_not_by_name(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    text = '{"id": "x", "good": "Be kind.", "bad": "Be rude."}\n'
    for path in (a, b):
        path.write_text(text)
    for section in (
        lambda path: Queries(path=str(path)),
        lambda path: Queries(path="q", against=(str(path),)),
        lambda path: PrinciplesConfig(mode="fixed", path=str(path)),
        lambda path: JudgedSet(style="mt-bench", questions=str(path), label="x"),
    ):
        assert identity(section(a)) == identity(section(b))
        b.write_text(text * 2)
        assert identity(section(a)) != identity(section(b))
        b.write_text(text)


def test_a_catalogue_counts_by_content_in_every_stage(tmp_path: Path) -> None:
    """Of the words that lead-ins are made of as well."""
    text = (Path(sections.__file__).parents[1] / "catalogue.yaml").read_text()

    def stages(name: str, text: str) -> dict[str, str]:
        (tmp_path / name).write_text(text)
        made = smoke(tmp_path, f"principles.catalogue={tmp_path / name}")
        return {n: s.fingerprint for n, s in stages_of(made).items()}

    here = stages("a.yaml", text)
    assert stages("b.yaml", text) == here
    again = stages("b.yaml", text.replace("Safety", "Caution"))
    assert {n for n in here if here[n] == again[n]} == {"queries"}


def test_own_tasks_count_by_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.yaml").write_text("task: t")

    def of(name: str) -> Any:
        return identity(Benchmarks(tasks=("t",), task_folders=(str(tmp_path / name),)))  # type: ignore[arg-type]

    assert of("a") == of("b")
    (tmp_path / "b" / "t.yaml").write_text("task: t\nmetric: x")
    assert of("a") != of("b")


# -- stages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy(Stage):
    """Reads one thing, makes another."""

    source: Artifact
    limit: int = 1
    workers: int = field(default=1, metadata={"costs_only": True})
    names: tuple[str, ...] = field(default=(), metadata={"identity": lambda names: len(names)})

    title = "copy"

    def run(self, run: RunFolder) -> StageResult:
        return StageResult(1, 1)


@dataclass(frozen=True)
class Other(Copy):
    """With the same fields."""


def test_an_artifact_counts_as_its_maker(tmp_path: Path) -> None:
    first = Copy(Artifact(Path("hub/model")))
    here, there = (Copy(Artifact(tmp_path / name, first)) for name in ("here", "there"))
    assert here.fingerprint == there.fingerprint
    assert here.fingerprint != first.fingerprint
    assert (
        Copy(Artifact(tmp_path / "here", replace(first, limit=2))).fingerprint != here.fingerprint
    )


def test_a_file_or_model_counts_by_its_content_and_a_hub_id_by_its_name(tmp_path: Path) -> None:
    def of(path: Path) -> str:
        return Copy(Artifact(path)).fingerprint

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("1")
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    assert of(tmp_path / "a") == of(tmp_path / "b")
    assert of(tmp_path / "a.jsonl") == of(tmp_path / "b.jsonl")
    (tmp_path / "b" / "weights").write_text("2")
    (tmp_path / "b.jsonl").write_text("[]\n")
    assert of(tmp_path / "a") != of(tmp_path / "b")
    assert of(tmp_path / "a.jsonl") != of(tmp_path / "b.jsonl")
    assert of(Path("some/model")) != of(Path("another/model"))


def test_what_else_makes_a_fingerprint() -> None:
    stage = Copy(Artifact(Path("m")))
    same = (replace(stage, workers=8), replace(stage, where=Where("sso", 1)))
    assert {s.fingerprint for s in same} == {stage.fingerprint}
    others = (
        replace(stage, seed=1),
        replace(stage, limit=2),
        replace(stage, where=Where("sso", 1, "iteration-1")),
        Other(Artifact(Path("m"))),
    )
    assert len({s.fingerprint for s in (stage, *others)}) == 5
    assert replace(stage, names=("a",)).fingerprint == replace(stage, names=("b",)).fingerprint


#: Recipes that come to every kind of stage.
RICH = {
    "sso": (
        "smoke",
        "queries.augment={to: 99}",
        "filter=true",
        "reward={batch_size: 8}",
        "benchmarks={tasks: [ifeval]}",
    ),
    "rank": ("best-of-n", "policy.model=m", "queries.path=q", "ranking.judge=oracle"),
    "given": ("spin", "policy.model=m", "queries.path=q"),
    "distilled": ("contrast", "policy.model=m", "queries.path=q"),
    "improved": ("sgpo", "policy.model=m", "queries.path=q", "improver_training={}"),
    "judged": ("spin-judged", "policy.model=m", "queries.path=q", "judge=oracle"),
    "contrasting": ("pbaa", "policy.model=m", "queries.path=q", "hygiene.min_contrast=0"),
    "margin": ("dlma", "policy.model=m", "queries.path=q"),
    "furthest": ("pbaa-best-of-n", "policy.model=m", "queries.path=q"),
}


def _planned() -> list[tuple[Stage, str]]:
    found: dict[str, Stage] = {}
    for name, *settings in RICH.values():
        for stage in load_recipe(name, settings).plan():
            found.setdefault(type(stage).__name__, stage)
    return [(s, f.name) for s in found.values() for f in fields(s) if f.name != "catalogue"]


PLANNED = _planned()


def test_every_kind_of_stage_is_looked_at() -> None:
    def below(kind: type[Any]) -> set[type[Any]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    mine = {k for k in below(Stage) if k.__module__.startswith("selfsteer.stages")}
    mine -= {ImprovePrinciple, OpposeRules}  # no recipe's, verbs plan them
    assert {type(stage) for stage, _ in PLANNED} == {k for k in mine if not inspect.isabstract(k)}


@pytest.mark.parametrize(
    ("stage", "name"), PLANNED, ids=[f"{type(s).__name__}.{n}" for s, n in PLANNED]
)
def test_a_field_of_a_stage_counts_unless_it_only_costs(stage: Stage, name: str) -> None:
    (mine,) = (f for f in fields(stage) if f.name == name)
    value = getattr(stage, name)
    if name == "where":
        moved: Any = replace(stage.where, method="another", round=9)
    elif is_dataclass(value) and not isinstance(value, Artifact | Objective | TokenObjective):
        moved = None
    elif name == "sets":
        moved = (value[0]._replace(weight=2.0),)
    elif name == "judges":
        moved = (JudgeConfig(kind="oracle"),) if not value else ()
    else:
        moved = other(value, get_type_hints(type(stage))[name])
    again = replace(stage, **{name: moved})
    counts = name != "where" and not mine.metadata.get("costs_only")
    assert (again.fingerprint != stage.fingerprint) == counts


# -- whole recipes ---------------------------------------------------------------------------------


def fingerprints(recipe: Any) -> dict[str, str]:
    return {name: stage.fingerprint for name, stage in stages_of(recipe).items()}


def test_a_run_folder_that_moved_is_the_same_run(tmp_path: Path) -> None:
    here = fingerprints(smoke(tmp_path))
    assert here == fingerprints(smoke(tmp_path / "elsewhere", "name=renamed"))


def test_settings_that_only_cost_change_no_stage(tmp_path: Path) -> None:
    cheap = (
        "policy.threads=3",
        "keep={generator: false, checkpoints: 4}",
        "tracking=[tensorboard]",
        "hygiene.export_unsafe=false",
        "training.row_tokens=99",
        "training.gradient_checkpointing=true",
        "generator.save_every_steps=7",
    )
    assert fingerprints(smoke(tmp_path)) == fingerprints(smoke(tmp_path, *cheap))


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("seed=1", "queries"),
        ("queries.limit=63", "queries"),
        ("principles.temperature=0.9", "principles"),
        ("sampling.top_p=0.9", "triples"),
        ("hygiene.min_chars=3", "filter"),
        ("generator.gamma=0.2", "generator"),
        ("training.beta=0.2", "policy"),
        ("evaluation.temperature=0.0", "evaluation"),
    ],
)
def test_a_setting_changes_what_it_is_for_and_all_that_follows(
    tmp_path: Path, setting: str, first: str
) -> None:
    """Of the round without a baseline, in which each stage reads the one before it."""
    before = fingerprints(smoke(tmp_path, "baseline=null"))
    after = fingerprints(smoke(tmp_path, "baseline=null", setting))
    changed = [name for name in before if before[name] != after[name]]
    names = [name for name in before if name != "iteration-1/quality"]
    assert changed[0].rpartition("/")[2] == first
    assert [n for n in changed if n in names] == names[names.index(changed[0]) :]


def test_evaluation_queries_are_known_by_their_content(tmp_path: Path) -> None:
    def fingerprint(name: str, *more: str) -> str:
        (tmp_path / name).write_text('{"prompt": "Why is it so?"}\n')
        made = smoke(tmp_path, f"evaluation.queries.path={tmp_path / name}", *more)
        return str(made.plan()[-1].fingerprint)

    here = fingerprint("a.jsonl")
    assert fingerprint("b.jsonl") == here
    assert fingerprint("a.jsonl", "evaluation.queries.min_chars=5") != here


def test_a_judge_of_other_settings_does_not_grow_the_queries_again(tmp_path: Path) -> None:
    def fingerprint(judge: str) -> str:
        made = smoke(tmp_path, "queries.augment={to: 100}", f"judge={judge}")
        return stages_of(made)["augment"].fingerprint

    chat = "{kind: chat, model: 'package:selfsteer.testbed/checkpoint', batch_size: 4}"
    assert fingerprint(chat) == fingerprint(chat.replace("4", "8"))
    assert fingerprint(chat) != fingerprint("oracle")


def test_how_answers_are_sampled_does_not_grow_the_queries_again(tmp_path: Path) -> None:
    def changed(setting: str) -> list[str]:
        before, after = (
            fingerprints(smoke(tmp_path, "queries.augment={to: 100}", *more))
            for more in ((), (setting,))
        )
        return [name for name in before if before[name] != after[name]]

    for setting in ("sampling.top_p=0.5", "sampling.max_new_tokens=9", "sampling.shard_size=9"):
        assert changed(setting)[0] == "iteration-1/triples"
    assert changed("sampling.batch_size=9")[0] == "augment"


def test_more_iterations_leave_those_that_are_done(tmp_path: Path) -> None:
    once = fingerprints(recipe("pbaa"))
    twice = fingerprints(recipe("pbaa", iterations=2))
    assert {n: twice[n] for n in once} == once


def test_each_fingerprint_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of a late round reads those of the earlier ones along many ways."""
    calls: list[Any] = []

    def counted(value: Any) -> str:
        calls.append(value)
        return digest(value)

    monkeypatch.setattr(stage_module, "digest", counted)
    plan = recipe("sso", iterations=2).plan()
    assert plan[-1].fingerprint == plan[-1].fingerprint
    assert len(calls) <= len(plan)


@pytest.mark.parametrize("name", recipe_names())
def test_stages_say_what_they_make_and_where(name: str) -> None:
    """No two stages of a plan write the same file, and each reads what was made before it."""
    given = {
        "reward": ["reward.data=y.jsonl"],
        "best-of-n": ["queries.path=q", "ranking.judge=oracle"],
        "spin-judged": ["queries.path=q", "judge=oracle"],
        "smoke": [],
        "demo": [],
    }.get(name, ["queries.path=q"])
    if name not in ("smoke", "demo"):
        given = ["policy.model=m", *given]
    plan = load_recipe(name, given).plan()
    made = [file for stage in plan for file in stage.files]
    assert len(set(made)) == len(made)
    for i, stage in enumerate(plan):
        assert stage.name.endswith(stage.title)
        assert stage.name.startswith(stage.where.folder)
        sources = [getattr(stage, f.name) for f in fields(stage)]
        makers = [s.maker for s in sources if isinstance(s, Artifact) and s.maker]
        assert all(m in plan[:i] for m in makers)


@pytest.mark.parametrize("stage", {type(s): s for s, _ in PLANNED}.values(), ids=lambda s: s.title)
def test_a_stage_that_is_in_no_round_writes_into_the_run_folder(
    stage: Stage, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    for file in replace(stage, where=Where()).files:
        assert (run / file).is_relative_to(tmp_path)


def test_texts_are_those_of_the_stage_that_wrote_them() -> None:
    """What is filtered, and what is made of it, is scored under one name."""
    made = stages_of(recipe("sso-online"))
    triples = made["iteration-1/triples"]
    assert isinstance(triples, Sample)
    for name in ("filter", "preferences"):
        assert made[f"iteration-1/{name}"].texts == triples.name
    assert made["iteration-1/policy"].read is not None
    assert made["iteration-1/policy"].read.texts == triples.name
