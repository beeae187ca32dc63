"""Time and memory of an optimiser step: the released way, TRL and ours, side by side.

    python benchmarks/step_speed.py     # about half an hour; goes on where it was stopped
    python benchmarks/step_speed.py --repeats 2 --vocabularies 4096 --only pbaa --output /tmp/trial
    python benchmarks/step_speed.py --model FOLDER --pairs FILE     # a real model, against TRL

A step is forward and backward of a few queries; collating is timed, the optimiser's update is the
same for every row and measured apart. Rows are interleaved in one process. Lengths are drawn like
UltraFeedback's (query median 120 tokens, principles 150-350, responses median 330, long tails),
divided by ``--scale``; several draws take turns, so that no single one decides. The model is a
random Llama in float32, the reference the same weights with a little noise.

TRL's loss differs from sso-online's weighting and from the NLL of sso; it gets the equivalent pairs
(each term's, under its context) in one batch, and only the cost is compared. "TRL compact" is TRL
with the choice of valid positions that it makes on a GPU forced on.

With ``--model`` the step is DPO's (objective pbaa) on pairs of a file and a model of yours, ours
against TRL's; every row's loss and gradient norm must be ours.
"""

import argparse
import copy
import ctypes
import gc
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import selfsteer
from selfsteer.data.digests import derive_seed, digest
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.reading import import_records
from selfsteer.data.records import Preference
from selfsteer.errors import DataError, NumericsError
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.load import CPU, load_model
from selfsteer.models.score import batch_logps, pack, pad, settle_layout, sums_by_row
from selfsteer.models.tree import TreeRow
from selfsteer.objectives import Objective, steering_loss
from selfsteer.recipe.sections import Policy, resolve_path
from selfsteer.run.folder import versions
from selfsteer.terminal import progress_bar

ROOT = Path(__file__).parent
OBJECTIVES = ("sso-online", "sso", "pbaa")

RELEASED, COMPACT = "released", "TRL compact, reference precomputed"
OURS, OURS_AND_REFERENCE = "ours", "ours, reference pass counted in"
#: Every row: what it does. Those marked * are measured in every case.
ROWS = {
    RELEASED: "* padded, one forward per pair, full float32 logits, a reference in the loop",
    "released, reference cached": "the reference is a table",
    "released, response-only head": "only response positions are projected, logits kept",
    "released, packed": "one row without padding, nothing shared, every position projected",
    "released, prompts shared": "one tree per pair and query, every position projected",
    "TRL": "one padded batch of all pairs, every position projected in chunks",
    "TRL, reference precomputed": "the same with precompute_ref_log_probs",
    COMPACT: "* and only valid positions projected, as on a GPU",
    "padded, reference cached": "ours with layout: padded",
    "packed, nothing shared": "ours with each sequence a tree of its own",
    OURS: "* trees in one row, response-only head, reference cached",
    OURS_AND_REFERENCE: "* one epoch: each reference score is used once",
}
EVERYWHERE = tuple(name for name, text in ROWS.items() if text.startswith("*"))
#: Memory is measured on one case, each of these rows in a fresh process.
MEMORY_ROWS = (RELEASED, COMPACT, OURS, OURS_AND_REFERENCE)
MEMORY_OBJECTIVE = "sso-online"
#: With a model of yours: ours first, which the others must equal.
REAL_ROWS = (OURS, OURS_AND_REFERENCE, "TRL", "TRL, reference precomputed", COMPACT)
REAL_OBJECTIVE = "pbaa"
#: Largest relative differences to the released step that pass as float32 rounding.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3
#: Standard deviation of what is added to the policy's weights to make the reference's.
NOISE = 0.002

#: A sequence of a step: its name and the number of its query.
Key = tuple[str, int]
Query = Mapping[str, EncodedSequence]
#: Sums of log-probs (N,) of N sequences, scored in one forward.
Scorer = Callable[[Sequence[EncodedSequence]], Tensor]
#: One step on one draw; returns the loss.
Step = Callable[[int], float]


class Apart(tuple[int, ...]):
    """Prompt ids that equal no others, so that the tree layout shares nothing."""

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__


def rows_of(objective: str, vocabulary: int) -> tuple[str, ...]:
    """All rows for the objective of six sequences where time allows; else the main ones."""
    if objective != "sso-online" or vocabulary > 32_768:
        return EVERYWHERE
    return tuple(name for name in ROWS if name != "TRL" or vocabulary <= 4096)


