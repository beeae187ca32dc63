"""Time and memory of an optimiser step: the released way against ours, side by side.

    python benchmarks/step_speed.py                     # about 10 minutes on one thread
    python benchmarks/step_speed.py --repeats 3 --vocabularies 4096

Rows, interleaved in one process, median of the repeats after one warm-up:

- released: padded, one forward per pair, full float32 logits, a reference model in the loop;
- padded: one padded forward, response-span logits, reference computed beforehand;
- ours: the tree layout, chunked head, reference computed beforehand;
- ours+ref: the same with the reference pass counted in (one epoch).

Lengths are drawn like UltraFeedback's (query median 120 tokens, principles 150-350, responses
median 330, long tails), divided by ``--scale``. The model is a random Llama.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selfsteer.models.chat import EncodedSequence
from selfsteer.models.logprobs import batch_logps, pack, pad, settle_layout, sums_by_row
from selfsteer.objectives import Objective, steering_loss
from selfsteer.runs import versions, write_atomic

ROOT = Path(__file__).parent
OBJECTIVES = ("sso-online", "sso", "pbaa")


def draw_lengths(rng: random.Random, scale: int) -> dict[str, int]:
    """Token counts of one query: prompt per context, and each response."""

    def tail(median: float, sigma: float) -> int:
        return max(4, round(rng.lognormvariate(0, sigma) * median / scale))

    query = tail(120, 0.8)
    return {
        "plain": query,
        "good": query + rng.randint(150 // scale, 350 // scale),
        "bad": query + rng.randint(150 // scale, 350 // scale),
        "y+": min(tail(330, 0.6), 1500 // scale),
        "y-": min(tail(330, 0.6), 1500 // scale),
        "yo": min(tail(330, 0.6), 1500 // scale),
    }


def draw_query(
    rng: random.Random, names: tuple[str, ...], vocabulary: int, scale: int
) -> dict[str, EncodedSequence]:
    """Random ids; equal contexts and responses are equal across sequences."""
    sizes = draw_lengths(rng, scale)
    ids = {k: tuple(rng.randrange(vocabulary) for _ in range(n)) for k, n in sizes.items()}
    texts = {"good": "y+", "bad": "y-", "plain": "yo"}
    return {
        name: EncodedSequence(ids[name.split("/")[0]], ids[texts[name.split("/")[1]]])
        for name in names
    }


def released_step(
    model: Any, reference: Any, objective: Objective, queries: list[dict[str, EncodedSequence]]
) -> float:
    """A pair at a time: padded forward of policy and reference, full logits in float32."""

    def sums(which: Any, pair: list[EncodedSequence]) -> torch.Tensor:
        batch = pad(pair, 0)
        logits = which(
            input_ids=batch.input_ids_NT, attention_mask=batch.attention_mask_NT, use_cache=False
        ).logits.float()
        logps = logits.log_softmax(-1)[batch.row, batch.position, batch.target]
        return sums_by_row(logps, batch.row, len(pair))

    policy: dict[str, torch.Tensor] = {}
    frozen: dict[str, torch.Tensor] = {}
    for term in objective.terms:
        a, b = term.sequences
        pair = [q[a] for q in queries] + [q[b] for q in queries]
        for found, which in ((policy, model), (frozen, reference)):
            with torch.set_grad_enabled(which is model):
                found[a], found[b] = sums(which, pair).split(len(queries))
    lengths = {n: torch.tensor([len(q[n].response_ids) for q in queries]) for n in policy}
    loss = steering_loss(objective, policy, frozen, lengths).loss
    loss.backward()
    return float(loss.detach())


def our_step(
    model: Any,
    objective: Objective,
    queries: list[dict[str, EncodedSequence]],
    reference: torch.Tensor,
    layout: str,
) -> float:
    """One forward of the whole micro-batch; the reference is a table."""
    names = objective.sequences
    flat = [q[n] for n in names for q in queries]
    batch = pack(flat, layout, 0)
    logps = batch_logps(model, batch)
    policy = sums_by_row(logps, batch.row, len(flat)).view(len(names), -1)
    frozen = sums_by_row(reference, batch.row, len(flat)).view(len(names), -1)
    lengths = torch.tensor([len(s.response_ids) for s in flat]).view(len(names), -1)
    tables = [dict(zip(names, t, strict=True)) for t in (policy, frozen, lengths)]
    loss = steering_loss(objective, *tables).loss
    loss.backward()
    return float(loss.detach())


def measure(
    steps: dict[str, Callable[[], float]], optimiser: Any, repeats: int
) -> dict[str, dict[str, float]]:
    """Interleaved: each repeat runs every row once."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            optimiser.zero_grad()
            start = time.perf_counter()
            losses[name] = step()
            elapsed = time.perf_counter() - start
            if repeat:
                times[name].append(elapsed)
    return {
        name: {
            "seconds": statistics.median(t),
            "min": min(t),
            "max": max(t),
            "loss": losses[name],
        }
        for name, t in times.items()
    }


