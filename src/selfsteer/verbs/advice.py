"""What `selfsteer init` looks at, and what it makes of it: a method and settings, with reasons.

Nothing is loaded but prompts: a model's size is in the headers of its files, or in its name.
"""

import math
import os
import re
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter

from selfsteer.data.artifacts import read_json
from selfsteer.data.curate import NearDuplicates, words, written_in
from selfsteer.data.digests import ADAPTER_CONFIG, is_hub_id, split_revision
from selfsteer.data.files import HubName
from selfsteer.data.queries import load_queries
from selfsteer.errors import ConfigError, DataError, short
from selfsteer.methods import Recipe
from selfsteer.methods.base import PrincipledPairs
from selfsteer.methods.contrast import Distilled
from selfsteer.principles.catalogue import CATALOGUES, load_catalogue
from selfsteer.recipe.read import method_of, validate
from selfsteer.recipe.sections import SCRIPTS, JudgeConfig, JudgedRanking, Queries, resolve_path
from selfsteer.recipe.sections import Generator as DataGenerator
from selfsteer.recipe.texts import ENDLESS, is_endless
from selfsteer.run.folder import by_reason
from selfsteer.verbs.common import amount

GB = 2**30

#: Tokens of an answer at most, as SSO v2; tokens of a word, twice as many as English has, so that
#: an answer can be seen to break a rule of length; words of a sentence.
MOST, PER_WORD, SENTENCE = 2048, 3, 25

#: Similarity of near-duplicates, and the most prompts that they are looked for in within seconds.
NEAR = 0.8
NEAR_LOOKED = 5000

#: What to do with a model whose files are not whole.
DOWNLOAD = "Download the model again."

#: Prompts whose script and language are looked at.
SAMPLE = 200

#: Words of English that few prompts in English do without.
_ENGLISH = frozenset(
    words("a an and are do does for how i in is it me my of the to what which why")
)

#: Bytes that full training takes per parameter (docs/scaling.md), and room for activations.
FULL, FULL_CPU, ROOM = 18, 16, 1.25

#: Parameters below which a model hardly writes usable principles or follows two at a time.
SMALL = 1_500_000_000

#: Seconds that contrast distillation took per query, parameter and token on one core (recipe
#: smollm2: 152 queries of 96 tokens, 135M parameters, 20 minutes on two cores).
CPU_RATE = 20 * 60 * 2 / (152 * 96 * 135e6)

#: Seconds of a night.
NIGHT = 12 * 3600

#: How many times as long as contrast distillation others take, as in the demo.
COSTS = {"sso": 2.7, "pbaa": 1.4}


# -- what there is ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """Cores, memory in GB, and the memory of each GPU in GB."""

    cores: int
    memory: float
    gpus: tuple[float, ...] = ()

    def __str__(self) -> str:
        if self.gpus:
            count = f"{len(self.gpus)} GPUs" if len(self.gpus) > 1 else "a GPU"
            return f"{count} of {self.gpus[0]:.0f} GB"
        return f"{self.cores} CPU core{'s' * (self.cores > 1)}, {self.memory:.0f} GB, no GPU"


