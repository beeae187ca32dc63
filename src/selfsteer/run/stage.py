"""A stage is a value: a frozen dataclass whose fields are everything that its result depends on.

Its fingerprint, its name and place in the run folder, its cost and its checks hang on it::

    @dataclass(frozen=True)
    class Pair(Stage):
        samples: Artifact                      # counts as its maker's fingerprint
        hygiene: Hygiene                       # counts as those of its fields that bear on results

        def run(self, run: RunFolder) -> StageResult: ...

Nothing heavy is imported before a stage runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from selfsteer.data.digests import MISSING, digest, digest_path, model_digest
from selfsteer.data.queries import queries_digest
from selfsteer.data.records import SCHEMA_VERSION
from selfsteer.principles.catalogue import catalogue_of
from selfsteer.recipe.sections import (
    Benchmarks,
    EngineSettings,
    JudgeConfig,
    Loading,
    PrinciplesConfig,
    Queries,
    Section,
    mark,
    resolve_path,
)
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult

#: Marks a field of a stage that only costs time or memory. Another mark is ``identity``: what of
#: the field counts, where that is less than all.
COSTS_ONLY: Mapping[str, Any] = {"costs_only": True}


@dataclass(frozen=True)
class Where:
    """A stage's place: whose round it is part of, and the folder of the run that it writes in."""

    #: None where it serves every method of the run
    method: str | None = None
    #: counted from 1; None outside of rounds
    round: int | None = None
    folder: str = ""


@dataclass(frozen=True)
class Artifact:
    """Something a stage reads: what another stage made, or a model or file that was given."""

    path: Path
    maker: "Stage | None" = None

    @property
    def fingerprint(self) -> str:
        """The maker's, or that of the content; of a hub id that of its name."""
        if self.maker is not None:
            return self.maker.fingerprint
        return digest_path(self.path) if self.path.is_file() else model_digest(str(self.path))

    @property
    def texts(self) -> str:
        """The stage whose responses these are: scoring them twice costs once."""
        return self.maker.texts if self.maker else str(self.path)

    def records(self, scale: Scale) -> int:
        """How many records there will be, as if nothing were dropped."""
        return self.maker.records(scale) if self.maker else 0


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """One arrow of the data flow.

    Args:
        where: its place; set when it is planned.
        seed: the run's.
        loading: how models are loaded.
    """

    where: Where = Where()
    seed: int = 0
    loading: Loading = field(default_factory=Loading)

    #: Files and folders that it makes, by ``{name}`` and ``{folder}``; others read the first.
    makes: ClassVar[tuple[str, ...]] = ("{name}",)
    #: What it resumes from until it is finished, or leaves beside its outputs.
    leaves: ClassVar[tuple[str, ...]] = ()
    #: Whether its records hold the responses of those that it reads, none of its own.
    passes_on: ClassVar[bool] = False
    #: Whether all ranks do the work together, where there are several.
    on_ranks: ClassVar[bool] = False
    #: Whether it cannot work where there are several ranks.
    one_process: ClassVar[bool] = False

    @property
    @abstractmethod
    def title(self) -> str:
        """Its name within its round, such as ``triples``."""

    @abstractmethod
    def run(self, run: RunFolder) -> StageResult:
        """Does the work.

        Raises:
            SelfsteerError: whatever ends the run.
        """

    @property
    def name(self) -> str:
        """Its path in the run folder, such as ``iteration-1/triples``."""
        return f"{self.where.folder}/{self.title}" if self.where.folder else self.title

    @property
    def outputs(self) -> tuple[str, ...]:
        """The files and folders that it makes; the first is what others read."""
        folder = self.where.folder or "."
        return tuple(p.format(name=self.name, folder=folder) for p in self.makes)

    @property
    def files(self) -> tuple[str, ...]:
        """All that it may leave in the run folder."""
        left = (p.format(name=self.name) for p in self.leaves)
        return (*self.outputs, *left, f"{self.name}.dropped.jsonl")

    @property
    def permits(self) -> set[str]:
        """What it lets the authors of its models do; see `Section.permits`."""
        values = (getattr(self, f.name) for f in fields(self))
        return set[str]().union(*(v.permits for v in values if isinstance(v, Section)))

    @property
    def read(self) -> Artifact | None:
        """What it reads first: the records that it works on, where there are any."""
        values = (getattr(self, f.name) for f in fields(self))
        return next((v for v in values if isinstance(v, Artifact)), None)

    @property
    def makers(self) -> "list[Stage]":
        """The stages that made what it reads."""
        return list(_makers([getattr(self, f.name) for f in fields(self)]))

    @property
    def depends_on(self) -> "list[Stage]":
        """Those of them that its result depends on."""
        counts = (f.name for f in fields(self) if not f.metadata.get("costs_only"))
        return list(_makers([getattr(self, name) for name in counts]))

    @property
    def texts(self) -> str:
        """The stage whose responses its records hold."""
        return self.read.texts if self.passes_on and self.read else self.name

    @cached_property
    def fingerprint(self) -> str:
        """Changes when, and only when, the stage would have to be done again.

        Computed once: stages read each other's many times over.
        """
        return digest([type(self).__name__, SCHEMA_VERSION, self.name, self._inputs()])

    def _inputs(self) -> dict[str, Any]:
        return {
            f.name: f.metadata.get("identity", identity)(getattr(self, f.name))
            for f in fields(self)
            if f.name != "where" and not f.metadata.get("costs_only")
        }

    @property
    def absent(self) -> list[str]:
        """Files that it is to be made from and that are not there, as the recipe names them."""
        texts = _texts(self._inputs())
        return [text.removeprefix(MISSING) for text in texts if text.startswith(MISSING)]

    def records(self, scale: Scale) -> int:
        """How many records it makes, as if nothing were dropped."""
        return self.read.records(scale) if self.read else 0

    def cost(self, scale: Scale) -> Cost:
        """What it asks for; `plan` and `check` add these up."""
        return Cost(records=self.records(scale))

    def tidy(self, run: RunFolder) -> None:
        """Removes what the recipe does not want kept once the whole run is finished."""
        return

    def check(self) -> Iterator[str]:
        """Fails now, not after a night of sampling, where the stage could not run.

        Yields:
            What is odd but works.

        Raises:
            SelfsteerError: a model, a judge, an engine or a file cannot be used.
        """
        yield from ()


