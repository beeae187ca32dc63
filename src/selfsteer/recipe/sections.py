"""Settings: the sections that recipes of all methods are made of, checked before anything loads.

A field is documented once, in its description, with the source of its default. A field that only
costs time, memory or disk is marked ``costs_only`` where it is declared; every other field is part
of the fingerprint of the stages that take its section. Recipes are in `selfsteer.methods`.
"""

import datetime
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from typing_extensions import override

from selfsteer.errors import ConfigError, short
from selfsteer.objectives import (
    REFERENCE_FREE,
    SUMMED,
    BaseName,
    Direction,
    ObjectiveName,
    Weighting,
)
from selfsteer.recipe import secrets

GeneratorObjective = Literal["sso", "sso-plus-only", "sso-minus-only", "sso-direct-minus"]
Dtype = Literal["float32", "bfloat16", "auto"]
Device = Literal["auto", "cpu", "cuda"]
Layout = Literal["auto", "tree", "padded"]


#: The constants of `Objective.named`, as settings are called that give them.
CONSTANTS = frozenset(
    [
        *("beta", "gamma", "alpha", "steer", "use_weight", "use_steer", "detach_weight"),
        *("label_smoothing", "simpo_margin", "ceiling", "weighting", "noise", "budget"),
    ]
)


def unused_arguments(
    objective: str, base: str, given: Iterable[str], *, use_weight: bool, use_steer: bool
) -> list[str]:
    """The constants among ``given`` that this objective and base would ignore."""
    online = objective == "sso-online"
    used = {
        "label_smoothing": base == "sigmoid",
        "simpo_margin": base == "simpo",
        "ceiling": base == "sigmoid",
        "budget": base not in REFERENCE_FREE,
        "reference": base not in REFERENCE_FREE,
        "weighting": objective == "pbaa",
        "noise": objective == "pbaa" and base in SUMMED,
        "gamma": objective in get_args(GeneratorObjective),
        "use_weight": online,
        "use_steer": online,
        "alpha": online and use_weight,
        "detach_weight": online and use_weight,
        "steer": online and use_steer,
    }
    return [name for name in given if not used.get(name, True)]


def holding(faults: Mapping[str, bool]) -> Iterator[str]:
    """Those of the texts that hold."""
    return (text for text, holds in faults.items() if holds)


def twice(names: Iterable[str]) -> str | None:
    """The first name that stands there a second time."""
    found = list(names)
    return next((n for i, n in enumerate(found) if n in found[:i]), None)


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """`` Did you mean NAME?``, or nothing where none of the known names is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


#: Settings that let a model's author run code here.
PERMISSIONS = ("trust_remote_code", "allow_pickle")


class Section(BaseModel):
    """Base of all recipe sections: strict keys, frozen values, finite numbers."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    #: The setting that a plain value stands for: ``engine: vllm`` is ``engine: {kind: vllm}``.
    short: ClassVar[str | None] = None
    #: Whether a text of another kind stands for the whole section.
    spelled: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        plain = cls.short is not None and isinstance(value, str | bool)
        return {cls.short: value} if plain else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The section, or the plain value that stands for it."""
        found = handler(core_schema)
        plain = {"type": ["string", "boolean"]} if cls.short else {"type": "string"}
        return {"anyOf": [found, plain]} if cls.short or cls.spelled else found

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        kinds = {kind, *get_args(kind)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("input should be a number")  # pydantic takes true for 1
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        free = (n for n, f in type(self).model_fields.items() if f.annotation == dict[str, Any])
        told = (f"{n}.{place}" for n in free for place in secrets.places(getattr(self, n)))
        # a recipe is written into the run folder, and shown by reports
        of_secrets = (f"{p} must hold no secret: set it in the environment" for p in told)
        if faults := "; ".join([*of_secrets, *self.faults()]):
            raise ValueError(faults)
        return self

    def faults(self) -> Iterator[str]:
        """What contradicts itself, and settings that have no effect beside the others."""
        yield from ()

    @property
    def every_section(self) -> Iterator["Section"]:
        """This one and all below it."""
        yield self
        given = [getattr(self, name) for name in type(self).model_fields]
        many = (v if isinstance(v, tuple) else (v,) for v in given)
        for section in (v for some in many for v in some if isinstance(v, Section)):
            yield from section.every_section

    @property
    def permits(self) -> set[str]:
        """Which of a model's risks are taken: ``trust_remote_code``, ``allow_pickle``."""
        return {n for s in self.every_section for n in PERMISSIONS if getattr(s, n, False) is True}

    @property
    def reaches(self) -> set[str]:
        """What starts a program, or sends prompts or keys where its author wants them."""
        return {name for s in self.every_section if isinstance(s, EngineSettings) for name in s.led}

    def with_models(self, named: Callable[[str], str]) -> Self:
        """A copy with other names for its models, and for those of the sections in it.

        Args:
            named: from a name to the new one; what a server calls its model is not asked for.
        """
        changed: dict[str, Any] = {}
        served = getattr(getattr(self, "engine", self), "base_url", None) is not None
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                changed[name] = value.with_models(named)
            elif name == "model" and value is not None and not served:
                changed[name] = named(value)
        changed = {name: value for name, value in changed.items() if value != getattr(self, name)}
        return self.model_copy(update=changed) if changed else self

    def idle(self, names: Iterable[str], why: str) -> Iterator[str]:
        """The settings among ``names`` that were given, though they have no effect."""
        for name in sorted(self.model_fields_set & set(names)):
            yield f"{name} has no effect {why}; remove it"


def _f(
    default: Any,
    description: str,
    *,
    costs_only: bool = False,
    content: Literal["file", "model"] | None = None,
    kind: str | None = None,
    **bounds: Any,
) -> Any:
    """A field.

    Args:
        default: ``...`` where it must be given.
        description: with the source of the default.
        costs_only: it bears on time, memory or disk and on no result.
        content: it names a file (or folder), or a model, whose content bears on results.
        kind: it is a setting of this ``kind`` of section only, or of several with commas between;
            its description begins with that.
        bounds: what values are allowed.
    """
    extra: Any = {"costs_only": costs_only, "content": content, "kind": kind}
    text = f"{kind}: {description}" if kind else description
    return Field(default, description=text, json_schema_extra=extra, **bounds)


def mark(field: FieldInfo, name: str) -> Any:
    """What a field was declared with: ``costs_only``, ``content`` or ``kind``."""
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


def foreign(section: Any) -> set[str]:
    """The settings that are of other kinds of this section than its own."""
    kinds = {name: mark(f, "kind") for name, f in type(section).model_fields.items()}
    return {name for name, kind in kinds.items() if kind and section.kind not in kind.split(", ")}


class Lora(Section):
    """Low-rank adapters instead of full training (arXiv 2106.09685)."""

    rank: int = _f(16, "rank of the adapters", gt=0)
    alpha: int = _f(32, "scale of the adapters", gt=0)
    targets: str | list[str] = _f("all-linear", "module names, or all-linear")
    bits: Literal[4, 8] | None = _f(
        None,
        "QLoRA: bits of the weights under the adapters (arXiv 2305.14314); null: full",
    )


