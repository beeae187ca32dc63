"""Catalogues: the features of a response, each with contrastive adjectives and guidelines.

A *picked* principle is put together from a catalogue; a *generated* one takes only the adjectives
from it and the guideline from a model. The built-in one has the eight features of SSO v2 in our own
words; it is the file ``catalogue.yaml``, in the form that a team's own catalogue has.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, ValidationError, model_validator
from pydantic import Field as Bounded

from selfsteer.errors import ConfigError, clip, short, some
from selfsteer.principles.rules import Check
from selfsteer.recipe.read import read_yaml
from selfsteer.recipe.sections import (
    CATALOGUES,
    PrinciplesConfig,
    Section,
    catalogue_path,
    did_you_mean,
    resolve_path,
)
from selfsteer.recipe.texts import unfit

#: Features of a catalogue; `lint` compares every two.
MOST_FEATURES = 1000

#: The recipe's `concision` is the probability of this feature.
CONCISION = "Concision"


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; write it, or take the whole entry out")
    return text.strip()


Words = Annotated[str, AfterValidator(_not_empty)]
Probability = Annotated[float, Bounded(ge=0, le=1)]


class Feature(Section):
    """One quality of a response: its name, the two adjectives, the two guidelines.

    ``weight`` says how likely it is, against the others', to be drawn where features are missing.
    ``checks`` are rules that a good response keeps, for ``judge: checks``; no principle shows them.
    """

    name: Words
    good_adjective: Words
    bad_adjective: Words
    good: Words
    bad: Words
    weight: float = Bounded(default=1.0, gt=0)
    checks: tuple[Check, ...] = ()


class Catalogue(Section):
    """Features and the sentences around them, all in one language.

    ``domain`` is shown to the model that chooses features and writes guidelines. ``opening`` holds
    ``{adjectives}``, ``conjunction`` stands before the last adjective. ``appended`` features are
    never chosen; each joins a query's features with its own probability.
    """

    language: Words = "English"
    domain: Words | None = None
    opening: Words = "Your response should be {adjectives}."
    conjunction: Words = "and"
    closing: str = "Do not reveal that you follow guidelines."
    appended: dict[str, Probability] = Bounded(default_factory=dict)
    features: tuple[Feature, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.features) > MOST_FEATURES:
            raise ValueError(
                f"there are {len(self.features):,} features, and every two are compared; give at "
                f"most {MOST_FEATURES:,}"
            )
        if self.opening.count("{adjectives}") != 1:
            raise ValueError(
                f"the opening must hold {{adjectives}} once, found {short(self.opening, 200)}; for "
                "example 'Your response should be {adjectives}.'"
            )
        sentences = ("opening", "conjunction", "closing")
        missing = [n for n in sentences if n not in self.model_fields_set]
        if self.language != "English" and missing:
            raise ValueError(
                f"the language is {clip(self.language)} but {', '.join(missing)} would stay "
                f"English; write them in {clip(self.language)}"
            )
        names = [f.name for f in self.features]
        for i, name in enumerate(names):
            if name.casefold() in (n.casefold() for n in names[:i]):
                raise ValueError(f"two features are called {short(name)}; rename or merge them")
        self.ordered(tuple(self.appended))
        if not self.choosable:
            raise ValueError(
                "there is no feature to choose; give at least one that is not appended"
            )
        return self

    @cached_property
    def by_name(self) -> Mapping[str, Feature]:
        """The features by their names, in catalogue order."""
        return {f.name: f for f in self.features}

    @property
    def rules(self) -> Mapping[str, tuple[Check, ...]]:
        """The checks of the features that have some, by feature."""
        return {f.name: f.checks for f in self.features if f.checks}

    @property
    def choosable(self) -> tuple[str, ...]:
        """What the model may choose from: all features but the appended ones."""
        return tuple(f.name for f in self.features if f.name not in self.appended)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Names and adjectives: what a response that leaks its principle begins with."""
        found = {w for f in self.features for w in (f.name, f.good_adjective, f.bad_adjective)}
        return tuple(sorted(w.lower() for w in found))

    def __getitem__(self, name: str) -> Feature:
        """The feature of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.by_name:
            near = difflib.get_close_matches(name, list(self.by_name), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"Unknown feature {short(name)}; the catalogue has {', '.join(self.by_name)}.{hint}"
            )
        return self.by_name[name]

    def appending(self, more: Mapping[str, float]) -> "Catalogue":
        """The same catalogue with these features appended, each with its own probability.

        Raises:
            ConfigError: a name is not in the catalogue.
        """
        self.ordered(tuple(more))
        return self.model_copy(update={"appended": {**self.appended, **more}})

    def ordered(self, features: tuple[str, ...]) -> tuple[str, ...]:
        """The same features in catalogue order, so that equal choices give equal texts.

        Raises:
            ConfigError: a name is not in the catalogue.
        """
        for name in features:
            self[name]
        return tuple(name for name in self.by_name if name in features)

    def adjectives(self, features: tuple[str, ...], *, good: bool) -> str:
        """``"helpful and accurate"``, or ``"unhelpful and inaccurate"``, in catalogue order."""
        chosen = [self[name] for name in self.ordered(features)]
        words = [f.good_adjective if good else f.bad_adjective for f in chosen]
        if len(words) == 1:
            return words[0]
        return f"{', '.join(words[:-1])} {self.conjunction} {words[-1]}"

    def guidelines(self, features: tuple[str, ...], *, good: bool) -> str:
        """The catalogue's own guideline sentences of these features, in catalogue order."""
        chosen = [self[name] for name in self.ordered(features)]
        return " ".join(f.good if good else f.bad for f in chosen)

    def principle(self, features: tuple[str, ...], guideline: str, *, good: bool) -> str:
        """The whole text of a principle: adjectives sentence, guideline, closing line.

        Without features there is no adjectives sentence.

        >>> BUILT_IN.principle(("Accuracy",), "State only facts that are true.", good=True)
        'Your response should be accurate. State only facts that are true. Do not reveal that you follow guidelines.'
        """  # noqa: E501
        adjectives = self.adjectives(features, good=good) if features else ""
        opening = self.opening.replace("{adjectives}", adjectives) if features else ""
        return " ".join(part for part in (opening, guideline, self.closing) if part)


