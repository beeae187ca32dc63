"""``selfsteer plan``: what a recipe will cost, before anything of it runs."""

import shlex
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from selfsteer.errors import ConfigError, short
from selfsteer.terminal import duration, out, say, table, warn
from selfsteer.verbs.common import (
    AsJson,
    Overrides,
    RecipeName,
    aligning,
    emit,
    settings_of,
    size,
)

#: The largest number that is calculated with.
MOST = 10**15


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="GPU model: a100, h100, h200 or l40s")] = "h100",
    gpus: Annotated[int, typer.Option(help="number of GPUs", min=1, max=MOST)] = 1,
    queries: Annotated[
        int | None,
        typer.Option(help="number of queries; default: counted in the query set", min=1, max=MOST),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(
            help="parameters of the policy, such as 8.03e9; default: counted", min=1, max=MOST
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="layers of the policy", min=1, max=MOST)
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(help="hidden size of the policy", min=1, max=MOST)
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="vocabulary size of the policy", min=1, max=MOST)
    ] = None,
    query_tokens: Annotated[int, typer.Option(help="tokens per query", min=1, max=MOST)] = 120,
    principle_tokens: Annotated[
        int, typer.Option(help="tokens per principle", min=1, max=MOST)
    ] = 250,
    response_tokens: Annotated[
        int,
        typer.Option(help="tokens per response, at most sampling.max_new_tokens", min=2, max=MOST),
    ] = 330,
    utilisation: Annotated[
        float,
        typer.Option(
            help="share of the GPU's peak that training and scoring reach", min=0.01, max=1
        ),
    ] = 0.4,
    sampling_utilisation: Annotated[
        float, typer.Option(help="share of the GPU's peak that sampling reaches", min=0.001, max=1)
    ] = 0.1,
    as_json: AsJson = False,
) -> None:
    """Estimate what a recipe costs: tokens, operations, memory, disk and hours.

    Reads the size of the model from its config.json; for a model that is not on this machine, give
    --params, --layers, --hidden and --vocabulary. The formulas are in docs/scaling.md.
    """
    from selfsteer.methods import recipe_of
    from selfsteer.recipe.sections import resolve_path

    values = settings_of(recipe, overrides or [])
    for section, key, known in (("policy", "model", params), ("queries", "path", queries)):
        given = values.setdefault(section, {}) if known is not None else None
        if isinstance(given, dict) and not given.get(key):
            given[key] = f"the {section}"  # left open, and not needed for arithmetic
    checked = aligning(recipe_of(values, f"recipe {recipe}"))
    from selfsteer.data.queries import load_queries
    from selfsteer.run.cost import Scale
    from selfsteer.verbs import planning

    if gpu not in planning.GPUS:
        raise ConfigError(f"Unknown GPU {short(gpu)}; choose one of {', '.join(planning.GPUS)}.")
    shape = planning.shape_of(
        resolve_path(checked.policy.model),
        params=params,
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
    )
    count = queries or len(load_queries(checked.queries).queries)
    held_out = len(load_queries(checked.evaluation.queries).queries) if checked.evaluation else 0
    found = planning.plan(
        checked,
        Scale(count, held_out),
        shape,
        planning.Lengths(query_tokens, principle_tokens, response_tokens),
        planning.Machine(gpu, gpus, utilisation, sampling_utilisation),
    )
    emit(found, as_json, tell)
    say(f"measured on this machine: {shlex.join(['selfsteer', 'check', recipe])}")


def tell(found: Mapping[str, Any]) -> None:
    """Prints a plan: stages, memory, disk, what dominates, and what was assumed."""
    assumed, totals, memory = found["assumptions"], found["totals"], found["memory_per_rank"]
    where, room = f"{assumed['gpus']:,} {assumed['gpu'].upper()}", found["gpu_memory"]
    out.print(f"{found['recipe']}: an estimate; nothing was measured", style="bold")
    stages = table(
        ["stage", "records", "tokens sampled", "PFLOP", f"on {where}"],
        (
            [
                row["stage"],
                f"{row['records']:,}",
                f"{row['sampled_tokens']:,}" if row["sampled_tokens"] else "",
                *((_peta(flops), duration(row["hours"] * 3600)) if flops else ("", "")),
            ]
            for row in found["stages"]
            for flops in [sum(row["flops"].values())]
        ),
    )
    sums = (f"{totals['sampled_tokens']:,}", _peta(totals["flops"]))
    stages.add_row("total", "", *sums, duration(totals["hours"] * 3600), style="bold")
    out.print(stages)
    names = {"ddp": "each GPU holds all", "sharded": f"sharded over {assumed['gpus']}"}
    ways = list(names) if assumed["gpus"] > 1 else ["ddp"]
    held = table(
        ["GPU memory, training", *(names[way] for way in ways)],
        (
            [kind, *(size(memory[way][kind]) if kind in memory[way] else "" for way in ways)]
            for kind in memory["ddp"]
        ),
    )
    needed = [totals["memory_per_rank"][way] for way in ways]
    fits = [f"{size(n)} {'fits' if n <= room else 'too much'}" for n in needed]
    held.add_row(f"total, of {size(room)}", *fits, style="bold")
    out.print(held)
    parts = ", ".join(f"{kind} {size(n)}" for kind, n in found["disk"].items() if n)
    out.print(f"disk: {size(totals['disk'])}: {parts}")
    if judge := totals["judge"]:
        out.print(
            f"judge: {judge['requests']:,} requests, {judge['prompt_tokens']:,} tokens in, "
            f"{judge['completion_tokens']:,} out"
        )
    if totals["cost"] is not None:
        parts_of = ((r["stage"], r) for r in found["stages"])
        judges = ((f"judge of {r['stage']}", r["judge"] or {}) for r in found["stages"])
        priced = ", ".join(
            f"{who} {r['cost']:,.2f}" for who, r in (*parts_of, *judges) if r.get("cost")
        )
        out.print(f"servers: {totals['cost']:,.2f} at their price: {priced}")
    stage, share = _largest({row["stage"]: row["hours"] for row in found["stages"]})
    kind, part = _largest(memory[ways[-1]])
    file, kept = _largest(found["disk"])
    out.print(
        f"most of the time: {stage} ({share:.0%}); of the GPU memory: {kind} ({part:.0%}); of the "
        f"disk: {file} ({kept:.0%})"
    )
    out.print(
        f"assumed: {found['shape']['parameters'] / 1e9:,.3g}B parameters; "
        f"{assumed['query_tokens']} tokens a query, {assumed['principle_tokens']} a guideline, "
        f"{assumed['response_tokens']} a response; {assumed['peak_flops'] / 1e12:,.0f} TFLOP/s a "
        f"GPU, of which "
        f"{assumed['utilisation']:.0%} in training and scoring, "
        f"{assumed['sampling_utilisation']:.0%} in sampling; all GPUs busy in every stage; nothing "
        "dropped; judges in process, selection and loading are not counted",
        style="dim",
    )
    if found["not_counted"]:
        warn(f"not counted: {', '.join(found['not_counted'])}")


def _peta(flops: float) -> str:
    """10^15 operations, without digits that mean nothing."""
    return f"{flops / 1e15:,.0f}" if flops >= 1e17 else f"{flops / 1e15:.2g}"


def _largest(parts: Mapping[str, float]) -> tuple[str, float]:
    """The largest part and its share of all."""
    name = max(parts, key=lambda n: parts[n])
    return name, parts[name] / (sum(parts.values()) or 1)