def cases_of(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(objective, vocabulary): all, but at large vocabularies only what was asked for by name."""
    return [
        (name, vocabulary)
        for vocabulary in args.vocabularies
        for name in args.only or (OBJECTIVES if vocabulary <= 32_768 else OBJECTIVES[:1])
    ]


def draw_query(
    rng: random.Random, names: Sequence[str], vocabulary: int, scale: int
) -> dict[str, EncodedSequence]:
    """Random ids; equal contexts and responses are equal across sequences."""

    def tail(median: float, sigma: float) -> int:
        return max(4, round(rng.lognormvariate(0, sigma) * median / scale))

    query = tail(120, 0.8)
    sizes = {
        "plain": query,
        "good": query + rng.randint(150 // scale, 350 // scale),
        "bad": query + rng.randint(150 // scale, 350 // scale),
        "y+": min(tail(330, 0.6), 1500 // scale),
        "y-": min(tail(330, 0.6), 1500 // scale),
        "yo": min(tail(330, 0.6), 1500 // scale),
    }
    ids = {k: tuple(rng.randrange(1, vocabulary) for _ in range(n)) for k, n in sizes.items()}
    texts = {"good": "y+", "bad": "y-", "plain": "yo"}
    return {
        name: EncodedSequence(ids[name.split("/")[0]], ids[texts[name.split("/")[1]]])
        for name in names
    }


def draw_queries(args: argparse.Namespace, names: Sequence[str], vocabulary: int) -> list[Any]:
    """The queries of each draw; equal for every row and every process."""
    return [
        [
            draw_query(random.Random(derive_seed(args.seed, d, q)), names, vocabulary, args.scale)
            for q in range(args.queries)
        ]
        for d in range(args.draws)
    ]


def floor_flops(config: Any, sequences: Sequence[EncodedSequence]) -> tuple[int, int]:
    """Floating point operations of forward and backward over the unique tokens: (body, head).

    A product of (m, k) and (k, n) costs 2mkn, backward twice the forward. Body: the linear layers,
    and the attention scores and sums over the keys that each token may see. Head: the projection
    at positions that predict a response token. Norms, activations and soft-max are left out.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    linear = hidden * head_dim * (2 * heads + 2 * groups) + 3 * hidden * config.intermediate_size
    prompts = {s.prompt_ids for s in sequences}
    # the last token of a response predicts nothing and is not computed
    branches = [(len(s.prompt_ids), len(s.response_ids) - 1) for s in sequences]
    tokens = sum(map(len, prompts)) + sum(b for _, b in branches)
    keys = sum(n * (n + 1) // 2 for n in map(len, prompts))
    keys += sum(b * n + b * (b + 1) // 2 for n, b in branches)
    responses = sum(len(s.response_ids) for s in sequences)
    forward = layers * (2 * linear * tokens + 4 * heads * head_dim * keys)
    return 3 * forward, 3 * 2 * hidden * config.vocab_size * responses


def matmul_rate(
    rows: int,
    inner: int,
    outer: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    times: int = 1,
) -> float:
    """Measured FLOP/s of a linear layer's three products: output, gradients of input and weight."""
    x, w, y = (
        torch.randn(*size, device=device, dtype=dtype)
        for size in ((rows, inner), (outer, inner), (rows, outer))
    )
    products = [(a, b, a @ b) for a, b in ((x, w.T), (y, w), (y.T, x))]
    settle_clock(device)
    start = time.perf_counter()
    for _ in range(times):
        for a, b, out in products:
            torch.mm(a, b, out=out)
    settle_clock(device)
    return times * 6 * rows * inner * outer / (time.perf_counter() - start)


def settle_clock(device: torch.device) -> None:
    """Waits until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of(model: Any) -> torch.device:
    """Where a model's weights lie."""
    found: torch.device = next(model.parameters()).device
    return found


def under(device: torch.device, dtype: torch.dtype, scorer: Scorer) -> Scorer:
    """The scorer with its forward under autocast, as `LoadedModel.precision`; float32: as it is."""
    if dtype == torch.float32:
        return scorer

    def sums(sequences: Sequence[EncodedSequence]) -> Tensor:
        with torch.autocast(device.type, dtype):
            return scorer(sequences)

    return sums


def full_logits(model: Any) -> Scorer:
    """The released way: all logits of the padded batch, in float32."""

    def sums(sequences: Sequence[EncodedSequence]) -> Tensor:
        batch = pad(sequences, 0).to(device_of(model))
        logits = model(
            input_ids=batch.input_ids_NT, attention_mask=batch.attention_mask_NT, use_cache=False
        ).logits.float()
        logps = logits.log_softmax(-1)[batch.row, batch.position, batch.target]
        return sums_by_row(logps, batch.row, len(sequences))

    return sums


def response_head(model: Any) -> Scorer:
    """Padded, but only positions that predict a response token meet the vocabulary."""

    def sums(sequences: Sequence[EncodedSequence]) -> Tensor:
        batch = pad(sequences, 0).to(device_of(model))
        hidden = model.get_decoder()(
            input_ids=batch.input_ids_NT, attention_mask=batch.attention_mask_NT, use_cache=False
        ).last_hidden_state
        logits_RV = F.linear(hidden[batch.row, batch.position], model.lm_head.weight).float()
        logps = -F.cross_entropy(logits_RV, batch.target, reduction="none")
        return sums_by_row(logps, batch.row, len(sequences))

    return sums


def own(model: Any, layout: str, *, share: bool = True, every_position: bool = False) -> Scorer:
    """Our scorer, or with a trick taken away.

    Args:
        model: settled for the layout.
        layout: ``tree`` or ``padded``.
        share: False makes each sequence a tree of its own.
        every_position: projects prompt positions too, and forgets them.
    """

    def sums(sequences: Sequence[EncodedSequence]) -> Tensor:
        if not share:
            sequences = [EncodedSequence(Apart(s.prompt_ids), s.response_ids) for s in sequences]
        batch = pack(sequences, layout, 0).to(device_of(model))
        wanted = len(batch.row)
        asked = batch
        if isinstance(batch, TreeRow):
            size = batch.input_ids_1T.shape[1]
            if not share and size != sum(map(len, sequences)) - len(sequences):
                raise RuntimeError("prompts were shared in a row that should share none")
            if every_position:
                others = torch.ones(size, dtype=torch.bool, device=batch.position.device)
                others[batch.position] = False
                extra = others.nonzero().squeeze(1)
                zeros = torch.zeros_like(extra)
                asked = batch._replace(
                    row=torch.cat([batch.row, zeros]),
                    position=torch.cat([batch.position, extra]),
                    target=torch.cat([batch.target, zeros]),
                )
        return sums_by_row(batch_logps(model, asked)[:wanted], batch.row, len(sequences))

    return sums


def groups_of(objective: Objective, queries: int, by: str) -> list[list[Key]]:
    """What is scored in one forward: a ``pair`` of all queries, of one ``query``, or ``all``."""
    if by == "all":
        return [[(name, q) for name in objective.sequences for q in range(queries)]]
    pairs = [
        [[(name, q) for name in term.sequences] for q in range(queries)] for term in objective.terms
    ]
    if by == "query":
        return [group for term in pairs for group in term]
    return [[key for group in term for key in group] for term in pairs]


def run_step(
    objective: Objective,
    queries: Sequence[Query],
    by: str,
    policy: Scorer,
    reference: Scorer | Mapping[Key, Tensor],
) -> float:
    """Forward of policy and reference, group by group, then one backward."""
    found: dict[Key, Tensor] = {}
    frozen: dict[Key, Tensor] = {}
    for group in groups_of(objective, len(queries), by):
        sequences = [queries[q][name] for name, q in group]
        found.update(zip(group, policy(sequences).unbind(), strict=True))
        if isinstance(reference, Mapping):
            frozen.update((key, reference[key]) for key in group)
        else:
            with torch.no_grad():
                frozen.update(zip(group, reference(sequences).unbind(), strict=True))

    def by_name(values: Mapping[Key, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.stack([values[name, q] for q in range(len(queries))])
            for name in objective.sequences
        }

    policies = by_name(found)
    lengths = {
        n: torch.tensor([len(q[n].response_ids) for q in queries], device=policies[n].device)
        for n in queries[0]
    }
    loss = steering_loss(objective, policies, by_name(frozen), lengths).loss
    loss.backward()
    return float(loss.detach())


def twin(model: Any) -> Any:
    """Another module around the same parameters: a way of calling that leaves the first alone."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def build(
    objective: Objective, vocabulary: int, args: argparse.Namespace, rows: Sequence[str]
) -> tuple[Any, list[Any], dict[str, Step]]:
    """The policy, the draws, and the steps by row."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).train()
    draws = draw_queries(args, objective.sequences, vocabulary)
    return model, draws, steps_of(objective, model, draws, rows)


def build_real(
    objective: Objective, args: argparse.Namespace, rows: Sequence[str]
) -> tuple[Any, list[Any], dict[str, Step]]:
    """The same for a model and pairs of yours; pairs that are too long or not drawn stay out."""
    torch.manual_seed(args.seed)
    source = resolve_path(args.model)
    loaded = load_model(source, Policy(model=source, device="cpu"))
    queries = []
    for record in import_records(args.pairs, trainable=True).records:
        triple = record.to_triple() if isinstance(record, Preference) else record
        query = {name: loaded.chat.sequence(triple, name) for name in objective.sequences}
        if max(map(len, query.values())) <= args.max_tokens:
            queries.append(query)
    size = args.queries * args.draws
    if len(queries) < size:
        raise DataError(
            f"{args.pairs} has {len(queries)} pairs of at most {args.max_tokens} tokens, and "
            f"{args.draws} draws of {args.queries} need {size}."
        )
    random.Random(args.seed).shuffle(queries)
    draws = [queries[i : i + args.queries] for i in range(0, size, args.queries)]
    model = loaded.model.train()
    return model, draws, steps_of(objective, model, draws, rows)


def steps_of(
    objective: Objective,
    model: Any,
    draws: list[Any],
    rows: Sequence[str],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Step]:
    """The steps by row; the reference is the policy with a little noise, forwards are in dtype."""
    trees = twin(model)
    settle_layout(trees, "tree", [])
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for p in reference.parameters():
        p.add_(torch.randn_like(p), alpha=NOISE)
    tree_reference = twin(reference)
    settle_layout(tree_reference, "tree", [])

    keys, device = groups_of(objective, len(draws[0]), "all")[0], device_of(model)
    score = under(device, dtype, own(tree_reference, "tree"))
    with torch.no_grad():
        tables = [
            dict(zip(keys, score([d[q][n] for n, q in keys]).unbind(), strict=True)) for d in draws
        ]

    def step(by: str, policy: Scorer, frozen: Scorer | None = None) -> Step:
        policy = under(device, dtype, policy)
        frozen = frozen and under(device, dtype, frozen)
        return lambda d: run_step(objective, draws[d], by, policy, frozen or tables[d])

    apart = {"share": False, "every_position": True}
    steps = {
        RELEASED: step("pair", full_logits(model), full_logits(reference)),
        "released, reference cached": step("pair", full_logits(model)),
        "released, response-only head": step(
            "pair", response_head(model), response_head(reference)
        ),
        "released, packed": step(
            "all", own(trees, "tree", **apart), own(tree_reference, "tree", **apart)
        ),
        "released, prompts shared": step(
            "query",
            own(trees, "tree", every_position=True),
            own(tree_reference, "tree", every_position=True),
        ),
        "padded, reference cached": step("all", own(twin(model), "padded")),
        "packed, nothing shared": step("all", own(trees, "tree", share=False)),
        OURS: step("all", own(trees, "tree")),
        OURS_AND_REFERENCE: step("all", own(trees, "tree"), own(tree_reference, "tree")),
    }
    if any(name.startswith("TRL") for name in rows):
        steps |= trl_steps(objective, draws, model, reference, rows, dtype)
    return {name: steps[name] for name in rows}


def trl_steps(
    objective: Objective,
    draws: Sequence[Any],
    model: Any,
    reference: Any,
    rows: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, Step]:
    """TRL's own collator, loss and backward on the pairs of every term."""
    device = device_of(model).type
    os.environ["TQDM_DISABLE"] = "1"
    import datasets
    import trl.trainer.utils as trl_utils
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)

    class Tokenised(DPOTrainer):
        """Takes records of token ids as they are."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return super().compute_loss(*args, **kwargs)

    pairs = [
        [{"prompt_ids": list(q[a].prompt_ids), "chosen_ids": list(q[a].response_ids),
          "rejected_ids": list(q[b].response_ids)}
         for a, b in (t.sequences for t in objective.terms) for q in draw]
        for draw in draws
    ]  # fmt: skip
    size = len(pairs[0])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, "<pad>")),
        pad_token="<pad>",
        eos_token="<pad>",
    )

    def trainer(precompute: bool) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            made = Tokenised(
                model=twin(model),
                ref_model=twin(reference),
                args=DPOConfig(
                    output_dir=folder,
                    beta=objective.base.beta,
                    max_length=None,
                    per_device_train_batch_size=size,
                    precompute_ref_log_probs=precompute,
                    gradient_checkpointing=False,
                    bf16=False,
                    use_cpu=device == "cpu",
                    report_to=[],
                ),
                train_dataset=datasets.Dataset.from_list([p for draw in pairs for p in draw]),
                processing_class=tokenizer,
            )
        made.current_gradient_accumulation_steps = 1
        records = list(made.train_dataset)
        made.batches = [records[d * size : (d + 1) * size] for d in range(len(draws))]
        return made

    def step(made: Any, compact: bool = False) -> Step:
        def one(d: int) -> float:
            choose = (lambda device: True) if compact else trl_utils._use_triton
            with patch.object(trl_utils, "_use_triton", choose):
                return float(made.training_step(made.model, made.data_collator(made.batches[d])))

        return one

    found = {}
    if "TRL" in rows:
        found["TRL"] = step(trainer(precompute=False))
    precomputed = trainer(precompute=True)
    found["TRL, reference precomputed"] = step(precomputed)
    found[COMPACT] = step(precomputed, compact=True)
    return found


def check_equal(
    objective: str, name: str, loss: float, norm: float, seen: dict[str, float]
) -> None:
    """Refuses a row whose loss or gradient is not the first row's on the same draw.

    Raises:
        NumericsError: they differ by more than rounding; such a row must not be timed.
    """
    if not seen:
        seen["loss"], seen["norm"] = loss, norm
    if name.startswith("TRL") and objective != "pbaa":
        return
    for kind, value, bound in (("loss", loss, LOSS_TOLERANCE), ("norm", norm, NORM_TOLERANCE)):
        if not abs(value - seen[kind]) <= bound * abs(seen[kind]):
            raise NumericsError(
                f"{objective}, row {name!r}: {kind} {value} against {seen[kind]} of the first "
                "row. The rows do not compute the same; nothing is written for this case."
            )


def case(objective_name: str, vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """One objective at one vocabulary: every repeat runs each row once on the same draw.

    Returns:
        By row: seconds (median, min, max, all), and how many times faster than the released step
        (the same of the quotients within a repeat). The floor, tokens, and the optimiser's update.
    """
    objective = Objective.named(objective_name)
    rows = rows_of(objective_name, vocabulary)
    model, draws, steps = build(objective, vocabulary, args, rows)
    flat = [[q[n] for n in objective.sequences for q in draw] for draw in draws]
    flops = [floor_flops(model.config, sequences) for sequences in flat]
    times: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    rates: list[tuple[float, float]] = []
    smallest = min(range(len(draws)), key=lambda d: flops[d])
    label = f"{objective_name} {vocabulary:,}"
    with progress_bar(label, (args.repeats + 1) * len(steps)) as bar:
        for repeat in range(-1, args.repeats):
            d = smallest if repeat < 0 else repeat % len(draws)
            seen: dict[str, float] = {}
            for name, step in steps.items():
                model.zero_grad()
                start, used = time.perf_counter(), time.process_time()
                loss = step(d)
                elapsed, used = time.perf_counter() - start, time.process_time() - used
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                check_equal(
                    objective_name, name, loss, float(torch.nn.utils.get_total_norm(grads)), seen
                )
                bar.advance(1)
                if repeat >= 0:
                    times[name].append(elapsed)
                    processor[name].append(used)
            if repeat >= 0:
                width = sum(map(len, {s.prompt_ids for s in flat[d]})) + sum(
                    len(s.response_ids) - 1 for s in flat[d]
                )
                body = matmul_rate(width, args.hidden, 3 * args.hidden)
                rates.append((body, matmul_rate(256, args.hidden, vocabulary)))
    floors = [
        sum(f / r for f, r in zip(flops[i % len(draws)], rate, strict=True))
        for i, rate in enumerate(rates)
    ]
    return {
        "objective": objective_name,
        "vocabulary": vocabulary,
        "rows": {
            name: {
                **spread("seconds", t),
                **spread("faster", [a / b for a, b in zip(times[RELEASED], t, strict=True)]),
                "times": t,
                "processor_times": processor[name],
            }
            for name, t in times.items()
        },
        "floor": {
            **spread("seconds", floors),
            **spread("share", [f / t for f, t in zip(floors, times[OURS], strict=True)]),
            "flops": flops,
            "body_flops_per_second": statistics.median(r[0] for r in rates),
            "head_flops_per_second": statistics.median(r[1] for r in rates),
        },
        "optimiser_seconds": optimiser_seconds(model, args.repeats),
        "tokens": [
            {
                "sequences": sum(map(len, s)),
                "unique": sum(map(len, {x.prompt_ids for x in s}))
                + sum(len(x.response_ids) for x in s),
                "responses": sum(len(x.response_ids) for x in s),
            }
            for s in flat
        ],
    }


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        name: statistics.median(values),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }


def optimiser_seconds(model: Any, repeats: int) -> float:
    """Median time of AdamW's update of all weights, with the gradients that are there."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-7)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        optimiser.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_bytes(row: str, args: argparse.Namespace) -> dict[str, int]:
    """Peak memory of one step above what the models hold; for a process of its own.

    Gradients are included, they are the same for every row. The first, small step loads what is
    loaded once; then the heap is handed back, and Linux's high-water mark is reset.
    """
    if args.model:
        model, draws, steps = build_real(Objective.named(REAL_OBJECTIVE), args, [row])
    else:
        objective = Objective.named(MEMORY_OBJECTIVE)
        model, draws, steps = build(objective, args.memory_vocabulary, args, [row])
    size = [sum(len(s) for q in draw for s in q.values()) for draw in draws]
    steps[row](size.index(min(size)))
    model.zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    steps[row](size.index(max(size)))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"peak": status_bytes("VmHWM") - before, "weights": weights}


def status_bytes(field: str) -> int:
    """One of the kernel's figures on this process, Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory(rows: Sequence[str] = MEMORY_ROWS) -> dict[str, Any]:
    """`peak_bytes` of each row, this script started once per row with the same arguments."""
    found = {}
    with progress_bar("memory", len(rows)) as bar:
        for row in rows:
            command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", row]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[row] = json.loads(out.splitlines()[-1])
            bar.advance(1)
    return found


def real_case(args: argparse.Namespace) -> dict[str, Any]:
    """Ours and TRL's step on a model and pairs of yours, in turns; then memory, each apart."""
    model, draws, steps = build_real(Objective.named(REAL_OBJECTIVE), args, REAL_ROWS)
    tokens = [sum(len(s) for q in draw for s in q.values()) for draw in draws]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    with progress_bar("steps", (args.repeats + 1) * len(steps)) as bar:
        for repeat in range(-1, args.repeats):  # the first is a warm-up
            d, seen = repeat % len(draws), dict[str, float]()
            for name, step in steps.items():
                model.zero_grad()
                wall, cpu = time.perf_counter(), time.process_time()
                loss = step(d)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters())
                check_equal(REAL_OBJECTIVE, name, loss, float(norm), seen)
                bar.advance(1)
                if repeat >= 0:
                    run = {"loss": loss, "seconds": wall, "cpu_seconds": cpu, "tokens": tokens[d]}
                    runs[name].append(run)
    rows = {}
    for name, found in runs.items():
        rows[name] = {"runs": found}
        for kind in ("seconds", "cpu_seconds"):
            rows[name] |= spread(f"tokens_per_{kind}", [r["tokens"] / r[kind] for r in found])
            quotients = [a[kind] / b[kind] for a, b in zip(found, runs[OURS], strict=True)]
            rows[name] |= spread(f"ours_faster_{kind}", quotients)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(args),
        "versions": versions() | {"trl": version("trl")},
        "model": Path(args.model).name,
        **{name: getattr(args, name) for name in ("queries", "draws", "repeats", "max_tokens")},
        "rows": rows,
        "memory": measure_memory(REAL_ROWS) if args.memory_vocabulary else {},
    }