def _makers(value: Any) -> Iterator[Stage]:
    if isinstance(value, Artifact):
        yield from () if value.maker is None else (value.maker,)
    elif isinstance(value, Mapping):
        yield from _makers(list(value.values()))
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _makers(inner)


def identity(value: Any) -> Any:
    """What of a field bears on a result, as JSON: files and models count by content."""
    if isinstance(value, Artifact):
        return value.fingerprint
    if isinstance(value, BaseModel):
        return _section_identity(value)
    if isinstance(value, Mapping):
        return {str(k): identity(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [identity(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: identity(getattr(value, f.name)) for f in fields(value)}
    return value


def _section_identity(section: BaseModel) -> Any:
    if isinstance(section, EngineSettings):
        return engine_identity(section)
    found = {}
    for name, info in type(section).model_fields.items():
        if not mark(info, "costs_only"):
            value = getattr(section, name)
            found[name] = content(value, mark(info, "content")) if value else identity(value)
    if isinstance(section, Queries):
        del found["path"], found["against"]
        found["content"] = queries_digest(section)
    if isinstance(section, PrinciplesConfig) and section.mode != "fixed":
        # rules bear on the judge alone
        found["catalogue"] = catalogue_of(section).model_dump(
            exclude={"features": {"__all__": {"checks"}}}
        )
    if isinstance(section, JudgeConfig) and section.engine.base_url is not None:
        found["model"] = section.model
    if isinstance(section, Benchmarks):
        from selfsteer.evaluation.harness import harness_identity

        del found["task_folders"]  # they count by content
        found["harness"] = harness_identity(section)
    return found


def content(value: Any, kind: Any) -> Any:
    """A named file or model by what is in it; a missing one is reported by what reads it."""
    if kind is None:
        return identity(value)
    name = resolve_path(value)
    if kind == "model":
        return model_digest(name)
    return digest_path(Path(name)) if Path(name).exists() else f"{MISSING}{name}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        yield from chain.from_iterable(map(_texts, value))
    elif isinstance(value, str):
        yield value


def engine_identity(settings: EngineSettings) -> Any:
    """What answers depend on; a model that no server holds counts by content."""
    found = settings.identity
    if settings.model is None or settings.base_url is not None:
        return found
    return {**found, "model": model_digest(resolve_path(settings.model))}