class Loading(Section):
    """How a model is loaded: precision, device, layout and permissions."""

    dtype: Dtype = _f("auto", "auto: bfloat16 on a GPU (paper), float32 on a CPU")
    device: Device = _f("auto", "auto, cpu or cuda; CUDA_VISIBLE_DEVICES picks the GPU")
    layout: Layout = _f("auto", "tree shares prompts and needs no padding; auto tests it first")
    trust_remote_code: bool = _f(False, "run code that comes with the checkpoint")
    allow_pickle: bool = _f(False, "load weights that are not in safetensors format")
    chat_template_kwargs: dict[str, Any] = _f(
        {}, "variables of the chat template: {enable_thinking: false}, {reasoning_effort: low}"
    )
    date: str | None = _f(
        None,
        "what the chat template writes as today's date; null: the day on which the run started",
        pattern=r"^\d{4}-\d{2}-\d{2}$",
    )
    threads: int | None = _f(None, "CPU threads; null: torch's own choice", gt=0, costs_only=True)

    @override
    def faults(self) -> Iterator[str]:
        try:
            datetime.date.fromisoformat(self.date or "2000-01-01")
        except ValueError:
            yield f"date {self.date} is no day of the calendar"

    @property
    def loading(self) -> "Loading":
        """These settings alone."""
        return Loading(**self.model_dump(include=set(Loading.model_fields)))


#: What of `Loading` a judge's model has, too.
LOADED = {"dtype", "device", "trust_remote_code", "allow_pickle", "chat_template_kwargs"}


class Policy(Loading):
    """The model to align."""

    model: str = _f(
        ..., "folder, hub id (org/name@REVISION), adapters, FILE.gguf or package:MODULE/PATH"
    )
    lora: Lora | None = _f(None, "train adapters; saved merged and on their own")


class ReplicaResources(Section):
    """What Ray sets aside for each replica."""

    num_cpus: float = _f(1, "cores", ge=0)
    num_gpus: float = _f(0, "GPUs; 0.5 puts two replicas on one", ge=0)


#: Further arguments of an engine, those of them that come from elsewhere in the recipe, and what
#: the engine does with those: the arguments of vllm.LLM, and the fields of a request.
# fmt: off
_TAKEN = (
    ("engine_args", {
        "model", "dtype", "seed", "trust_remote_code", "load_format", "tensor_parallel_size",
        "gpu_memory_utilization", "max_model_len", "enable_prefix_caching", "generation_config",
        "max_logprobs",
    }, "sets"),
    ("extra_body", {
        "model", "messages", "seed", "max_tokens", "max_completion_tokens", "temperature", "top_p",
        "n", "stream", "chat_template_kwargs",
    }, "sends"),
)
# fmt: on


class Price(Section):
    """What a server takes, in a currency of yours per million tokens."""

    input: float = _f(..., "of prompts", ge=0, le=1e12)
    output: float = _f(..., "of answers, reasoning included", ge=0, le=1e12)
    batch: float = _f(
        0.5, "share of both that batches cost: half (OpenAI's guide to its Batch API)", ge=0, le=1
    )

    def of(self, counts: Mapping[str, int]) -> float:
        """The cost of so many ``prompt_tokens`` and ``completion_tokens``.

        Those that were asked in batches are counted again, as ``batch_prompt_tokens`` and
        ``batch_completion_tokens``.
        """
        read, written = (
            counts[name] - (1 - self.batch) * counts.get(f"batch_{name}", 0)
            for name in ("prompt_tokens", "completion_tokens")
        )
        return (read * self.input + written * self.output) / 1e6


def _is_here(address: str | None) -> bool:
    """Whether an address is this machine's, or none."""
    with suppress(ValueError):
        url = urlsplit(address if address and "//" in address else f"//{address or 'localhost'}")
        return secrets.is_loopback(url.hostname or "")
    return False


