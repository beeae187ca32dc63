"""`selfsteer plan`: what a recipe will cost, by arithmetic alone; nothing of it is measured.

Counts come from the stages themselves (`Stage.cost`); the formulas are those of docs/scaling.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import adapter_base, is_hub_id, split_revision
from selfsteer.errors import ArtifactError, ConfigError, short
from selfsteer.methods import Aligning
from selfsteer.models.head import CHUNK_BYTES, KEEP_BYTES
from selfsteer.recipe.sections import (
    EngineConfig,
    Generator,
    JudgeConfig,
    Lora,
    PolicyStage,
    Sampling,
)
from selfsteer.run.cost import TEXT, Cost, Scale, disk_bytes, total
from selfsteer.run.stage import Stage
from selfsteer.stages.principles import WritePrinciples

#: Name → (dense bfloat16 operations a second, bytes of memory), of the makers' data sheets.
GPUS = {
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "l40s": (362e12, 48e9),
}

#: Tokens of what a model says of a query's features, and of what it is shown before it writes.
FEATURE_ANSWER, INSTRUCTION = 20, 200

#: Tokens of a chat judge's question without conversation and answers, and of what it says: a
#: verdict after three sentences.
QUESTION, VERDICT = 130, 80

#: What is counted of a judge at a server.
ASKED = ("requests", "prompt_tokens", "completion_tokens")

#: Bytes per parameter: float32 weights, gradients, two moments, bfloat16 copies of autocast.
WEIGHT, GRADIENT, MOMENTS, COPY = 4, 4, 8, 2

#: Bytes of activations per token, hidden unit and layer; and with recomputation per token and
#: hidden unit: each layer's input, and one whole layer (docs/scaling.md).
ACTIVATION, LAYER_INPUT = 60, 4

#: Bytes of a token id and of a log-prob on disk.
ID, SCORE = 4, 4


@dataclass(frozen=True)
class Shape:
    """What of a dense decoder the arithmetic needs.

    ``attention`` is heads times head size, ``body`` the parameters of the layers: embeddings and
    head, of which there are ``parameters - body``, are no product per token.
    """

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    attention: int
    body: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of a query, of the guideline in a steered context, and of a response."""

    query: int = 120
    principles: int = 250
    response: int = 330

    def prompt(self, context: str) -> int:
        """Tokens of a context."""
        return self.query + (0 if context == "plain" else self.principles)


@dataclass(frozen=True)
class Machine:
    """GPUs, and the shares of their peak that training and sampling sustain."""

    gpu: str = "h100"
    count: int = 1
    training: float = 0.4
    sampling: float = 0.1

    @property
    def peak(self) -> float:
        """Operations a second of all GPUs together."""
        return GPUS[self.gpu][0] * self.count


def shape_of(
    model: str,
    *,
    params: float | None = None,
    layers: int | None = None,
    hidden: int | None = None,
    vocabulary: int | None = None,
) -> Shape:
    """The shape of a model: from numbers given, else from its ``config.json``.

    Args:
        model: as `selfsteer.models.sources`; of a hub id, ``config.json`` was fetched before.
        params: all parameters; counted in the files, or from the configuration, where not given.
        layers: decoder layers.
        hidden: size of the residual stream.
        vocabulary: tokens.

    Raises:
        ConfigError: not all numbers are given and there is no configuration to read, or one that
            leaves the number of parameters open.
    """
    given = {"params": params, "layers": layers, "hidden": hidden, "vocabulary": vocabulary}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if params and layers and hidden and vocabulary:
        return _whole(Shape(int(params), layers, hidden, vocabulary, hidden, 0), 2)
    path, found, stored = _configuration(model)
    if path is None:
        raise ConfigError(
            f"The size of {model} is not known here: it is no folder with a config.json, and no "
            f"such file was fetched from the hub. Give {', '.join(missing)} as well, or a "
            "local policy.model."
        )
    inner = found.get("text_config")
    c = {**found, **(inner if isinstance(inner, dict) else {})}
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "vocab_size": vocabulary,
        "num_attention_heads": None,
    }
    if absent := [key for key, value in sizes.items() if value is None and key not in c]:
        raise ConfigError(
            f"{path} has no {absent[0]}, so the size of {model} is not known. Give "
            f"{', '.join(missing)} as well."
        )
    numbers = (*sizes, "head_dim", "num_key_value_heads", "intermediate_size")
    for key in (k for k in numbers if c.get(k) is not None and sizes.get(k) is None):
        if type(c[key]) is not int or c[key] <= 0:
            raise ConfigError(
                f"{path}: {key} is {short(c[key])}, and no number above 0. Correct it, or give "
                "--params, --layers, --hidden and --vocabulary."
            )
    depth, width, tokens, heads = (value or c[key] for key, value in sizes.items())
    head = c.get("head_dim") or width // heads
    tables = 1 if c.get("tie_word_embeddings") else 2
    total = int(params) if params else stored
    if total is None:
        if any("expert" in key for key in c) or "intermediate_size" not in c:
            raise ConfigError(
                f"{path} is not that of a dense decoder, and there are no weights beside it, so "
                f"the parameters of {model} cannot be counted. Give --params."
            )
        groups = c.get("num_key_value_heads") or heads
        linear = width * head * (2 * heads + 2 * groups) + 3 * width * c["intermediate_size"]
        total = tables * tokens * width + depth * (linear + 2 * width) + width
    return _whole(Shape(total, depth, width, tokens, heads * head, 0), tables)


