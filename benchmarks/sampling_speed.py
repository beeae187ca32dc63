"""Speed of sampling: what the pipeline keeps of the engine's, and the engine beside others.

    python benchmarks/sampling_speed.py              # the pipeline's share; 8 minutes on one core
    python benchmarks/sampling_speed.py --model FOLDER --prompts FILE     # a model of yours

Without ``--model`` each row is `selfsteer bench sampling` on the tiny model with the demo's
prompts: the engine asked for all answers at once, and the same prompts through the sample stage, in
turns, both ways in the same batch size. Seconds are the process's CPU time, so that other work on
the machine counts little; what the stage spends waiting for the disk is therefore timed apart.

With ``--model`` the same prompts go to selfsteer, to ``generate`` of transformers (batches of the
same size, sorted by length, padded on the left) and to its continuous batching
(``generate_batch``). ``--against SRC`` adds another checkout of selfsteer, with batches of
``--against-batch``; ``--vllm PYTHON`` the interpreter of an environment that has vLLM. Each
contestant loads the model in a process of its own and waits there; they take turns, every repeat in
another order. Two workloads: the prompts as they are, and the question that asks the model to name
the features of each, whose instructions all prompts share. The floor is the time of the model's
matrix products alone at the full batch.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent

#: Queries per shard, batch size, queries asked, repeats.
SIZES = (
    (512, 256, 1024, 3),
    (512, 64, 1024, 3),
    (128, 64, 512, 5),
    (32, 64, 256, 5),
    (16, 64, 256, 5),
)


def measure(shard: int, batch: int, queries: int, repeats: int) -> dict[str, Any]:
    """One row: `selfsteer.verbs.sampling_speed.bench` in CPU time."""
    from selfsteer.methods import load_recipe
    from selfsteer.verbs.common import aligning
    from selfsteer.verbs.sampling_speed import bench

    given = (f"sampling.shard_size={shard}", f"sampling.batch_size={batch}", "policy.threads=1")
    return bench(aligning(load_recipe("demo", given)), queries, repeats, clock=time.process_time)


def sync_seconds(count: int = 50) -> float:
    """Wall time of writing one shard and its mark."""
    from selfsteer.data.jsonl import write_atomic

    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        start = time.perf_counter()
        for i in range(count):
            write_atomic(Path(folder) / f"{i}.jsonl", "x" * 400_000)
            write_atomic(Path(folder) / f"{i}.done.json", "{}")
        return (time.perf_counter() - start) / count


# -- beside others --------------------------------------------------------------------------------

OURS, AGAINST, VLLM = "selfsteer", "selfsteer, other checkout", "vLLM"
GENERATE, CONTINUOUS = "transformers generate", "transformers generate_batch"

#: Receives the name of a workload; answers with the tokens it made.
Asked = Callable[[str], int]


def ours(plan: dict[str, Any], batch: str = "batch") -> Asked:
    """The engine of the selfsteer that is on the path: this one, or release e794927's."""
    try:
        from selfsteer.data.records import Message
        from selfsteer.engines.base import Request
        from selfsteer.models.load import load_model
        from selfsteer.recipe.sections import Policy
    except ModuleNotFoundError:  # before the house was rebuilt
        from selfsteer.config import Policy
        from selfsteer.models.loading import load_model
        from selfsteer.records import Message

        Request = None
    from selfsteer.engines.base import SamplingParams
    from selfsteer.engines.transformers import TransformersEngine

    loaded = load_model(plan["model"], Policy(model=plan["model"], device=plan["device"]))
    engine = TransformersEngine(loaded, plan[batch])
    sampling = SamplingParams(plan["temperature"], plan["top_p"], plan["tokens"])

    def ask(name: str) -> int:
        texts = [tuple(Message(*m) for m in messages) for messages in plan["workloads"][name]]
        if Request is None:
            found = engine.generate(texts, sampling, 0)
        else:
            found = engine.generate([Request(f"{i}", t, i) for i, t in enumerate(texts)], sampling)
        return sum(c.completion_tokens for c in found)

    return ask


