"""A run's data and models for other programs, with the cards that tell how they were made."""

import shutil
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import Stored, disk_errors, write_atomic
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.formats import FORMATS, Exported, export
from selfsteer.formats.cards import (
    Origin,
    Step,
    dataset_card,
    judge_name,
    model_card,
    public_name,
)
from selfsteer.run.folder import RunFolder
from selfsteer.stages.filter import named_features, names_safety
from selfsteer.stages.inputs import stored_preferences, stored_triples
from selfsteer.terminal import progress_bar


def export_run(
    found: Mapping[str, Any],
    iteration: int,
    fmt: str,
    folder: Path,
    *,
    baseline: bool,
    queries_license: str | None = None,
) -> Exported:
    """Writes one iteration's preferences, or its triples for the authors' format.

    Args:
        found: what the run says of itself (`selfsteer.report.summary.load`).
        iteration: counted from 1.
        fmt: one of `selfsteer.formats.FORMATS`.
        folder: made if need be.
        baseline: take the baseline's data.
        queries_license: for the card of a Parquet data set.

    Raises:
        ConfigError: unknown format, or a licence where there is no card.
        ArtifactError: the run has not come that far.
    """
    if queries_license is not None and fmt in FORMATS and fmt != "parquet":
        raise ConfigError(
            f"--queries-license goes into a data set's card, and {fmt} has none. Leave it out or "
            "take --format parquet."
        )
    source = _iteration(found, iteration, baseline=baseline)
    records: Stored[Any]
    if fmt == "authors":
        written = [p for n in ("filtered.jsonl", "samples") if (p := source / n).exists()]
        if not written:
            raise ArtifactError(f"{source} has no triples yet; run it first.")
        records = stored_triples(written[0])
    else:
        if not any((source / "preferences").glob("shard-*.jsonl")):
            raise ArtifactError(f"{source} has no preferences yet; run it first.")
        records = stored_preferences(source / "preferences")
    kept, unsafe = _allowed(found, records)

    def card(files: list[str], left_out: list[str]) -> str:
        return dataset_card(
            origin_of(found, iteration, baseline=baseline),
            count=len(kept),
            files=files,
            left_out=[*unsafe, *left_out],
            queries_license=queries_license,
        )

    exported = export(
        kept,
        fmt,
        folder,
        found["recipe"]["name"],
        models=_writers(found, iteration, baseline=baseline),
        card=card if fmt == "parquet" else None,
    )
    return Exported(exported.paths, exported.count, [*unsafe, *exported.left_out])


def _allowed(found: Mapping[str, Any], records: Stored[Any]) -> tuple[Stored[Any], list[str]]:
    """What the run's recipe lets out, and what it does not, said.

    The bad response to a query about Safety was written under a principle that asks for harm.

    Raises:
        ConfigError: the recipe keeps pairs about Safety, and some records do not say what their
            principles were about.
    """
    if found["recipe"]["hygiene"].get("export_unsafe", True):
        return records, []
    silent, safe = 0, array("q")
    for i, record in enumerate(records):
        silent += not named_features(record)
        if not names_safety(record):
            safe.append(i)
    if silent:
        raise ConfigError(
            f"hygiene.export_unsafe is false, but {silent:,} of {len(records):,} records name no "
            "feature, so it is unknown whether they are about Safety. Set it to true if these "
            "texts may leave the run."
        )
    count = len(records) - len(safe)
    return records.take(safe), [
        f"{count:,} of {len(records):,} records: their principles name Safety."
    ]


def export_model(found: Mapping[str, Any], iteration: int, folder: Path, *, baseline: bool) -> Path:
    """Copies an iteration's policy to a folder of its own, with a model card beside it.

    The run's own folder stays as it is: its digest is the key of its stored log-probs.

    Raises:
        ConfigError: the folder is there and not empty.
        ArtifactError: there is no such policy, or the disk is full.
    """
    source = _iteration(found, iteration, baseline=baseline) / "policy"
    if not any(source.glob("*.safetensors")):
        raise ArtifactError(f"{source} holds no model yet; run it first.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; choose another, or move it away.")
    files = sorted(p for p in source.iterdir() if p.is_file())
    partial = folder.with_name(f".{folder.name}.partial")
    with disk_errors(folder), progress_bar("copy", len(files)) as bar:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in files:
            shutil.copy2(path, partial / path.name)
            bar.advance(1)
        card = model_card(origin_of(found, iteration, baseline=baseline))
        write_atomic(partial / "README.md", card)
        partial.replace(folder)
    return folder


