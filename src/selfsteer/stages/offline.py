"""`selfsteer train`: one objective on stored triples, under torchrun if there are ranks."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from selfsteer.data.digests import digest, model_digest
from selfsteer.data.jsonl import dump_lines, write_atomic
from selfsteer.data.reading import import_records
from selfsteer.data.records import Dropped, Preference, Triple
from selfsteer.errors import ConfigError, DataError
from selfsteer.models.load import check_trainable
from selfsteer.objectives import Objective
from selfsteer.recipe.sections import CONSTANTS, Hygiene, TrainConfig, resolve_path
from selfsteer.run import ranks
from selfsteer.run.folder import RunFolder
from selfsteer.run.stage import identity
from selfsteer.stages.filter import unfit
from selfsteer.stages.fit import encode, refer
from selfsteer.terminal import is_main_process, say, warn
from selfsteer.training.parts import load_to_train
from selfsteer.training.preference import PreferenceTask
from selfsteer.training.trainer import (
    RowBudget,
    complete_checkpoints,
    publish,
    train,
    work_folder,
)

MANIFEST = "selfsteer.json"
LOG = "metrics.jsonl"
DROPPED = "dropped.jsonl"


def train_offline(model: str, triples_path: Path, config: TrainConfig) -> dict[str, Any]:
    """Trains ``model`` and writes it to ``config.output``; the same command resumes.

    Args:
        model: folder, hub id or package: path.
        triples_path: our triples, the authors' JSON, or preferences (see docs/formats.md).
        config: objective and optimisation.

    Returns:
        The manifest that is also written into the output folder.

    Raises:
        ConfigError: the output holds something made with other settings or ranks.
        DataError: no triple has what the objective needs.
    """
    output = Path(os.path.expanduser(config.output))
    model, objective = resolve_path(model), _objective(config)
    needed = {*objective.sequences, *objective.read}
    found = import_records(triples_path, trainable=True)
    for example in found.examples:
        warn(f"dropped: {example}")
    dropped, triples = list(found.drops), list[Triple]()
    for record in found.records:
        triple: Any = record.to_triple() if isinstance(record, Preference) else record
        if why := teaches_nothing(triple, needed, keep_unfinished=config.keep_unfinished):
            dropped.append(Dropped(triple.id, why, triple))
        else:
            triples.append(triple)
    if not triples:
        raise _nothing_left(dropped)
    settings = identity(config)
    # queries per step depend on the ranks, and a training resumed with others would mix two orders
    fingerprint = digest([settings, ranks.size(), model_digest(model), dump_lines(triples)])
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        return _finished(output, fingerprint)
    work = RunFolder(work_folder(output))
    with work.locked() if is_main_process() else nullcontext():
        mark = work / "fingerprint"
        begun = complete_checkpoints(work.path) or (work / "model").exists()
        if begun and mark.exists() and mark.read_text("utf-8") != fingerprint:
            raise ConfigError(
                f"{work.path} holds a training that was begun with other settings, data or ranks. "
                "Finish it with those, choose another output, or remove that folder."
            )
        if is_main_process():
            write_atomic(mark, fingerprint)
        made = {"fingerprint": fingerprint, "model": model, "triples": str(triples_path)}
        with work.on_its_day():
            return _train(model, triples, dropped, config, work, made)


def teaches_nothing(
    triple: Triple, sequences: Collection[str], *, keep_unfinished: bool
) -> str | None:
    """Why a run would drop this triple.

    Args:
        triple: to look at.
        sequences: that the objective reads, as ``context/response``.
        keep_unfinished: whether answers may lack their end.

    Returns:
        ``no_pair``, ``no_plain``, ``no_principles``, ``unfinished``, or as `unfit` says.
    """
    if not {"good", "bad"} <= triple.responses.keys():
        return "no_pair"
    if "plain" not in triple.responses and any(s.endswith("/plain") for s in sequences):
        return "no_plain"
    if triple.principles is None and not all(s.startswith("plain/") for s in sequences):
        return "no_principles"
    if not keep_unfinished and not all(map(triple.finished, triple.responses)):
        return "unfinished"
    return unfit(triple, Hygiene())


def _nothing_left(dropped: list[Dropped]) -> DataError:
    counts = Counter(d.reason for d in dropped).most_common()
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts)
    return DataError(f"Nothing to train on: all {len(dropped):,} records are dropped ({reasons}).")


def _objective(config: TrainConfig) -> Objective:
    return Objective.named(config.objective, **config.model_dump(include={"base", *CONSTANTS}))


def _train(
    model: str,
    triples: list[Triple],
    dropped: list[Dropped],
    config: TrainConfig,
    work: RunFolder,
    made: dict[str, Any],
) -> dict[str, Any]:
    objective, output = _objective(config), Path(os.path.expanduser(config.output))
    check_trainable(model, config, config.lora)
    loaded = load_to_train(model, config, config.lora)
    n_in = len(triples) + len(dropped)
    limit, folder = config.max_length, work.path
    examples, reasons, truncated = encode(loaded, triples, objective, limit, folder)
    dropped = dropped + [Dropped(t.id, reasons[t.id], t) for t in triples if t.id in reasons]
    if not examples:
        raise _nothing_left(dropped)
    if is_main_process():
        work.drop("train", dropped)
    say(
        f"{objective.name} ({config.base}): {len(examples):,} of {n_in:,} records, "
        f"{len(objective.sequences)} sequences each, {truncated:,} responses truncated"
    )
    ranks.join(loaded.device.type)
    refer(examples, objective, lambda: loaded, work / "scores")
    queries = config.batch_size * config.accumulate * ranks.size()
    last = train(
        loaded,
        PreferenceTask(loaded, objective, examples),
        config,
        output=output,
        budget=RowBudget(queries, config.row_tokens, config.batch_size),
        label="train",
        seed=config.seed,
        lora=config.lora,
        on_log=lambda line: work.append(LOG, {"stage": "train", **line}),
        on_start=lambda step: work.rewind(LOG, "train", step),
    )
    manifest = made | {
        "config": config.model_dump(),
        "n_in": n_in,
        "n_out": len(examples),
        "dropped": dict(Counter(d.reason for d in dropped)),
        "responses_truncated": truncated,
        "last": last,
    }
    if is_main_process():
        write_atomic(work / "model" / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        shutil.copy(work / LOG, work / "model" / LOG)
        if dropped:
            shutil.copy(work / "train.dropped.jsonl", work / "model" / DROPPED)
    publish(output)
    ranks.shutdown()
    return manifest


def _finished(output: Path, fingerprint: str) -> dict[str, Any]:
    try:
        manifest = json.loads((output / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        manifest = {}
    if manifest.get("fingerprint") != fingerprint:
        raise ConfigError(
            f"The output {output} is there already and was not made by this command with these "
            "settings, data and number of ranks. Choose another output, or move it away."
        )
    say(f"nothing to do: {output} is finished")
    return dict(manifest)