def of_transformers(plan: dict[str, Any], *, continuous: bool, model: Any = None) -> Asked:
    """``generate`` in batches, or ``generate_batch`` with all prompts at once.

    A model that is not given is loaded in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    if model is None:
        model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.float32)
        model.to(plan["device"]).eval()
    greedy = plan["temperature"] == 0
    config = GenerationConfig(
        do_sample=not greedy,
        **({} if greedy else {k: plan[k] for k in ("temperature", "top_p")} | {"top_k": 0}),
        max_new_tokens=plan["tokens"],
        eos_token_id=plan["stops"],
        pad_token_id=plan["stops"][0],
    )

    def paged() -> Any:
        """Left alone it takes nine tenths of the memory for its cache, at every call."""
        from transformers import ContinuousBatchingConfig

        page, longest = 32, max(len(p) for prompts in plan["ids"].values() for p in prompts)
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=plan["batch"] * -(-(longest + plan["tokens"]) // page),
            max_requests_per_batch=plan["batch"],
            max_batch_tokens=max(1024, longest),
        )

    def length(new: Sequence[int]) -> int:
        return next((i + 1 for i, t in enumerate(new) if t in plan["stops"]), len(new))

    def ask(name: str) -> int:
        prompts = sorted(plan["ids"][name], key=len, reverse=True)
        if continuous:
            found = model.generate_batch(
                inputs=prompts, generation_config=config, continuous_batching_config=paged()
            )
            return sum(length(answer.generated_tokens) for answer in found.values())
        total = 0
        for start in range(0, len(prompts), plan["batch"]):
            rows = prompts[start : start + plan["batch"]]
            width = max(map(len, rows))
            ids = torch.tensor([[plan["stops"][0]] * (width - len(r)) + r for r in rows])
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
            ids, mask = ids.to(model.device), mask.to(model.device)
            full = model.generate(ids, attention_mask=mask, generation_config=config)
            total += sum(length(row) for row in full[:, width:].tolist())
        return total

    return ask


def of_vllm(plan: dict[str, Any]) -> Asked:
    """In process, with the same token ids."""
    from vllm import LLM, SamplingParams

    longest = max(len(p) for prompts in plan["ids"].values() for p in prompts)
    llm = LLM(
        plan["model"],
        dtype="float32",
        max_model_len=longest + plan["tokens"],
        max_num_seqs=plan["batch"],
        gpu_memory_utilization=0.3,  # the others hold a model each; on a CPU it is of its memory
    )
    names = ("temperature", "top_p")
    params = SamplingParams(
        max_tokens=plan["tokens"], stop_token_ids=plan["stops"], **{n: plan[n] for n in names}
    )

    def ask(name: str) -> int:
        prompts = [{"prompt_token_ids": p} for p in plan["ids"][name]]
        return sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, params))

    return ask


def serve(name: str, path: str) -> None:
    """A contestant's process: a workload's name in, tokens and seconds out, a line each."""
    plan = json.loads(Path(path).read_text())
    out = os.dup(1)  # libraries that print must not be taken for answers
    os.dup2(2, 1)
    if name != VLLM:
        import torch

        torch.set_num_threads(plan["threads"])
    ask = builder(name)(plan)
    ask("warm up")
    os.write(out, b"{}\n")
    for line in sys.stdin:
        os.write(out, f"{json.dumps(timed(ask, line.strip()))}\n".encode())


def builder(name: str) -> Callable[[dict[str, Any]], Asked]:
    """What makes a contestant ready."""
    others = {
        GENERATE: partial(of_transformers, continuous=False),
        CONTINUOUS: partial(of_transformers, continuous=True),
        VLLM: of_vllm,
        AGAINST: partial(ours, batch="against_batch"),
    }
    return others.get(name, ours)


def timed(ask: Asked, workload: str) -> dict[str, float]:
    """Tokens and seconds of one workload."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = ask(workload)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"tokens": tokens, "seconds": wall, "cpu_seconds": cpu}


