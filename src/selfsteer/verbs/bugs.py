"""What a bug report holds: files of a run as they are, even damaged, without secrets and texts."""

import json
import os
import platform
import re
import socket
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import distributions
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil

from selfsteer.data.files import opened
from selfsteer.errors import ArtifactError, DataError, SelfsteerError
from selfsteer.recipe import secrets
from selfsteer.recipe.sections import resolve_path
from selfsteer.run.folder import LEDGER, versions
from selfsteer.run.progress import FILE as PROGRESS

#: Lines of each log, and records of each file with ``--with-data``.
LOG_LINES, RECORDS = 50, 20
#: Bytes of a file at most, and of a record's line; the rest is cut and said so.
MOST_BYTES, MOST_LINE = 5_000_000, 200_000

#: Files of the run that are packed whole.
WHOLE = ("recipe.yaml", "resolved.json", LEDGER, PROGRESS)

#: Files of a folder that a recipe names, and what is none of prompts.
MOST_FILES, WEIGHTS = 1000, (".safetensors", ".gguf", ".bin", ".pt", ".pth")

#: How secrets look, whoever wrote them, and what takes their place.
_SHAPES = {
    "keys and tokens": (
        r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|AIza)[A-Za-z0-9_\-]{12,}"
        r"|\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*",
        "[secret]",
    ),
    # as a program prints its environment, whether or not they are set in this one
    "values of variables that are named like secrets": (
        r"(?<![A-Za-z0-9_])([A-Z0-9_]*(?:_KEY|_TOKEN|_SECRET|PASSWORD|PASSWD|CREDENTIALS?)"
        r"(?:\\?[\"'])?[ \t]*[=:][ \t]*)(?:(\\?[\"'])(?!\[secret\]).+?\2|"
        r"(\\?[\"']?)[^\s\"'\\,}\[]{4,})",
        r"\1\2\3[secret]\2",
    ),
    "values of settings that are named like secrets": (
        r"(?i)((?:\bBearer\s+|(?<![a-z])(?:(?:api|auth|access|hf)[-_]?(?:key|token|secret)|password)"
        r"(?:[\"']?[ \t]*[=:][ \t]*[\"']?|[ \t]+)))(?!null\b)[^\s\"',}\[]{4,}",
        r"\1[secret]",
    ),
    "users and passwords of addresses": (r"(?<=://)[^\s/@\"']+(?=@)", "[secret]"),
    "queries of addresses": (r"(\bhttps?://[^\s\"'?]+\?)[^\s\"'#]+", r"\1[secret]"),
}


#: What an error quotes; where a mark is not closed, as where a value was cut, all that follows. An
#: apostrophe in a word quotes nothing.
_SAID = re.compile(
    r"""(?<!\w)(?:'(?:(?:[^'\\]|\\.)*'(?!\w)|.*$)|"(?:(?:[^"\\]|\\.)*"(?!\w)|.*$))""", re.DOTALL
)

#: An example in a warning, as JSON writes it: ``(\\"…\\")``, to the end of its string.
_QUOTED = re.compile(r'\(\\"(?:[^"\\]|\\.)*\\"\)')


#: A word that may tell something of somebody.
_WORD = re.compile(r"[^\W\d_]{3,}|\w*\d\w{4,}")

#: What was replaced, and few words between.
_BETWEEN = re.compile(r"\[text\](?:[^\w\[]+\w+){0,4}?[^\w\[]+(?=\[text\])")


@dataclass
class Packed:
    """A bug report: its files by name, what was replaced in them, and what is not in it."""

    files: dict[str, str] = field(default_factory=dict)
    removed: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)

    def archive(self) -> bytes:
        """The zip file."""
        buffer = BytesIO()
        with zipfile.ZipFile(buffer, "w") as packing:
            for name, text in self.files.items():
                # without a time: a clock may stand where zip files know none
                packing.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    def to_json(self) -> dict[str, Any]:
        """What it holds, what was replaced and what was left out."""
        sizes = {name: len(text.encode()) for name, text in self.files.items()}
        return {"files": sizes, "replaced": dict(+self.removed), "left_out": self.left_out}

    def add(self, name: str, text: str) -> None:
        """A file, with what must not be in it replaced."""
        clean, found = redacted(text)
        self.files[name] = clean
        self.removed += found