@dataclass(frozen=True)
class Finding:
    """Something wrong in a catalogue file: where, what, and what to do about it."""

    line: int
    where: str
    problem: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.where}: {self.problem}"


def read(text: str) -> tuple[Catalogue | None, list[Finding], Mapping[str, int]]:
    """Reads a catalogue from its YAML.

    Returns:
        The catalogue, or None where it cannot be used; the reasons why not; and the line on which
        each feature begins.
    """
    try:
        value = read_yaml(text)  # first: it is the one with limits
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        return (
            None,
            [Finding(line, "file", f"cannot be read: {clip(' '.join(str(e).split()), 300)}")],
            {},
        )
    if root is None or not isinstance(value, dict):
        return None, [Finding(1, "file", "must be a mapping with a list of features")], {}
    lines = dict(_lines(root, ()))
    names = _names(value)
    starts = {name: lines.get(("features", i), 1) for i, name in names.items()}
    findings = []
    try:
        found = Catalogue.model_validate(value)
    except ValidationError as e:
        for fault in e.errors():
            loc = fault["loc"]
            at = next(lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines)
            findings.append(Finding(at, _where(loc, names), _problem(fault)))
        return None, findings, starts
    return found, findings, starts


def _names(value: Mapping[str, Any]) -> dict[int, str]:
    rows = value.get("features")
    rows = rows if isinstance(rows, list) else []
    return {i: str(r["name"]) for i, r in enumerate(rows) if isinstance(r, dict) and "name" in r}


def _where(loc: tuple[Any, ...], names: Mapping[int, str]) -> str:
    if loc[:1] == ("features",) and len(loc) > 1:
        loc = (names.get(loc[1], f"feature {loc[1] + 1}"), *loc[2:])
    return clip(".".join(map(str, loc))) or "catalogue"


def _problem(fault: Any) -> str:
    if fault["type"] == "missing":
        return "is missing; write it"
    if fault["type"] == "extra_forbidden":
        inside: type[Section] = Feature if fault["loc"][0] == "features" else Catalogue
        known = (Check if "checks" in fault["loc"] else inside).model_fields
        near = difflib.get_close_matches(str(fault["loc"][-1]), list(known), n=1, cutoff=0.5)
        meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"is not a known key; {meant}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return str(message)
    hint = "; put texts in quotes" if fault["type"] == "string_type" else ""
    return f"{message[0].lower()}{message[1:]}, found {short(fault['input'], 200)}{hint}"


def _lines(node: yaml.Node, loc: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], int]]:
    yield loc, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*loc, key.value), key.start_mark.line + 1
            for inner, line in _lines(value, (*loc, key.value)):
                if inner != (*loc, key.value):
                    yield inner, line
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(value, (*loc, i))


def catalogue_text(path: str | None) -> str:
    """The YAML of a catalogue: a file or a shipped one; None is the built-in one.

    Raises:
        ConfigError: there is no such file.
    """
    path = catalogue_path(path) if path else "package:selfsteer/catalogue.yaml"
    file = Path(resolve_path(path))
    if wrong := unfit(file):
        raise ConfigError(f"The catalogue {path} {wrong}.")
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        near = did_you_mean(path, CATALOGUES)
        shipped = f" Shipped ones are {', '.join(CATALOGUES)}.{near}" if "." not in path else ""
        raise ConfigError(f"The catalogue {path} cannot be read: {reason}.{shipped}") from None


def load_catalogue(path: str | None) -> Catalogue:
    """The catalogue of a YAML file; None is the built-in one.

    Raises:
        ConfigError: it does not exist or cannot be used; says each reason with its line.
    """
    if path is None:
        return BUILT_IN
    found, findings, _ = read(catalogue_text(path))
    if found is None:
        raise ConfigError(f"The catalogue {path} cannot be used: {some(map(str, findings))}.")
    return found


def catalogue_of(settings: PrinciplesConfig) -> Catalogue:
    """The catalogue that a recipe's principles are made with, `append` and `concision` applied.

    Raises:
        ConfigError: it cannot be used, or lacks what the recipe asks of it.
    """
    found = load_catalogue(settings.catalogue)
    more = dict(settings.append)
    if settings.concision is not None:
        if CONCISION in more:
            raise ConfigError(
                "principles.concision and principles.append.Concision say the same; keep one."
            )
        if CONCISION not in found.by_name:
            raise ConfigError(
                f"principles.concision has no effect: {settings.catalogue} has no feature "
                f"{CONCISION}. Remove it (principles.concision=null); a catalogue lists "
                "what it appends under 'appended'."
            )
        more[CONCISION] = settings.concision
    found = found.appending(more)
    if settings.features_per_query > len(found.choosable):
        raise ConfigError(
            f"principles.features_per_query {settings.features_per_query} is more than the "
            f"catalogue can give: {', '.join(found.choosable) or 'all its features are appended'}."
        )
    if settings.examples and found.language != "English":
        raise ConfigError(
            f"principles.examples are English and the catalogue's language is {found.language}: "
            "the guidelines would be English too. Set principles.examples: 0."
        )
    return found


BUILT_IN = Catalogue.model_validate(read_yaml(catalogue_text(None)))
