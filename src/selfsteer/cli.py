"""``selfsteer <verb>``: thin; torch is not loaded before a stage starts."""

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from selfsteer.run import ranks
from selfsteer.verbs.benchmark import benchmarks_app
from selfsteer.verbs.data import data_app
from selfsteer.verbs.plan import plan_app
from selfsteer.verbs.principles import AsJson, principles_app
from selfsteer.verbs.report import report
from selfsteer.verbs.rewardbench import reward_app
from selfsteer.verbs.study import study_app
from selfsteer.verbs.view import view_app

#: Verbs by what they are for, in the order of the help.
PANELS = {
    "Align a model": ("init", "check", "plan", "run", "sweep", "train", "merge"),
    "Look at it": ("view", "report", "show", "compare", "chat", "judge", "audit"),
    "Data and principles": ("queries", "principles", "import", "export", "push"),
    "Measure": ("benchmark", "rewardbench", "bench", "testbed"),
}


class Verbs(typer.core.TyperGroup):
    """The verbs in the order of `PANELS`; a verb that is in none comes last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the help's order."""
        order = {name: panel for panel, names in PANELS.items() for name in names}
        for name, command in self.commands.items():
            command.rich_help_panel = order.get(name, "More")  # type: ignore[attr-defined]
        known = [name for name in order if name in self.commands]
        return [*known, *(name for name in self.commands if name not in order)]


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Align a language model with nothing but prompts: Self-Steering Optimization.\n\n"
    "Start with [bold]selfsteer run demo[/bold], then [bold]selfsteer init mine.yaml[/bold]. A run "
    "can be stopped at any time; the same command goes on where it was. "
    "[bold]selfsteer view[/bold] shows it in a browser meanwhile.",
    epilog="Results go to stdout, all else to stderr; --json is for machines, NO_COLOR=1 for no "
    "colours. Exit codes: 0 done; 2 usage, recipe or data; 3 model, engine, disk or a run in use; "
    "130 interrupted.",
)
testbed_app = typer.Typer(no_args_is_help=True, help="The tiny world that the demo runs on.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(data_app)
app.add_typer(view_app)
app.add_typer(study_app)
app.add_typer(reward_app)
app.add_typer(plan_app)
app.add_typer(benchmarks_app)
app.add_typer(testbed_app, name="testbed")
app.add_typer(bench_app, name="bench")
app.add_typer(principles_app, name="principles")
app.command()(report)


def complete_recipe(begun: str) -> list[str]:
    """Shipped recipes for the shell; files it completes itself."""
    from selfsteer.recipe.read import recipe_names

    return [name for name in recipe_names() if name.startswith(begun)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="settings as KEY=VALUE, for example seed=1 training.beta=0.2"),
]

Nproc = Annotated[
    int | None,
    typer.Option(min=1, help="train on so many ranks of this machine, a GPU each, by torchrun"),
]
Profile = Annotated[
    str | None,
    typer.Option(help="with --nproc: ddp (default), fsdp2, zero2, zero3 or accelerate's own YAML"),
]