def _whole(shape: Shape, tables: int) -> Shape:
    """With the parameters that are not in so many tables of the vocabulary."""
    body = shape.parameters - tables * shape.vocabulary * shape.hidden
    if body <= 0:
        raise ConfigError(
            f"{shape.parameters:,} parameters leave nothing for its layers: a vocabulary of "
            f"{shape.vocabulary:,} with hidden states of {shape.hidden:,} has "
            f"{shape.parameters - body:,} in embeddings and head. Correct --params, --vocabulary "
            "or --hidden."
        )
    return replace(shape, body=body)


def _configuration(model: str) -> tuple[Path | None, dict[str, Any], int | None]:
    """Which file says what shape a model has, what it says, and the parameters beside it.

    Adapters have the shape of their base. Nothing is fetched, merged or dequantised.
    """
    from huggingface_hub import try_to_load_from_cache

    path = Path(model) / "config.json"
    if is_hub_id(model):
        repo, revision = split_revision(model)
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        path = Path(cached) if isinstance(cached, str) else path
    elif base := adapter_base(Path(model)):
        return (None, {}, None) if adapter_base(Path(base)) else _configuration(base)
    elif Path(model).is_file():
        from gguf import GGUFReader
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        from selfsteer.models.sources import check_source

        check_source(model)
        tensors = GGUFReader(model).tensors
        said = load_gguf_checkpoint(model)["config"]
        return Path(model), said, sum(int(t.n_elements) for t in tensors)
    if not path.exists():
        return None, {}, None
    return path, read_json(dict[str, Any], path, "Fetch it again."), stored_parameters(path.parent)


