"""A run's data and models for other programs, with the cards that tell how they were made."""

import shutil
from array import array
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import disk_errors, write_atomic
from selfsteer.data.stored import Stored
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.formats import FORMATS, Exported, export, export_parquet, export_triples
from selfsteer.formats.cards import dataset_card, model_card, public_name
from selfsteer.formats.export import R
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
    if fmt not in FORMATS:
        raise ConfigError(f"Unknown format {fmt!r}; choose one of {', '.join(FORMATS)}.")
    if queries_license is not None and fmt != "parquet":
        raise ConfigError(
            f"--queries-license goes into a data set's card, and {fmt} has none. Leave it out or "
            "take --format parquet."
        )
    source = _iteration(found, iteration, baseline=baseline)
    if fmt == "authors":
        for triples in (source / "filtered.jsonl", source / "samples"):
            if triples.exists():
                kept, said = _allowed(found, stored_triples(triples))
                exported = export_triples(kept, folder)
                return replace(exported, left_out=[*said, *exported.left_out])
        raise ArtifactError(f"{source} has no triples yet; run it first.")
    if not any((source / "preferences").glob("shard-*.jsonl")):
        raise ArtifactError(f"{source} has no preferences yet; run it first.")
    preferences, said = _allowed(found, stored_preferences(source / "preferences"))
    if fmt == "parquet":

        def card(files: list[str], left_out: list[str]) -> str:
            return dataset_card(
                found,
                iteration=iteration,
                baseline=baseline,
                count=len(preferences),
                files=files,
                left_out=[*said, *left_out],
                queries_license=queries_license,
            )

        exported = export_parquet(preferences, folder, card)
    else:
        models = _writers(found, iteration, baseline=baseline)
        exported = export(preferences, fmt, folder, found["recipe"]["name"], models=models)
    return replace(exported, left_out=[*said, *exported.left_out])


def _allowed(found: Mapping[str, Any], records: Stored[R]) -> tuple[Stored[R], list[str]]:
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
            "feature, so nobody knows whether they are about Safety. Set it to true if these texts "
            "may leave the run."
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
        card = model_card(found, iteration=iteration, baseline=baseline)
        write_atomic(partial / "README.md", card)
        partial.replace(folder)
    return folder


def _iteration(found: Mapping[str, Any], iteration: int, *, baseline: bool) -> Path:
    run = Path(found["run"])
    if baseline and not found["recipe"].get("baseline"):
        raise ConfigError(f"{run} has no baseline.")
    return RunFolder(run).iteration(iteration, baseline=baseline)


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