def hardware(text: str) -> Hardware:
    """``auto``: this machine; ``cpu``: without its GPUs; ``80``, ``4x80``: GPUs by their GB.

    Raises:
        ConfigError: it is none of these.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    memory = psutil.virtual_memory().total / GB
    if text == "cpu":
        return Hardware(cores, memory)
    if text == "auto":
        return Hardware(cores, memory, _gpus())
    if not (found := re.fullmatch(r"(?:([1-9]\d{0,4})x)?([1-9]\d{0,4})", text)):
        raise ConfigError(
            f"--hardware takes auto, cpu, or GPUs by their memory in GB: 80, or 4x80 for four of "
            f"them; found {text!r}."
        )
    return Hardware(cores, memory, (float(found[2]),) * int(found[1] or 1))


def _gpus() -> tuple[float, ...]:
    """GB of each GPU that CUDA_VISIBLE_DEVICES leaves; torch would take seconds to say it."""
    if (program := shutil.which("nvidia-smi")) is None:
        return ()
    asked = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout
        found = tuple(float(line) / 1024 for line in said.split("\n") if line.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()  # a driver that does not answer cannot train either
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return found[: sum(name.strip() not in ("", "-1") for name in visible.split(","))]


@dataclass(frozen=True)
class Model:
    """The policy: its parameters and context as far as they are known, and where from."""

    source: str
    parameters: int | None = None
    by_name: bool = False
    context: int | None = None

    def __str__(self) -> str:
        if self.parameters is None:
            return "size unknown"
        return f"{amount(self.parameters)} parameters{' by its name' * self.by_name}"


def look_at_model(source: str) -> Model:
    """What headers and names say of a model.

    Raises:
        ConfigError: there is no such model, or its files are not whole.
        ArtifactError: its config.json is damaged, or that of its adapters.
    """
    path = Path(resolve_path(source))
    if not path.exists():
        if is_hub_id(source):
            return Model(source, *_named(split_revision(source)[0]))
        raise ConfigError(
            f"There is no model {source!r}: no such folder or file, and it is not a hub id "
            "(org/name)."
        )
    if (adapters := path / ADAPTER_CONFIG).is_file():
        base = read_json(dict[str, Any], adapters, DOWNLOAD).get("base_model_name_or_path")
        if not isinstance(base, str) or (Path(resolve_path(base)) / ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"{adapters} names {short(base)} as the base model, and adapters need a whole "
                "model below them. Set base_model_name_or_path to one, or merge the adapters below."
            )
        found = look_at_model(base)
        return Model(source, found.parameters, found.by_name, found.context)
    if is_endless(path):
        raise ConfigError(f"{source} {ENDLESS}.")
    if not path.is_dir():
        return Model(source, *_named(path.name))
    if not (config := path / "config.json").is_file():
        raise ConfigError(f"{source} is a folder but not a model: it has no config.json.")
    context = read_json(dict[str, Any], config, DOWNLOAD).get("max_position_embeddings")
    context = context if isinstance(context, int) else None
    weights = sum(map(_weights, path.glob("*.safetensors")))
    if not weights:
        return Model(source, *_named(path.name), context)
    return Model(source, weights, context=context)


def _named(name: str) -> tuple[int | None, bool]:
    """Parameters by a name such as ``Llama-3.1-8B-Instruct``, and whether it says so."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z])", name)
    if found is None:
        return None, False
    return round(float(found[1]) * (1e9 if found[2] in "Bb" else 1e6)), True


