"""``selfsteer principles <verb>``: look at a catalogue, check one, write principles to a file."""

import hashlib
import itertools
import json
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfsteer.errors import ArtifactError, ConfigError, DataError
from selfsteer.terminal import out, say, table
from selfsteer.verbs.common import AsJson, emit

if TYPE_CHECKING:
    from selfsteer.verbs.writing import Importing, Improving, Writing

app = typer.Typer(
    no_args_is_help=True,
    help="Catalogues of features, and the principles made from them.",
)
#: Arguments that `write` and `improve` share.
Queries = Annotated[
    str,
    typer.Argument(help="prompts: JSONL, JSON, CSV, Parquet or the name of a Hugging Face dataset"),
]


@app.command("list")
def list_(
    file: Annotated[
        str | None,
        typer.Argument(help="catalogue in YAML or a shipped one; default: the built-in one"),
    ] = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="print the file itself, to start your own from")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List a catalogue's features.

    Shipped, beside the built-in one: house-style, support-desk, careful-assistant.
    """
    from selfsteer.principles.catalogue import catalogue_text, load_catalogue

    catalogue = load_catalogue(file)
    if as_yaml:
        typer.echo(catalogue_text(file), nl=False)
        return
    emit(catalogue.model_dump(mode="json"), as_json, _print_catalogue)


def _print_catalogue(catalogue: dict[str, Any]) -> None:
    appended = catalogue["appended"]
    rows = (
        [
            f["name"],
            f"appended {appended[f['name']]:g}"
            if f["name"] in appended
            else f"weight {f['weight']:g}",
            f"{f['good_adjective']}: {f['good']}",
            f"{f['bad_adjective']}: {f['bad']}",
        ]
        for f in catalogue["features"]
    )
    out.print(table(["feature", "drawn", "good", "bad"], rows, words=4))
    about = filter(None, [catalogue["language"], catalogue["domain"]])
    closing = f"{', '.join(about)}; closing line: {catalogue['closing']}"
    out.print(closing, style="dim", markup=False)


@app.command()
def show(
    feature: Annotated[str, typer.Argument(help="one feature, or several separated by commas")],
    catalogue: Annotated[
        str | None,
        typer.Option(help="catalogue in YAML or a shipped one; default: the built-in one"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show both principles of a feature, in full, as a model sees them."""
    from selfsteer.principles.catalogue import load_catalogue
    from selfsteer.principles.writer import picked

    names = tuple(n.strip() for n in feature.split(",") if n.strip())
    found = picked(names, load_catalogue(catalogue))
    text = f"good: {found.good}\nbad:  {found.bad}"
    emit(found.to_dict(), as_json, lambda _: out.print(text, markup=False))


@app.command()
def lint(
    file: Annotated[Path, typer.Argument(help="catalogue in YAML")],
    as_json: AsJson = False,
) -> None:
    """Check a catalogue; exits with 0 if it is clean, with 2 if there are findings."""
    from selfsteer.principles import lint as rules
    from selfsteer.principles.catalogue import catalogue_text

    findings = rules.lint(catalogue_text(str(file)))
    text = "\n".join(map(str, findings)) or f"{file} is clean"
    emit([asdict(f) for f in findings], as_json, lambda _: out.print(text, markup=False))
    if findings:
        raise ConfigError(f"{file}: {len(findings)} finding(s); each says what to do.")


