"""Settings as users write them: YAML, shipped recipes, ``KEY=VALUE``; faults in words."""

import difflib
import math
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from selfsteer.errors import ConfigError, clip, short, some
from selfsteer.recipe.sections import Section, did_you_mean, twice
from selfsteer.recipe.texts import unfit

#: Values that a YAML text may hold, keys included.
NODES = 100_000

#: Bits of a whole number; no setting takes one of more.
BITS = 1024

#: Columns of a recipe that is written.
WIDTH = 100


def recipe_names() -> list[str]:
    """The shipped recipes."""
    folder = files("selfsteer") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if ".yaml" in p.name)


def recipe_text(name_or_path: str) -> str:
    """The YAML of a shipped recipe or of a file.

    Raises:
        ConfigError: neither exists.
    """
    if name_or_path in recipe_names():
        return (files("selfsteer") / "recipes" / f"{name_or_path}.yaml").read_text("utf-8")
    path = Path(name_or_path)
    if wrong := unfit(path):
        raise ConfigError(f"The recipe {name_or_path} {wrong}.")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"There is no recipe {short(name_or_path, 200)}: it is not a shipped one "
            f"({', '.join(recipe_names())}) and as a file: {reason}."
            f"{did_you_mean(name_or_path, [*recipe_names(), *_beside(path)])}"
        ) from None


def _beside(path: Path) -> list[str]:
    """The YAML files of the same folder, as the user would name them; none where it has none."""
    with suppress(OSError):
        found = (p for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
        return sorted(map(str, islice(found, 1000)))
    return []


class Loader(yaml.SafeLoader):
    """YAML where a key that stands twice is an error, and a date or 1:30 is the text that it is.

    An alias counts as all the nodes that it stands for, and there may be `NODES`: a short text can
    name billions.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As YAML does, but there is an end to it."""
        mark = self.peek_event().start_mark
        alias, before = self.check_event(yaml.AliasEvent), self._nodes
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if alias and node not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias stands in what it names", mark)
        self._nodes += self._sizes[node] if alias else 1
        if self._nodes > NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {NODES:,} values", mark)
        self._sizes.setdefault(node, self._nodes - before)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As YAML does, but a key that stands twice is an error."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if (key := twice(keys)) is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {short(key)} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _number(loader: Loader, node: Any) -> Any:
    """A number, but not to base 60, which is how YAML 1.1 reads 1:30."""
    if ":" in node.value:
        return node.value
    if node.tag.endswith(":float"):
        return loader.construct_yaml_float(node)
    found = loader.construct_yaml_int(node)
    if found.bit_length() > BITS:  # in hexadecimal it may be longer than Python would write it
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of more than {BITS:,} bits", node.start_mark
        )
    return found


def _text(loader: Loader, node: Any) -> Any:
    """A text that UTF-8 can hold: an escape may stand for half a surrogate pair."""
    found = loader.construct_yaml_str(node)
    try:
        found.encode()
    except UnicodeError:
        raise yaml.constructor.ConstructorError(
            None, None, f"{short(found)} is no text, as it holds half a character", node.start_mark
        ) from None
    return found


Loader.add_constructor("tag:yaml.org,2002:int", _number)
Loader.add_constructor("tag:yaml.org,2002:float", _number)
Loader.add_constructor("tag:yaml.org,2002:str", _text)


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is none.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, LookupError, AttributeError) as e:  # a tag that its value does not bear
        raise yaml.YAMLError(f"a value does not fit its tag: {e}") from None


def typed(text: str) -> Any:
    """The value that was typed on the command line: what is no YAML is the text that it is."""
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


def load_values(name_or_path: str) -> dict[str, Any]:
    """The settings of a shipped recipe or of a file, as written.

    Raises:
        ConfigError: it does not exist or is not a YAML mapping.
    """
    try:
        values = read_yaml(recipe_text(name_or_path))
    except yaml.YAMLError as e:
        reason = clip(" ".join(str(e).split()), 300)
        raise ConfigError(f"The recipe {name_or_path} cannot be read: {reason}.") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"The recipe {name_or_path} must be a mapping of settings, found {short(values, 200)}."
        )
    return values