def _iteration(found: Mapping[str, Any], iteration: int, *, baseline: bool) -> Path:
    run = Path(found["run"])
    if baseline and not found["recipe"].get("baseline"):
        raise ConfigError(f"{run} has no baseline.")
    return RunFolder(run).iteration(iteration, baseline=baseline)


# -- what the run says of itself -----------------------------------------------------------------


def origin_of(found: Mapping[str, Any], iteration: int, *, baseline: bool) -> Origin:
    """What a card tells of an iteration of a run (`selfsteer.report.summary.load`)."""
    recipe, stages = found["recipe"], found["stages"]
    method = recipe["baseline"] if baseline else recipe["method"]
    where = f"{'baseline/' if baseline else ''}iteration-{iteration}/"
    shared = ("queries", "augment", f"iteration-{iteration}/principles")
    after = (f"{where}quality", f"{where}policy")
    begun = [
        e
        for e in RunFolder(Path(found["run"])).ledger()
        if e["event"] == "begin" and e["stage"] == f"{where}preferences"
    ]
    measured = found["quality"].get(method, [])
    evaluation, label = found["evaluation"], f"{method}/iteration-{iteration}"
    models = evaluation["models"] if evaluation else {}
    queries, judge = recipe["queries"], recipe.get("judge")
    return Origin(
        name=recipe["name"],
        method=method,
        iteration=iteration,
        iterations=recipe["iterations"],
        model=recipe["policy"]["model"],
        principles=_principles(recipe["principles"]) if "principles" in recipe else None,
        sampling=recipe["sampling"],
        training=recipe["training"],
        queries=public_name(queries["path"])
        + (", grown with the policy itself" if queries.get("augment") else ""),
        seed=recipe["seed"],
        made=_made(begun[-1]) if begun else "unknown",
        steps=[
            Step(name, e["n_in"], e["n_out"], e["dropped"])
            for name, e in stages.items()
            if e["event"] == "finish"
            and (name in shared or (name.startswith(where) and name not in after))
        ],
        quality=measured[iteration - 1]["preferences"] if len(measured) >= iteration else None,
        judge=None if judge is None else judge_name(judge),
        trained_on=stages.get(f"{where}policy", {}).get("n_out"),
        evaluation=(evaluation["queries"], models["base"], models[label])
        if label in models
        else None,
    )


def _made(begin: Mapping[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d", time.gmtime(begin["time"]))
    return f"{when}, with {', '.join(f'{k} {v}' for k, v in begin['versions'].items())}"


def _principles(settings: Mapping[str, Any]) -> str:
    """Where the principles come from."""
    own, mode = settings.get("catalogue"), settings["mode"]
    texts = f"the texts of the catalogue {public_name(own)}" if own else "the built-in texts"
    if mode == "fixed":
        return f"{mode}: texts given by the author of the run"
    if mode == "picked":
        return f"{mode}: {texts} of the features"
    writer = settings.get("writer")
    writer = public_name(writer) if isinstance(writer, str) else "the policy"
    return f"{mode}: written per query by {writer}, {texts} where its answer was unusable"


def _writers(found: Mapping[str, Any], iteration: int, *, baseline: bool) -> tuple[str, str]:
    """Names of the models that wrote the chosen and the rejected answers."""
    recipe = found["recipe"]
    own = f"{recipe['name']}{'/baseline' if baseline else ''}/iteration"
    if not baseline and recipe["method"] == "sso":
        generator = f"{own}-{iteration}/generator"
        halves = recipe["generator"]["per_half"]
        return (f"{generator}/plus", f"{generator}/minus") if halves else (generator, generator)
    policy = (
        public_name(recipe["policy"]["model"])
        if iteration == 1
        else f"{own}-{iteration - 1}/policy"
    )
    if recipe["method"] == "spin" and not baseline:
        return f"given in {public_name(recipe['queries']['path'])}", policy
    if recipe["method"] == "sgpo" and not baseline and recipe["improver"]:
        return public_name(recipe["improver"]["model"]), policy
    return policy, policy