def _weights(file: Path) -> int:
    """Weights in a safetensors file, by its header."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        # a Git LFS pointer, which is text, asks for exabytes
        header = opened.read(size) if 8 + size <= file.stat().st_size else b""
    try:
        tensors = TypeAdapter(dict[str, dict[str, Any]]).validate_json(header)
        return sum(math.prod(t["shape"]) for name, t in tensors.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{file} has no header of a safetensors file: it is empty, cut off, or a Git LFS "
            f"pointer in place of the weights. {DOWNLOAD}"
        ) from None


@dataclass(frozen=True)
class Prompts:
    """What a file of prompts holds; lengths are characters of the user's turns.

    ``near`` counts near-duplicates, None where they were not looked for. ``english`` is whether the
    words look like it, None where the script is not Latin.
    """

    count: int
    shortest: int
    median: int
    long: int
    longest: int
    dropped: dict[str, int]
    near: int | None
    answers: int
    script: str
    english: bool | None

    def __str__(self) -> str:
        near = "" if self.near is None else f", {self.near:,} near-duplicates"
        gone = f"; left out: {by_reason(Counter(self.dropped))}" if self.dropped else ""
        english = {True: ", English", False: ", not English by its words", None: ""}[self.english]
        return (
            f"{self.count:,} prompts of {self.shortest:,} to {self.longest:,} characters (median "
            f"{self.median:,}, 95 % at most {self.long:,}){near}, {self.answers:,} with an answer; "
            f"{self.script} script{english}{gone}"
        )

    @property
    def tokens(self) -> int:
        """Of the longest 5 %, by four characters a token; scripts without spaces have one each."""
        return self.long // (4 if self.script == "Latin" else 1) + 1


def look_at_prompts(path: str) -> Prompts | None:
    """Reads a file or folder of prompts; None for a data set on the hub, which is not fetched.

    Raises:
        DataError: there is no such file, or it holds no prompt that can be asked.
    """
    if not Path(found := resolve_path(path)).exists():
        if is_hub_id(HubName.read(found).repo):
            return None
        raise DataError(f"There is no file {path}, and it is not a data set on the hub (org/name).")
    loaded = load_queries(Queries(path=path))
    lengths = sorted(len(q.user_text) for q in loaded.queries)
    near = None
    if len(lengths) <= NEAR_LOOKED:
        index = NearDuplicates(NEAR)
        near = sum(index.add(q) is not None for q in loaded.queries)
    step = max(len(lengths) // SAMPLE, 1)
    sample = [loaded.queries[i].user_text for i in range(0, len(lengths), step)]
    script = _script(sample)
    english = None
    if script == "Latin":
        hits = sum(not _ENGLISH.isdisjoint(words(text)) for text in sample)
        english = hits >= len(sample) / 2
    return Prompts(
        len(lengths),
        lengths[0],
        round(statistics.median(lengths)),
        lengths[math.ceil(0.95 * len(lengths)) - 1],
        lengths[-1],
        dict(loaded.dropped),
        near,
        loaded.answers_cut,
        script,
        english,
    )


def _script(sample: list[str]) -> str:
    """The script of most of these texts."""
    return max(SCRIPTS, key=lambda name: (sum(map(written_in((name,)), sample)), name == "Latin"))


# -- what to do ------------------------------------------------------------------------------------

#: What answers should become, as ``--goal`` writes it.
GOALS = {
    "quality": "better answers in general",
    "style": "a house style (rules in a catalogue)",
    "constitution": "written rules of your own (a text file or a catalogue)",
    "answers": "like given answers, which stand beside the prompts",
    "judge": "what a judge prefers",
    "reward": "what a reward model prefers",
}

#: Goals that need something after a colon, and what.
NEEDS = {"constitution": "FILE", "judge": "JUDGE", "reward": "MODEL"}


#: The catalogue of a style that is not named.
HOUSE_STYLE = "house-style"


def is_catalogue(name: str) -> bool:
    """Whether rules by this name are a catalogue, not a text."""
    return name in CATALOGUES or name.endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class Goal:
    """One of `GOALS`, and the catalogue, judge or model that it names."""

    kind: str = "quality"
    given: str | None = None

    @classmethod
    def read(cls, text: str) -> "Goal":
        """Reads ``quality``, ``style``, ``style:CATALOGUE``, ``constitution:FILE`` and the others.

        Raises:
            ConfigError: it is none of them, or no such judge, catalogue or file.
        """
        kind, _, given = text.partition(":")
        if kind not in GOALS or (kind in NEEDS and not given):
            known = ", ".join(f"{k}:{NEEDS[k]}" if k in NEEDS else k for k in GOALS)
            raise ConfigError(f"--goal takes {known} (style:CATALOGUE as well), found {text!r}.")
        if given and kind in ("quality", "answers"):
            raise ConfigError(f"--goal {kind} takes nothing after it, found {given!r}.")
        if kind == "judge":
            short_form: Any = given
            validate(JudgeConfig, short_form, f"judge {given}")
        elif kind == "style" or (kind == "constitution" and is_catalogue(given)):
            load_catalogue(given or HOUSE_STYLE)
        elif kind == "constitution" and not Path(given).is_file():
            raise ConfigError(f"There is no file {short(given)} of rules, nor such a catalogue.")
        return cls(kind, given or (HOUSE_STYLE if kind == "style" else None))


@dataclass(frozen=True)
class Wishes:
    """All that advice is given on; what is None is not known.

    ``queries`` names the prompts, also those of the hub, which are not looked at.
    """

    model: Model | None
    queries: str | None
    prompts: Prompts | None
    hardware: Hardware | None = None
    goal: Goal = Goal()
    pairs: bool = False

    @property
    def weak(self) -> bool:
        """Whether it is to run without a GPU."""
        return self.hardware is not None and not self.hardware.gpus

    @property
    def small(self) -> bool:
        """Whether the model is known to be a small one."""
        return bool(self.model and self.model.parameters and self.model.parameters < SMALL)

    @property
    def full(self) -> float | None:
        """GB that full training takes; None where model or machine is not known."""
        if not (self.hardware and self.model and self.model.parameters):
            return None
        return self.model.parameters / GB * (FULL if self.hardware.gpus else FULL_CPU) * ROOM

    @property
    def spread(self) -> str:
        """Options of ``run`` for full training that only all GPUs together have room for."""
        gpus = self.hardware.gpus if self.hardware else ()
        if self.full is None or not gpus or not gpus[0] < self.full <= sum(gpus):
            return ""
        return f" --nproc {len(gpus)} --profile fsdp2"

    @property
    def too_large(self) -> str:
        """What to say of a model whose weights fit on no GPU, even in 4 bits; else empty."""
        gpus = self.hardware.gpus if self.hardware else ()
        if not (gpus and self.model and self.model.parameters):
            return ""
        least = 0.5 * self.model.parameters / GB * ROOM
        if least <= gpus[0] or self.spread:
            return ""
        return f"even 4 bits take {least:.0f} GB, so it does not fit: take a smaller model"

    @property
    def recipe(self) -> tuple[str, str]:
        """The shipped recipe to start from, and why (docs/methods.md)."""
        if self.goal.kind in ("judge", "reward"):
            return "best-of-n", "the judge decides, so the pairs are as good as it is"
        if self.goal.kind == "answers":
            return "spin", "prompts with good answers need no principles; irft does it in one pass"
        if self.goal.kind == "style":
            return "sso", (
                "a model of 135M parameters kept 0.91 of a house style's rules after SSO and 0.62 "
                "after PBAA; contrast, in about half of SSO's time and with all features in each "
                "principle, had 0.87 (three seeds each)"
            )
        if not self.pairs:
            return "contrast", (
                "prompts and the weights at hand: one answer per query and a third of SSO's "
                "compute; above SSO on the tiny world, level with it on a harder one, where three "
                "rounds are above it (docs/methods.md); sso or pbaa if you want pairs to keep"
            )
        if self.weak:
            return (
                "pbaa",
                "pairs at a third of the compute of sso, which is far above it on a harder world",
            )
        return (
            "sso",
            "above PBAA, by far on a harder world and a real model; pbaa: a third of the compute",
        )


#: Features of a style in one principle; more were not measured.
TOGETHER = 4

#: A setting, its value and why it has it.
Advice = tuple[str, Any, str]


def advise(w: Wishes, kind: type[Recipe]) -> Iterator[Advice]:
    """Settings for a method, each with its reason; settings that a method lacks are among them."""
    yield from _data(w, kind)
    yield from _principles(w, kind)
    yield from _judging(w, kind)
    yield from _sizes(w, kind)
    yield from _training(w, kind)


def _data(w: Wishes, kind: type[Recipe]) -> Iterator[Advice]:
    found = w.prompts
    if w.model:
        yield "policy.model", w.model.source, str(w.model)
    if w.queries:
        seen = f"{found.count:,} prompts, {found.script} script" if found else "not looked at"
        yield "queries.path", w.queries, seen
    if found is None:
        return
    if found.near is None:
        near = f"not looked for in more than {NEAR_LOOKED:,} prompts"
    else:
        near = f"{found.near:,} of {found.count:,} prompts are this similar to an earlier one"
    yield "queries.near_duplicates", NEAR, f"drops later ones; {near}"
    if (asked := _asked(w, kind)) < found.count:
        why = f"about a night on {w.hardware}, roughly; selfsteer check measures it"
        yield "queries.limit", asked, why
    if asked < DataGenerator.model_fields["queries"].default:
        yield "generator.queries", asked, "all of them; SSO v2: 8k of 60k"


def _asked(w: Wishes, kind: type[Recipe]) -> int:
    """How many of the prompts are asked: all that a CPU can do in a night."""
    assert w.prompts is not None
    if not (w.hardware and w.weak and w.model and w.model.parameters):
        return w.prompts.count
    each = CPU_RATE * w.model.parameters * _new_tokens(w, kind) / w.hardware.cores
    each *= COSTS.get(method_of(kind), 1.0)
    return min(w.prompts.count, int(max(round(NIGHT / each, -2), 100)))


def _principles(w: Wishes, kind: type[Recipe]) -> Iterator[Advice]:
    if w.goal.kind in ("style", "constitution"):
        path = w.goal.given
        yield "principles.mode", "picked", "your rules word for word; no model rewrites them"
        yield "principles.catalogue", path, f"selfsteer principles list {path} prints its rules"
        yield "principles.features", "random", "the rules hold for every query, so none is chosen"
        yield "principles.concision", None, ""
        features = len(load_catalogue(path).choosable)
    elif w.small:
        features = 2
        yield "principles.mode", "picked", "small models write principles in form, not in sense"
        yield "principles.features", "random", "small models name features at random anyway"
    else:
        return
    if w.goal.kind == "style" and issubclass(kind, Distilled):
        yield (
            "principles.features_per_query",
            min(TOGETHER, features),
            (
                "it learns the mean over all queries, so each should ask for the whole style; a "
                "model of 135M parameters kept 0.87 of four rules with all in each, 0.75 with one"
            ),
        )
    elif w.small:
        yield "principles.features_per_query", 1, "small models follow one short wish at a time"
    else:
        yield "principles.features_per_query", min(2, features), "as SSO v2"


def _judging(w: Wishes, kind: type[Recipe]) -> Iterator[Advice]:
    goal, given = w.goal.kind, w.goal.given
    ranking = kind.model_fields.get("ranking")
    place = "ranking.judge" if ranking and ranking.annotation is JudgedRanking else "judge"
    if goal == "reward":
        yield place, {"kind": "reward", "model": given}, "scores each answer"
    elif goal == "judge":
        yield place, given, "let another judge measure the outcome: this one's taste is learnt"
    elif goal in ("style", "constitution"):
        catalogue = load_catalogue(given)
        if (ruled := len(catalogue.rules)) > 0:
            many = f"{ruled} of its {len(catalogue.features)} features have rules that"
            yield place, f"checks:{given}", f"{many} a program checks; no model has to judge"


def _ruled(w: Wishes) -> int:
    """Tokens in which an answer can break the rules of length; 0: there are none."""
    if w.goal.kind not in ("style", "constitution"):
        return 0
    rules = [c for checks in load_catalogue(w.goal.given).rules.values() for c in checks]
    counts = [(c.words, 1) for c in rules if c.words]
    counts += [(c.sentences, SENTENCE) for c in rules if c.sentences]
    words_ = max((max(n.min or 0, n.max or 0) * each for n, each in counts), default=0)
    return min(max(PER_WORD * words_, 64), MOST) if words_ else 0


def _new_tokens(w: Wishes, kind: type[Recipe]) -> int:
    """Tokens of an answer that rules, the hardware and the model's context leave room for."""
    usual = 128 if issubclass(kind, Distilled) else 256
    tokens = (_ruled(w) or usual) if w.weak else MOST
    context = w.model.context if w.model else None
    prompt = w.prompts.tokens if w.prompts else 256
    # principles take about 100 tokens
    return tokens if context is None else max(min(tokens, context - prompt - 100), 16)


