"""``selfsteer export``: a run's preferences or its policy for other programs."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import out, warn
from selfsteer.verbs.common import AsJson, Trust, aligning, check_trust, emit


def export(
    run: Annotated[Path, typer.Argument(help="run folder")],
    to: Annotated[Path, typer.Option(help="folder to write to")],
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="trl (default), trl-prompts, trl-unpaired, llama-factory, llama-factory-sharegpt, "
            "distilabel, chat, parquet or authors; reward, a function for GRPO; answers for an "
            "official benchmark: alpaca-eval, arena-hard or mt-bench; or, with --model, gguf",
        ),
    ] = None,
    model: Annotated[
        bool, typer.Option("--model", help="export the trained policy with its card")
    ] = False,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="llama.cpp's sources, whose convert_hf_to_gguf.py --format gguf runs; default: "
            "the one on the PATH",
        ),
    ] = None,
    iteration: Annotated[
        int | None, typer.Option(help="iteration to export; default: the last one")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="export the baseline's data or policy")] = False,
    queries_license: Annotated[
        str | None, typer.Option(help="licence of the queries, for the card of --format parquet")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="question file of the official benchmark; default: the run's judged set"),
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Export a run's preferences, its policy with a card, or its answers to a benchmark."""
    from selfsteer.evaluation.official import FILES

    if fmt in FILES:
        if model or baseline or iteration is not None or queries_license is not None:
            raise ConfigError(
                f"--format {fmt} exports the answers of base, baseline and policy, and takes "
                "neither --model, --baseline, --iteration nor --queries-license."
            )
        _export_answers(run, str(fmt), questions, to, as_json, trust)
        return
    if questions is not None:
        raise ConfigError(f"--questions belongs to --format {', '.join(FILES)}.")
    if fmt == "gguf" and not model:
        raise ConfigError("--format gguf is a format of models; add --model.")
    if llama_cpp is not None and fmt != "gguf":
        raise ConfigError("--llama-cpp belongs to --model --format gguf.")
    if model and (fmt not in (None, "gguf") or queries_license is not None):
        raise ConfigError(
            "--model takes neither --queries-license nor a --format other than gguf: those are for "
            "data."
        )
    from selfsteer.formats.cards import warnings_of
    from selfsteer.formats.gguf import converter
    from selfsteer.verbs.exporting import check_outside, export_model, export_to
    from selfsteer.view import RunView

    check_outside(to)
    of = RunView.open(run).round(iteration, baseline=baseline)
    if model:
        again = f"selfsteer export {shlex.quote(str(run))} --model --format gguf --to "
        command = converter(llama_cpp, again + shlex.quote(str(to))) if fmt else None
        folder = str(export_model(of, to, command))
        emit({"paths": [folder], "warnings": warnings_of(of)}, as_json, _print_model)
        return
    if fmt == "reward":
        check_trust(run, of.recipe.policy, trust)
    exported = export_to(to, of, fmt or "trl", queries_license, trust=trust)
    paths = list(map(str, exported.paths))
    result = {
        "records": exported.count,
        "paths": paths,
        "left_out": exported.left_out,
        "warnings": warnings_of(of, data=True),
    }
    emit(result, as_json, _print)


def _print_model(result: dict[str, Any]) -> None:
    for text in result["warnings"]:
        warn(text)
    out.print(*result["paths"], markup=False)


def _print(result: dict[str, Any]) -> None:
    for reason in (*result["warnings"], *result["left_out"]):
        warn(reason)
    out.print(f"{result['records']:,} records: {', '.join(result['paths'])}")


def _export_answers(
    run: Path, style: str, questions: Path | None, to: Path, as_json: bool, trust: bool
) -> None:
    """Writes answers, and prints the commands that run the official tool on them."""
    from selfsteer.verbs.benchmark import export_answers
    from selfsteer.verbs.exporting import check_outside
    from selfsteer.view import RunView

    check_outside(to)
    opened = RunView.open(run)
    check_trust(run, opened.recipe.policy, trust)
    check_trust(run, aligning(opened.recipe).sampling, trust)
    written = export_answers(opened, style, questions, to)

    def show(result: dict[str, Any]) -> None:
        for name, count in written.left_out.items():
            warn(f"{name}: {count:,} questions were not answered and are left out")
        out.print(f"{written.answers:,} answers: {', '.join(result['paths'])}", markup=False)
        out.print(f"\nRun the official tool on them:\n\n{written.commands}", markup=False)

    emit({**asdict(written), "paths": list(map(str, written.paths))}, as_json, show)