def case(name: str, vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """One objective at one vocabulary."""
    torch.manual_seed(0)
    rng = random.Random(0)
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
    reference = copy.deepcopy(model).eval()
    objective = Objective.named(name)
    names = objective.sequences
    queries = [draw_query(rng, names, vocabulary, args.scale) for _ in range(args.queries)]
    flat = [q[n] for n in names for q in queries]
    padded_model = copy.deepcopy(model)
    settle_layout(model, "tree", flat)
    settle_layout(reference, "tree", flat)
    with torch.no_grad():
        table = batch_logps(reference, pack(flat, "tree", 0))

    def with_reference() -> float:
        with torch.no_grad():
            fresh = batch_logps(reference, pack(flat, "tree", 0))
        return our_step(model, objective, queries, fresh, "tree")

    plain_reference = copy.deepcopy(padded_model).eval()
    steps = {
        "released": lambda: released_step(padded_model, plain_reference, objective, queries),
        "padded": lambda: our_step(padded_model, objective, queries, table, "padded"),
        "ours": lambda: our_step(model, objective, queries, table, "tree"),
        "ours+ref": with_reference,
    }
    every = torch.optim.SGD([*model.parameters(), *padded_model.parameters()], lr=0.0)
    rows = measure(steps, every, args.repeats)
    return {"objective": name, "vocabulary": vocabulary, "rows": rows}


def main() -> None:
    """Measures all cases and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--queries", type=int, default=2)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = []
    for vocabulary in args.vocabularies:
        for name in OBJECTIVES:
            cases.append(case(name, vocabulary, args))
            print(json.dumps(cases[-1]), flush=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, CPU, {args.threads} thread(s), float32",
        "settings": vars(args),
        "versions": versions(),
        "cases": cases,
    }
    lines = [
        "# Time of an optimiser step's forward and backward",
        "",
        f"{result['date']}; {result['hardware']}; Llama with {args.layers} layers of "
        f"{args.hidden}, {args.queries} queries a step, lengths ÷ {args.scale}; median of "
        f"{args.repeats}, interleaved. Made by `python benchmarks/step_speed.py`. Ratios are to "
        "the released way. Same loss in every row.",
        "",
        "| objective | vocabulary | released, s | padded | ours | ours, reference counted in |",
        "|---|---|---|---|---|---|",
    ]
    for c in cases:
        rows = c["rows"]
        base = rows["released"]["seconds"]
        ratios = [f"{base / rows[k]['seconds']:.2f}×" for k in ("padded", "ours", "ours+ref")]
        lines.append(
            f"| {c['objective']} | {c['vocabulary']:,} | {base:.2f} | " + " | ".join(ratios) + " |"
        )
    write_atomic(ROOT / "results" / "step_speed.json", json.dumps(result, indent=1) + "\n")
    write_atomic(ROOT / "results" / "step_speed.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
