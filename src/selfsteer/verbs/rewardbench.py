"""``selfsteer rewardbench``: a reward model, or a policy taken as one, on chosen/rejected sets."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.verbs.common import AsJson


def rewardbench(
    model: Annotated[str, typer.Argument(help="reward model or policy: folder, hub id, package:")],
    file: Annotated[
        Path, typer.Argument(help="JSONL, JSON, Parquet or CSV: prompt, chosen, rejected, subset")
    ],
    ref: Annotated[
        str | None, typer.Option(help="of a policy: what it was trained from; default: none")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="of a policy: scales its rewards; 0.1")] = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="of a policy: divide by the answer's length")
    ] = False,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", help="JSON file to write; default: in the model's run folder, if any"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="of a reward model: sequences together; 32", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the checkpoint")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the intervals")] = 0,
    as_json: AsJson = False,
) -> None:
    """Score a reward model, or a policy by its implicit reward, as RewardBench does.

    Reads RewardBench's and RewardBench 2's columns; sections are weighted as on the leaderboard,
    other subsets stand under their own names. A policy's reward is beta * (log p - log p_ref).
    """
    from selfsteer.stages.benchmark_rewards import benchmark_rewards
    from selfsteer.terminal import out, say, warn

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
    if as_json:
        out.print_json(data=report)
    else:
        out.print(text, markup=False)
    for path in written:
        say(f"written: {path}")