@contextmanager
def contestant(name: str, args: argparse.Namespace, plan: Path) -> Iterator[Callable[[str], Any]]:
    """Its process, loaded and warm; a call asks for one workload."""
    python = args.vllm if name == VLLM else sys.executable
    threads = str(args.threads)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    # else vLLM on a CPU leaves one core to its scheduler, half of two
    env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if name == AGAINST:
        env["PYTHONPATH"] = str(args.against)
    command = [python, __file__, "--serve", name, "--plan", str(plan)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer() -> Any:
            line = process.stdout.readline() if process.stdout is not None else ""
            if not line:
                raise SystemExit(f"{name} ended early; what it said is above")
            return json.loads(line)

        def ask(workload: str) -> Any:
            assert process.stdin is not None
            process.stdin.write(f"{workload}\n")
            process.stdin.flush()
            return answer()

        answer()
        yield ask
        process.stdin.close()


def planned(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that every contestant gets."""
    from selfsteer.data.queries import load_queries
    from selfsteer.engines.base import stop_ids
    from selfsteer.models.load import configured_stops, load_chat
    from selfsteer.principles.writer import feature_prompt
    from selfsteer.recipe.sections import Policy, Queries, resolve_path

    model = resolve_path(args.model)
    chat = load_chat(model, Policy(model=model))
    settings = Queries(path=resolve_path(args.prompts), max_chars=args.max_chars)
    queries = load_queries(settings).queries[: args.count]
    workloads = {
        "prompts": [[(m.role, m.content) for m in q.messages] for q in queries],
        "features": [[(m.role, m.content) for m in feature_prompt(q, 3)] for q in queries],
    }
    workloads["warm up"] = workloads["prompts"][:2]
    from selfsteer.data.records import Message

    ids = {
        name: [chat.prompt_ids(tuple(Message(*m) for m in messages)) for messages in conversations]
        for name, conversations in workloads.items()
    }
    names = ("batch", "against_batch", "tokens", "temperature", "top_p", "threads", "device")
    return {
        "model": model,
        "workloads": workloads,
        "ids": ids,
        "stops": stop_ids(chat, configured_stops(model, Policy(model=model))),
        **{name: getattr(args, name) for name in names},
    }


def floor(model_folder: str, batch: int, threads: int, repeats: int = 5) -> float:
    """Tokens per second if a step were its linear layers and nothing else."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(batch, m.in_features) for m in linear}
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for m in linear:
                m(inputs[m.in_features])
            seconds.append(time.perf_counter() - start)
    return batch / statistics.median(seconds[1:])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All contestants in turns; rates of every repeat, and how many times faster ours is."""
    names = [OURS, GENERATE, CONTINUOUS]
    names += [AGAINST] if args.against else []
    names += [VLLM] if args.vllm else []
    plan = planned(args)
    rows: dict[str, dict[str, list[Any]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "plan.json").write_text(json.dumps(plan))
        asks = {n: stack.enter_context(contestant(n, args, folder / "plan.json")) for n in names}
        for repeat in range(args.repeats):
            for workload in ("prompts", "features"):
                for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                    found = asks[name](workload)
                    rows.setdefault(workload, {}).setdefault(name, []).append(found)
                    print(workload, name, json.dumps(found), flush=True)
    lowest = floor(plan["model"], args.batch, args.threads)
    return {
        "model": Path(plan["model"]).name,
        **{
            n: getattr(args, n)
            for n in ("batch", "against_batch", "tokens", "temperature", "top_p", "threads")
        },
        "prompts": len(plan["ids"]["prompts"]),
        "prompt_tokens": {w: sum(map(len, plan["ids"][w])) for w in rows},
        "floor_tokens_per_second": lowest,
        "workloads": {
            w: {n: rates(found, r[OURS]) for n, found in r.items()} for w, r in rows.items()
        },
    }


def rates(found: Sequence[Any], own: Sequence[Any]) -> dict[str, Any]:
    """Tokens per second, wall and CPU, with how many times faster ours was in each repeat."""
    row: dict[str, Any] = {"runs": list(found)}
    for kind in ("seconds", "cpu_seconds"):
        rate, ours = ([x["tokens"] / x[kind] for x in runs] for runs in (found, own))
        ratio = [a / b for a, b in zip(ours, rate, strict=True)]
        row[f"tokens_per_{kind.removesuffix('s')}"] = statistics.median(rate)
        row[f"spread_{kind}"] = [min(rate), max(rate)]
        row[f"ours_faster_{kind}"] = statistics.median(ratio)
    return row


def page(result: dict[str, Any]) -> str:
    """The Markdown page of a comparison."""
    lines = [
        "# The default engine beside others, on one model",
        "",
        f"{result['where']}. Model {result['model']}, {result['prompts']} prompts, "
        f"{result['tokens']} new tokens, temperature {result['temperature']}, top-p "
        f"{result['top_p']}, batch {result['batch']} "
        f"({result['against_batch']} of the other checkout), "
        f"float32, {result['threads']} thread(s). Made "
        "by `python benchmarks/sampling_speed.py --model`, whose docstring says how. Tokens per "
        "second are medians with lowest and highest; the ratios are medians of those within a "
        "repeat. vLLM computes in processes of its own, so its CPU time is not seen.",
    ]
    for workload, rows in result["workloads"].items():
        lines += [
            "",
            f"Workload {workload}, {result['prompt_tokens'][workload]:,} tokens of prompts:",
            "",
            "| | tokens/s | ours is faster by | by CPU time |",
            "|---|---:|---:|---:|",
        ]
        for name, row in rows.items():
            low, high = row["spread_seconds"]
            cpu = "" if name == VLLM else f"{row['ours_faster_cpu_seconds']:.2f}×"
            lines.append(
                f"| {name} | {row['tokens_per_second']:,.1f} ({low:,.1f} to {high:,.1f}) | "
                f"{row['ours_faster_seconds']:.2f}× | {cpu} |"
            )
    rate = result["floor_tokens_per_second"]
    lines += [
        "",
        f"The matrix products of a step at the full batch alone would allow {rate:,.0f} tokens/s; "
        "prompts are not counted in.",
        "",
    ]
    return "\n".join(lines)


def where(threads: str) -> str:
    """When, on what and with which versions."""
    import torch
    import transformers

    return (
        f"{date.today()}, {threads}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}"
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--model", help="folder of a chat model: compare engines on it")
    parser.add_argument("--prompts", default="package:selfsteer.testbed/queries/align.jsonl")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, few prompts")
    parser.add_argument("--against", type=Path, help="another checkout's src")
    parser.add_argument("--vllm", help="python of an environment with vLLM")
    parser.add_argument("--count", type=int, default=32, help="prompts")
    parser.add_argument("--max-chars", type=int, default=220)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--against-batch", type=int, help="of --against; default: as --batch")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.against_batch = args.against_batch or args.batch
    if args.tiny:
        args.model, args.count, args.tokens = "package:selfsteer.testbed/checkpoint", 6, 8
        args.batch, args.repeats = 4, 1
    return args


def main() -> None:
    """Measures, prints and writes `sampling_speed` or, with a model, `sampling_engines`."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.serve:
        serve(args.serve, args.plan)
    elif args.model:
        threads = f"{args.threads} of {os.cpu_count()} cores {platform.machine()}"
        result = {"where": where(threads), **compare(args)}
        text = page(result)
        (args.out / "sampling_engines.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "sampling_engines.md").write_text(text)
        print(text)
    else:
        pipeline(args.out)


def pipeline(out: Path) -> None:
    """What the pipeline keeps of the engine's speed."""
    rows = [measure(*size) for size in SIZES]
    sync = sync_seconds()
    place = where("one thread of 2 cores AMD EPYC that other work shared, CPU time, seed 0")
    lines = [
        "# What the pipeline keeps of an engine's speed",
        "",
        f"{place}. Made by `python benchmarks/sampling_speed.py`, whose docstring says how. Engine "
        "transformers, the tiny model; tokens per second are medians, with lowest and highest.",
        "",
        "| queries per shard | answers per shard | batch size | direct, tokens/s | pipeline, "
        "tokens/s | kept |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ways = []
        for way in ("direct", "pipeline"):
            rates = row[way]["tokens_per_second"]
            ways.append(f"{row[way]['median']:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})")
        lines.append(
            f"| {row['shard_size']} | {2 * row['shard_size']} | {row['batch_size']} | "
            f"{' | '.join(ways)} | {row['kept']:.1%} |"
        )
    lines += [
        "",
        f"Writing a shard of 400 kB and its mark, synced, takes {1000 * sync:.0f} ms of wall time "
        "more.",
        "",
    ]
    figures = {"where": place, "rows": rows, "sync_seconds": sync}
    (out / "sampling_speed.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "sampling_speed.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