def stored_parameters(folder: Path) -> int | None:
    """Parameters in a folder's safetensors files, by their headers; None where there are none.

    Raises:
        ArtifactError: one of the files is not whole.
    """
    from safetensors import SafetensorError, safe_open

    total, files = 0, sorted(folder.glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                names = file.keys()
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except SafetensorError:
            raise ArtifactError(
                f"{path} is not a complete safetensors file; fetch it again."
            ) from None
    return total if files else None


# -- the arithmetic ------------------------------------------------------------------------------


def tokens_of(sequences: Sequence[str], lengths: Lengths, *, shared: bool) -> tuple[int, int, int]:
    """(tokens, pairs of a token and a key it sees, response tokens) of one query's sequences.

    Args:
        sequences: ``context/response`` each.
        lengths: of prompts and responses; the last token of a response predicts nothing.
        shared: whether sequences of one context share its prompt (layout ``tree``).
    """
    new = lengths.response - 1
    tokens = pairs = 0
    contexts = [name.partition("/")[0] for name in sequences]
    for context in dict.fromkeys(contexts) if shared else contexts:
        under = contexts.count(context) if shared else 1
        prompt = lengths.prompt(context)
        tokens += prompt + under * new
        pairs += prompt * (prompt + 1) // 2 + under * (new * prompt + new * (new + 1) // 2)
    return tokens, pairs, len(sequences) * lengths.response


def forward_flops(shape: Shape, tokens: float, pairs: float, responses: float) -> float:
    """Operations of a forward: 2 per parameter and token, 4 per pair, 2 per logit."""
    return (
        2 * shape.body * tokens
        + 4 * shape.layers * shape.attention * pairs
        + 2 * shape.hidden * shape.vocabulary * responses
    )


def plan(
    recipe: Aligning,
    scale: Scale,
    shape: Shape,
    lengths: Lengths,
    machine: Machine,
) -> dict[str, Any]:
    """All figures of a recipe: ``stages``, ``memory``, ``disk``, ``totals``, ``assumptions``.

    Args:
        recipe: checked; all of it is counted, whatever is done.
        scale: queries and evaluation queries.
        shape: of the policy.
        lengths: assumed, the same for every record; responses never exceed their budget.
        machine: assumed; all stages keep all of its GPUs busy.
    """
    loading, lora, (peak, gpu_memory) = recipe.policy.loading, recipe.policy.lora, GPUS[machine.gpu]
    lengths = replace(lengths, response=min(lengths.response, recipe.sampling.max_new_tokens))
    rows, before = [], Cost()
    for stage in recipe.plan():
        cost = stage.cost(scale)
        rows.append(_stage(stage, cost, before, lengths, shape, machine))
        before = total((before, cost))
    judged = [row["judge"] for row in rows if row["judge"]]
    disk = disk_bytes(
        before,
        tokens=lengths.response,
        parameters=shape.parameters,
        # models are saved in the computing precision
        bytes_per_weight=4 if loading.dtype == "float32" or loading.device == "cpu" else 2,
        checkpoints=0 if lora else recipe.keep.checkpoints,
    )
    # queries with their principles stand in three files of a record
    each = lengths.query + 2 * lengths.principles
    disk["queries and principles"] = 3 * before.principles * each * TEXT
    disk["examples while it trains"] = machine.count * _examples_bytes(before, lengths)
    memory = {
        name: memory_bytes(lora, recipe.training, shape, lengths, machine, sharded=name != "ddp")
        for name in ("ddp", "sharded")
    }
    return {
        "recipe": recipe.name,
        "estimate": True,
        "shape": shape.__dict__,
        "assumptions": {
            "gpu": machine.gpu,
            "gpus": machine.count,
            "peak_flops": peak,
            "gpu_memory": gpu_memory,
            "utilisation": machine.training,
            "sampling_utilisation": machine.sampling,
            "query_tokens": lengths.query,
            "principle_tokens": lengths.principles,
            "response_tokens": lengths.response,
            "layout": "padded" if loading.layout == "padded" else "tree",
        },
        "stages": rows,
        "not_counted": list(before.unknown),
        "totals": {
            "sampled_tokens": sum(r["sampled_tokens"] for r in rows),
            "training_flops": sum(r["flops"]["training"] for r in rows),
            "flops": sum(sum(r["flops"].values()) for r in rows),
            "hours": sum(r["hours"] for r in rows),
            "judge": {n: sum(j[n] for j in judged) for n in ASKED} if judged else None,
            "cost": sum(costs)
            if (costs := [r["cost"] for r in (*rows, *judged) if r["cost"]])
            else None,
            "memory_per_rank": {name: sum(parts.values()) for name, parts in memory.items()},
            "disk": sum(disk.values()),
        },
        "memory_per_rank": memory,
        "gpu_memory": gpu_memory,
        "disk": disk,
    }


def _stage(
    stage: Stage, cost: Cost, before: Cost, lengths: Lengths, shape: Shape, machine: Machine
) -> dict[str, Any]:
    """What one stage adds to the work of those before it."""
    shared = stage.loading.layout != "padded"
    budget = stage.settings.max_new_tokens if isinstance(stage, WritePrinciples) else 0
    kinds = {
        "features": (INSTRUCTION + lengths.query, FEATURE_ANSWER),
        "principles": (INSTRUCTION + lengths.query, min(lengths.principles, budget)),
    }
    flops = {"sampling": 0.0, "scoring": 0.0, "training": 0.0}
    sampled = read = 0
    for kind, n in cost.answers.items():
        prompt, response = kinds.get(kind) or (lengths.prompt(kind), lengths.response)
        sampled += n * response
        read += n * prompt
        tokens = prompt + response
        flops["sampling"] += n * forward_flops(shape, tokens, tokens**2 / 2, response)
    sets: dict[tuple[str, int], list[str]] = {}
    for (texts, sequence), n in cost.scores.items():
        new = max(n - before.scores.get((texts, sequence), 0), 0)
        sets.setdefault((texts, new), []).append(sequence)
    for (_, n), sequences in sets.items():
        flops["scoring"] += n * forward_flops(shape, *tokens_of(sequences, lengths, shared=shared))
    for training in cost.trainings:
        once = forward_flops(shape, *tokens_of(training.sequences, lengths, shared=shared))
        flops["training"] += training.passes * once
    work = flops["scoring"] + flops["training"]
    seconds = flops["sampling"] / machine.sampling + work / machine.training
    engine = _engine(stage)
    return {
        "stage": stage.name,
        "records": cost.records,
        "sampled_tokens": sampled,
        "cost": engine and engine.cost_of(read, sampled),
        "judge": judge_asked(getattr(stage, "judge", None), cost.judged, lengths),
        "flops": flops,
        "hours": seconds / machine.peak / 3600,
    }


def _engine(stage: Stage) -> EngineConfig | None:
    """The engine that answers in this stage, where one does."""
    if isinstance(stage, WritePrinciples):
        return stage.settings.writer or stage.engine
    sampling: Sampling | None = getattr(stage, "sampling", None)
    return sampling.engine if sampling else None


def judge_asked(judge: JudgeConfig | None, pairs: int, lengths: Lengths) -> dict[str, Any] | None:
    """What a judge at a server is asked, each pair in both orders; None where there is none.

    Args:
        judge: of a stage.
        pairs: that it compares.
        lengths: of conversations and answers.
    """
    if judge is None or judge.engine.kind != "openai" or not pairs:
        return None
    read = 2 * pairs * (QUESTION + lengths.query + 2 * lengths.response)
    written = 2 * pairs * min(VERDICT, judge.max_new_tokens)
    asked = dict(zip(ASKED, (2 * pairs, read, written), strict=True))
    return {**asked, "cost": judge.engine.cost_of(read, written)}


def memory_bytes(
    lora: Lora | None,
    settings: PolicyStage | Generator,
    shape: Shape,
    lengths: Lengths,
    machine: Machine,
    *,
    sharded: bool,
) -> dict[str, float]:
    """Kind → bytes on one GPU while the policy is trained.

    Args:
        lora: adapters are trained alone.
        settings: the training's.
        shape: of the policy.
        lengths: what share of a row are response tokens.
        machine: how many ranks.
        sharded: weights, gradients and moments are shared among the ranks (FSDP, ZeRO-3), and of
            the copies there are those of one layer; else each rank has all (DDP).
    """
    ranks = machine.count if sharded else 1
    trained = _adapters(shape, lora.rank) if lora else shape.parameters
    row, recomputed = settings.row_tokens, settings.gradient_checkpointing
    layers = LAYER_INPUT * shape.layers + ACTIVATION if recomputed else ACTIVATION * shape.layers
    responses = row * lengths.response / (lengths.query / 2 + lengths.response)
    logits = min(responses * shape.vocabulary * 4, KEEP_BYTES["cuda"] + CHUNK_BYTES["cuda"])
    found = {
        "weights": WEIGHT * shape.parameters / ranks,
        "gradients": GRADIENT * trained / ranks,
        "optimiser": MOMENTS * trained / ranks,
        "bfloat16 copies": COPY * shape.body / (shape.layers if ranks > 1 else 1),
        "activations": layers * shape.hidden * row,
        "logits": logits,
        "buckets": 0 if sharded or machine.count == 1 else GRADIENT * trained,
        "start, to compare with": COPY * shape.parameters if settings.selection.points else 0,
    }
    return {kind: n for kind, n in found.items() if n}


def _adapters(shape: Shape, rank: int) -> int:
    """Parameters of LoRA on every product of a layer: four of attention, three after it."""
    inner = max(shape.body / shape.layers - 4 * shape.hidden * shape.attention, 0)
    inner = inner / (3 * shape.hidden)
    wide = 4 * (shape.hidden + shape.attention) + 3 * (shape.hidden + inner)
    return int(rank * wide * shape.layers)


def _examples_bytes(cost: Cost, lengths: Lengths) -> int:
    """Of the largest training: token ids and reference log-probs, which each rank has on disk."""
    sizes = [0]
    for training in cost.trainings:
        tokens, _, responses = tokens_of(training.sequences, lengths, shared=False)
        sizes.append(training.records * (tokens * ID + responses * SCORE))
    return max(sizes)