def _sizes(w: Wishes, kind: type[Recipe]) -> Iterator[Advice]:
    new = _new_tokens(w, kind)
    why = "no GPU: longer answers take hours" if w.weak else "as SSO v2"
    if w.weak and new == _ruled(w):
        why = (
            f"room to break each rule of length: {PER_WORD} tokens a word, {SENTENCE} words a "
            "sentence"
        )
    elif w.model and w.model.context and new < (128 if w.weak else MOST):
        why = f"the model's context has {w.model.context:,} tokens, principle and prompt included"
    elif w.weak and issubclass(kind, Distilled):
        why += "; answers that are cut off teach as well"
    yield "sampling.max_new_tokens", new, why
    if w.weak and issubclass(kind, PrincipledPairs):
        yield "sampling.keep_unfinished", True, "dropping what is cut off would leave few pairs"
    prompt = w.prompts.tokens if w.prompts else MOST - new
    # the chat template and a principle, under which a generator is trained, take some tokens too
    longest = -(-(new + prompt + 192) // 256) * 256
    why = "as SSO v2"
    if w.prompts and longest < MOST:
        why = f"an answer and 95 % of the prompts; the longest has {w.prompts.longest:,} characters"
    for section in ("training", "generator"):
        yield f"{section}.max_length", min(longest, MOST), why


def _training(w: Wishes, kind: type[Recipe]) -> Iterator[Advice]:
    sections = ("generator", "training")
    distils = issubclass(kind, Distilled)
    adapters = yield from _memory(w)
    if adapters:
        rate, why = 5e-5, "adapters need ten to a hundred times the rate of full weights; search it"
    elif w.small:
        rate = 2e-5 if distils else 1e-5
        why = (
            "as measured at 135M parameters (benchmarks/real)"
            if distils
            else "as recipe smollm2, of 135M parameters"
        )
        why += "; search it (selfsteer sweep)"
    else:
        rate = 5e-6 if distils else 5e-7
        why = "OPCD's; search it" if distils else "SSO v2's; search it (selfsteer sweep)"
    for section in sections:
        yield f"{section}.learning_rate", rate, why
    if w.prompts:
        asked = _asked(w, kind)
        usual = {"generator": 32, "training": 128 if distils else 256}
        for section, most in usual.items():
            size = most
            while size > 8 and asked < 16 * size:
                size //= 2
            if size < most:
                steps = max(asked // size, 1)
                counted = f"{steps} step{'s' * (steps > 1)}"
                why = f"{counted} per pass over {asked:,} prompts"
                yield f"{section}.batch_size", size, why
    if w.weak:
        for section in sections:
            yield f"{section}.row_tokens", 2048, "memory of one forward pass; changes no result"


def _memory(w: Wishes) -> Generator[Advice, None, bool]:
    """How the training fits the memory.

    Returns:
        Whether adapters are trained.
    """
    need = w.full
    if not (w.hardware and w.model and w.model.parameters) or need is None:
        return False
    gpus, weights = w.hardware.gpus, w.model.parameters / GB
    there = sum(gpus) if gpus else w.hardware.memory
    if need <= there:
        if w.spread:
            yield "policy.dtype", "auto", f"{need:.0f} GB: run with{w.spread}"
        return False
    why = f"full training needs about {need:.0f} GB, {w.hardware} has {there:.0f}"
    lora: dict[str, Any] = {"rank": 16}
    if gpus and 4 * weights * ROOM > gpus[0]:
        lora["bits"] = 4
        why += "; bits needs selfsteer[quant]" * (find_spec("bitsandbytes") is None)
        why += f"; {w.too_large}" * bool(w.too_large)
    yield "policy.lora", lora, why
    return True