def redacted(text: str) -> tuple[str, Counter[str]]:
    """The text without secrets, the home folder and the noted host; how often each was there.

    Secrets are the values of environment variables that are named like one, what looks like a key
    or a token, users and passwords in addresses, and their queries.
    """
    found: Counter[str] = Counter()
    own = secrets.values_of(secrets.named_like_secrets())
    own |= {f"{secrets.HEADERS}, {i}": v for i, v in enumerate(secrets.header_values(), 1)}
    # the longest first: one may hold another
    for name, value in sorted(own.items(), key=lambda item: -len(item[1])):
        for spelled in secrets.spellings([value]):
            found[f"value of {name}"] += text.count(spelled)
            text = text.replace(spelled, "[secret]")
    for what, (shape, instead) in _SHAPES.items():
        text, times = re.subn(shape, instead, text)
        found[what] += times
    if (home := str(Path.home())) != "/":
        text, found["home folder"] = re.subn(rf"(?<![\w.-]){re.escape(home)}(?![\w-])", "~", text)
    # not everywhere: a machine may be called as anything else is
    noted = rf'("host": "){re.escape(socket.gethostname())}(?=")'
    text, found["name of the machine"] = re.subn(noted, r"\1[host]", text)
    return text, +found


def packed(run: Path, *, with_data: bool = False) -> Packed:
    """A bug report of a run; files are taken as they are, as a damaged run has to be reported too.

    Args:
        run: its folder.
        with_data: whether prompts and answers are to be in it.

    Raises:
        ArtifactError: the folder is none of a run.
    """
    if not any((run / name).is_file() for name in ("resolved.json", LEDGER)):
        raise ArtifactError(
            f"{run} is not a run folder: it has neither resolved.json nor {LEDGER}. Give the "
            "folder that 'selfsteer run' wrote, for example runs/demo."
        )
    made, data = Packed(), sorted(_data(run))
    hidden = set[str]() if with_data else _of_data(run, data)
    made.add("about.json", json.dumps(about(run), indent=1) + "\n")
    for name in WHOLE:
        if (text := _read(made, run, run / name)) is not None:
            made.add(name, text)  # secrets go first: words are taken out of them
            if name == LEDGER and not with_data:
                text, made.removed["answers that warnings quote"] = _QUOTED.subn(
                    r'(\\"[text]\\")', made.files[name]
                )
                made.files[name] = _without_data(made, text, hidden)
            if name == PROGRESS and not with_data:
                made.files[name] = _without_quotes(made, made.files[name], hidden)
    if (log := _read(made, run, run / "metrics.jsonl")) is not None:
        made.add("metrics.last.jsonl", _last(log))
    made.add("dropped.json", json.dumps(dict(_drops(made, run)), indent=1) + "\n")
    made.add("files.txt", "".join(_listing(run)))
    if not with_data:
        made.left_out["prompts and answers"] = "add --with-data to pack them"
    for path in data if with_data else ():
        if (text := _read(made, run, path)) is not None:
            made.add(f"data/{_name(run, path)}", "".join(_lines(text)[:RECORDS]))
    return made


def _data(run: Path) -> Iterator[Path]:
    """The files of a run that hold prompts and answers."""
    return (p for p in run.rglob("*.jsonl") if p.name not in (LEDGER, "metrics.jsonl"))


def _sources(run: Path) -> Iterator[Path]:
    """The files that its recipe names, as far as they are found from here."""
    try:
        todo = [json.loads((run / "resolved.json").read_text("utf-8"))]
    except (OSError, ValueError, RecursionError):
        todo = []
    while todo:
        match todo.pop():
            case {**section}:
                todo += section.values()
            case [*values]:
                todo += values
            case str(text) if len(text) < 1000:
                with suppress(OSError, ValueError, SelfsteerError):
                    path = Path(resolve_path(text))
                    inside = sorted(path.rglob("*"))[:MOST_FILES] if path.is_dir() else [path]
                    yield from (p for p in inside if p.suffix not in WEIGHTS and p.is_file())


def _without_words(made: Packed, text: str, found: Set[str]) -> str:
    """A text without these words, which stand in the data and not in this program's own texts.

    Errors may hold a prompt without quotes: as a server says it, or as the id of a record.
    """
    clean = _WORD.sub(lambda m: "[text]" if m[0].lower() in found else m[0], text)
    made.removed["words of prompts and answers"] += clean.count("[text]") - text.count("[text]")
    return _BETWEEN.sub("", clean)


def _of_data(run: Path, data: Sequence[Path]) -> set[str]:
    """The words of the run's errors and warnings that stand in its data.

    Where no data are found, that is each word which is not this program's own.
    """
    ledger, progress = (_read(Packed(), run, run / name) or "" for name in (LEDGER, PROGRESS))
    told = [text for line in ledger.split("\n") for text in _warnings(line)]
    with suppress(ValueError, TypeError, KeyError, RecursionError):  # a damaged one is not packed
        told.append(str(json.loads(progress)["error"]))
    words = {w.lower() for w in _WORD.findall("\n".join(told))} - _own_words()
    files = [*data, *_sources(run)]
    return _standing_in(files, words) if files else words


def _warnings(line: str) -> list[str]:
    """Those of a line of the ledger; a damaged one is one."""
    try:
        found = json.loads(line).get("notes", {}).get("warnings", [])
        return [str(text) for text in found]
    except (ValueError, AttributeError, TypeError, RecursionError):
        return [line]


