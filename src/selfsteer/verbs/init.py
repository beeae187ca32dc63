"""``selfsteer init``: looks at model, prompts and machine, and writes a recipe that fits them."""

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfsteer.errors import ConfigError, SelfsteerError, listed
from selfsteer.terminal import err, out, say, warn
from selfsteer.verbs.common import complete_recipe

if TYPE_CHECKING:
    from selfsteer.verbs.advice import Goal, Model, Prompts, Wishes

#: The schema's name beside a recipe; editors find it by the recipe's first line.
SCHEMA = "selfsteer.schema.json"

#: What is asked where a goal needs to know more.
QUESTIONS = {
    "constitution": "file of rules (text or catalogue)",
    "judge": "judge (chat:MODEL, checks:CATALOGUE)",
    "reward": "reward model",
}


def init(
    path: Annotated[Path, typer.Argument(help="file to write")],
    model: Annotated[
        str | None, typer.Option(help="model to align: folder, hub id, FILE.gguf, package:NAME")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="prompts: a file, a folder or a data set on the hub")
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(
            help="quality, style[:CATALOGUE], constitution:FILE, answers, judge:JUDGE or "
            "reward:MODEL"
        ),
    ] = None,
    pairs: Annotated[
        bool | None, typer.Option("--pairs/--no-pairs", help="make pairs to keep or to publish")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="prompts to evaluate on, used for nothing else")
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="auto, cpu, or GPUs by their memory in GB: 80, 4x80")
    ] = "auto",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="shipped recipe to start from; default: what docs/methods.md says of the goal",
            autocompletion=complete_recipe,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing")] = False,
) -> None:
    """Write a commented recipe that fits your model, prompts, goal and machine.

    On a terminal it asks for what no option says; an empty answer takes the default. What is not
    known stays empty in the recipe.
    """
    from selfsteer.data.jsonl import write_atomic
    from selfsteer.verbs import advice
    from selfsteer.verbs.schema import schema_text

    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} is there already; choose another name or move it away.")
    asking = not yes and on_terminal()
    policy = _answer(
        asking, model, "model to align: folder, hub id or FILE.gguf (Enter: later)", _model
    )
    queries, found = _answer(
        asking, prompts, "prompts: file, folder or data set on the hub (Enter: later)", _prompts
    ) or (None, None)
    held_out, _ = _answer(
        asking and queries is not None,
        held_out,
        "held-out prompts, to measure before and after (Enter: none)",
        _prompts,
    ) or (None, None)
    if asking and goal is None:
        for number, text in enumerate(advice.GOALS.values(), 1):
            err.print(f"  {number} {text}", markup=False)
    wanted = (
        advice.Goal.read(goal)
        if goal is not None
        else _answer(asking, None, "what answers should become (Enter: 1)", _goal) or advice.Goal()
    )
    if wanted.kind == "answers" and found and not found.answers:
        raise ConfigError(
            f"{queries} holds no answer beside a prompt, and methods that learn from given answers "
            "need them. Give conversations that end in an answer, or choose another --goal."
        )
    if queries is not None and queries == held_out:
        warn(
            f"{queries} is both trained and evaluated on, and a run drops every prompt that it "
            "is evaluated on, so none will be left. Give --held-out other prompts."
        )
    wanted = _opposed(wanted, policy, path)
    either = wanted.kind in ("quality", "constitution") and recipe is None
    if asking and pairs is None and either:
        pairs = _ask(
            typer.confirm, "do you want pairs to keep or to publish?", default=False, err=True
        )
    # without a model there is nothing to size
    machine = advice.hardware(hardware) if policy or hardware != "auto" else None
    wishes = advice.Wishes(policy, queries, found, machine, wanted, bool(pairs))
    text, blank = written(path.stem, wishes, recipe, held_out)
    write_atomic(path, text)
    write_atomic(path.with_name(SCHEMA), schema_text())
    if wishes.too_large:
        warn(f"{policy.source if policy else ''}: {wishes.too_large}.")
    _say_next(path, wishes, blank, recipe)
    if found and held_out is None:
        say(
            f"\nwithout held-out prompts nothing is evaluated: selfsteer queries {queries} --to "
            "FILE --holdout 0.1 sets some apart, for --held-out"
        )