class EngineSettings(Section):
    """One engine: transformers or vllm (in process), or openai (a server)."""

    kind: Literal["transformers", "vllm", "openai", "ray"] = _f(
        "transformers",
        "transformers, vllm: in process; openai: a server, yours or hosted; ray: a cluster",
    )
    model: str | None = _f(None, "openai without launch: the server's name for its model")
    base_url: str | None = _f(None, "address of a running server, up to /v1", kind="openai")
    launch: str | None = _f(
        None, "command that serves a model, with {model} and {port}; started for each model",
        kind="openai",
    )  # fmt: skip
    launch_timeout: float = _f(
        900, "seconds until a launched server must answer", kind="openai", costs_only=True, gt=0
    )
    api_key_env: str = _f(
        "OPENAI_API_KEY", "environment variable with the key; if unset, no key is sent",
        kind="openai", costs_only=True,
    )  # fmt: skip
    concurrency: int = _f(
        256,
        "requests under way at most; few at first, more while the server answers faster with more",
        kind="openai",
        costs_only=True,
        gt=0,
    )
    retries: int = _f(6, "retries of a failed request", kind="openai", costs_only=True, ge=0)
    backoff: float = _f(
        0.5,
        "seconds before the first retry, doubled up to 60",
        kind="openai",
        costs_only=True,
        ge=0,
    )
    timeout: float = _f(
        600, "seconds until a request counts as lost", kind="openai", costs_only=True, gt=0
    )
    max_requests: int | None = _f(
        None, "most requests of a run; null: no limit", kind="openai", costs_only=True, gt=0
    )
    max_tokens_total: int | None = _f(
        None,
        "most tokens of a run, in and out; null: no limit",
        kind="openai",
        costs_only=True,
        gt=0,
    )
    price: Price | None = _f(
        None,
        "per million tokens: {input: 0.15, output: 0.60}; null: not counted",
        kind="openai",
        costs_only=True,
    )
    max_cost: float | None = _f(
        None, "most that a run costs at this price; null: no limit", kind="openai",
        costs_only=True, gt=0,
    )  # fmt: skip
    batch: bool = _f(
        False,
        "ask through /files and /batches, which answer within 24 h, at half the price (OpenAI)",
        kind="openai",
        costs_only=True,
    )
    extra_body: dict[str, Any] = _f({}, "more fields of each request, such as top_k", kind="openai")
    memory: float = _f(
        0.9, "share of each GPU's memory (on a CPU: of the machine's)",
        kind="vllm", costs_only=True, gt=0, le=1,
    )  # fmt: skip
    tensor_parallel: int = _f(1, "GPUs that hold one model together", kind="vllm", gt=0)
    max_model_len: int | None = _f(
        None, "longest prompt and answer, tokens; null: the model's context", kind="vllm", gt=0
    )
    engine_args: dict[str, Any] = _f(
        {}, "more arguments of vllm.LLM, such as max_num_seqs or quantization", kind="vllm"
    )

    short: ClassVar[str | None] = "kind"

    @override
    def model_post_init(self, context: Any) -> None:
        secrets.KEYS.add(self.api_key_env)  # for servers that other sections launch

    @property
    def led(self) -> Iterator[str]:
        """The settings that start a program, or say where prompts and which key go."""
        default = type(self).model_fields["api_key_env"].default
        address = getattr(self, "address", None)  # of a cluster that is not this machine's
        yield from holding(
            {
                "launch": self.launch is not None,
                "base_url": not _is_here(self.base_url),
                "api_key_env": self.base_url is not None and self.api_key_env != default,
                "engine_args": bool(self.engine_args),
                "address": address != "auto" and not _is_here(address),
            }
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on; tries, limits and concurrency change none."""
        fields = EngineSettings.model_fields.items()
        return {name: getattr(self, name) for name, f in fields if not mark(f, "costs_only")}

    def cost_of(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost, in batches where it asks so; None without a price."""
        asked = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        batched = {f"batch_{name}": n for name, n in asked.items() if self.batch}
        return None if self.price is None else self.price.of({**asked, **batched})

    def conflicts(self, where: str, *, named: bool = False) -> Iterator[str]:
        """What contradicts itself, and settings that have no effect.

        Args:
            where: the section's dotted name, for the messages.
            named: whether ``model`` belongs here, launched or in process.
        """
        fields, openai = type(self).model_fields, self.kind == "openai"
        changed = {name for name, f in fields.items() if getattr(self, name) != f.default}
        others = foreign(self) | ({"model"} if not openai and not named else set())
        url = urlsplit(self.base_url or "http://none")
        launched, launch = self.launch is not None, self.launch or "{model}{port}"
        wrong = {
            **{
                f".{name} has no effect with kind {self.kind}": True
                for name in sorted(changed & others)
            },
            " of kind openai needs base_url or launch, and not both": (
                openai and (self.base_url is None) != launched
            ),
            ".model is missing: what the server calls its model": (
                openai and not launched and self.model is None
            ),
            ".launch_timeout has no effect without launch; remove it": (
                openai and not launched and "launch_timeout" in changed
            ),
            f".launch has no place for {{model}}: {short(launch, 200)}": openai
            and "{model}" not in launch,
            f".launch has no place for {{port}}: {short(launch, 200)}": openai
            and "{port}" not in launch,
            ".model has no effect with launch: the stage names the model": (
                openai and launched and self.model is not None and not named
            ),
            ".api_key_env has no effect: a launched server gets no key": (
                openai and launched and "api_key_env" in changed
            ),
            ".max_cost has no effect without price: give what the server takes": (
                openai and self.max_cost is not None and self.price is None
            ),
            ".batch has no effect with launch: a launched server answers at once; remove it": (
                openai and launched and self.batch
            ),
            ".price.batch has no effect without batch; remove it": (
                openai
                and self.price is not None
                and not self.batch
                and "batch" in self.price.model_fields_set
            ),
            ".base_url must look like http://HOST:PORT/v1": (
                openai and (url.scheme not in ("http", "https") or not url.hostname)
            ),
            ".base_url must hold no secret; see api_key_env": (
                openai and bool(url.username or url.password or url.query or url.fragment)
            ),
            ".launch must hold no secret: a server on this machine needs no key": (
                openai and secrets.in_command(launch)
            ),
            ".api_key_env must hold no secret, but the name of the variable that has it": (
                not secrets.is_variable(self.api_key_env)
            ),
            **{
                f".{key}.{name} is what the engine itself {what}; remove it": True
                for key, own, what in _TAKEN
                for name in sorted(own & getattr(self, key).keys())
            },
        }
        return (where + text for text in holding(wrong))


class EngineConfig(EngineSettings):
    """What answers: transformers or vllm (in process), a server, or replicas on a Ray cluster."""

    replicas: int = _f(
        1, "copies of the model that answer side by side", kind="ray", costs_only=True, gt=0
    )
    resources: ReplicaResources = _f(
        ReplicaResources(), "what Ray reserves for each replica", kind="ray", costs_only=True
    )
    address: str | None = _f(
        None, "null starts a cluster on this machine; auto or ray://HOST:PORT joins one",
        kind="ray", costs_only=True,
    )  # fmt: skip
    replica: EngineSettings | None = _f(
        None, "the engine of each replica; null: transformers", kind="ray"
    )
    adapters: bool = _f(
        False, "the server at base_url loads what the run trains, as LoRA adapters (vLLM)",
        kind="openai", costs_only=True,
    )  # fmt: skip

    @property
    def answering(self) -> EngineSettings:
        """The engine that answers in the end: of kind ray, the one that each replica holds."""
        held = (self.replica or EngineSettings()).model_copy(update={"model": self.model})
        return held if self.kind == "ray" else self

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on; replicas are none: the same batches and seeds."""
        return self.answering.identity if self.kind == "ray" else super().identity

    @override
    def conflicts(self, where: str, *, named: bool = False) -> Iterator[str]:
        yield from super().conflicts(where, named=named)
        idle = {
            "for a model that the run does not train": named,
            "without base_url: a launched server holds each model in its turn": (
                self.base_url is None
            ),
            "with batch: batches name models that the server keeps": self.batch,
        }
        for why in holding(idle) if self.adapters and self.kind == "openai" else ():
            yield f"{where}.adapters has no effect {why}; remove it"
        inner, replica = f"{where}.replica", self.replica
        if self.kind != "ray" or replica is None:
            return
        if replica.kind == "ray":
            yield f"{inner} of kind ray would be a cluster in a cluster"
            return
        yield from replica.conflicts(inner)
        one_server = (
            f"{inner}.base_url names one server for all replicas; ask it with {where} of kind "
            "openai and more concurrency, or give launch"
        )
        limits = {
            f"{inner}.{name} would count for each replica by itself; remove it": (
                getattr(replica, name) is not None
            )
            for name in ("max_requests", "max_tokens_total", "max_cost")
        }
        yield from holding({one_server: replica.base_url is not None, **limits})


class WriterConfig(EngineConfig):
    """What writes principles or rewrites answers: folder, hub id, or engine with its model."""

    chat_template_kwargs: dict[str, Any] = _f({}, "as policy.chat_template_kwargs")

    short: ClassVar[str | None] = "model"

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on."""
        return {**super().identity, "chat_template_kwargs": self.chat_template_kwargs}

    def loading(self, policy: Loading) -> Loading:
        """How the writer's model is loaded: as the policy, with variables of its own template."""
        return policy.model_copy(update={"chat_template_kwargs": self.chat_template_kwargs})


#: Unicode scripts that queries can be bounded to, as Unicode names them.
# fmt: off
SCRIPTS = (
    "Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek",
    "Gujarati", "Gurmukhi", "Han", "Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana",
    "Khmer", "Lao", "Latin", "Malayalam", "Mongolian", "Myanmar", "Oriya", "Sinhala",
    "Tamil", "Telugu", "Thaana", "Thai", "Tibetan",
)
# fmt: on


class Augment(Section):
    """Grows the query set with the policy itself before principles are written."""

    to: int = _f(..., "number of queries wanted, including the given ones", gt=0)
    depth: float = _f(0.4, "share made from one query, harder or more specific", ge=0, le=1)
    breadth: float = _f(0.3, "share made from one query, same kind, other subject", ge=0, le=1)
    instruct: float = _f(0.3, "share asked for after showing three queries", ge=0, le=1)
    temperature: float = _f(1.0, "ours: new queries need variety", ge=0)
    top_p: float = _f(0.95, "ours, as temperature", gt=0, le=1)
    max_new_tokens: int = _f(256, "tokens of a new query", gt=0)
    attempts: int = _f(10, "rounds; each asks for what is still missing", gt=0)

    @override
    def faults(self) -> Iterator[str]:
        total = self.depth + self.breadth + self.instruct
        if abs(total - 1) > 1e-6:
            yield f"depth, breadth and instruct must add up to 1, found {total:g}"


class Queries(Section):
    """Where the prompts come from, and which of them are asked."""

    path: str = _f(
        ...,
        "JSONL, JSON, CSV, text or Parquet: file, folder, package: or NAME:CONFIG:SPLIT@REVISION "
        "on the hub",
    )
    split: str = _f("train", "split to read, if the path is a name on the hub")
    columns: dict[str, str] = _f({}, "new names of columns: {question: prompt}")
    limit: int | None = _f(None, "use only the first N queries", gt=0)
    min_chars: int | None = _f(None, "fewest characters of the user turns", gt=0)
    max_chars: int | None = _f(None, "most characters of the user turns", gt=0)
    scripts: tuple[str, ...] | None = _f(
        None, "scripts of half of the letters: [Latin]", min_length=1
    )
    near_duplicates: float | None = _f(
        None, "drop later queries whose word 3-grams have this Jaccard similarity", ge=0.05, le=1
    )
    against: tuple[str, ...] = _f((), "evaluation sets to keep out, named like path")
    ngram: int = _f(
        8, "words in a row shared with one of them that make a query contaminated", gt=0
    )

    @override
    def faults(self) -> Iterator[str]:
        least, most = self.min_chars, self.max_chars
        if least and most and least > most:
            yield f"min_chars {least} exceeds max_chars {most}"
        for script in (s for s in self.scripts or () if s not in SCRIPTS):
            near = difflib.get_close_matches(script.title(), SCRIPTS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            yield f"unknown script {short(script)}{hint}; known are {', '.join(SCRIPTS)}"
        if not self.against and not self._grows():
            yield from self.idle(["ngram"], "without 'against' or 'augment'")

    def _grows(self) -> bool:
        return False


class GrownQueries(Queries):
    """Where the prompts come from; the policy may add to them."""

    augment: Augment | None = _f(None, "grow the set with the policy; null: use it as it is")

    def _grows(self) -> bool:
        return self.augment is not None


class OnlineQueries(GrownQueries):
    """Where the prompts come from; each iteration takes a slice of its own (SSO v1)."""

    per_iteration: int | None = _f(None, "new queries per iteration; null: an equal share", gt=0)


#: Catalogues that come with the program, as recipes name them.
CATALOGUES = tuple(
    sorted(path.stem for path in (Path(__file__).parents[1] / "catalogues").glob("*.yaml"))
)


def catalogue_path(name: str) -> str:
    """The path of a catalogue: that of a shipped one by its name, any other as it is."""
    return f"package:selfsteer/catalogues/{name}.yaml" if name in CATALOGUES else name


CataloguePath = Annotated[str, AfterValidator(catalogue_path)]


class PrinciplesConfig(Section):
    """How principles are made."""

    mode: Literal["picked", "generated", "fixed"] = _f(
        "generated",
        "picked: the catalogue's text; generated: written by a model for each query; fixed: yours",
    )
    catalogue: CataloguePath | None = _f(
        None, f"YAML file of your own features, or {', '.join(CATALOGUES)}; null: the built-in one"
    )
    features: Literal["model", "random", "none"] = _f(
        "model",
        "who names a query's features; missing ones are drawn at random; none: no adjectives",
    )
    features_per_query: int = _f(2, "features of each query (SSO v2, §4)", ge=1)
    concision: float | None = _f(
        None,
        "probability that Concision is appended (SSO v2: 0.2); null: the catalogue's",
        ge=0,
        le=1,
    )
    append: dict[str, Annotated[float, Field(ge=0, le=1)]] = _f(
        {}, "feature: its probability of being appended; such features are not named or drawn"
    )
    writer: WriterConfig | None = _f(
        None, "model that writes principles, or an engine with its model; null: the policy"
    )
    written_from: Literal["features", "query"] = _f(
        "features", "what the writer sees: query and its features (v1), or the query alone (v2)"
    )
    examples: int = _f(0, "worked examples shown to the writer", ge=0, le=3)
    candidates: int = _f(1, "answers of the writer per query; the best is used", ge=1)
    system: Literal["keep", "replace"] = _f(
        "keep", "a system prompt that the chat template itself writes: principles follow it, or not"
    )
    good: str | None = _f(None, "mode fixed: the whole good principle, the same for every query")
    bad: str | None = _f(None, "mode fixed: the whole bad principle")
    path: str | None = _f(
        None,
        "mode fixed: JSONL of principles by query id; missing ids get good and bad",
        content="file",
    )
    max_new_tokens: int = _f(256, "tokens of a written answer", gt=0)
    temperature: float = _f(0.7, "temperature of the writer", ge=0)
    top_p: float = _f(0.8, "nucleus mass of the writer", gt=0, le=1)
    batch_size: int = _f(128, "conversations decoded together, at most", gt=0)
    shard_size: int = _f(512, "queries per shard, the unit of resumption", gt=0)

    @property
    def asks_a_model(self) -> bool:
        """Whether anything is asked of a model at all."""
        return self.mode == "generated" or (self.mode == "picked" and self.features == "model")

    @override
    def faults(self) -> Iterator[str]:
        fixed, good = self.mode == "fixed", self.good
        incomplete = (good is None) != (self.bad is None)
        from_query = (self.mode, self.written_from) == ("generated", "query")
        yield from holding(
            {
                "good and bad come together; give both": fixed and incomplete,
                "mode fixed needs good and bad, or path": (
                    fixed and not incomplete and good is None and self.path is None
                ),
                "good and bad are the same text": fixed and good is not None and good == self.bad,
                "features none is for mode generated with written_from query": (
                    not fixed and self.features == "none" and not from_query
                ),
                "candidates: at temperature 0 all of them are the same answer": (
                    not fixed and self.temperature == 0 and self.candidates > 1
                ),
            }
        )
        own = {"good", "bad", "path"}
        always = {"mode", "system", "shard_size"}
        idle = set(type(self).model_fields) - own - always if fixed else own
        if self.mode == "picked":
            idle |= {"writer", "written_from", "examples", "candidates"}
        if not self.asks_a_model:
            idle |= {"max_new_tokens", "temperature", "top_p", "batch_size"}
        yield from self.idle(idle, f"with mode {self.mode} and features {self.features}")


class Sampling(Section):
    """How responses are sampled (SSO v2, §4: temperature 0.7, top-p 0.8, 2048 new tokens)."""

    engine: EngineConfig = _f(EngineConfig(), "what answers: transformers, vllm, or a section")
    temperature: float = _f(0.7, "temperature; 0 is greedy", ge=0)
    top_p: float = _f(0.8, "nucleus mass", gt=0, le=1)
    max_new_tokens: int = _f(2048, "tokens of a response", gt=0)
    batch_size: int = _f(128, "conversations decoded together, at most", gt=0)
    shard_size: int = _f(512, "queries per shard, the unit of resumption", gt=0)
    keep_unfinished: bool = _f(False, "keep responses that were cut off by the budget")
    reasoning: Literal["drop", "keep"] = _f(
        "drop", "whether the thoughts before a response are trained on with it"
    )


class PrincipledSampling(Sampling):
    """Sampling of responses that are written under principles, too."""

    contrast: float = _f(
        0.0,
        "logits of good responses are pushed so many times as far from the bad context (Linear "
        "Alignment, arXiv 2401.11458: 3, from the plain one); 0: plain sampling",
        ge=-100,
        le=100,
    )
    contrast_bad: float = _f(
        0.0,
        "logits of bad responses, likewise from the good context; -0.25: a milder bad one",
        ge=-100,
        le=100,
    )

    @property
    def ratios(self) -> dict[str, float]:
        """Response name → its ratio, of those that are contrasted."""
        given = {"good": self.contrast, "bad": self.contrast_bad}
        return {name: ratio for name, ratio in given.items() if ratio}

    @override
    def faults(self) -> Iterator[str]:
        kind = self.engine.answering.kind
        if self.ratios and kind != "transformers":
            pushed = "contrast" if self.contrast else "contrast_bad"
            yield (
                f"{pushed} reads the logits of two contexts at every token, and an engine of kind "
                f"{kind} answers in text alone; set sampling.engine: transformers"
            )


class Hygiene(Section):
    """Pairs that teach nothing, or the wrong thing, are dropped and counted."""

    min_chars: int = _f(1, "shortest response kept; 20 in the authors' release", ge=0)
    strip_lead_ins: bool = _f(True, "cut lead-ins such as 'Helpful response:'")
    max_length_ratio: float | None = _f(
        None,
        "longer / shorter response of a pair at most, in tokens; null: no limit",
        ge=1,
    )
    max_length_difference: int | None = _f(
        None, "most tokens by which the two responses of a pair differ; null: no limit", ge=0
    )
    match_lengths: bool = _f(
        False, "keep equally many pairs with a longer and with a shorter chosen response"
    )

    @property
    def capped(self) -> bool:
        """Whether some difference in length is too much."""
        return self.max_length_ratio is not None or self.max_length_difference is not None


class PrincipledHygiene(Hygiene):
    """Hygiene of pairs that were written under principles."""

    export_unsafe: bool = _f(
        True,
        "export pairs whose principles name Safety; their rejected text was written to harm",
        costs_only=True,
    )
    min_contrast: float | None = _f(
        None,
        "least lead of the good response over the other one when the principles rank them, nats "
        "per token (docs/judges.md); 0: the order must be confirmed; null: off",
    )


class Bound(Section):
    """What a figure must reach: mean, off, {quantile: 0.5} or {at_least: -1.2}."""

    rule: Literal["mean", "off"] | None = _f(None, "mean: over what is left so far; off: no bound")
    quantile: float | None = _f(None, "over what is left so far; 0 keeps all", ge=0, lt=1)
    at_least: float | None = _f(None, "least value, nats per token")

    short: ClassVar[str | None] = "rule"

    @field_validator("rule", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of the word

    @override
    def faults(self) -> Iterator[str]:
        if sum(v is not None for v in (self.rule, self.quantile, self.at_least)) != 1:
            yield "give exactly one of mean, off, {quantile: …} and {at_least: …}"


class Filter(Section):
    """v1's log-prob filter on triples; true: as released, false: off."""

    enabled: bool = _f(True, "whether triples are filtered at all")
    steering_order: bool = _f(
        True,
        "each response likelier the closer the context is to its own (SSO v1's release)",
    )
    near_on_policy: Bound = _f(
        Bound(rule="mean"), "bound on m(y+|x) and m(y-|x), nats per token (SSO v1's release)"
    )
    gap: Bound = _f(Bound(rule="mean"), "bound on both steering gaps, nats (SSO v1's release)")

    short: ClassVar[str | None] = "enabled"

    @override
    def faults(self) -> Iterator[str]:
        if not self.enabled and self.model_fields_set - {"enabled"}:
            yield "a filter that is not enabled has no other settings"


Order = Literal["tournament", "climb"]
JudgeKind = Literal["oracle", "checks", "chat", "reward", "principles", "human"]

#: Those of them that ask a model.
OF_MODELS = "chat, reward, principles"


class JudgeConfig(Section):
    """What compares responses: oracle, checks, KIND:MODEL, human:PATH, or a section."""

    kind: JudgeKind = _f(
        ..., "oracle (testbed only), checks, chat, reward, principles (a policy's own) or human"
    )
    model: str | None = _f(None, "as policy.model", kind=OF_MODELS, content="model")
    engine: EngineConfig = _f(EngineConfig(), "what answers, as in sampling.engine", kind="chat")
    path: CataloguePath | None = _f(
        None,
        "human: JSONL of labels; checks: catalogue whose features have checks; null: those of "
        "the queries alone",
        kind="human, checks",
        content="file",
    )
    temperature: float = _f(
        0.0, "0 is greedy, as in MT-Bench (arXiv 2306.05685)", kind="chat", ge=0
    )
    max_new_tokens: int = _f(512, "tokens of reasons and verdict", kind="chat", gt=0)
    clip: float = _f(
        0.2, "most nats by which a token counts (docs/methods.md)", kind="principles", gt=0
    )
    good: str | None = _f(
        None, "the good principle, for every query; null: the one that it holds", kind="principles"
    )
    bad: str | None = _f(None, "the bad principle, likewise", kind="principles")
    tie_margin: float = _f(
        0.0, "scores that differ by no more than this tie", kind="reward, principles", ge=0
    )
    batch_size: int = _f(32, "sequences per batch", kind="chat, reward", gt=0)
    dtype: Dtype = _f("auto", "as policy.dtype", kind=OF_MODELS)
    device: Device = _f("auto", "as policy.device", kind=OF_MODELS)
    trust_remote_code: bool = _f(False, "as policy.trust_remote_code", kind=OF_MODELS)
    allow_pickle: bool = _f(False, "as policy.allow_pickle", kind=OF_MODELS)
    chat_template_kwargs: dict[str, Any] = _f({}, "as policy.chat_template_kwargs", kind=OF_MODELS)

    spelled: ClassVar[bool] = True

    @property
    def loading(self) -> Loading:
        """How the judge's own model is loaded; only for principles does it score in a layout."""
        layout: Layout = "auto" if self.kind == "principles" else "padded"
        return Loading(layout=layout, **self.model_dump(include=LOADED))

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        kind, colon, rest = value.partition(":")
        given = {"path" if kind in ("human", "checks") else "model": rest} if colon else {}
        return {"kind": kind, **given}

    @override
    def faults(self) -> Iterator[str]:
        engine = self.engine.answering.kind
        served = LOADED - {"chat_template_kwargs"}
        idle = {"openai": {*served, "batch_size"}, "vllm": {"batch_size", "device"}}
        yield from self.idle(foreign(self), f"with a judge of kind {self.kind}")
        yield from holding(
            {
                f"a judge of kind {self.kind} needs a {name}: "
                f"{self.kind}:{name.upper()}": not getattr(self, name)
                for name in ("model", "path")
                if name not in foreign(self) and self.kind != "checks"
            }
        )
        yield from self.idle(idle.get(engine, ()), f"with an engine of kind {engine}")
        yield from holding(
            {
                "engine.model has no effect: judge.model names the model; remove it": (
                    self.engine.model is not None
                ),
                "a judge cannot use an engine of kind ray; use vllm, or openai with launch": (
                    self.engine.kind == "ray"
                ),
                "good and bad come together; give both": bool(self.good) != bool(self.bad),
                "good and bad are the same text": bool(self.good) and self.good == self.bad,
            }
        )
        yield from self.asked.conflicts("engine", named=True)

    @property
    def only_compares(self) -> bool:
        """Whether it gives no answer a score of its own."""
        return self.kind in ("chat", "human")

    @property
    def asked(self) -> EngineConfig:
        """The engine with the judge's model."""
        return self.engine.model_copy(update={"model": self.model})


class Schedule(Section):
    """What all trainings have in common: steps, optimiser, memory."""

    learning_rate: float = _f(5e-7, "peak learning rate (SSO v2, §4)", gt=0)
    batch_size: int = _f(..., "queries per optimiser step, over all ranks", gt=0)
    epochs: float = _f(1, "passes over the data", gt=0, le=1000)
    warmup: float = _f(0.1, "share of the steps; cosine decay follows (SSO v2)", ge=0, lt=1)
    weight_decay: float = _f(0.1, "AdamW (SSO v2)", ge=0)
    adam_beta2: float = _f(0.95, "AdamW (SSO v2)", gt=0, lt=1)
    max_grad_norm: float = _f(1.0, "gradient clipping", gt=0)
    max_length: int = _f(2048, "longest prompt and response, tokens (SSO v2)", gt=0)
    gradient_checkpointing: bool = _f(
        False, "recompute activations to save memory", costs_only=True
    )
    save_every_steps: int = _f(100, "steps between resumable checkpoints", gt=0, costs_only=True)


class Rows(Schedule):
    """A training beside a frozen model, in rows that are filled by tokens."""

    row_tokens: int = _f(
        16_384,
        "tokens of one forward pass per rank; halved, with a message, if a GPU runs out of memory",
        gt=0,
        costs_only=True,
    )
    reference: Literal["iteration", "first"] = _f(
        "iteration", "frozen reference: the iteration's start, or the very first policy"
    )


class Budget(Section):
    """What a chosen answer may lose against the reference (docs/methods.md)."""

    weight: float = _f(1.0, "cost per nat beyond the slack; ours", gt=0)
    slack: float = _f(0.1, "nats per token that it may lose freely; ours", ge=0)


class Optimisation(Rows):
    """What training the generator and training the policy have in common."""

    base: BaseName = _f("sigmoid", "sigmoid (DPO), ipo, hinge, simpo or orpo")
    beta: float = _f(0.1, "β of the base loss: 0.1 (v2), 0.2 with IPO (v1)", gt=0)
    label_smoothing: float = _f(0.0, "cDPO's ε, sigmoid base only", ge=0, lt=0.5)
    simpo_margin: float = _f(0.5, "SimPO's margin, simpo base only", ge=0)
    ceiling: float | None = _f(
        None,
        "where both implicit rewards stop, ± (after TSO, arXiv 2409.02118); sigmoid base only",
        gt=0,
    )
    budget: Budget | None = _f(
        None,
        "penalty on chosen answers that lose log-prob (after arXiv 2411.05875); sigmoid, ipo and "
        "hinge; null: none",
    )

    def _unused(self, objective: str) -> Iterator[str]:
        """The constants that an objective and this base would ignore."""
        unused = unused_arguments(
            objective,
            self.base,
            self.model_fields_set,
            use_weight=getattr(self, "use_weight", True),
            use_steer=getattr(self, "use_steer", True),
        )
        yield from self.idle(unused, f"with objective {objective} and base {self.base}")


class Selection(Section):
    """Which step of a training is kept, by its answers to held-out queries (docs/selection.md)."""

    points: int = _f(4, "candidate steps, evenly spaced; 0: keep the last step, unmeasured", ge=0)
    queries: int = _f(128, "queries held out of the training data, at most a tenth of it", ge=16)
    max_kl: float = _f(0.2, "largest KL from the start, nats per token (docs/selection.md)", gt=0)
    max_length_ratio: float = _f(2.0, "factor by which answers may lengthen or shorten", gt=1)
    max_repeated: float = _f(
        0.1, "share of repeated 4-grams, at most this much above the start's", gt=0
    )
    max_unfinished: float = _f(
        0.1, "share of answers cut off, at most this much above the start's", gt=0
    )
    stop: float = _f(2.0, "training ends at a candidate this many times over a bound", ge=1)

    @override
    def faults(self) -> Iterator[str]:
        if self.points == 0:
            yield from self.idle(self.model_fields_set - {"points"}, "with points 0")


class Generator(Optimisation):
    """The data generator: a copy of the policy trained with L_SSO (SSO v2, eq. 1-4)."""

    queries: int = _f(8000, "queries whose triples train it; 8k of 60k (SSO v2, §4)", gt=0)
    objective: GeneratorObjective = _f("sso", "sso, or an ablation of it")
    gamma: float = _f(0.1, "γ, weight of the NLL", ge=0)
    batch_size: int = _f(32, "triples per optimiser step (SSO v2)", gt=0)
    per_half: bool = _f(False, "train two generators, one per half of the loss (SSO v2, §8)")
    selection: Selection = Selection()

    @override
    def faults(self) -> Iterator[str]:
        yield from self._unused(self.objective)
        if self.per_half and self.objective != "sso":
            yield "per_half splits objective sso; leave objective unset"


class PolicyStage(Rows):
    """The policy stage, whatever it is trained on."""

    batch_size: int = _f(256, "queries per optimiser step (SSO v2)", gt=0)
    selection: Selection = Selection()


class PolicyTraining(PolicyStage, Optimisation):
    """The policy stage of a preference objective."""

    @override
    def faults(self) -> Iterator[str]:
        yield from self._unused("pbaa")


class ImproverTraining(PolicyStage):
    """Trains the policy to improve its own answers, by the NLL of better ones."""

    learning_rate: float = _f(5e-6, "peak; ours, the paper gives none. Search it", gt=0)
    batch_size: int = _f(32, "examples per optimiser step; ours", gt=0)
    selection: Selection = Selection(points=0)

    @override
    def faults(self) -> Iterator[str]:
        yield from self.idle(["reference"], "without a reference")
        if self.selection.points:
            yield "selection measures answers to queries, not rewrites; leave selection unset"


class Distilling(PolicyStage):
    """The policy stage of methods that distil."""

    learning_rate: float = _f(
        5e-6, "peak; OPCD's (arXiv 2602.12275). Search it: 2e-5 was best at 135M parameters", gt=0
    )
    batch_size: int = _f(128, "queries per optimiser step (OPCD)", gt=0)
    # the target itself is far from the start, and a style may well be a length
    selection: Selection = Selection(max_kl=1.0, max_length_ratio=4.0)


class Distillation(Section):
    """How a policy is drawn to a target at each token, and how much of the target is kept."""

    direction: Direction = _f("reverse", "reverse KL(π ‖ q), forward KL(q ‖ π), or jsd")
    top_k: int = _f(512, "most entries of the vocabulary kept for a token", gt=0)
    coverage: float = _f(
        0.99, "mass that they are to cover in every context; the others count as one", gt=0, lt=1
    )


class Contrast(Distillation):
    """The target of contrast distillation, and how much of it is kept (docs/methods.md)."""

    strength: float = _f(4.0, "λ, how strongly the contrast of the principles counts", gt=0)
    clip: float = _f(1.0, "most nats by which it counts at a token; holds λ in check", gt=0)


class Training(PolicyTraining):
    """The policy stage: one plain pair per query."""

    weighting: Weighting | None = _f(
        None,
        "wpo: weight pairs by how likely the policy finds them (arXiv 2406.11827); dora: by how "
        "likely they were written without a principle (after arXiv 2504.05831)",
    )
    noise: float = _f(
        0.0,
        "σ of noise on the reference's logits of rejected answers, as the margin that it comes to "
        "(after DNPO, arXiv 2502.05400); sigmoid and hinge",
        ge=0,
    )

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.noise and self.reference == "first":
            yield "noise is on the iteration's start; leave reference unset"


class Margin(Section):
    """What a pair has to exceed: a part of the contrast of its principles (docs/methods.md)."""

    weight: float = _f(0.2, "share of the contrast that counts (DLMA, the authors' script)", gt=0)
    bound: float = _f(40.0, "nats at which the contrast is cut (DLMA, the authors' script)", gt=0)


class Steering(Section):
    """The constants of v1's loss on triples."""

    alpha: float = _f(0.66, "v1's α in W", ge=0, le=1)
    steer: float = _f(0.1, "v1's β_G, weight of the steering terms", ge=0)
    use_weight: bool = _f(True, "use v1's W; false: W = 1")
    use_steer: bool = _f(True, "use v1's steering terms; false: 2 sequences per query")
    detach_weight: bool = _f(False, "stop the gradient through W")


class OnlineTraining(PolicyTraining, Steering):
    """The policy stage of the online way: v1's loss on triples."""

    @override
    def faults(self) -> Iterator[str]:
        yield from self._unused("sso-online")


class RewardData(Section):
    """One preference set of a reward model's mixture; its path alone will do."""

    path: str = _f(..., "anything that selfsteer import reads, or a run folder")
    name: str | None = _f(None, "name in tables; null: the path's last part")
    weight: float = _f(1.0, "passes per epoch: 0.5 takes a seeded half, 2 each pair twice", gt=0)

    short: ClassVar[str | None] = "path"

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name or Path(self.path).name


class Reward(Schedule):
    """A Bradley-Terry reward model, on the run's preferences, other sets, or both."""

    model: str | None = _f(None, "model to start from, as policy.model; null: that one")
    data: tuple[RewardData, ...] = _f((), "preference sets besides the run's own")
    own_weight: float = _f(1.0, "weight of the run's own preferences, as data.weight", gt=0)
    margin: str | None = _f(
        None, "key of a record's margin, subtracted from its score difference (Llama 2, eq. 2)"
    )
    holdout: float = _f(0.1, "share of the queries to hold out and measure on", ge=0, lt=1)
    learning_rate: float = _f(
        2e-6, "peak; that of RLHFlow's Llama3-8B reward models, SSO gives none", gt=0
    )
    batch_size: int = _f(256, "pairs per optimiser step (SSO v2's policy stage)", gt=0)
    forward_pairs: int = _f(8, "pairs per forward pass; divides batch_size", gt=0)
    center: float = _f(0.0, "pulls scores to mean 0; 0.01 is usual (arXiv 2312.09244, eq. 2)", ge=0)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """One set of data may stand without a list."""
        found = handler(core_schema)
        handler.resolve_ref_schema(found)["properties"]["data"]["type"] = [
            "array",
            "object",
            "string",
        ]
        return found

    @model_validator(mode="before")
    @classmethod
    def _one_set(cls, value: Any) -> Any:
        if not isinstance(value, dict) or isinstance(value.get("data", ()), list | tuple):
            return value
        rest, data = {k: v for k, v in value.items() if k != "data"}, value["data"]
        return rest if data is None else {**rest, "data": [data]}

    @override
    def faults(self) -> Iterator[str]:
        sizes = f"forward_pairs {self.forward_pairs} does not divide batch_size {self.batch_size}"
        label = twice(d.label for d in self.data)
        yield from holding(
            {
                sizes: self.batch_size % self.forward_pairs != 0,
                f"two sets of data are called {short(label)}; give each a name": label is not None,
            }
        )


class Ranking(Section):
    """How many plain answers compete; the best against the worst."""

    samples: int = _f(4, "answers per query; 4 in self-rewarding (arXiv 2401.10020, §3.1)", ge=2)


class ContrastRanking(Ranking):
    """How answers are ranked by their principles; the best against the worst."""

    clip: float = _f(0.2, "most nats by which a token counts (docs/methods.md)", gt=0)


class ComparedRanking(Ranking):
    """How plain answers are ranked by a judge; the best against the worst."""

    order: Order = _f(
        "tournament",
        "of judges that only compare: tournament compares every two answers, climb each with the "
        "best so far (after IPR, arXiv 2411.05875)",
    )


class JudgedRanking(ComparedRanking):
    """How plain answers are ranked; the best against the worst."""

    judge: JudgeConfig | None = _f(None, "judge that ranks them; null: the recipe's judge")

    @override
    def faults(self) -> Iterator[str]:
        if self.judge is not None and self.judge.kind == "human":
            yield "human labels cannot rank answers that are sampled now"


class Improvement(Section):
    """A search for a better fixed good principle (after DRPO, arXiv 2411.08733)."""

    good: str = _f(..., "the good principle to begin with, whole")
    bad: str | None = _f(None, "the bad principle that goes with it; it stays as it is")
    writer: WriterConfig | None = _f(
        None, "model that rewrites principles, or an engine with its model; null: the policy"
    )
    steps: int = _f(20, "rounds of rating and rewriting (DRPO: 20)", ge=1)
    queries_per_step: int = _f(4, "queries that principles are tried on in a step (DRPO: 1)", ge=1)
    beam: int = _f(2, "paths kept after each step (DRPO: 2)", ge=1)
    tries: int = _f(3, "new principles asked for per path (DRPO: 3)", ge=1)
    good_enough: float | None = _f(
        None, "mean rating from which on a principle is not rewritten (DRPO: 4.5 of 5); null: none"
    )
    confirm: int = _f(32, "queries aside, on which the start and the last beam are compared", ge=1)
    temperature: float = _f(0.7, "temperature of the writer (DRPO: 0.2)", ge=0)
    top_p: float = _f(0.95, "nucleus mass of the writer (DRPO)", gt=0, le=1)
    max_new_tokens: int = _f(256, "tokens of a written principle", gt=0)

    @override
    def faults(self) -> Iterator[str]:
        yield from holding(
            {
                "good must be a text": not self.good.strip(),
                "good and bad are the same text": self.good == self.bad,
                "tries: at temperature 0 all of them are the same answer": (
                    self.temperature == 0 and self.tries > 1
                ),
            }
        )


class RulesConfig(Section):
    """Who writes the bad counterparts of given rules, and how."""

    writer: WriterConfig = _f(..., "model that writes, or an engine with its model")
    domain: str | None = _f(None, "the catalogue's domain, as writers of principles are told it")
    tries: int = _f(4, "answers asked for per rule; the first that can be used is", ge=1)
    temperature: float = _f(0.7, "temperature of the writer", ge=0)
    top_p: float = _f(0.9, "nucleus mass of the writer", gt=0, le=1)
    max_new_tokens: int = _f(256, "tokens of an answer", gt=0)

    @override
    def faults(self) -> Iterator[str]:
        if self.temperature == 0 and self.tries > 1:
            yield "tries: at temperature 0 all of them are the same answer"
        yield from self.writer.conflicts("writer", named=True)
        if self.writer.model is None:
            yield "writer.model is missing"


class Evaluation(Section):
    """Base, baseline and aligned policy answer held-out queries; the judge compares."""

    queries: Queries = _f(..., "held-out prompts, used for nothing else")
    temperature: float | None = _f(None, "null: as in sampling", ge=0)
    bootstrap: int = _f(2000, "resamples for the 95 % intervals", ge=100)


class HarnessTask(Section):
    """A task of lm-evaluation-harness or of a task folder: its name, or a section."""

    name: str = _f(..., "the harness's name of a task or a group of tasks")
    metric: str | None = _f(
        None, "METRIC or METRIC,FILTER for the table; null: the first that the harness reports"
    )
    fewshot: int | None = _f(None, "worked examples before a question; null: the task's own", ge=0)

    short: ClassVar[str | None] = "name"


class JudgedSet(Section):
    """Questions whose answers are judged: STYLE:PATH, or a section (docs/benchmarks.md)."""

    style: Literal["alpaca-eval", "arena-hard", "mt-bench"] = _f(
        ..., "alpaca-eval, arena-hard: against a baseline; mt-bench: each answer rated 1 to 10"
    )
    questions: str = _f(
        ..., "file of questions: id, and prompt, messages, instruction or turns", content="file"
    )
    baseline: str | None = _f(
        None,
        "file of answers to beat, by id or equal question; null: the first model's answers",
        content="file",
    )
    label: str | None = _f(None, "name of its column; null: the questions' file name")

    spelled: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        style, _, path = value.partition(":")
        return {"style": style, "questions": path}

    @override
    def faults(self) -> Iterator[str]:
        if not self.questions:
            yield "it names no questions; give STYLE:PATH"
        if self.style == "mt-bench" and self.baseline is not None:
            yield from self.idle(["baseline"], "in style mt-bench")

    @property
    def name(self) -> str:
        """What tables and files call it."""
        return self.label or Path(self.questions).stem


class Benchmarks(Section):
    """Public or own benchmarks of base, baseline and aligned policy (docs/benchmarks.md)."""

    tasks: tuple[HarnessTask, ...] = _f((), "tasks of lm-evaluation-harness: [ifeval, gsm8k, mmlu]")
    task_folders: tuple[str, ...] = _f((), "folders with tasks of your own, in the harness's YAML")
    chat_template: bool = _f(True, "ask tasks through the model's chat template")
    batch_size: int = _f(16, "tasks: requests per batch", gt=0, costs_only=True)
    judged: tuple[JudgedSet, ...] = _f((), "question sets whose answers are judged")
    judge: JudgeConfig | None = _f(None, "judge of the judged sets; null: the recipe's")
    temperature: float = _f(0.0, "of answers to judged sets; greedy as in Arena-Hard", ge=0)
    max_new_tokens: int | None = _f(None, "tokens of those answers; null: as in sampling", gt=0)
    limit: int | None = _f(None, "only the first N questions of each task and set; null: all", gt=0)

    @override
    def faults(self) -> Iterator[str]:
        names = [t.name for t in self.tasks] + [s.name for s in self.judged]
        name = twice(names)
        yield from holding(
            {
                "it names neither tasks nor judged sets": not names,
                f"two benchmarks are called {short(name)}; give one a label": name is not None,
            }
        )
        if not self.tasks:
            yield from self.idle(["task_folders", "chat_template", "batch_size"], "without tasks")
        if not self.judged:
            yield from self.idle(["judge", "temperature", "max_new_tokens"], "without judged")

    def judge_faults(self, judge: JudgeConfig | None) -> Iterator[str]:
        """Why this judge cannot judge the judged sets."""
        if self.judged and judge is None:
            yield "benchmarks.judged needs a judge; set benchmarks.judge or judge"
        elif judge and judge.kind == "human" and any(s.style == "mt-bench" for s in self.judged):
            yield (
                "benchmarks.judged of style mt-bench needs a judge that rates, and human labels "
                "compare. Set benchmarks.judge to chat:MODEL"
            )


Tracker = Literal["trackio", "wandb", "tensorboard", "mlflow"]


class Keep(Section):
    """What stays on disk."""

    generator: bool = _f(True, "keep the generator's weights after the run")
    checkpoints: int = _f(1, "resumable checkpoints kept while training", ge=1)


class BenchmarkConfig(Section):
    """`selfsteer benchmark`: the settings of a recipe that benchmarks of given models need."""

    seed: int = 0
    policy: Policy
    sampling: Sampling = Sampling()
    judge: JudgeConfig | None = None
    benchmarks: Benchmarks


class TrainConfig(Optimisation, Steering, Loading):
    """`selfsteer train`: one objective on stored triples, offline."""

    objective: ObjectiveName = _f("sso", "any named objective")
    batch_size: int = _f(8, "most queries per forward pass and rank", gt=0)
    accumulate: int = _f(1, "optimiser step = batch_size × accumulate × ranks", gt=0)
    gamma: float = _f(0.1, "γ, weight of the NLL in the sso objectives", ge=0)
    weighting: Weighting | None = _f(None, "as training.weighting; objective pbaa only")
    seed: int = _f(0, "seed of the order of the data", ge=0)
    lora: Lora | None = _f(None, "as policy.lora")
    keep_unfinished: bool = _f(False, "train on records with a response that was cut off")
    output: str = _f(..., "folder for the trained model", costs_only=True)
    reference: Literal["iteration", "first"] = _f("iteration", "always the given model here")

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from self._unused(self.objective)
        if self.weighting == "dora":
            yield "weighting dora needs a run, which knows what each answer was written under"
        if self.reference == "first":
            yield "train takes the given model as reference"


def resolve_path(value: str) -> str:
    """A path as the system knows it: inside an installed package, or absolute.

    ``package:MODULE/PATH`` is inside the package, which is not imported; ``./PATH`` becomes
    absolute, as a `Path` of it would read like a hub id, and so does ``~/PATH``; others stay.

    Raises:
        ConfigError: the package or file does not exist, or the module is not a package.
    """
    if value.startswith(("./", "../", "~/")):
        return str(Path(os.path.expanduser(value)).absolute())
    if not value.startswith("package:"):
        return value
    module, _, inside = value.removeprefix("package:").partition("/")
    top, *rest = module.split(".")
    spec = find_spec(top) if top.isidentifier() else None
    if spec is None:
        raise ConfigError(
            f"{short(value, 200)}: there is no package {short(top)} here. Install it first."
        )
    if spec.submodule_search_locations is None:
        raise ConfigError(
            f"{short(value, 200)}: {top} is a module without a folder. Give package:PACKAGE/PATH."
        )
    paths = [Path(folder, *rest, inside) for folder in spec.submodule_search_locations]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        raise ConfigError(f"{short(value, 200)} names nothing in the installed package.")
    return str(path)