def merge(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Applies ``a.b=c`` overrides to nested mappings; ``a.b=null`` goes back to the default.

    Raises:
        ConfigError: an override is not of that form, or descends into a plain value.
    """
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"An override must look like key=value, found {short(override)}.")
        *parents, last = key.split(".")
        node: Any = out
        for parent in parents:
            child = {} if node.get(parent) is None else node[parent]
            if not isinstance(child, dict):
                raise ConfigError(
                    f"{short(override)}: {clip(parent)} is a plain value, not a section."
                )
            node[parent] = node = dict(child)
        value = typed(text)
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return out


def laid_over(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others in their place, section by section.

    >>> laid_over({"training": {"beta": 0.3, "epochs": 2}}, {"training": {"epochs": 1}})
    {'training': {'beta': 0.3, 'epochs': 1}}
    """
    below = {k: (values.get(k), v) for k, v in own.items()}
    both = {
        k: laid_over(a, b)
        for k, (a, b) in below.items()
        if isinstance(a, dict) and isinstance(b, dict)
    }
    return {**values, **own, **both}


S = TypeVar("S", bound=Section)


def check_sections(settings: Iterable[str], sections: Collection[str], verb: str) -> None:
    """Refuses settings of a recipe that a verb without one makes no use of.

    Raises:
        ConfigError: names the setting.
    """
    for setting in settings:
        key = setting.partition("=")[0]
        if key in ("policy.model", "queries.path"):
            raise ConfigError(f"{short(setting)} repeats an argument of {verb}; leave it out.")
        if key.partition(".")[0] not in sections:
            raise ConfigError(
                f"{short(setting)} has no effect here: of a recipe's settings, {verb} takes "
                f"{', '.join(sections)}."
            )


def choose(family: Sequence[type[S]], values: Mapping[str, Any], where: str) -> type[S]:
    """The class of recipes that ``method`` names; without one the first.

    Raises:
        ConfigError: no class has that method.
    """
    by_name = {method_of(model): model for model in family}
    name = values.get("method", method_of(family[0]))
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    raise ConfigError(
        f"The {where} cannot be used: unknown method {short(name)}; methods are "
        f"{', '.join(by_name)}.{did_you_mean(name, by_name)}"
    )


def method_of(model: type[Section]) -> str:
    """The name of a recipe class's method."""
    return str(model.model_fields["method"].default)


def validate(
    model: type[S], values: Mapping[str, Any], where: str, family: Sequence[type[Section]] = ()
) -> S:
    """Checks ``values`` against a section; every fault becomes one ConfigError paragraph.

    Args:
        model: the section.
        values: its settings.
        where: for the message.
        family: the recipe classes of all methods, to say which one has a setting.
    """
    try:
        return model.model_validate(values)
    except ValidationError as e:
        faults = [_fault(model, fault, family) for fault in e.errors()]
        text = some(faults)
        raise ConfigError(
            f"The {where} cannot be used: {text}{'' if text.endswith('?') else '.'}"
        ) from None


def _fault(model: type[Section], fault: Any, family: Sequence[type[Section]]) -> str:
    path = clip(".".join(str(p) for p in fault["loc"]))
    if fault["type"] == "extra_forbidden":
        others = [method_of(m) for m in family if path in known_keys(m)]
        if others:
            return (
                f"{path} has no effect with method {method_of(model)}; remove it (it is a setting "
                f"of {', '.join(others)})"
            )
        if ":" in str(fault["loc"][-1]):
            return f"unknown key {short(path)} (YAML needs a space after a colon: {{key: value}})"
        near = _nearest(model, fault["loc"])
        return f"unknown key {short(path)}" + (f" (did you mean {near!r}?)" if near else "")
    if fault["type"] == "missing" or (fault["type"] == "string_type" and fault["input"] is None):
        return f"{path} is missing"
    if fault["type"] == "model_type":
        below = [
            key.removeprefix(f"{path}.") for key in known_keys(model) if key.startswith(f"{path}.")
        ]
        keys = ", ".join(key for key in below if "." not in key)
        return (
            f"{path} is a section with settings of its own ({keys}), found "
            f"{short(fault['input'], 200)}"
        )
    message = fault["msg"].removeprefix("Value error, ")
    if not path:
        return message
    if fault["type"] == "value_error" and isinstance(fault["input"], Mapping):
        # the section says what is wrong with it, often beginning with the setting's name
        setting = message.split()[0].rstrip(":") in fault["input"]
        return f"{path}.{message}" if setting else f"{path}: {message}"
    return f"{path}: {message[0].lower()}{message[1:]}, found {short(fault['input'], 200)}"


def known_keys(model: type[Section]) -> list[str]:
    """All keys of a section and its subsections, dotted."""
    return list(descriptions(model))


def known_settings(model: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that a section has too, in its own sections as well."""
    out = {}
    for name, value in values.items():
        if name in model.model_fields:
            below = subsections(model.model_fields[name].annotation)
            inner = isinstance(value, Mapping) and len(below) == 1
            out[name] = known_settings(below[0], value) if inner else value
    return out


def subsections(annotation: Any) -> list[type[Section]]:
    """The section types in an annotation, also inside Optional."""
    found = [annotation, *get_args(annotation)]
    return [a for a in found if isinstance(a, type) and issubclass(a, Section)]


def _nearest(model: type[Section], loc: tuple[Any, ...]) -> str | None:
    """The key that was meant: one of the same section, else one of the same name elsewhere."""
    *parents, last = (str(part) for part in loc if not isinstance(part, int))
    keys = [key.split(".") for key in known_keys(model)]
    siblings = {key[-1]: ".".join(key) for key in keys if key[:-1] == parents}
    anywhere = {key[-1]: ".".join(key) for key in reversed(keys)}
    for names, cutoff in ((anywhere, 1.0), (siblings, 0.5), (anywhere, 0.7)):
        if near := difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            return names[near[0]]
    return None


def commented_yaml(values: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """Settings as YAML, each with the comment on its dotted key, beside it or above.

    >>> print(commented_yaml({"training": {"beta": 0.1}}, {"training.beta": "β"}), end="")
    training:
      beta: 0.1  # β
    """
    return "".join(f"{line}\n" for line in _commented(values, comments, ()))


def _commented(
    values: Mapping[str, Any], comments: Mapping[str, str], parents: tuple[str, ...]
) -> Iterator[str]:
    indent = "  " * len(parents)
    for name, value in values.items():
        key = (*parents, name)
        below = value if isinstance(value, Mapping) and value else None
        said = "" if below or value is None else f" {_flow(value)}"
        line, comment = f"{indent}{name}:{said}", comments.get(".".join(key), "")
        if comment and len(line) + len(comment) + 4 > WIDTH:
            mark = f"{indent}# "
            yield from textwrap.wrap(comment, WIDTH, initial_indent=mark, subsequent_indent=mark)
        elif comment:
            line += f"  # {comment}"
        yield line
        yield from _commented(below, comments, key) if below else ()


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return str(text).removesuffix("...\n").strip()


def descriptions(model: type[Section], prefix: str = "") -> dict[str, str]:
    """Each dotted key's description, sections included; the method's is its class's first line."""
    out = {}
    for name, info in model.model_fields.items():
        subs = subsections(info.annotation)
        described = subs or [model] * (name == "method")
        doc = (described[0].__doc__ or "").split("\n")[0] if described else ""
        out[prefix + name] = (info.description or doc).rstrip(".")
        for sub in subs:
            out |= descriptions(sub, f"{prefix}{name}.")
    return out