@app.command()
def run(
    recipe: Annotated[
        str,
        typer.Argument(
            help="a shipped recipe's name, a YAML file, or a run folder",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
    dry_run: Annotated[bool, typer.Option(help="list the stages, do nothing")] = False,
    redo: Annotated[
        bool, typer.Option(help="replace work of other settings; it moves to superseded/")
    ] = False,
    nproc: Nproc = None,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe, or go on with it: queries to an aligned model.

    The run folder is the whole state. The same command continues after any interruption; when
    everything is done it says so.

    Shipped recipes: demo, smoke, sso, sso-online, pbaa, reward; the rivals best-of-n,
    self-rewarding, sgpo, spin, wpo.
    """
    from selfsteer.report import summary
    from selfsteer.run import execute as pipeline
    from selfsteer.run.folder import RunFolder
    from selfsteer.terminal import is_main_process, out, say

    checked, given = _load(recipe, overrides or [])
    if dry_run:
        folder = RunFolder(checked.folder)
        whole = pipeline.plan(checked, folder)
        stale = {e["stage"] for e in folder.stale(whole)}
        states = {
            s.name: "done" if folder.is_done(s) else "conflict" if s.name in stale else "to do"
            for s in pipeline.select(whole, until)
        }
        if not is_main_process():
            return
        if as_json:
            out.print_json(json.dumps(states))
        else:
            for name, state in states.items():
                out.print(f"{state:<10} {name}")
        return
    _on_ranks(nproc, profile)
    ran = pipeline.execute(checked, given, until=until, redo=redo)
    if not is_main_process():
        return
    if ran == 0:
        say(f"nothing to do: {checked.folder} is finished" + (f" up to {until}" if until else ""))
    found = summary.load(checked.folder)
    if as_json:
        out.print_json(json.dumps(found))
        return
    summary.print_result(found, out)
    _say_next(found, until)


def _say_next(found: dict[str, Any], until: str | None) -> None:
    """Where the model is, and the commands that a person types now."""
    from selfsteer.terminal import say

    folder, models = found["run"], found["models"]
    if until is not None:
        say(f"next: selfsteer view {folder}, or the rest: selfsteer run {folder}")
        return
    steps = [(f"view {folder}", "every triple in a browser")]
    if found["recipe"]["method"] == "reward":
        made = Path(folder) / "reward"
        steps = [
            (f"rewardbench {made} FILE", "its accuracy on a benchmark"),
            (f"judge RUN --judge reward:{made}", "the pairs of another run, judged by it"),
        ]
    elif "policy" in models:
        say(f"\nthe aligned model: {models['policy']}   (from_pretrained and servers load it)")
        steps += [
            (f"report {folder}", "the figures on one page"),
            (f"chat {folder}", "ask it something"),
            (f"export {folder} --format trl --to DIR", "the preferences for other trainers"),
        ]
    say("next:")
    for command, what in steps:
        say(f"  selfsteer {command}   {what}")


@app.command()
def check(
    recipe: Annotated[
        str,
        typer.Argument(
            help="a shipped recipe's name, a YAML file, or a run folder",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Overrides = None,
    queries: Annotated[int, typer.Option(help="queries of the steering check", min=2)] = 64,
    as_json: AsJson = False,
) -> None:
    """See what a run would meet, before a night of sampling; nothing is written.

    Folder, queries, model, template, budgets, disk and engine; and whether the policy follows the
    principles at all, on a few queries. Exit code 0 if a run can start, warnings or not.
    """
    checked, _ = _load(recipe, overrides or [])
    _needs_queries(checked)
    from selfsteer.terminal import out
    from selfsteer.verbs import check as checking

    figures = checking.check(checked, queries, (lambda line: None) if as_json else checking.tell)
    if as_json:
        out.print_json(json.dumps(figures))
    else:
        out.print(f"\n{checking.conclusion(figures)}")
    raise typer.Exit(figures["exit_code"])


def _on_ranks(nproc: int | None, profile: str | None) -> None:
    """Starts the ranks that were asked for; as one of them, checks that they are all there."""
    from selfsteer.errors import ConfigError

    ranks.check_world(nproc)
    if ranks.in_world():
        if profile is not None and ranks.LAUNCHER not in os.environ:
            raise ConfigError(
                "--profile has no effect in a world that is there already. Leave it out, and give "
                "its file to accelerate launch: --config_file."
            )
        return
    if profile is not None and (nproc or 1) == 1:
        raise ConfigError("--profile has no effect on a single rank; add --nproc N.")
    if nproc is not None and nproc > 1:
        ranks.launch(nproc, profile)


def _load(recipe: str, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    import yaml

    from selfsteer.recipe.read import load_values, merge, validate
    from selfsteer.recipe.sections import Recipe

    folder = Path(recipe)
    if (folder / "recipe.yaml").is_file():
        here = folder.absolute()
        overrides = [f"runs_dir={here.parent}", f"name={here.name}", *overrides]
        recipe = str(folder / "recipe.yaml")
    values = merge(load_values(recipe), overrides)
    return validate(Recipe, values, f"recipe {recipe}"), yaml.safe_load(yaml.safe_dump(values))


def _needs_queries(recipe: Any) -> None:
    from selfsteer.errors import ConfigError

    if recipe.method == "reward":
        raise ConfigError(
            "This looks at queries and sampling, and a recipe of method reward has neither. "
            "Start it with selfsteer run."
        )


@app.command()
def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            help="a shipped recipe's name or a YAML file", autocompletion=complete_recipe
        ),
    ],
    settings: Annotated[
        list[str],
        typer.Argument(
            help="KEY=VALUE, and axes KEY=V1,V2… of generator.* or of training.*, for example "
            "generator.learning_rate=5e-7,1e-6"
        ),
    ],
    budget: Annotated[
        int, typer.Option(help="most trainings; a seeded part of the grid", min=1)
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """Try a few settings of one training on the same data; say which made the best model.

    Cells are run folders under NAME-sweep. They share all that comes before the training, and are
    compared by what checkpoint selection measures on held-out queries (docs/selection.md).
    """
    from rich.table import Table

    from selfsteer.terminal import out
    from selfsteer.verbs import sweep as sweeping

    tried = [s for s in settings if re.fullmatch(r"(generator|training)\.[a-z_]+=[^\[{]*,.*", s)]
    fixed = [s for s in settings if s not in tried]
    axes, stage = sweeping.axes_of(tried)
    _, given = _load(recipe, fixed)
    report = sweeping.sweep(given, axes, stage, budget)
    if as_json:
        out.print_json(json.dumps(report))
        return
    rows = sweeping.table(report)
    table = Table(box=None, padding=(0, 1))
    for name in rows[0]:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    out.print(table)
    best = report["cells"][report["best"]]["settings"]
    chosen = [*map(shlex.quote, fixed), *(f"{k}={v}" for k, v in best.items())]
    out.print("next: selfsteer run " + " ".join([recipe, *chosen]), markup=False, soft_wrap=True)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="the model to train: folder, hub id or package:")],
    triples: Annotated[Path, typer.Argument(help="our triples or preferences, or authors' JSON")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="KEY=VALUE: objective, base, learning_rate, batch_size, output …"),
    ] = None,
    nproc: Nproc = None,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Train one objective on stored triples, offline, alone or on several ranks.

    Example: selfsteer train MODEL triples.jsonl objective=sso-online base=ipo beta=0.2
    learning_rate=5e-7 batch_size=1 accumulate=16 output=DIR
    """
    from selfsteer.recipe.read import merge, validate
    from selfsteer.recipe.sections import TrainConfig
    from selfsteer.terminal import is_main_process, out

    config = validate(TrainConfig, merge({}, settings or []), "settings of train")
    _on_ranks(nproc, profile)
    from selfsteer.stages.offline import train_offline

    manifest = train_offline(model, triples, config)
    if not is_main_process():
        return
    if as_json:
        out.print_json(json.dumps(manifest))
    else:
        shown = {k: v for k, v in manifest["last"].items() if k == "loss" or "margins" in k}
        figures = ", ".join(f"{k} {v:.4f}" for k, v in shown.items())
        out.print(
            f"{config.output}: trained on {manifest['n_out']:,} triples; last step: {figures}"
        )


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="a folder of LoRA adapters, as peft writes them")],
    output: Annotated[Path, typer.Argument(help="folder of the plain checkpoint to make")],
    base: Annotated[
        str | None, typer.Option(help="the model under them; default: the one they name")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: as the base is stored")
    ] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="run code that comes with it")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="load weights not in safetensors")] = False,
) -> None:
    """Add LoRA adapters to their base: a checkpoint that any program loads."""
    from selfsteer.recipe.read import validate
    from selfsteer.recipe.sections import Loading, resolve_path
    from selfsteer.terminal import out

    values: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
    values |= {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    settings = validate(Loading, values, "merge")
    from selfsteer.models.load import merge_adapter

    used = merge_adapter(adapter, output, settings, resolve_path(base) if base else None)
    out.print(f"{output}: {used} with the adapters of {adapter}")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="the file to write")],
    recipe: Annotated[
        str,
        typer.Option(help="the shipped recipe to start from", autocompletion=complete_recipe),
    ] = "sso",
) -> None:
    """Write a commented recipe to start from."""
    from selfsteer.data.jsonl import write_atomic
    from selfsteer.errors import ConfigError
    from selfsteer.recipe.read import commented_yaml, descriptions, recipe_text
    from selfsteer.terminal import out

    if path.exists():
        raise ConfigError(f"{path} is there already; choose another name or move it away.")
    write_atomic(path, commented_yaml(recipe_text(recipe), descriptions()))
    data = "reward.data" if recipe == "reward" else "queries.path"
    out.print(f"{path}: set policy.model and {data}, then: selfsteer run {path}")


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    as_json: AsJson = False,
) -> None:
    """Show a run: stages, counts, drops by reason, data quality, where the models are."""
    from selfsteer.report import summary
    from selfsteer.terminal import out

    found = summary.load(run)
    if as_json:
        out.print_json(json.dumps(found))
    else:
        summary.print_show(found, out)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    question: Annotated[str | None, typer.Option(help="ask once, then leave")] = None,
    features: Annotated[
        str,
        typer.Option(
            help="features that the good and bad principle name, comma-separated; default: "
            "Helpfulness,Accuracy, the first two of the run's own catalogue, or its fixed texts"
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    as_json: AsJson = False,
) -> None:
    """Ask base, generator and policy the same thing; plain, good and bad side by side."""
    from selfsteer.errors import ConfigError
    from selfsteer.report import summary
    from selfsteer.terminal import err, out

    if as_json and question is None:
        raise ConfigError("--json prints one answer; give the question with --question.")
    found = summary.load(run)
    from selfsteer.verbs.chat import Chat

    talk = Chat(found, tuple(f.strip() for f in features.split(",") if f.strip()), seed)
    if as_json and question is not None:
        said = {"principles": talk.principles.to_dict(), "answers": talk.answers(question)}
        out.print_json(json.dumps({"question": question, **said}))
        return
    if question is not None:
        talk.ask(question)
        return
    err.print("ask anything; an empty line or Ctrl-D leaves", style="dim")
    while True:
        if sys.stdin.isatty():
            err.print("> ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        talk.ask(line)


@app.command()
def judge(
    preferences: Annotated[
        Path,
        typer.Argument(help="a run folder, or preferences: a JSONL file or a folder of shards"),
    ],
    judges: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help="oracle, chat:MODEL, reward:MODEL, human:PATH or a YAML mapping; one or two; "
            "default: the run's own",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="judge a seeded subset of so many", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="of the subset and the intervals")] = 0,
    iteration: Annotated[int | None, typer.Option(help="of a run; default: the last one")] = None,
    baseline: Annotated[bool, typer.Option(help="the baseline's preferences instead")] = False,
    store: Annotated[
        Path | None, typer.Option(help="folder of the judges' answers; default: the run's own")
    ] = None,
    label_sheet: Annotated[
        Path | None, typer.Option(help="judge nothing: write the pairs for people to label")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge preferences: verdicts, accuracy, position bias, cost; agreement of two judges."""
    from contextlib import nullcontext

    from selfsteer.errors import ConfigError
    from selfsteer.recipe.read import merge, validate
    from selfsteer.recipe.sections import JudgeConfig
    from selfsteer.run.folder import RunFolder
    from selfsteer.terminal import out
    from selfsteer.verbs import judge_tables as judging

    if label_sheet is not None and (judges or as_json or store):
        raise ConfigError("--label-sheet judges nothing; leave --judge, --store and --json out.")
    given = [
        validate(JudgeConfig, merge({}, [f"judge={j}"]).get("judge", j), f"judge {j}")
        for j in judges or []
    ]
    if len(given) > 2:
        raise ConfigError(f"Give one judge or two, found {len(given)}.")
    source, is_run = preferences, (preferences / "recipe.yaml").is_file()
    if is_run:
        recipe, _ = _load(str(preferences), [])
        k = recipe.iterations if iteration is None else iteration
        source = RunFolder(preferences).iteration(k, baseline=baseline) / "preferences"
        store = store or preferences / "judgements"
        given = given or ([recipe.judge] if recipe.judge else [])
    elif iteration is not None or baseline:
        raise ConfigError(f"--iteration and --baseline need a run folder; {preferences} is none.")
    if not given and label_sheet is None:
        raise ConfigError("Name a judge: --judge oracle, chat:MODEL, reward:MODEL or human:PATH.")
    from selfsteer.verbs.judging import judge_preferences, load_preferences, pick, write_label_sheet

    chosen = pick(load_preferences(source), limit, seed)
    if label_sheet is not None:
        count = write_label_sheet(chosen, label_sheet, seed)
        out.print(
            f"{label_sheet}: {count:,} pairs. Set each verdict to first, second or tie, then: "
            f"selfsteer judge {preferences} --judge human:{label_sheet}"
        )
        return
    # answers are added to the run folder, so no other process may work in it
    with RunFolder(preferences).locked() if is_run else nullcontext():
        report = judge_preferences(chosen, given, store, seed)
    if as_json:
        out.print_json(json.dumps(report))
    else:
        judging.print_judges(report, out)


@bench_app.command("sampling")
def bench_sampling(
    recipe: Annotated[
        str,
        typer.Argument(
            help="a shipped recipe's name, a YAML file, or a run folder",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Overrides = None,
    engine: Annotated[
        str | None, typer.Option(help="sampling.engine instead of the recipe's: a kind or YAML")
    ] = None,
    queries: Annotated[int, typer.Option(help="queries asked, two answers each", min=1)] = 256,
    repeats: Annotated[int, typer.Option(help="of each way; the median counts", min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second of an engine, and what the pipeline keeps of them."""
    chosen = [] if engine is None else [f"sampling.engine={engine}"]
    checked, _ = _load(recipe, [*(overrides or []), *chosen])
    _needs_queries(checked)
    from selfsteer.terminal import out
    from selfsteer.verbs import bench as sampling_speed

    found = sampling_speed.bench(checked, queries, repeats)
    if as_json:
        out.print_json(json.dumps(found))
    else:
        sampling_speed.tell(found)


@testbed_app.command("build")
def build_testbed(
    output: Annotated[Path, typer.Argument(help="folder for the checkpoint")],
    seed: Annotated[int, typer.Option(help="of data and weights")] = 0,
    examples: Annotated[int, typer.Option(help="training examples")] = 64_000,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
) -> None:
    """Train the tiny model again, from scratch (minutes on one core)."""
    from selfsteer.terminal import out
    from selfsteer.testbed.model import build

    figures = build(output, examples=examples, seed=seed, threads=threads)
    out.print_json(json.dumps(figures))


def version(value: bool) -> None:
    """Prints the version and leaves."""
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
    from selfsteer.errors import ConfigError

    verb = context.invoked_subcommand
    if ranks.size() > 1 and verb not in ("run", "train"):
        raise ConfigError(f"{verb} works in one process, and this is one of {ranks.size()} ranks.")


def main() -> None:
    """Entry point; every expected failure is one paragraph and an exit code.

    0 done or nothing to do; 2 usage, config, data; 3 artifact, engine, numerics, disk, lock;
    130 interrupted.
    """
    from selfsteer.errors import SelfsteerError

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads that spin while they wait made a busy machine up to seven times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ranks.enter()
    try:
        app()
    except SelfsteerError as e:
        _fail(str(e), e.exit_code)
    except SystemExit as e:
        if e.code == 130:  # what typer makes of Ctrl-C
            _fail("interrupted; what is finished is kept, the same command goes on from there", 130)
        raise
    except RuntimeError as e:
        if ranks.is_loss(e):
            _fail(ranks.LOST, 3, lost=True)
        if type(e).__name__ != "OutOfMemoryError":
            raise
        _fail(
            "the GPU's memory is full. Lower sampling.batch_size, or row_tokens "
            "(reward.forward_pairs) where a model is trained; then the same command goes on.",
            3,
        )
    except OSError as e:
        _fail(f"{e.strerror or e}: {e.filename}. Run the same command again when it is fixed.", 3)


def _fail(text: str, code: int, *, lost: bool = False) -> None:
    if not ranks.bow_out(text, code, lost=lost):
        where = f"rank {ranks.number()}: " if ranks.in_world() else ""
        print(f"selfsteer: {where}{text}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