def real_table(result: Mapping[str, Any]) -> str:
    """The page of `real_case`."""
    seen = result["versions"]
    lines = [
        "# The training step on a real model, against TRL",
        "",
        f"{result['date']}; {result['hardware']}, float32; torch {seen['torch']}, transformers "
        f"{seen['transformers']}, TRL {seen['trl']}. DPO on {result['model']}, {result['queries']} "
        f"pairs a step of at most {result['max_tokens']} tokens a sequence, "
        f"{result['draws']} draws in turn, {result['repeats']} repeats after a warm-up, rows "
        "interleaved; losses and gradient norms agree. Forward and backward, without the "
        "optimiser's update. Made by `python benchmarks/step_speed.py --model`. Tokens are those "
        "of all sequences, prompts counted for each; medians, least and most. Peak memory is above "
        "the weights, gradients included; TRL without precomputing also holds the reference model.",
        "",
        "| | tokens/s | ours is faster by | by CPU time | peak, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, r in result["rows"].items():
        low, high = r["tokens_per_seconds_min"], r["tokens_per_seconds_max"]
        peak = result["memory"].get(name, {}).get("peak")
        lines.append(
            f"| {name} | {r['tokens_per_seconds']:,.0f} ({low:,.0f}–{high:,.0f}) | "
            f"{r['ours_faster_seconds']:.2f}× | {r['ours_faster_cpu_seconds']:.2f}× | "
            f"{'' if peak is None else f'{peak / 2**20:,.0f}'} |"
        )
    return "\n".join(lines) + "\n"


def hardware(args: argparse.Namespace) -> str:
    """Processor, cores and threads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "CPU")
    return f"{name} ({platform.machine()}), {os.cpu_count()} cores, {args.threads} thread(s)"


def measured_code() -> str:
    """Digest of the sources that the steps run through."""
    package = Path(selfsteer.__file__).parent
    files = [*sorted((package / "models").glob("*.py")), package / "objectives.py"]
    return digest([f.read_text() for f in files])


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What makes two results comparable; anything else on file is measured again."""
    settings = ("hidden", "layers", "queries", "draws", "scale", "seed", "repeats")
    return {
        "hardware": hardware(args),
        "settings": {name: getattr(args, name) for name in settings},
        "versions": versions() | {"trl": version("trl"), "code": measured_code()},
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: a line per row, a column per case."""
    cases, s = result["cases"], result["settings"]
    seen = result["versions"]
    heads = [f"{c['objective']}, {c['vocabulary'] // 1024}k" for c in cases]
    lines = [
        "# Time and memory of an optimiser step",
        "",
        f"{result['date']}; {result['hardware']}, float32; torch {seen['torch']}, transformers "
        f"{seen['transformers']}, TRL {seen['trl']}. Llama with {s['layers']} layers of "
        f"{s['hidden']}, {s['queries']} queries a step, {s['draws']} draws of lengths (÷ "
        f"{s['scale']}) in turn, seed {s['seed']}; {s['repeats']} repeats after a warm-up, rows "
        "interleaved. Made by `python benchmarks/step_speed.py`, all figures in "
        "`step_speed.json`.",
        "",
        "First line: seconds of forward and backward of the released step, median. Others: how "
        "many times faster, median (least–most) of the quotients within a repeat. Loss and "
        "gradient norm agree in all rows but TRL's, whose loss differs (`pbaa` excepted). Rows "
        "that were not measured in a case are empty. Processor time well below wall time means "
        "that the machine was busy: do not believe that case.",
        "",
        f"| objective, vocabulary | {' | '.join(heads)} |",
        "|---" * (len(cases) + 1) + "|",
    ]

    def line(name: str, cells: Iterator[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    for name in ROWS:
        found = [c["rows"].get(name) for c in cases]
        if name == RELEASED:
            line(f"{name}, s", (f"{r['seconds']:.2f}" for r in found))
        elif any(found):
            line(
                name,
                (
                    f"{r['faster']:.2f}× ({r['faster_min']:.2f}–{r['faster_max']:.2f})" if r else ""
                    for r in found
                ),
            )
    line(
        "ours against TRL compact",
        (f"{against(c, COMPACT):.2f}×" for c in cases),
    )
    line("share of the floor, ours", (f"{c['floor']['share']:.0%}" for c in cases))
    line("processor time per wall time", (f"{idleness(c):.2f}" for c in cases))
    line("AdamW's update, not included, s", (f"{c['optimiser_seconds']:.2f}" for c in cases))
    lines += ["", "What the rows are:", ""]
    lines += [f"- {name}: {text.removeprefix('* ')}." for name, text in ROWS.items()]
    lines += [
        "",
        "The floor is the FLOPs of the unique tokens (linear layers and attention; the head at "
        "response positions; backward twice the forward) at the rate of plain products of the "
        "same shapes, measured in every repeat. Where logits of every position exceed the head's "
        'chunk, "packed" and "prompts shared" compute them twice.',
    ]
    if "memory" in result:
        released = result["memory"][RELEASED]["peak"]
        lines += [
            "",
            f"Peak memory of a step above the models, {MEMORY_OBJECTIVE} at "
            f"{result['memory_vocabulary']:,}, largest draw, each in a fresh process; the policy's "
            f"gradients, {result['memory'][RELEASED]['weights'] / 2**20:,.0f} MiB, are included:",
            "",
            "| | MiB | of released | of released and its reference model |",
            "|---|---|---|---|",
        ]
        for name, m in result["memory"].items():
            ratios = (m["peak"] / released, m["peak"] / (released + m["weights"]))
            line(name, iter((f"{m['peak'] / 2**20:,.0f}", *(f"{r:.2f}×" for r in ratios))))
    return "\n".join(lines) + "\n"


def idleness(c: Mapping[str, Any]) -> float:
    """Processor time of all rows by their wall time: about 1 per thread on an idle machine."""
    rows = c["rows"].values()
    return sum(sum(r["processor_times"]) for r in rows) / sum(sum(r["times"]) for r in rows)


def against(c: Mapping[str, Any], other: str) -> float:
    """How many times faster ours is than another row, median within repeats."""
    pairs = zip(c["rows"][other]["times"], c["rows"][OURS]["times"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--queries", type=int, default=2)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--scale", type=int, default=4, help="divides all lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-vocabulary", type=int, default=32768, help="0: no memory")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--fresh", action="store_true", help="measure again what is on file")
    parser.add_argument("--model", help="folder of a chat model; needs --pairs")
    parser.add_argument("--pairs", help="preferences or triples that `selfsteer train` reads")
    parser.add_argument("--max-tokens", type=int, default=384, help="longest sequence of --pairs")
    parser.add_argument("--peak-of", choices=(*MEMORY_ROWS, *REAL_ROWS), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """Measures what is not on file yet and writes both files after every case."""
    args = arguments()
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    # TRL calls two arguments of transformers by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if args.peak_of:
        print(json.dumps(peak_bytes(args.peak_of, args)))
        return
    if args.model:
        result = real_case(args)
        text = real_table(result)
        write_atomic(args.output / "step_speed_model.json", json.dumps(result, indent=1) + "\n")
        write_atomic(args.output / "step_speed_model.md", text)
        print(text)
        return
    path = args.output / "step_speed.json"
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), **identity(args), "cases": []}
    if path.exists() and not args.fresh:
        stored = json.loads(path.read_text())
        if all(stored.get(k) == v for k, v in identity(args).items()):
            result = stored

    def save() -> None:
        order = [
            (v, o) for v in sorted({c["vocabulary"] for c in result["cases"]}) for o in OBJECTIVES
        ]
        result["cases"].sort(key=lambda c: order.index((c["vocabulary"], c["objective"])))
        write_atomic(path, json.dumps(result, indent=1) + "\n")
        write_atomic(path.with_suffix(".md"), table(result))

    for wanted in cases_of(args):
        done = {(c["objective"], c["vocabulary"]): c for c in result["cases"]}
        if wanted in done and tuple(done[wanted]["rows"]) == rows_of(*wanted):
            continue
        result["cases"] = [c for key, c in done.items() if key != wanted]
        result["cases"].append(case(*wanted, args))
        save()
    if args.memory_vocabulary and result.get("memory_vocabulary") != args.memory_vocabulary:
        result["memory"] = measure_memory()
        result["memory_vocabulary"] = args.memory_vocabulary
        save()
    print(table(result))


if __name__ == "__main__":
    main()
