"""``selfsteer rewardbench``: a reward model, or a policy taken as one, on chosen/rejected sets."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfsteer.errors import ConfigError, DataError
from selfsteer.terminal import out, say, warn
from selfsteer.verbs.common import AsJson, emit

if TYPE_CHECKING:
    from selfsteer.judges.base import Scorer
    from selfsteer.recipe.sections import Policy


def rewardbench(
    model: Annotated[
        str, typer.Argument(help="reward model or policy: folder, hub id or package:NAME")
    ],
    file: Annotated[
        Path,
        typer.Argument(help="JSONL, JSON, Parquet or CSV with prompt, chosen, rejected and subset"),
    ],
    ref: Annotated[
        str | None, typer.Option(help="for a policy: the model it was trained from; default: none")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="for a policy: scale of its rewards; default: 0.1")
    ] = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="for a policy: divide by the length of the answer")
    ] = False,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="JSON file to write; default: in the run folder that the model is part of, if any",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="for a reward model: sequences per batch; default: 32", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="run Python code that comes with the checkpoint"),
    ] = False,
    seed: Annotated[int, typer.Option(help="seed of the intervals")] = 0,
    as_json: AsJson = False,
) -> None:
    """Score a reward model, or a policy by its implicit reward, on RewardBench or a file like it.

    Reads the columns of RewardBench and RewardBench 2. Sections are weighted as on the leaderboard;
    other subsets are listed by name. The reward of a policy is beta * (log p - log p_ref).
    """
    import numpy as np

    from selfsteer.data.digests import digest_path
    from selfsteer.data.files import read_rows
    from selfsteer.data.jsonl import write_atomic
    from selfsteer.evaluation.rewardbench import evaluate, markdown, read_items, readable
    from selfsteer.models.load import load_chat
    from selfsteer.recipe.read import validate
    from selfsteer.recipe.sections import Policy, resolve_path
    from selfsteer.run.folder import versions

    if out_file is not None and out_file.suffix != ".json":
        raise ConfigError(f"{out_file} would hold JSON; choose an --out that ends in .json.")
    loading = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    given = {"model": resolve_path(model), **loading}
    policy = validate(Policy, given, "options of rewardbench")
    scorer = _scorer(model, policy, ref, beta, batch_size, per_token=per_token)
    items, dropped, examples = read_items(read_rows(file), file.stem)
    for example in examples:
        warn(f"dropped: {example}")
    if not items:
        raise DataError(
            f"{file} has no row with prompt, chosen and rejected answers. Give JSONL, JSON, "
            "Parquet or CSV with these columns, and subset where there are several."
        )
    read = readable(items, load_chat(policy.model, policy))
    if refused := len(items) - len(read):
        dropped["template_refuses"] = refused
    if not read:
        raise DataError(f"The chat template of {model} refuses the conversation of every row.")
    found = evaluate(read, scorer, np.random.default_rng(seed))
    if too_long := found.pop("too_long"):
        dropped["too_long"] = too_long
    report = {
        "model": model,
        "reference": ref,
        "file": str(file),
        "file_digest": digest_path(file),
        "rows_read": found["rows"] + dropped.total(),
        "dropped": dict(sorted(dropped.items())),
        "examples": examples,
        **found,
        "versions": versions(),
    }
    text = markdown(report)
    kind = "-ref" * (ref is not None) + "-per-token" * per_token
    path = out_file or _in_run(Path(resolve_path(model)), f"{file.stem}{kind}")
    emit(report, as_json, lambda _: out.print(text, markup=False))
    if path is not None:
        write_atomic(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
        write_atomic(path.with_suffix(".md"), text)
        say(f"written: {path} and {path.with_suffix('.md').name}")


def _scorer(
    model: str,
    policy: "Policy",
    reference: str | None,
    beta: float | None,
    batch_size: int | None,
    *,
    per_token: bool,
) -> "Scorer":
    """A reward model, or a policy by its implicit reward.

    Raises:
        ConfigError: an option that has no effect on this kind of model, or a bad setting.
    """
    from selfsteer.evaluation.implicit_reward import ImplicitReward
    from selfsteer.judges.reward import RewardJudge
    from selfsteer.models.load import is_reward_model
    from selfsteer.recipe.read import validate
    from selfsteer.recipe.sections import JudgeConfig

    source = policy.model
    if is_reward_model(source, policy):
        for name, given in (("--ref", reference), ("--beta", beta), ("--per-token", per_token)):
            if given not in (None, False):
                raise ConfigError(f"{name} has no effect: {model} is a reward model; leave it out.")
        judge = {"kind": "reward", "model": source, "batch_size": batch_size or 32}
        judge |= policy.model_dump(include={"dtype", "device", "trust_remote_code"})
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