@cache
def _own_words() -> frozenset[str]:
    """The words of the program itself, but for those of its tiny world; in lower case."""
    package = Path(__file__).parents[1]
    files = (p for kind in ("*.py", "*.yaml") for p in package.rglob(kind))
    texts = (p.read_text("utf-8").lower() for p in files if "testbed" not in p.parts)
    return frozenset(w for text in texts for w in _WORD.findall(text))


def _standing_in(files: Iterable[Path], words: set[str]) -> set[str]:
    """The words that occur in a file, and all that are not ASCII, which files may escape."""
    found = {w for w in words if not w.isascii()}
    for path in files:
        with suppress(OSError, DataError), opened(path) as file:
            while (left := words - found) and (piece := file.read(1 << 24) + file.readline()):
                held = piece.lower()
                found.update(w for w in left if w.encode() in held)
    return found


def _without_data(made: Packed, ledger: str, hidden: Set[str]) -> str:
    """The ledger with nothing of a prompt or an answer in its warnings."""

    def cleaned(line: str) -> str:
        said = _warnings(line)
        if said in ([], [line]):
            return _without_words(made, line, hidden) if said else line
        found = json.loads(line)
        found["notes"]["warnings"] = [_without_words(made, text, hidden) for text in said]
        return json.dumps(found)

    return "\n".join(cleaned(line) if line else line for line in ledger.split("\n"))


def _without_quotes(made: Packed, progress: str, hidden: Set[str]) -> str:
    """What a run says of itself, with nothing of a prompt or an answer that its error holds."""
    try:
        found = json.loads(progress)
        if found["error"] is not None:
            said, made.removed["quotes in the error"] = _SAID.subn("'[text]'", str(found["error"]))
            found["error"] = _without_words(made, said, hidden)
    except (ValueError, TypeError, KeyError, RecursionError):
        made.left_out[PROGRESS] = "it is damaged; add --with-data to pack it as it is"
        return ""
    return json.dumps(found) + "\n"


def about(run: Path) -> dict[str, Any]:
    """When and where the report was made, and with what."""
    installed = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run": run.resolve().name,
        "versions": versions(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "disk_free_gb": round(psutil.disk_usage(str(run)).free / 1e9, 1),
        "gpus": gpus(),
        "packages": dict(sorted(installed.items())),
    }


def gpus() -> list[str]:
    """Names and memory of the GPUs that torch sees."""
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{p.name}, {p.total_memory / 1e9:.0f} GB" for p in found]


def _name(run: Path, path: Path) -> str:
    """A file's name in the run, with escapes for what is no text in it."""
    return os.fsencode(path.relative_to(run)).decode(errors="backslashreplace")


def _read(made: Packed, run: Path, path: Path) -> str | None:
    """A file of the run, as far as it may be packed; notes down what is not."""
    name = _name(run, path)
    if not path.exists():
        made.left_out[name] = "it is not there"
    elif not path.resolve().is_relative_to(run.resolve()):
        made.left_out[name] = "a link leads out of the run folder"
    elif not path.is_file():
        made.left_out[name] = "it is no file"
    else:
        with open(path, "rb") as file:
            begun = file.read(MOST_BYTES)
        if path.stat().st_size > MOST_BYTES:
            made.left_out[f"the rest of {name}"] = f"more than {MOST_BYTES:,} bytes"
        return begun.decode(errors="replace")
    return None


def _last(log: str) -> str:
    """The last lines of each stage."""
    kept: dict[str, list[str]] = {}
    for line in _lines(log):
        named = re.search(r'"stage": "([^"]*)"', line)
        kept.setdefault(named[1] if named else "", []).append(line)
    return "".join(line for lines in kept.values() for line in lines[-LOG_LINES:])


def _lines(text: str) -> list[str]:
    """Lines with their ends, long ones cut; only a newline ends one, as in JSON Lines."""
    lines = (line for line in text.split("\n") if line)
    return [f"{x if len(x) <= MOST_LINE else x[:MOST_LINE] + '… (cut)'}\n" for x in lines]


def _drops(made: Packed, run: Path) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Of each file of dropped records, how many it holds by reason."""
    for path in sorted(run.rglob("*.dropped.jsonl")):
        if (text := _read(made, run, path)) is not None:
            reasons: Counter[str] = Counter()
            for line in filter(None, text.split("\n")):
                try:
                    reasons[str(json.loads(line)["reason"])] += 1
                except (ValueError, TypeError, KeyError):
                    reasons["unreadable line"] += 1
            yield _name(run, path), reasons


def _listing(run: Path) -> Iterator[str]:
    """Size and name of each file of the run."""
    for path in sorted(run.rglob("*")):
        if path.is_symlink():
            yield f"{'link':>14}  {_name(run, path)}\n"
        elif path.is_file():
            yield f"{path.stat().st_size:>14,}  {_name(run, path)}\n"