@app.command()
def write(
    queries: Queries,
    model: Annotated[
        str, typer.Option(help="model that writes them: folder, hub id or package:NAME")
    ],
    to: Annotated[Path, typer.Option(help="JSONL file to write")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="recipe settings as KEY=VALUE, such as principles.examples=2 seed=1"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write principles for a query file, without a run; the same command resumes.

    A recipe can use the result: principles.mode=fixed principles.path=FILE.
    """
    from selfsteer.data.jsonl import read_jsonl
    from selfsteer.verbs.writing import Writing

    given = {"policy": {"model": model}, "queries": {"path": queries}}
    report = _made(Writing, given, to, settings or [])
    report["examples"] = [
        {
            "query": value["messages"][-1]["content"],
            "good": value["principles"]["good"],
            "bad": value["principles"]["bad"],
        }
        for _, value in itertools.islice(read_jsonl(to), 3)
    ]
    emit(report, as_json, lambda _: _print_written(report, to))


@app.command()
def improve(
    queries: Queries,
    model: Annotated[str, typer.Option(help="model that answers: folder, hub id or package:NAME")],
    good: Annotated[str, typer.Option(help="the good principle to begin with, whole")],
    judge: Annotated[
        str, typer.Option(help="rates answers: oracle, checks, reward:MODEL or a section")
    ],
    to: Annotated[Path, typer.Option(help="YAML file to write")],
    bad: Annotated[
        str | None, typer.Option(help="the bad principle that goes with it; it stays as it is")
    ] = None,
    writer: Annotated[
        str | None, typer.Option(help="model that rewrites principles; default: --model")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="recipe settings as KEY=VALUE, such as improve.beam=3 seed=1"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Improve a fixed good principle without training; the same command resumes.

    A beam search along the queries: a judge that scores rates answers, a model rewrites the
    principle. The result is a section of a recipe: principles.mode=fixed.
    """
    from selfsteer.verbs.common import named_judge
    from selfsteer.verbs.writing import Improving

    given = {
        "policy": {"model": model},
        "queries": {"path": queries},
        "improve": {"good": good, "bad": bad, "writer": writer},
        "judge": named_judge(judge).model_dump(exclude_unset=True),
    }
    report = _made(Improving, given, to, settings or [])
    emit(report, as_json, lambda _: _print_improved(report, to))


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="rules: text with one per line, a Markdown list, JSONL of traits")
    ],
    model: Annotated[
        str,
        typer.Option(help="model that writes the bad counterparts: folder, hub id, package:NAME"),
    ],
    to: Annotated[Path, typer.Option(help="catalogue to write, in YAML")],
    server: Annotated[
        str | None, typer.Option(help="address of a server, up to /v1, that has the model")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="settings as KEY=VALUE, such as rules.tries=8 seed=1"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a catalogue from written rules: a model writes the bad counterpart of each.

    Your rules stay as they are, word for word; traits in the first person become rules. The same
    command resumes. Read the result before you train on it.
    """
    report = import_rules(file, model, to, server=server, settings=settings or [])
    emit(report, as_json, lambda _: _print_imported(report, to))


def import_rules(
    file: Path,
    model: str,
    to: Path,
    *,
    server: str | None = None,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a catalogue of the rules of a file; returns the report on it.

    Args:
        file: the rules.
        model: that writes the bad counterparts.
        to: the catalogue.
        server: where the model is served; None: in process.
        settings: more of them, as KEY=VALUE.

    Raises:
        DataError: no rule, or no answer that can be used.
    """
    from selfsteer.verbs.writing import Importing

    writer = {"kind": "openai", "base_url": server, "model": model} if server else {"model": model}
    given = {"path": str(file), "rules": {"writer": writer}}
    return _made(Importing, given, to, list(settings))


def _print_imported(report: dict[str, Any], path: Path) -> None:
    from selfsteer.principles.catalogue import load_catalogue

    for feature in load_catalogue(str(path)).features:
        text = f"{feature.name}\n  good: {feature.good}\n  bad:  {feature.bad}"
        out.print(text, markup=False)
    counts = ", ".join(f"{n:,} {what}" for what, n in report["outcomes"].items())
    out.print(f"\nanswers of the writer: {counts}", markup=False)
    lost = ", ".join(f"{n:,} {why}" for why, n in report["dropped"].items())
    gone = f", dropped: {lost}" if lost else ""
    out.print(f"{report['n_in']:,} lines, {report['n_out']:,} features{gone}", markup=False)
    for finding in report["findings"]:
        out.print(finding, style="yellow", markup=False)
    say("read every bad rule: it must differ from the good one in that one point only")
    out.print(f"{path}   (principles.catalogue={path} principles.concision=null)", markup=False)


def _print_improved(report: dict[str, Any], path: Path) -> None:
    for step, tried in enumerate(report["path"], 1):
        out.print(f"{step:>3}  {tried['rating']:.3f}  {tried['good']}", markup=False)
    written = ", ".join(f"{n:,} {why}" for why, n in sorted(report["written"].items()))
    out.print(f"\nrewritten: {written or 'nothing'}", markup=False)
    ratings, gain = report["ratings"], report["gain"]
    aside = f"{report['compared']:,} queries that were set aside ({report['scale']})"
    if report["best"] == report["start"]:
        out.print(f"no better principle: the start has {ratings['start']:.3f} on {aside}")
    else:
        mean, low, high = gain
        bounds = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
        text = f"{ratings['start']:.3f} → {ratings['best']:.3f}, {mean:+.3f}{bounds}, on {aside}"
        out.print(text, markup=False)
    setting = shlex.quote(f"principles.good={json.dumps(report['best'], ensure_ascii=False)}")
    out.print(f"\n{setting}\n{path}", markup=False)


def _print_written(report: dict[str, Any], path: Path) -> None:
    for name in ("sources", "first_try", "retry"):
        if name in report:
            counts = ", ".join(f"{n:,} {what}" for what, n in report[name].items())
            out.print(f"{name.replace('_', ' ')}: {counts}", markup=False)
    for shown in report["examples"]:
        text = f"\n{shown['query']}\n  good: {shown['good']}\n  bad:  {shown['bad']}"
        out.print(text, markup=False)
    out.print(f"\n{report['n_out']:,} principles: {path}", markup=False)


def _made(
    kind: "type[Writing | Improving | Importing]",
    given: dict[str, Any],
    to: Path,
    settings: list[str],
) -> dict[str, Any]:
    """Runs what a command plans in a folder beside ``to``, and keeps a report there.

    Args:
        kind: what it plans.
        given: its settings.
        to: the file to make.
        settings: more of them, as KEY=VALUE.

    Returns:
        The report.
    """
    from selfsteer.data.jsonl import write_atomic
    from selfsteer.recipe.read import check_sections, merge, validate
    from selfsteer.run.execute import execute
    from selfsteer.run.folder import RunFolder

    sections = [name for name in kind.model_fields if name not in ("folder", "path")]
    check_sections(settings, sections, kind.verb)
    work, report = to.with_name(f"{to.name}.partial"), to.with_name(f"{to.name}.report.json")
    values = merge({**given, "folder": str(work)}, settings)
    writing = validate(kind, values, f"settings of {kind.verb}")
    run, stages = RunFolder(work), writing.plan()
    last = stages[-1]
    if to.exists():
        done: dict[str, Any] = json.loads(report.read_text("utf-8")) if report.exists() else {}
        if not {"fingerprint": last.fingerprint, "sha256": _sha256(to)}.items() <= done.items():
            raise ConfigError(
                f"{to} is there already and was not made by this command with these settings and "
                "queries. Choose another name, or move it away."
            )
        shutil.rmtree(work, ignore_errors=True)  # where a kill has left it
        say(f"nothing to do: {to} is finished")
        return done
    if run.stale(stages):
        raise ConfigError(
            f"{work} holds principles that were begun with other settings or queries. Finish "
            "those, choose another name, or remove that folder."
        )
    own = not work.exists() or run.last(last.name) is not None
    try:
        execute(writing, values)
    except DataError:
        if own and "path" in given:  # answers that make no catalogue are of no use to another try
            with suppress(ArtifactError), run.locked():
                shutil.rmtree(work)
        raise
    made, entry = run / last.outputs[0], run.last(last.name) or {}
    found = {
        "fingerprint": last.fingerprint,
        "sha256": _sha256(made),
        **_origin(given),
        **writing.model_dump(mode="json", include=set(sections) - {"seed", "policy", "queries"}),
        "n_in": entry["n_in"],
        "n_out": entry["n_out"],
        "dropped": entry["dropped"],
        **entry["notes"],
    }
    write_atomic(report, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    made.replace(to)
    shutil.rmtree(work)
    return found


def _origin(given: dict[str, Any]) -> dict[str, str]:
    """Model and file of what was made."""
    if "path" in given:
        return {"model": given["rules"]["writer"]["model"], "rules_file": given["path"]}
    return {"model": given["policy"]["model"], "queries": given["queries"]["path"]}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
