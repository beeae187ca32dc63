"""``selfsteer rewardbench``: a reward model, or a policy taken as one, on chosen/rejected sets."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.terminal import out, say, warn
from selfsteer.verbs.common import AsJson, emit


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
    from selfsteer.stages.benchmark_rewards import benchmark_rewards

    loading = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    report, text, written = benchmark_rewards(
        model,
        file,
        reference=ref,
        beta=beta,
        per_token=per_token,
        output=out_file,
        batch_size=batch_size,
        loading=loading,
        seed=seed,
    )
    for example in report["examples"]:
        warn(f"dropped: {example}")
    emit(report, as_json, lambda _: out.print(text, markup=False))
    for path in written:
        say(f"written: {path}")