def on_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _ask(ask: Callable[..., Any], question: str, **more: Any) -> Any:
    """What is answered; Ctrl-C is what it is elsewhere."""
    try:
        return ask(question, **more)
    except typer.Abort as e:
        if isinstance(e.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _answer(asking: bool, given: str | None, question: str, read: Callable[[str], Any]) -> Any:
    """What an option or an answer says; None without one. A wrong answer is asked again."""
    if given is not None:
        return read(given)
    if not asking:
        return None

    while text := _ask(typer.prompt, question, default="", show_default=False, err=True).strip():
        try:
            return read(text)
        except SelfsteerError as e:
            err.print(str(e), style="yellow", markup=False)
    return None


def _model(text: str) -> "Model":
    from selfsteer.recipe.sections import resolve_path
    from selfsteer.verbs.advice import look_at_model

    found = look_at_model(text)
    there = Path(resolve_path(text)).exists()
    say(f"  {text}: {found}" + " (no such folder here, so a hub id)" * (not there))
    return found


def _prompts(text: str) -> "tuple[str, Prompts | None]":
    from selfsteer.verbs.advice import look_at_prompts

    found = look_at_prompts(text)
    say(f"  {text}: {found or 'a data set on the hub, not looked at'}")
    if found and found.english is False:
        warn(
            "the built-in principles are English; docs/principles.md says how to write them in "
            "another language."
        )
    return text, found


def _goal(text: str) -> Any:
    """A goal, or the number of one, for which more may be asked."""
    from selfsteer.verbs.advice import GOALS, HOUSE_STYLE, NEEDS, Goal

    kinds = list(GOALS)
    if not text.isdecimal():
        return Goal.read(text)
    if not 1 <= int(text) <= len(kinds):
        raise ConfigError(f"Choose 1 to {len(kinds)}.")
    kind = kinds[int(text) - 1]
    if kind == "style":
        return Goal.read(f"style:{_ask(typer.prompt, 'catalogue', default=HOUSE_STYLE, err=True)}")
    if kind in NEEDS:
        return Goal.read(f"{kind}:{_ask(typer.prompt, QUESTIONS[kind], err=True)}")
    return Goal(kind)


def _opposed(goal: "Goal", policy: "Model | None", path: Path) -> "Goal":
    """The goal with a catalogue in place of a text of rules, which the policy makes into one."""
    from selfsteer.verbs.advice import Goal, is_catalogue
    from selfsteer.verbs.principles import import_rules

    rules = goal.given or ""
    if goal.kind != "constitution" or is_catalogue(rules):
        return goal
    made = path.with_name(f"{Path(rules).stem}.catalogue.yaml")
    if policy is None:
        raise ConfigError(
            f"{rules} holds rules, and a recipe needs a catalogue, in which each rule has a bad "
            f"counterpart. Give --model, which then writes them, or have another model do it: "
            f"selfsteer principles import {rules} --model MODEL --to {made}, then --goal "
            f"constitution:{made}."
        )
    say(f"  {policy.source} writes the bad counterparts of the rules in {rules}")
    try:
        report = import_rules(Path(rules), policy.source, made)
    except ConfigError as e:
        if made.exists():
            raise ConfigError(f"{e} To use it as it is: --goal constitution:{made}.") from e
        raise
    say(f"  {made}: {report['n_out']} of {report['n_in']} lines became features; read them")
    return Goal(goal.kind, str(made))


def written(
    stem: str, w: "Wishes", recipe: str | None = None, held_out: str | None = None
) -> tuple[str, list[str]]:
    """The text of a recipe, and its settings that are still blank.

    Args:
        stem: the file's name, without its ending; the run's too, where it can be one.
        w: what it is to fit.
        recipe: the shipped recipe to start from; None: the one that fits the goal.
        held_out: prompts to evaluate on.

    Raises:
        ConfigError: no such recipe, one that has no setting for what was asked for, or settings
            that cannot be honoured together.
    """
    from selfsteer.methods import METHODS, Paired, recipe_of
    from selfsteer.recipe.read import (
        choose,
        commented_yaml,
        descriptions,
        load_values,
        method_of,
        recipe_text,
    )
    from selfsteer.verbs.advice import advise

    name, why = (recipe, f"as in recipe {recipe}") if recipe else w.recipe
    values = load_values(name)
    kind = choose(METHODS, values, f"recipe {name}")
    comments = descriptions(kind)
    known, given = set(comments), list(advise(w, kind))
    given.append(("method", method_of(kind), why))
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", stem):
        given.append(("name", stem, comments["name"]))
    if held_out is not None:
        given.append(("evaluation.queries.path", held_out, "held-out prompts"))
    options = {
        "policy.model": "--model",
        "queries.path": "--prompts",
        "evaluation.queries.path": "--held-out",
        "principles.catalogue": f"--goal {w.goal.kind}",
    }
    if w.goal.kind in ("judge", "reward"):
        options |= dict.fromkeys(("judge", "ranking.judge"), f"--goal {w.goal.kind}")
    idle = [options[key] for key, *_ in given if key in options and key not in known]
    if w.pairs and not issubclass(kind, Paired):
        idle.append("--pairs")
    if idle:
        raise ConfigError(
            f"{listed(idle)} would have no effect: recipe {name} has no such setting. Leave it "
            "out, or choose another --recipe."
        )
    for key, value, reason in given:
        if key in known:
            _put(values, key.split("."), value)
            comments[key] = reason
    blank = [key for key in _blanks(values) if key.rpartition(".")[2] in ("model", "path", "data")]
    if not blank:
        recipe_of(values, f"recipe {stem}")
    head = "\n".join(line for line in recipe_text(name).splitlines() if line.startswith("#"))
    machine = f" for {w.hardware}" if w.hardware else ""
    first = f"# yaml-language-server: $schema={SCHEMA}\n# Made by selfsteer init{machine}.\n"
    return f"{first}{head}\n{commented_yaml(values, comments)}", blank


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets a setting, in sections that are made where they are missing; None takes it out."""
    *parents, last = path
    for parent in parents:
        values = values.setdefault(parent, {})
    if value is None:
        values.pop(last, None)
    else:
        values[last] = value


def _blanks(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of settings without a value."""
    found = []
    for name, value in values.items():
        inner = _blanks(value, f"{prefix}{name}.") if isinstance(value, Mapping) else []
        found += [prefix + name] if value is None else inner
    return found


def _say_next(path: Path, w: "Wishes", blank: list[str], recipe: str | None) -> None:
    """What was written, and what to type now."""
    name, why = w.recipe
    place = shlex.quote(str(path))
    machine = f", for {w.hardware}" if w.hardware else ""
    out.print(f"{path}: {recipe or name}{machine}", markup=False)
    if recipe is None:
        out.print(why, style="dim", markup=False)
    out.print(f"set {', '.join(blank)} in it, then:" if blank else "next:")
    steps = [
        (f"check {place}", "minutes: would it work, and how long would it take?"),
        (f"preview {place}", "five queries, all the way to what would be trained on"),
        (f"run {place}{w.spread}", "everything; resumes after any stop"),
    ]
    if recipe == "reward":
        steps = steps[-1:]
    longest = max(len(step) for step, _ in steps)
    for step, what in steps:
        out.print(f"  selfsteer {step:<{longest}}   {what}", markup=False)
