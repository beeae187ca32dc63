"""``selfsteer report-bug``: what somebody else needs to find a fault of a run, in one file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import out, say
from selfsteer.verbs.common import AsJson, emit

if TYPE_CHECKING:
    from selfsteer.verbs.bugs import Packed


def report_bug(
    run: Annotated[Path, typer.Argument(help="run folder, finished, failed or damaged")],
    to: Annotated[
        Path | None, typer.Option("--out", help="zip file to write; default: NAME-bug.zip here")
    ] = None,
    with_data: Annotated[
        bool,
        typer.Option(help="add the first records of each file: queries, answers and dropped ones"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pack what a bug report needs: versions, platform, recipe, ledger, last log lines, drops.

    Secrets, your home folder and the host that the run noted are replaced. Prompts and answers stay
    out unless you add --with-data. Nothing is sent anywhere; what the file holds is printed.
    """
    from selfsteer.data.jsonl import write_atomic
    from selfsteer.verbs.bugs import packed

    target = to or Path(f"{run.resolve().name}-bug.zip")
    if target.suffix != ".zip":
        raise ConfigError(f"--out names the file to write and must end in .zip, found {target}.")
    if target.exists():
        raise ConfigError(f"{target} is there already. Remove it, or choose another --out.")
    made = packed(run, with_data=with_data)
    write_atomic(target, made.archive())
    result = {"file": str(target), **made.to_json()}
    emit(result, as_json, lambda _: _print(target, made))


def _print(target: Path, made: "Packed") -> None:
    out.print(f"{target}  {target.stat().st_size:,} bytes", markup=False)
    for name, text in made.files.items():
        out.print(f"  {name}  {len(text.encode()):,} bytes", markup=False)
    for what, count in (+made.removed).items():
        out.print(f"  replaced: {what}, {count:,} times", markup=False)
    for name, why in made.left_out.items():
        out.print(f"  left out: {name}: {why}", markup=False)
    say("Read it before you send it: principles and settings are in it as you wrote them.")
