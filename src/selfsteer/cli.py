"""``selfsteer <verb>``: thin; torch is not loaded before a stage starts."""

import errno
import io
import logging
import os
import sys
from dataclasses import make_dataclass
from types import ModuleType
from typing import Annotated, Any, TextIO, cast

import typer
import typer.core

from selfsteer import stopping
from selfsteer.errors import ConfigError, SelfsteerError, clip, short, without_passwords
from selfsteer.run import ranks
from selfsteer.terminal import CONTROL, LastingStream
from selfsteer.verbs import (
    audit,
    bench,
    benchmark,
    chat,
    check,
    compare,
    export,
    import_,
    init,
    judge,
    merge,
    plan,
    preview,
    principles,
    push,
    queries,
    report,
    report_bug,
    rewardbench,
    run,
    schema,
    show,
    sweep,
    testbed,
    train,
    view,
)

#: Verbs by what they are for, in the order of the help. A verb is a module: it has a function of
#: its own name, or an ``app`` of several verbs.
PANELS = {
    "Align a model": (init, check, preview, plan, run, sweep, train, merge),
    "Look at it": (view, report, show, compare, chat, judge, audit, report_bug),
    "Data and principles": (queries, principles, import_, export, push, schema),
    "Measure": (benchmark, rewardbench, bench, testbed),
}


def name_of(verb: ModuleType) -> str:
    """What you type for it."""
    return verb.__name__.rpartition(".")[2].rstrip("_").replace("_", "-")


class Verbs(typer.core.TyperGroup):
    """The verbs in the order of `PANELS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the help's order."""
        return [name_of(verb) for verbs in PANELS.values() for verb in verbs]


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Align a language model with nothing but prompts: Self-Steering Optimization.\n\n"
    "Start with [bold]selfsteer run demo[/bold], then [bold]selfsteer init mine.yaml[/bold]. You "
    "can stop a run at any time; the same command resumes it. [bold]selfsteer view[/bold] shows it "
    "in a browser.",
    epilog="Results go to stdout, everything else to stderr. --json prints results for programs; "
    "NO_COLOR=1 turns colours off. Exit codes: 0 done; 2 usage, recipe or data; 3 model, engine, "
    "disk or a run in use; 130 interrupted (143 by SIGTERM, 75 when "
    "--until-time is up or after SIGUSR1).",
)

for panel, verbs in PANELS.items():
    for verb in verbs:
        if hasattr(verb, "app"):
            app.add_typer(verb.app, name=name_of(verb), rich_help_panel=panel)
        else:
            function = getattr(verb, verb.__name__.rpartition(".")[2])
            app.command(name_of(verb), rich_help_panel=panel)(function)


def version(value: bool) -> None:
    """Prints the version and exits."""
    if value:
        from selfsteer import __version__

        typer.echo(f"selfsteer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    verb = context.invoked_subcommand
    if ranks.size() > 1 and verb not in ("run", "train"):
        raise ConfigError(f"{verb} works in one process, but this is one of {ranks.size()} ranks.")


def main() -> None:
    """Entry point; every expected failure is one paragraph and an exit code.

    0 done or nothing to do; 2 usage, config, data; 3 artifact, engine, numerics, disk, lock;
    130 interrupted, 143 by SIGTERM, 75 when the time is up.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.setLogRecordFactory(_log_record)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads that spin while they wait made a busy machine up to seven times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what a locale cannot read or write ends nothing
            stream.reconfigure(errors="replace")
    # some daemons start programs without one, and then there is none to last
    if not isinstance(sys.stderr, LastingStream | None):
        sys.stderr = cast(TextIO, LastingStream(sys.stderr))
    ranks.enter()
    if not ranks.in_world():  # a rank is stopped by its launcher, which tells it from a failure
        stopping.listen()
    try:
        _check_arguments()
        app()
    except SelfsteerError as e:
        _fail(str(e), e.exit_code)
    except (SystemExit, KeyboardInterrupt) as e:
        # what typer makes of Ctrl-C, but while it builds its commands
        if isinstance(e, KeyboardInterrupt) or e.code == 130:
            way_on = stopping.way_on
            then = f". Go on with: {way_on}" if way_on else ", and the same command resumes"
            kept = f"finished work is kept{then}" if stopping.keeps else "nothing is kept"
            code = stopping.exit_code()
            why = "the time is up" if code == stopping.OUT_OF_TIME else "interrupted"
            # Python remembers an interrupt that left a text it was executing, as for dataclasses,
            # and would end by SIGINT in spite of the code; one that ends well makes it forget
            make_dataclass("Forgotten", ())
            _fail(f"{why}; {kept}", code)
        raise
    except RuntimeError as e:
        if ranks.is_loss(e):
            _fail(ranks.LOST, 3, lost=True)
        if type(e).__name__ != "OutOfMemoryError":
            raise
        _fail(
            "the GPU is out of memory. Lower sampling.batch_size or, if a model was in training, "
            "row_tokens (reward.forward_pairs); the same command then resumes.",
            3,
        )
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            longest = max(str(e.filename).split("/"), key=len)
            _fail(
                f"the name {short(longest)} is too long for the file system. Choose a shorter one.",
                2,
            )
        what = f"{e.strerror or e}" + (f": {clip(str(e.filename), 300)}" if e.filename else "")
        _fail(f"{what}. Fix this, then run the same command again.", 3)
    except BaseException as e:
        if type(e).__name__ != "PanicException":  # of libraries in Rust, and no Exception
            raise
        _fail(
            f"a library gave up ({clip(str(e), 300)}), most likely on the model's tokenizer: its "
            "regular expressions may have no end on a text. Use another checkpoint, or leave that "
            "text out.",
            3,
        )


def _log_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """What a library logs; the hub's retries name its address, which may hold a password."""
    made = logging.LogRecord(*args, **kwargs)
    if made.name.startswith("huggingface_hub"):
        made.msg, made.args = without_passwords(made.getMessage()), ()
    return made


def _check_arguments() -> None:
    """Refuses what no recipe, ledger or page could name.

    Raises:
        ConfigError: an argument is no text.
    """
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeError:
            raise ConfigError(
                f"The argument {short(argument)} is no UTF-8 text, and what it names could not be "
                "written down. Rename it."
            ) from None


def _fail(text: str, code: int, *, lost: bool = False) -> None:
    if not ranks.report_exit(text, code, lost=lost):
        where = f"rank {ranks.number()}: " if ranks.in_world() else ""
        print(f"selfsteer: {where}{text}".translate(CONTROL), file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
