"""``selfsteer run``: a recipe, from queries to an aligned model."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from selfsteer import stopping
from selfsteer.terminal import is_main_process, out, say
from selfsteer.verbs.common import (
    AsJson,
    Nproc,
    Overrides,
    Profile,
    RecipeName,
    emit,
    load_recipe,
    on_ranks,
    stop_in_time,
)

if TYPE_CHECKING:
    from selfsteer.view import RunView


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
    until_time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="stop cleanly after this time, for example 110m or 2h, with exit code 75; the "
            "same command resumes",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="list the stages without running them")] = False,
    redo: Annotated[
        bool,
        typer.Option(
            help="redo stages whose settings changed or whose files are damaged; their old results "
            "move to superseded/"
        ),
    ] = False,
    nproc: Nproc = None,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe, or resume it: from queries to an aligned model.

    The run folder holds the whole state. After any interruption, the same command resumes; once
    everything is done, it does nothing.

    Shipped recipes: demo, smoke, smollm2, sso, sso-online, pbaa, dlma, contrast, distil,
    good-over-plain, bad-to-plain, best-of-n, best-of-n-principles, pbaa-best-of-n, rlcd,
    self-rewarding, sgpo, spin, spin-judged, irft, wpo, reward.
    """
    from selfsteer.report import summary
    from selfsteer.run.execute import execute, pinned, select, to_do
    from selfsteer.run.folder import RunFolder
    from selfsteer.view import RunView

    checked, given = load_recipe(recipe, overrides or [])
    if dry_run:
        folder, whole = RunFolder(checked.folder), pinned(checked)[0].plan()
        stale = {e["stage"] for e in [*folder.stale(whole), *folder.outdated(whole)]}
        for _, fault in folder.damaged(whole):
            raise fault
        stages = select(whole, until)
        todo = {s.name for s in to_do(folder, stages)}
        states = {
            s.name: "conflict" if s.name in stale else "to do" if s.name in todo else "done"
            for s in stages
        }
        text = "\n".join(f"{state:<10} {name}" for name, state in states.items())
        if is_main_process():
            emit(states, as_json, lambda _: out.print(text))
        return
    stop_in_time(until_time)
    resume = ["selfsteer", "run", str(checked.folder), *(["--until", until] if until else [])]
    try:
        on_ranks(nproc, profile)
    except KeyboardInterrupt:
        if (checked.folder / "recipe.yaml").is_file():
            ranked = ["--nproc", str(nproc)] if nproc else []
            sharded = ["--profile", profile] if profile else []
            stopping.way_on = shlex.join([*resume, *ranked, *sharded])
        raise
    beside = f", with {' and '.join(others)} beside it" if (others := checked.methods[1:]) else ""
    ran = execute(
        checked,
        given,
        until=until,
        redo=redo,
        heading=f"{checked.methods[0]}{beside}",
        way_on=shlex.join(resume),
    )
    if not is_main_process():
        return
    if ran == 0:
        say(f"nothing to do: {checked.folder} is finished" + (f" up to {until}" if until else ""))
    found = RunView.open(checked.folder)
    if as_json:
        out.print_json(data=found.to_json())
        return
    summary.print_result(found)
    _say_next(found, until)


def _say_next(found: "RunView", until: str | None) -> None:
    """Where the model is, and the commands that a person types now."""
    folder, models = shlex.quote(str(found.folder)), found.models
    if until is not None:
        say(f"next: selfsteer view {folder}, or the rest: selfsteer run {folder}")
        return
    steps = [(f"view {folder}", "every answer in a browser")]
    if "policy" in models:
        say(f"\nthe aligned model: {models['policy']}   (from_pretrained and servers load it)")
        steps += [
            (f"show {folder}", "counts, drops by reason, data quality"),
            (f"report {folder}", "the figures on one page"),
            (f"chat {folder}", "ask it something"),
            (f"export {folder} --format trl --to DIR", "the preferences for other trainers")
            if found.stage("WritePairs")
            else (f"export {folder} --model --to DIR", "the model with its card"),
        ]
    elif "reward" in models:
        made = models["reward"]
        steps = [
            (f"rewardbench {shlex.quote(made)} FILE", "its accuracy on a benchmark"),
            (
                f"judge RUN --judge {shlex.quote(f'reward:{made}')}",
                "the pairs of another run, judged by it",
            ),
        ]
    say("next:")
    longest = max(len(command) for command, _ in steps)
    for command, what in steps:
        say(f"  selfsteer {command:<{longest}}   {what}")
