"""Prints ``docs/commands.md``, every verb with its help; ``make docs`` writes it."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

import typer

from selfsteer import cli

HEAD = """# Commands

Every verb of `selfsteer`, with its arguments and options. `selfsteer VERB --help` prints the same.
`make docs` writes this page from the program.
"""

#: What stands for the value of an option, by the type of the parameter.
VALUES = {"Path": "PATH", "str": "TEXT", "int": "N", "float": "X"}


def page() -> Iterator[str]:
    """The page, part by part."""
    root: Any = typer.main.get_command(cli.app)
    yield HEAD
    yield paragraphs(root.epilog)
    for panel, verbs in cli.PANELS.items():
        yield f"\n## {panel}"
        for name in map(cli.name_of, verbs):
            yield from section(root.commands[name], f"selfsteer {name}")


def section(command: Any, name: str) -> Iterator[str]:
    """Usage, help and parameters of a verb; of a group, its verbs one by one."""
    if hasattr(command, "commands"):
        for verb, own in command.commands.items():
            yield from section(own, f"{name} {verb}")
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    yield f"\n### {name}\n"
    yield f"```text\n{' '.join([name, '[OPTIONS]', *map(placed, arguments)])}\n```\n"
    yield paragraphs(command.help)
    hints = get_type_hints(command.callback)
    if own := [p for p in command.params if p.name != "help"]:
        yield "\n| | |\n|---|---|"
        for p in own:
            yield f"| {spelled(p, str(hints[p.name]))} | {cell(p)} |"


def placed(argument: Any) -> str:
    """``[OVERRIDES]...``: an argument as usage lines write it."""
    name = (argument.metavar or argument.name.upper()).strip("[]")
    name = name if argument.required else f"[{name}]"
    return f"{name}..." if argument.nargs == -1 else name


def spelled(p: Any, hint: str) -> str:
    """``--limit INTEGER``: a parameter as it is typed."""
    if p.param_type_name == "argument":
        return f"`{placed(p)}`"
    if p.is_flag:
        return " / ".join(f"`{name}`" for name in [*p.opts, *p.secondary_opts])
    return f"`{p.opts[0]} {p.metavar or next(v for k, v in VALUES.items() if k in hint)}`"


def cell(p: Any) -> str:
    """What a parameter is for, whether it is needed, and what holds without it."""
    default = p.default() if callable(p.default) else p.default
    notes = ["required"] if p.required and p.param_type_name == "option" else []
    if not isinstance(default, bool) and default not in (None, ""):
        notes.append(f"default: `{default}`")
    return escaped(p.help) + (f" ({', '.join(notes)})" if notes else "")


def paragraphs(text: str) -> str:
    """Help without the console's markup."""
    return escaped(re.sub(r"\[/?bold\]", "`", inspect.cleandoc(text)))


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([|<>*_])", r"\\\1", text)


if __name__ == "__main__":
    print("\n".join(page()))
