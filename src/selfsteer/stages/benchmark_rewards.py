"""`selfsteer rewardbench`: a model and a file to a report, kept in the model's run folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import digest_path
from selfsteer.data.files import read_rows
from selfsteer.data.jsonl import write_atomic
from selfsteer.errors import ConfigError, DataError
from selfsteer.evaluation.implicit_reward import ImplicitReward
from selfsteer.evaluation.rewardbench import evaluate, markdown, read_items
from selfsteer.judges.base import Scorer
from selfsteer.judges.reward import RewardJudge
from selfsteer.models.load import is_reward_model
from selfsteer.recipe.read import validate
from selfsteer.recipe.sections import JudgeConfig, Policy, resolve_path
from selfsteer.run.folder import versions


def benchmark_rewards(
    model: str,
    file: Path,
    *,
    reference: str | None,
    beta: float | None,
    per_token: bool,
    output: Path | None,
    batch_size: int | None,
    loading: Mapping[str, Any],
    seed: int,
) -> tuple[dict[str, Any], str, list[Path]]:
    """Scores a file's rows; see `selfsteer.evaluation.rewardbench` for what is read and counted.

    Args:
        model: a classifier with one label, or a chat model, scored by its implicit reward.
        file: the rows.
        reference: of a chat model.
        beta: of a chat model; None is 0.1.
        per_token: of a chat model.
        output: JSON file; None: ``rewardbench/`` of the model's run folder, where it lies in one.
        batch_size: of a reward model; None is 32.
        loading: dtype, device and trust_remote_code.
        seed: of the intervals.

    Returns:
        The report, its markdown table, and the files written.

    Raises:
        ConfigError: an option that this kind of model has no use for, or settings that are none.
        DataError: the file cannot be read, or no row can be used.
    """
    if output is not None and output.suffix != ".json":
        raise ConfigError(f"{output} would hold JSON; choose an --out that ends in .json.")
    scorer = _scorer(model, reference, beta, batch_size, loading, per_token=per_token)
    items, dropped, examples = read_items(read_rows(file), file.stem)
    if not items:
        raise DataError(
            f"{file} has no row with prompt, chosen and rejected answers. "
            f"{''.join(f'{e}. ' for e in examples[:1])}Give JSONL, JSON, Parquet or CSV with these "
            "columns, and subset where there are several."
        )
    found = evaluate(items, scorer, np.random.default_rng(seed))
    if too_long := found.pop("too_long"):
        dropped["too_long"] = too_long
    report = {
        "model": model,
        "reference": reference,
        "file": str(file),
        "file_digest": digest_path(file),
        "rows_read": found["rows"] + dropped.total(),
        "dropped": dict(sorted(dropped.items())),
        "examples": examples,
        **found,
        "versions": versions(),
    }
    text = markdown(report)
    kind = "-ref" * (reference is not None) + "-per-token" * per_token
    path = output or _in_run(Path(resolve_path(model)), f"{file.stem}{kind}")
    if path is None:
        return report, text, []
    write_atomic(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_atomic(path.with_suffix(".md"), text)
    return report, text, [path, path.with_suffix(".md")]


def _scorer(
    model: str,
    reference: str | None,
    beta: float | None,
    batch_size: int | None,
    loading: Mapping[str, Any],
    *,
    per_token: bool,
) -> Scorer:
    source = resolve_path(model)
    policy = validate(Policy, {"model": source, **loading}, "options of rewardbench")
    if is_reward_model(source, policy):
        for name, given in (("--ref", reference), ("--beta", beta), ("--per-token", per_token)):
            if given not in (None, False):
                raise ConfigError(f"{name} has no effect: {model} is a reward model; leave it out.")
        judge = {"kind": "reward", "model": source, "batch_size": batch_size or 32, **loading}
        return RewardJudge(validate(JudgeConfig, judge, "options of rewardbench"))
    if batch_size is not None:
        raise ConfigError(
            f"--batch-size has no effect: {model} is a chat model, whose sequences are put "
            "together by their length; leave it out."
        )
    if beta is not None and not 0 < beta < math.inf:
        raise ConfigError(f"--beta must be above 0 and finite, found {beta:g}.")
    return ImplicitReward(policy, reference, beta or 0.1, per_token=per_token)


def _in_run(model: Path, name: str) -> Path | None:
    """``RUN/rewardbench/iteration-1-policy-NAME.json`` for a model that lies in a run folder."""
    folder = model.absolute()
    run = next((p for p in folder.parents if (p / "resolved.json").is_file()), None)
    if run is None or not model.is_dir():
        return None
    whole = "-".join((*folder.relative_to(run).parts, name))
    return run / "rewardbench" / f"{whole}.json"
