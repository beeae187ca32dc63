"""Correctness, speed and memory on a GPU, in one command and a few minutes.

    python benchmarks/gpu.py --minutes 8
    python benchmarks/gpu.py --device cpu --tiny     # all of it on tiny models; needs no GPU

Nothing is downloaded: models have random weights in the shapes of Llama 3.2 1B and Llama 3.1 8B,
their output embeddings scaled so that next tokens are about as certain as those of a trained model.

| part | what |
|---|---|
| card | the device, and the rate of plain products |
| correctness | tree = padded = one by one; flex_attention = SDPA; halved rows give the same step |
| steps | forward and backward of an optimiser step: released, TRL, ours, and the floor |
| distillation | the teacher pass and the step of contrast distillation |
| sampling | the transformers engine against ``generate`` |
| sharding | a training on one rank under FSDP2 and torchrun equals a plain one |

Each part runs in a process of its own, which is ended when its share of the time is over; what it
does not need, the later parts get. ``gpu.json`` is written after each part, with ``gpu.md`` made
from it. What did not fit is named with the reason, an error is kept with the end of its traceback,
and the next part runs. The exit code is 1 if a check failed or anything ended in an error.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import step_speed as steps
import torch
import transformers as hf
from sampling_speed import of_transformers, timed
from torch import Tensor
from transformers.utils import logging as transformers_logging

from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Message
from selfsteer.models import tree
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.models.load import LoadedModel, load_chat
from selfsteer.models.score import batch_logps, pad
from selfsteer.objectives import ContrastObjective, Objective
from selfsteer.recipe.sections import Contrast, Lora, Optimisation, Policy, TrainConfig
from selfsteer.recipe.sections import resolve_path as resolve
from selfsteer.run.folder import versions

ROOT = Path(__file__).parent
TESTBED = "package:selfsteer.testbed/checkpoint"

COMMON = {"vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {**COMMON, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "head_dim": 64, "tie_word_embeddings": True},
    "8B": {**COMMON, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "head_dim": 128, "tie_word_embeddings": False},
    "tiny": {"vocab_size": 2000, "num_attention_heads": 4, "num_key_value_heads": 2,
             "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
             "tie_word_embeddings": True},
}  # fmt: skip
#: Beside the shape. The window is shorter than the sequences, so that it matters.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {}),
    "qwen2": (hf.Qwen2Config, {}),
    "gemma2": (hf.Gemma2Config, {"sliding_window": 32, "query_pre_attn_scalar": 64}),
}
#: Standard deviation of a random model's logits: most mass is on some dozens of tokens.
SPREAD = 3.3
#: Bytes that must be free for full gradients to be compared, per parameter: weights, gradients,
#: those compared with, and as much again for what the forward keeps.
COMPARING_BYTES = 24
#: Largest differences in float32: a token's log-prob in nats, and gradients relative to their norm.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-3
#: In bfloat16 a layout may be this much further from float32 than sequences one by one are.
BFLOAT16_FACTOR = 1.5
#: Relative differences of loss and gradient norm between the rows of a step, in bfloat16.
STEP_LOSS, STEP_NORM = 0.02, 0.05
#: Memory that the 8B case needs: float32 weights, their bfloat16 copies, two rows' activations.
BIG_BYTES = 110e9
#: Most seconds that a part's imports may take.
IMPORT_S = 120.0
#: Seconds between the end of a part's share and the end of its process.
GRACE_S = 5.0
#: Lines of a traceback that are kept.
LINES = 8


class Part:
    """What a part of the script finds, written down at once.

    Args:
        args: the command line.
        path: of the file.
        seconds: the part's share of the time.
    """

    def __init__(self, args: argparse.Namespace, path: Path, seconds: float) -> None:
        self.args, self.path = args, path
        self.end = time.monotonic() + seconds
        self.device = torch.device(args.device)
        self.on_gpu = self.device.type == "cuda"
        self.found = nothing()

    def left(self) -> float:
        """Seconds until the part's share is over."""
        return self.end - time.monotonic()

    def put(self, name: str, figures: Any) -> None:
        """A result."""
        self.found["figures"][name] = figures
        self.save()

    def check(self, name: str, *, ok: bool, **figures: Any) -> None:
        """A result that is right or wrong."""
        self.found["checks"].append({"name": name, "ok": ok, **figures})
        self.save()

    def skip(self, name: str, why: str) -> None:
        """Something that was not done."""
        self.found["skipped"][name] = why
        self.save()

    def error(self, name: str, error: BaseException) -> None:
        """Something that broke; to be called where it was caught."""
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        self.found["errors"][name] = lines[-LINES:]
        self.save()

    def save(self) -> None:
        """Writes all that was found."""
        write_atomic(self.path, json.dumps(self.found))

    def each(self, cases: Mapping[str, Callable[[], None]]) -> None:
        """Runs the cases one after another; one that breaks does not end the others."""
        longest = 0.0
        for name, case in cases.items():
            if self.left() < longest:
                self.skip(
                    name,
                    f"{max(self.left(), 0):.0f} s were left of the part's share, and an earlier "
                    f"case took {longest:.0f} s",
                )
                continue
            start = time.monotonic()
            try:
                case()
            except Exception as e:
                self.error(name, e)
            longest = max(longest, time.monotonic() - start)
            if self.on_gpu:  # a new case is compiled anew, and does not count as a recompilation
                tree._block_mask.cache_clear()
                torch._dynamo.reset()
            self.free()

    def free(self) -> None:
        """Gives memory back that nothing holds."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def shape(self, name: str) -> dict[str, Any]:
        """Settings of a model's size, or of the tiny one."""
        return SHAPES["tiny" if self.args.tiny else name]

    def model(self, shape: Mapping[str, Any], family: str = "llama", dtype: Any = None) -> Any:
        """A model with random weights on the device, float32 unless said otherwise."""
        kind, more = FAMILIES[family]
        config = kind(
            **{**shape, **more},
            max_position_embeddings=8192,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        with self.device:
            made = hf.AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
        with torch.no_grad():
            head = made.get_output_embeddings().weight
            head *= SPREAD / (config.initializer_range * math.sqrt(config.hidden_size))
        return made.to(self.device)

    def loaded(self, model: Any, layout: str = "tree") -> LoadedModel:
        """As selfsteer holds a model; its tokenizer is the tiny world's."""
        return LoadedModel(model, chat(), self.device, torch.bfloat16, "random", "", layout)

    def draws(
        self, names: Sequence[str], shape: Mapping[str, Any], count: int, queries: int
    ) -> Any:
        """Draws of queries with lengths like UltraFeedback's; tiny ones are 16 times shorter."""
        scale = 16 if self.args.tiny else 1
        wanted = argparse.Namespace(seed=0, draws=count, queries=queries, scale=scale)
        return steps.draw_queries(wanted, names, shape["vocab_size"])

    def clocked(self, work: Callable[[], Any]) -> tuple[Any, float, int | None]:
        """What work gives, its seconds, and the bytes that its peak is above where it began."""
        steps.settle_clock(self.device)
        before = 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        found = work()
        steps.settle_clock(self.device)
        elapsed = time.perf_counter() - start
        return found, elapsed, torch.cuda.max_memory_allocated() - before if self.on_gpu else None


def nothing() -> dict[str, Any]:
    """What a part has found before it begins."""
    return {"checks": [], "figures": {}, "skipped": {}, "errors": {}}


def chat() -> ChatFormat:
    """The tiny world's tokenizer and template."""
    path = resolve(TESTBED)
    return load_chat(path, Policy(model=path))


# -- card ------------------------------------------------------------------------------------------


def card(part: Part) -> None:
    """The device, and what plain products reach on it."""
    part.put("versions", versions())
    if part.on_gpu:
        seen = torch.cuda.get_device_properties(0)
        part.put("name", seen.name)
        part.put("memory_bytes", seen.total_memory)
        part.put("cuda", torch.version.cuda)
    else:
        part.put("name", steps.hardware(argparse.Namespace(threads=torch.get_num_threads())))
    size, times = (128, 1) if part.args.tiny else (8192, 10)
    for dtype in (torch.bfloat16, torch.float32):
        rate = [steps.matmul_rate(size, size, size, part.device, dtype, times) for _ in range(3)]
        part.put(f"flops_per_second_{str(dtype).removeprefix('torch.')}", rate[-1])


# -- correctness -----------------------------------------------------------------------------------


def correctness(part: Part) -> None:
    """Layouts and attentions agree, and rows that did not fit change nothing."""
    part.each(
        {
            "flex_attention": partial(flex_equals_sdpa, part),
            **{f"layouts, {name}": partial(layouts_agree, part, name) for name in FAMILIES},
            "halved rows": partial(halving_changes_nothing, part),
        }
    )


def flex_equals_sdpa(part: Part) -> None:
    """One call with a block mask against a call of SDPA per segment."""
    names = Objective.named("sso-online").sequences
    shape = part.shape("1B")
    flat = [s for q in part.draws(names, shape, 1, 2)[0] for s in q.values()]
    row = tree.plant(flat)
    size = row.input_ids_1T.shape[1]
    wrap = tree._compiled if part.on_gpu else (lambda function: function)
    if not part.on_gpu:
        part.skip("flex_attention, gradients", "flex_attention has no gradient on a CPU")
    float32, half = torch.float32, torch.bfloat16
    for dtype, window, softcap in (
        (float32, None, None), (half, None, None), (half, 32, None), (half, 32, 20.0),
    ):  # fmt: skip
        torch.manual_seed(0)
        heads = [shape["num_attention_heads"], *[shape["num_key_value_heads"]] * 2]
        given = [torch.randn(1, n, size, shape["head_dim"], device=part.device) for n in heads]
        weight = torch.randn_like(given[0])

        def attended(
            by_flex: bool,
            kind: torch.dtype,
            given: Any = given,
            weight: Tensor = weight,
            window: int | None = window,
            softcap: float | None = softcap,
        ) -> list[Tensor]:
            inputs = [t.to(kind, copy=True).requires_grad_(part.on_gpu) for t in given]
            if by_flex:
                out = tree.flex_tree_attention(*inputs, row.trees, None, window, softcap, wrap)
            else:
                with patch.object(tree, "_flex_errors", ["not wanted"]):
                    out, _ = tree.tree_attention(
                        None, *inputs, None, 0.0, None, window, softcap, row.trees
                    )
                out = out.transpose(1, 2)
            if part.on_gpu:
                (out.float() * weight).sum().backward()
            return [out.detach().float(), *(t.grad.float() for t in inputs if t.grad is not None)]

        exact = attended(False, float32)
        start = time.perf_counter()
        flex = [relative(a, b) for a, b in zip(attended(True, dtype), exact, strict=True)]
        seconds = time.perf_counter() - start
        sdpa = [relative(a, b) for a, b in zip(attended(False, dtype), exact, strict=True)]
        bounds = [max(BFLOAT16_FACTOR * e, 1e-4) for e in sdpa]
        part.check(
            f"flex_attention = SDPA, {short(dtype)}, window {window}, softcap {softcap}",
            ok=all(f <= b for f, b in zip(flex, bounds, strict=True)),
            what="output" + ", gradients of query, key, value" * part.on_gpu,
            flex_from_float32_sdpa=flex,
            sdpa_from_float32_sdpa=sdpa,
            first_call_seconds=seconds,
        )


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what was expected."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def short(dtype: torch.dtype) -> str:
    """``float32`` or ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def layouts_agree(part: Part, family: str) -> None:
    """Values and gradients of the three layouts, in float32 and bfloat16 autocast."""
    shape = dict(part.shape("1B"))
    if part.on_gpu:
        while shape["num_hidden_layers"] > 1 and (
            torch.cuda.mem_get_info()[0] < COMPARING_BYTES * parameters(shape)
        ):
            shape["num_hidden_layers"] //= 2
    model = part.model(shape, family).train()
    names = Objective.named("sso-online").sequences
    flat = [s for q in part.draws(names, shape, 1, 1)[0] for s in q.values()]
    flat = [EncodedSequence(s.prompt_ids[-300:], s.response_ids[:200]) for s in flat]
    batches = {
        "one by one": [pad([s], 0) for s in flat],
        "padded": [pad(flat, 0)],
        "tree": [tree.plant(flat)],
    }
    size = sum(len(s.response_ids) for s in flat)

    def walked(way: str, dtype: torch.dtype) -> Tensor:
        (tree.install if way == "tree" else tree.uninstall)(model)
        model.zero_grad()
        parts = []
        for batch in batches[way]:
            with torch.autocast(part.device.type, dtype, enabled=dtype != torch.float32):
                logps = batch_logps(model, batch.to(part.device))
            (logps.double().sum() / size).backward()
            parts.append(logps.detach().double())
        return torch.cat(parts)

    exact = walked("one by one", torch.float32)
    gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
    whole = float(torch.nn.utils.get_total_norm(gradient.values()))
    # how far a wrong token moves log-probs: what the tolerances must be far below
    tree.uninstall(model)
    with torch.no_grad():
        s = flat[0]
        wrong = EncodedSequence((1 + s.prompt_ids[0] % 1000, *s.prompt_ids[1:]), s.response_ids)
        moved = batch_logps(model, pad([wrong], 0).to(part.device)).double()
    moved_by = float((moved - exact[: len(s.response_ids)]).abs().mean())
    allowed = (0.0, 0.0)
    for dtype in (torch.float32, torch.bfloat16):
        for way in batches:
            if (way, dtype) == ("one by one", torch.float32):
                continue
            gap = (walked(way, dtype) - exact).abs()
            lost = [float((p.grad - gradient[n]).norm()) for n, p in model.named_parameters()]
            found = {
                "log_prob_largest": float(gap.max()),
                "log_prob_mean": float(gap.mean()),
                "gradient": math.hypot(*lost) / whole,
            }
            if dtype == torch.bfloat16 and way == "one by one":
                allowed = (found["log_prob_mean"], found["gradient"])
                part.put(f"bfloat16 one by one, {family}", found)
                continue
            if dtype == torch.float32:
                ok = found["log_prob_largest"] <= VALUE_TOLERANCE
                ok = ok and found["gradient"] <= GRADIENT_TOLERANCE
            else:
                ok = found["log_prob_mean"] <= BFLOAT16_FACTOR * allowed[0] + 1e-4
                ok = ok and found["gradient"] <= BFLOAT16_FACTOR * allowed[1] + 1e-4
            part.check(
                f"{way} = one by one, {family}, {short(dtype)}",
                ok=ok,
                layers=shape["num_hidden_layers"],
                **found,
                one_wrong_prompt_token_moves=moved_by,
            )


def parameters(shape: Mapping[str, Any]) -> int:
    """Roughly how many a model of this shape has."""
    d, size = shape["hidden_size"], shape["head_dim"]
    heads = 2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]
    layer = d * size * heads + 3 * d * shape["intermediate_size"]
    embeddings = 1 if shape["tie_word_embeddings"] else 2
    return int(shape["num_hidden_layers"] * layer + embeddings * d * shape["vocab_size"])


def trainer_of(part: Part, loaded: LoadedModel, task: Any, row_tokens: int, work: str) -> Any:
    """The trainer of a run, for single steps of all examples."""
    from selfsteer.training.trainer import RowBudget, RowTrainer

    count = len(task.examples)
    budget = RowBudget(count, row_tokens)
    settings = Optimisation(batch_size=count)
    return RowTrainer(loaded, task, settings, budget=budget, work=Path(work), seed=0)


def halving_changes_nothing(part: Part) -> None:
    """A step whose rows do not fit is done in smaller ones, and gives the same."""
    from selfsteer.training.preference import Example, PreferenceTask
    from selfsteer.training.trainer import RowBudget

    objective = Objective.named("pbaa")
    shape = part.shape("1B")
    examples = [
        Example(f"{i}", q, {n: torch.full((len(s.response_ids),), -3.0) for n, s in q.items()})
        for i, q in enumerate(part.draws(objective.sequences, shape, 1, 8)[0])
    ]
    tokens = sum(e.tokens() for e in examples)
    loaded = part.loaded(part.model(shape))
    with tempfile.TemporaryDirectory() as work:
        task = PreferenceTask(loaded, objective, examples)
        trainer = trainer_of(part, loaded, task, tokens, work)

        def step(row_tokens: int) -> dict[str, Any]:
            loaded.model.zero_grad()
            part.free()
            trainer.budget = RowBudget(len(examples), row_tokens)
            if part.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            loss = float(trainer.training_step(loaded.model, {"examples": examples}))
            grads = [p.grad for p in loaded.model.parameters()]
            return {
                "loss": loss,
                "gradient_norm": float(torch.nn.utils.get_total_norm(grads)),
                "row_tokens": trainer.budget.row_tokens,
                "reserved": torch.cuda.max_memory_reserved() if part.on_gpu else None,
            }

        roomy, small = step(tokens), step(tokens // 4)
        by_limit = part.on_gpu and not part.args.tiny
        with (
            memory_limit((roomy["reserved"] + small["reserved"]) / 2)
            if by_limit
            else too_small_for(loaded.model, tokens * 2 // 3)
        ):
            halved = step(tokens)
    part.check(
        "halved rows give the same step, bfloat16",
        ok=halved["row_tokens"] < tokens
        and all(
            abs(halved[n] - roomy[n]) <= bound * abs(roomy[n])
            for n, bound in (("loss", 2e-3), ("gradient_norm", 1e-2))
        ),
        forced="by a limit of the process's memory" if by_limit else "by an error in the forward",
        tokens=tokens,
        roomy=roomy,
        small=small,
        halved=halved,
    )


@contextmanager
def memory_limit(size: float) -> Any:
    """This process may hold so many bytes of the GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(size / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def too_small_for(model: Any, tokens: int) -> Any:
    """Forwards of more tokens fail as they do on a full GPU."""
    own = model.forward

    def forward(*args: Any, tree_row: Any = None, **kwargs: Any) -> Any:
        if tree_row is not None and tree_row[0].shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(*args, tree_row=tree_row, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        model.forward = own


# -- steps -----------------------------------------------------------------------------------------


def step_speed(part: Part) -> None:
    """An optimiser step's forward and backward: the released way, TRL, ours."""
    part.each(
        {
            "1B, pbaa": partial(step_case, part, "1B, pbaa", "1B", "pbaa", 8),
            "1B, sso-online": partial(step_case, part, "1B, sso-online", "1B", "sso-online", 4),
            "8B with LoRA, pbaa": partial(
                step_case, part, "8B with LoRA, pbaa", "8B", "pbaa", 2, lora=True
            ),
        }
    )


def step_case(
    part: Part, name: str, size: str, objective: str, queries: int, *, lora: bool = False
) -> None:
    """One model and objective; half the queries where the memory is too small."""
    if size == "8B" and part.on_gpu and not part.args.tiny:
        free = torch.cuda.mem_get_info()[0]
        if free < BIG_BYTES:
            part.skip(name, f"{free / 1e9:.0f} GB are free, and it needs {BIG_BYTES / 1e9:.0f}")
            return
    queries = 2 if part.args.tiny else queries
    while True:
        try:
            measured_steps(part, name, size, Objective.named(objective), queries, lora)
            return
        except torch.OutOfMemoryError:
            if queries == 1:
                raise
            part.skip(f"{name}, {queries} queries", "the GPU's memory is too small for one row")
        queries //= 2
        part.free()


def measured_steps(
    part: Part, name: str, size: str, objective: Objective, queries: int, lora: bool
) -> None:
    """Interleaved repeats of all rows, each on the same draw."""
    shape = part.shape(size)
    draws = part.draws(objective.sequences, shape, 3, queries)
    rows = [steps.RELEASED, steps.COMPACT, steps.OURS, steps.OURS_AND_REFERENCE]
    why = None if importlib.util.find_spec("trl") else "trl is not installed"
    why = "TRL is measured with full weights only" if lora else why
    if why:
        rows.remove(steps.COMPACT)
        part.skip(f"{name}, {steps.COMPACT}", why)
    model = part.model(shape).train()
    if lora:
        model, todo = lora_steps(objective, model, draws)
    else:
        todo = steps.steps_of(objective, model, draws, rows, torch.bfloat16)
    flat = [[s for q in draw for s in q.values()] for draw in draws]
    tokens = [sum(map(len, f)) for f in flat]
    # no gradients of the frozen weights: two thirds of the products
    share = 2 / 3 if lora else 1.0
    flops = [[share * f for f in steps.floor_flops(model.config, one)] for one in flat]
    seconds: dict[str, list[float]] = {row: [] for row in todo}
    peaks: dict[str, int | None] = {}
    floors: list[float] = []
    worst = {"loss": 0.0, "gradient_norm": 0.0}
    repeats, longest = (1, 0.0) if part.args.tiny else (6, 0.0)
    for repeat in range(-1, repeats):  # the first is a warm-up, on the longest draw
        if repeat > 0 and part.left() < longest:
            part.skip(f"{name}, repeats from {repeat + 1}", "the part's share of time is over")
            break
        begun = time.monotonic()
        d = tokens.index(max(tokens)) if repeat < 0 else repeat % len(draws)
        seen: dict[str, dict[str, float]] = {}
        for row, step in todo.items():
            model.zero_grad()
            loss, elapsed, peak = part.clocked(partial(step, d))
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            seen[row] = {"loss": loss, "gradient_norm": norm}
            if repeat < 0:
                peaks[row] = peak
            else:
                seconds[row].append(elapsed)
        for row, figures in seen.items():
            if row == steps.COMPACT and objective.name != "pbaa":
                continue  # another loss on the same pairs
            for kind, value in figures.items():
                base = seen[steps.OURS][kind]
                worst[kind] = max(worst[kind], abs(value - base) / abs(base))
        if repeat >= 0:
            width = sum(map(len, {s.prompt_ids for s in flat[d]}))
            width += sum(len(s.response_ids) - 1 for s in flat[d])
            floors.append(floor_seconds(part, shape, width, flops[d]))
            longest = max(longest, time.monotonic() - begun)
    part.check(
        f"rows of a step agree, {name}",
        ok=worst["loss"] <= STEP_LOSS and worst["gradient_norm"] <= STEP_NORM,
        relative_difference=worst,
    )
    done = [tokens[i % len(draws)] for i in range(len(floors))]
    ours = seconds[steps.OURS]
    part.put(
        name,
        {
            "queries": queries,
            "repeats": len(floors),
            "tokens": tokens,
            "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "rows": {
                row: {
                    **steps.spread("seconds", t),
                    **steps.spread("tokens_per_s", [n / s for n, s in zip(done, t, strict=True)]),
                    **steps.spread("ours_faster", [s / o for s, o in zip(t, ours, strict=True)]),
                    "peak_bytes": peaks[row],
                }
                for row, t in seconds.items()
            },
            "floor": {
                **steps.spread("seconds", floors),
                **steps.spread("share", [f / o for f, o in zip(floors, ours, strict=True)]),
            },
        },
    )


def floor_seconds(
    part: Part, shape: Mapping[str, Any], width: int, flops: Sequence[float]
) -> float:
    """The step's products at the rate of plain ones in bfloat16, measured now."""
    times = 1 if part.args.tiny else 10
    hidden = shape["hidden_size"]
    rate = partial(steps.matmul_rate, device=part.device, dtype=torch.bfloat16, times=times)
    body = rate(width, hidden, shape["intermediate_size"])
    head = rate(min(width, 1024), hidden, shape["vocab_size"])
    return flops[0] / body + flops[1] / head


def lora_steps(objective: Objective, model: Any, draws: Any) -> tuple[Any, dict[str, Any]]:
    """The steps of a model with adapters; the reference is the same model without them."""
    from selfsteer.models.save import add_lora

    device = next(model.parameters()).device
    tree.install(model)
    wrapped = add_lora(model, Lora()).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_B" in n:  # zero at the start: policy and reference would be the same
                p.normal_(std=0.01)
    half = partial(steps.under, device, torch.bfloat16)
    padded, rows = half(steps.full_logits(wrapped)), half(steps.own(wrapped, "tree"))

    def without(scorer: Any) -> Any:
        def sums(sequences: Sequence[EncodedSequence]) -> Tensor:
            with wrapped.disable_adapter(), torch.no_grad():
                return scorer(sequences)

        return sums

    keys = steps.groups_of(objective, len(draws[0]), "all")[0]
    tables = [
        dict(zip(keys, without(rows)([d[q][n] for n, q in keys]).unbind(), strict=True))
        for d in draws
    ]

    def step(by: str, policy: Any, frozen: Any = None) -> Any:
        return lambda d: steps.run_step(objective, draws[d], by, policy, frozen or tables[d])

    return wrapped, {
        steps.RELEASED: step("pair", padded, without(padded)),
        steps.OURS: step("all", rows),
        steps.OURS_AND_REFERENCE: step("all", rows, without(rows)),
    }


# -- distillation ----------------------------------------------------------------------------------


def distillation(part: Part) -> None:
    """The teacher pass of contrast distillation, then the step on what it said."""
    from safetensors.torch import save_file

    from selfsteer.models.teacher import Teacher, lessons
    from selfsteer.training.preference import DistilTask, Example

    objective, settings = ContrastObjective(), Contrast()
    shape = part.shape("1B")
    count, repeats = (4, 1) if part.args.tiny else (32, 3)
    answers = part.draws(objective.read, shape, 1, count)[0]
    read = [[a[name] for name in objective.read] for a in answers]
    teacher = Teacher(
        part.loaded(part.model(shape, dtype=torch.bfloat16), "padded"),
        objective,
        settings.top_k,
        settings.coverage,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "targets.safetensors"
        size, rates = sum(len(s) for a in read for s in a), []
        teacher.teach(read[:2])
        for _ in range(repeats):
            found, seconds, peak = part.clocked(partial(teacher.teach, read))
            rates.append(size / seconds)
        part.put(
            "teacher",
            {
                "answers": count,
                "tokens": size,
                **steps.spread("tokens_per_s", rates),
                "peak_bytes": peak,
                "entries_per_token": len(found["index"]) / len(found["kept"]),
                "covered": float(found["covered"].mean()),
            },
        )
        save_file(found, path)
        del teacher
        part.free()
        loaded = part.loaded(part.model(shape))
        examples = [
            Example(f"{i}", {n: a[n] for n in objective.sequences}, lesson=lesson)
            for i, (a, lesson) in enumerate(zip(answers, lessons(path), strict=True))
        ]
        trainer = trainer_of(part, loaded, DistilTask(loaded, objective, examples), 16_384, folder)
        size, rates, losses = sum(e.tokens() for e in examples), [], []
        for repeat in range(-1, repeats):
            loaded.model.zero_grad()
            work = partial(trainer.training_step, loaded.model, {"examples": examples})
            loss, seconds, peak = part.clocked(work)
            losses.append(float(loss))
            if repeat >= 0:
                rates.append(size / seconds)
    part.put(
        "step",
        {"tokens": size, **steps.spread("tokens_per_s", rates), "peak_bytes": peak},
    )
    # the student starts as its teacher: the loss is that of the contrast, neither zero nor broken
    part.check(
        "distillation: the loss is finite and repeats",
        ok=all(math.isfinite(x) and abs(x - losses[0]) <= 0.02 * abs(losses[0]) for x in losses),
        losses=losses,
    )


# -- sampling --------------------------------------------------------------------------------------


def sampling(part: Part) -> None:
    """The transformers engine and ``generate`` on the same prompts, in turns."""
    from selfsteer.engines.base import Request, SamplingParams
    from selfsteer.engines.transformers import TransformersEngine

    count, tokens, repeats = (6, 8, 1) if part.args.tiny else (64, 256, 3)
    rng = random.Random(0)
    lines = Path(resolve("package:selfsteer.testbed/queries/align.jsonl")).read_text("utf-8")
    texts = [json.loads(line)["prompt"] for line in lines.splitlines()]
    prompts = [
        (Message("user", " ".join(rng.choices(texts, k=rng.randint(1, 30)))),) for _ in range(count)
    ]
    model = part.model(part.shape("1B"), dtype=torch.bfloat16).eval()
    model.generation_config = hf.GenerationConfig()
    engine = TransformersEngine(part.loaded(model), count)
    settings = SamplingParams(0.7, 0.8, tokens)

    def ours(workload: str) -> int:
        asked = prompts if workload == "prompts" else prompts[:2]
        requests = [Request(f"{i}", p, i) for i, p in enumerate(asked)]
        return sum(c.completion_tokens for c in engine.generate(requests, settings))

    ids = [list(engine.loaded.chat.prompt_ids(p)) for p in prompts]
    plan = {
        "ids": {"prompts": ids, "warm up": ids[:2]},
        "batch": count,
        "tokens": tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "stops": engine.stop_ids,
    }
    generate = of_transformers(plan, continuous=False, model=model)
    ways = {"selfsteer": ours, "transformers generate": generate}
    for ask in ways.values():
        ask("warm up")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    longest = 0.0
    for repeat in range(repeats):
        if part.left() < longest:
            part.skip(f"sampling, repeats from {repeat + 1}", "the part's share of time is over")
            break
        begun = time.monotonic()
        for name, ask in ways.items():
            runs[name].append(timed(ask, "prompts"))
        longest = max(longest, time.monotonic() - begun)
    rates = {n: [r["tokens"] / r["seconds"] for r in found] for n, found in runs.items()}
    part.put(
        "sampling",
        {
            "prompts": count,
            "prompt_tokens": sum(map(len, ids)),
            "new_tokens": tokens,
            "rows": {
                name: {
                    **steps.spread("tokens_per_s", rate),
                    **steps.spread(
                        "ours_faster",
                        [a / b for a, b in zip(rates["selfsteer"], rate, strict=True)],
                    ),
                    "tokens": [r["tokens"] for r in runs[name]],
                }
                for name, rate in rates.items()
            },
        },
    )


# -- sharding --------------------------------------------------------------------------------------


def sharding(part: Part) -> None:
    """One rank under torchrun with FSDP2 (NCCL; gloo on a CPU), and the same training without."""
    from safetensors.torch import load_file

    import selfsteer
    from selfsteer.run.ranks import environment_of
    from selfsteer.stages.offline import train_offline

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = [
            {"prompt": f"What is {i}?", "chosen": "A number. " * (1 + i % 3), "rejected": "No."}
            for i in range(8)
        ]
        path = folder / "pairs.jsonl"
        path.write_text("".join(json.dumps(p) + "\n" for p in pairs))
        settings = {"objective": "pbaa", "device": part.device.type, "dtype": "float32",
                    "learning_rate": 1e-4, "warmup": 0, "batch_size": 4}  # fmt: skip
        config = TrainConfig(**settings, output=str(folder / "plain"))  # type: ignore[arg-type]
        train_offline(TESTBED, path, config)
        words = [f"{k}={v}" for k, v in settings.items()]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
            "-m", "selfsteer", "train", TESTBED, str(path), *words, f"output={folder / 'fsdp2'}",
        ]  # fmt: skip
        source = str(Path(selfsteer.__file__).parents[1])
        env = {**os.environ, **environment_of("fsdp2", 1), "PYTHONPATH": source}
        if "PYTHONPATH" in os.environ:
            env["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        ended = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=max(part.left(), 1)
        )
        if ended.returncode:
            said = ended.stderr.rstrip().splitlines()[-LINES:]
            part.check("one rank under FSDP2 ends", ok=False, exit_code=ended.returncode, said=said)
            return
        start, plain, sharded = (
            load_file(Path(f) / "model.safetensors")
            for f in (resolve(TESTBED), folder / "plain", folder / "fsdp2")
        )

        def gaps(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[Tensor]:
            return [(a[n].double() - b[n].double()).abs().flatten() for n in a]

        gap, moved = torch.cat(gaps(plain, sharded)), torch.cat(gaps(plain, start))
        part.check(
            "one rank under FSDP2 ends with the weights of a plain training",
            ok=plain.keys() == sharded.keys()
            and float(gap.max()) <= 2e-5
            and float(gap.mean()) <= 1e-2 * float(moved.mean()),
            backend="nccl" if part.on_gpu else "gloo",
            largest_difference=float(gap.max()),
            mean_difference=float(gap.mean()),
            training_moved_mean=float(moved.mean()),
        )


# -- all of it -------------------------------------------------------------------------------------

#: What is done, and the share of the time that it may take.
PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    "card": (card, 0.05),
    "correctness": (correctness, 0.35),
    "steps": (step_speed, 0.30),
    "distillation": (distillation, 0.10),
    "sampling": (sampling, 0.10),
    "sharding": (sharding, 0.10),
}


def work(args: argparse.Namespace) -> None:
    """A part's own process: waits for the seconds that it gets, then works."""
    transformers_logging.set_verbosity_error()
    # TRL calls two arguments of transformers by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if args.device == "cpu":
        warnings.filterwarnings("ignore", "flex_attention called without")
    write_atomic(args.found, json.dumps(nothing()))  # all is imported
    line = sys.stdin.readline()
    if not line:
        return
    part = Part(args, args.found, float(line))
    if part.on_gpu:
        torch.cuda.set_device(0)
        # beyond the limit flex_attention would silently run uncompiled
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    try:
        PARTS[args.part][0](part)
    except Exception as e:
        part.error(args.part, e)
    if tree._flex_errors:
        part.check("flex_attention is what ran", ok=False, errors=tree._flex_errors)
    part.save()


def start(name: str, words: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """The process of a part, which imports while the part before it runs."""
    found = str(folder / f"{name}.json")
    command = [sys.executable, __file__, *words, "--part", name, "--found", found]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a part's process and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finished(process: subprocess.Popen[str], path: Path, seconds: float) -> dict[str, Any]:
    """Lets a part work for so long; what it found until it ended or was ended."""
    assert process.stdin is not None
    begun = time.monotonic()
    while not path.exists() and process.poll() is None and time.monotonic() - begun < IMPORT_S:
        time.sleep(0.05)
    begun, over = time.monotonic(), False
    with suppress(BrokenPipeError):  # it has ended already; its exit code says how
        process.stdin.write(f"{seconds}\n")
        process.stdin.close()
    try:
        process.wait(seconds + GRACE_S)
    except subprocess.TimeoutExpired:
        over = True
        stop(process)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else nothing()
    if over:
        found["skipped"]["the rest"] = f"ended after {seconds:.0f} s, the part's share of the time"
    elif process.returncode:
        found["errors"]["process"] = [f"ended with exit code {process.returncode}"]
    return {"share_s": seconds, "seconds": time.monotonic() - begun, **found}


def run(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """All parts in their order; writes both files after each."""
    end = time.monotonic() + args.minutes * 60 - GRACE_S
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "minutes": args.minutes,
        "device": args.device,
        "tiny": args.tiny,
        "parts": {},
    }
    names = list(args.only or PARTS)
    with tempfile.TemporaryDirectory() as folder:
        coming = start(names[0], words, Path(folder))
        try:
            for i, name in enumerate(names):
                current = coming
                if i + 1 < len(names):
                    coming = start(names[i + 1], words, Path(folder))
                share = PARTS[name][1] / sum(PARTS[n][1] for n in names[i:])
                seconds = max(share * (end - time.monotonic()), 1.0)
                path = Path(folder) / f"{name}.json"
                try:
                    result["parts"][name] = finished(current, path, seconds)
                finally:
                    stop(current)
                write_atomic(args.output, json.dumps(result, indent=1) + "\n")
                write_atomic(args.output.with_suffix(".md"), page(result))
        finally:
            stop(coming)
    return result


def good(result: Mapping[str, Any]) -> bool:
    """Whether no check failed and nothing broke."""
    parts = result["parts"].values()
    return all(c["ok"] for p in parts for c in p["checks"]) and not any(p["errors"] for p in parts)


# -- the page --------------------------------------------------------------------------------------


def page(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    parts = result["parts"]
    seen = parts.get("card", {}).get("figures", {})
    known = seen.get("versions", {})
    about = [result["date"], seen.get("name", result["device"])]
    if "memory_bytes" in seen:
        about += [f"{seen['memory_bytes'] / 2**30:.0f} GiB", f"CUDA {seen['cuda']}"]
    about += [f"{n} {known[n]}" for n in ("python", "torch", "transformers") if n in known]
    lines = [
        "# What a GPU says",
        "",
        f"{', '.join(about)}. Made by `python benchmarks/gpu.py` with {result['minutes']:g} minutes"
        + (" and tiny models: the figures mean nothing, the checks do." if result["tiny"] else ".")
        + " Random weights; how everything is measured is in the script's docstring, all figures "
        "are in the JSON file beside this page.",
        "",
        *(
            f"- Plain products in {kind}: {seen[key] / 1e12:,.1f} TFLOP/s."
            for kind in ("bfloat16", "float32")
            if (key := f"flops_per_second_{kind}") in seen
        ),
        "",
    ]
    checks = [c for p in parts.values() for c in p["checks"]]
    if checks:
        lines += ["## Checks", "", "| check | | figures |", "|---|---|---|"]
        for c in checks:
            rest = ", ".join(f"{k} {told(v)}" for k, v in c.items() if k not in ("name", "ok"))
            lines.append(f"| {c['name']} | {'passed' if c['ok'] else '**failed**'} | {rest} |")
        lines.append("")
    for name, case in parts.get("steps", {}).get("figures", {}).items():
        lines += [
            f"## A step: {name}",
            "",
            f"bfloat16 autocast over {case['weights_bytes'] / 2**30:,.1f} GiB of weights, "
            f"{case['queries']} queries a step, {case['repeats']} interleaved repeats after a "
            "warm-up on the largest draw, whose peak memory is shown (above the models, gradients "
            "included). Medians, least and most.",
            "",
            "| | tokens/s | ours is faster by | peak, GiB |",
            "|---|---:|---:|---:|",
            *(
                f"| {row} | {spread(r, 'tokens_per_s', ',.0f')} | "
                f"{spread(r, 'ours_faster', '.2f')} | {gib(r['peak_bytes'])} |"
                for row, r in case["rows"].items()
            ),
            "",
            f"The products alone would take {case['floor']['share']:.0%} of our time.",
            "",
        ]
    taught = parts.get("distillation", {}).get("figures", {})
    if taught:
        lines += ["## Contrast distillation", "", "| | tokens/s | peak, GiB |", "|---|---:|---:|"]
        for name, r in taught.items():
            lines.append(
                f"| {name} | {spread(r, 'tokens_per_s', ',.0f')} | {gib(r['peak_bytes'])} |"
            )
        lines.append("")
    for case in parts.get("sampling", {}).get("figures", {}).values():
        lines += [
            "## Sampling",
            "",
            f"{case['prompts']} prompts of {case['prompt_tokens']:,} tokens in one batch, "
            f"{case['new_tokens']} new tokens each, temperature 0.7, top-p 0.8, bfloat16 weights.",
            "",
            "| | tokens/s | ours is faster by |",
            "|---|---:|---:|",
            *(
                f"| {row} | {spread(r, 'tokens_per_s', ',.0f')} | "
                f"{spread(r, 'ours_faster', '.2f')} |"
                for row, r in case["rows"].items()
            ),
            "",
        ]
    skipped = [
        f"- {name}: {what}: {why}."
        for name, p in parts.items()
        for what, why in p["skipped"].items()
    ]
    lines += ["## Skipped", "", *(skipped or ["Nothing."])]
    for name, p in parts.items():
        for what, said in p["errors"].items():
            lines += ["", f"## Error in {name}: {what}", "", "```", *said, "```"]
    times = ", ".join(f"{n} {p['seconds']:.0f} of {p['share_s']:.0f}" for n, p in parts.items())
    lines += ["", f"Seconds of each part and its share: {times}."]
    return "\n".join(lines).rstrip() + "\n"


def spread(row: Mapping[str, float], name: str, form: str) -> str:
    """``median (least-most)``."""
    low, high = row[f"{name}_min"], row[f"{name}_max"]
    return f"{row[name]:{form}} ({low:{form}}–{high:{form}})"


def gib(size: int | None) -> str:
    """A size, or nothing where a CPU does not count it."""
    return "" if size is None else f"{size / 2**30:.1f}"


def told(value: Any) -> str:
    """A figure of a check in a table's cell."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "; ".join(f"{k} {told(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(map(told, value))
    return str(value).replace("|", "\\|")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, short texts")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """Runs all parts and writes what they found."""
    words = sys.argv[1:]
    args = arguments(words)
    if args.part:
        work(args)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no GPU here. To try the script without one: --device cpu --tiny"
        )
    result = run(args, words)
    print(page(result))
    raise SystemExit(0 if good(result) else 1)


if __name__ == "__main__":
    main()
