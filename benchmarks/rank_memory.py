"""How much of a model does each rank hold while it loads, scores, trains and saves?

    python benchmarks/rank_memory.py                        # minutes, and 20 GB of memory
    python benchmarks/rank_memory.py --layers 2 --width 128 --ranks 2    # seconds

Makes a Llama of random weights and runs ``selfsteer train`` on it under torchrun with gloo, on
CPUs, once for each profile and number of ranks. A thread of each rank reads its anonymous memory
every few milliseconds. A figure is the largest value of any rank within a phase, minus what that
rank held once it had loaded and dropped the tiny model (libraries, tokenizers), over the bytes of
the model's float32 weights. Pages of checkpoint files that are mapped into memory do not count:
ranks share them, and the system can drop them.

Phases: *load* the policy; *reference*: score the reference; *train*: two optimiser steps; *save*.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
TINY = "package:selfsteer.testbed/checkpoint"
PHASES = ("load", "reference", "train", "save")
#: Set for ranks: the folder of their figures.
REPORT = "RANK_MEMORY_REPORT"
SEQUENCES = 8


def make_model(folder: Path, layers: int, width: int) -> int:
    """Writes a Llama of random weights in bfloat16, as chat models come; float32 bytes of it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from selfsteer.recipe.sections import resolve_path

    config = LlamaConfig(
        vocab_size=16_384,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=False,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    size = sum(p.numel() for p in model.parameters()) * 4
    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(resolve_path(TINY))
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        model.bfloat16().save_pretrained(folder, max_shard_size="100MB")
        tokenizer.save_pretrained(folder)
    return size


def write_triples(path: Path) -> None:
    """Triples of one turn."""
    rows = [
        {
            "id": f"t{i}",
            "messages": [{"role": "user", "content": f"What is {i}?"}],
            "responses": {"good": f"It is {i}.", "bad": "Go away."},
        }
        for i in range(SEQUENCES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


# -- in a rank -------------------------------------------------------------------------------------


def anonymous() -> int:
    """Memory of this process that no file stands behind, bytes."""
    status = Path("/proc/self/status").read_text()
    return sum(
        int(line.split()[1]) * 1024
        for line in status.splitlines()
        if line.startswith(("RssAnon", "RssShmem"))
    )


class Watch:
    """Peaks of this process by phase, over a baseline."""

    def __init__(self) -> None:
        self.baseline = 0
        self.peaks: dict[str, int] = {}
        self._phase = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            self._look()
            time.sleep(0.003)

    def _look(self) -> None:
        if phase := self._phase:
            self.peaks[phase] = max(self.peaks.get(phase, 0), anonymous())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts for this phase, and afterwards for the one around it."""
        around, self._phase = self._phase, name
        self._look()
        try:
            yield
        finally:
            self._look()
            self._phase = around

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as this phase."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return counted


def be_rank(report: Path) -> None:
    """``selfsteer`` with these arguments, its phases watched."""
    from selfsteer import cli
    from selfsteer.recipe.sections import resolve_path
    from selfsteer.stages import offline
    from selfsteer.training import trainer

    watch, load = Watch(), offline.load_to_train

    def load_measured(source: str, *settings: Any) -> Any:
        load(resolve_path(TINY), *settings)
        watch.baseline = anonymous()
        with watch.phase("load"):
            return load(source, *settings)

    offline.load_to_train = load_measured
    offline.refer = watch.within("reference", offline.refer)
    offline.train = watch.within("train", offline.train)
    trainer.save_model = watch.within("save", trainer.save_model)
    try:
        cli.main()
    finally:
        found = {name: peak - watch.baseline for name, peak in watch.peaks.items()}
        (report / f"{os.environ['RANK']}.json").write_text(json.dumps(found), "utf-8")


# -- outside ---------------------------------------------------------------------------------------


def measure(model: Path, size: int, profile: str, ranks: int, work: Path) -> dict[str, Any]:
    """One training; the figures of the rank that held most."""
    from selfsteer.run.ranks import environment_of

    name = f"{profile}-{ranks}"
    report = work / f"{name}-{time.time_ns()}"
    report.mkdir(parents=True)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(ranks), str(Path(__file__))]
    words += ["train", str(model), str(work / "triples.jsonl"), "objective=pbaa", "threads=1"]
    words += [f"batch_size={SEQUENCES // 2 // ranks}", f"output={report / 'out'}"]
    began = time.monotonic()
    environment = {
        **os.environ,
        **environment_of(profile, ranks),
        REPORT: str(report),
        "OMP_NUM_THREADS": "1",
        # what is freed goes back to the system at once, and what is left is what is held
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    subprocess.run(words, env=environment, check=True)
    each = [json.loads((report / f"{k}.json").read_text()) for k in range(ranks)]
    row = {"profile": profile, "ranks": ranks, "seconds": round(time.monotonic() - began)}
    for phase in PHASES:
        first, *others = (found[phase] / size for found in each)
        row |= {f"{phase}_first": round(first, 2), f"{phase}_others": round(max(others), 2)}
    return row


def table(rows: Sequence[dict[str, Any]], header: dict[str, Any]) -> str:
    """The Markdown page."""
    had = header["versions"]
    lines = [
        "# Memory per rank",
        "",
        f"{header['date']}, {header['cores']} cores {header['cpu']} that other work shared, gloo, "
        f"Python {had['python']}, torch {had['torch']}, transformers {had['transformers']}, "
        f"accelerate {had['accelerate']}. Made by `python benchmarks/rank_memory.py`, whose "
        "docstring says what is measured.",
        "",
        f"Peak memory of a rank within each phase, as a multiple of the model's float32 weights "
        f"({header['model_bytes'] / 1e6:,.0f} MB, {header['layers']} layers, stored in bfloat16): "
        "the first rank, and the largest of the others.",
        "",
        f"| profile | ranks | {' | '.join(PHASES)} |",
        "|---|---:|" + "---:|" * len(PHASES),
    ]
    for row in rows:
        cells = [f"{row[f'{p}_first']:.2f} / {row[f'{p}_others']:.2f}" for p in PHASES]
        lines.append(f"| `{row['profile']}` | {row['ranks']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, writes the results after every figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--profiles", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--work", type=Path, default=Path("runs/bench-rank-memory"))
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    from selfsteer.data.jsonl import write_atomic
    from selfsteer.run.folder import versions

    args.work.mkdir(parents=True, exist_ok=True)
    model = args.work / f"model-{args.layers}-{args.width}"
    size = make_model(model, args.layers, args.width)
    write_triples(args.work / "triples.jsonl")
    info = Path("/proc/cpuinfo").read_text()
    models = [x.partition(":")[2].strip() for x in info.splitlines() if x.startswith("model name")]
    header = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "versions": {**versions(), "accelerate": version("accelerate")},
        "model_bytes": size,
        "layers": args.layers,
    }
    rows: list[dict[str, Any]] = []
    for profile in args.profiles:
        for ranks in args.ranks:
            rows.append(measure(model, size, profile, ranks, args.work))
            print(json.dumps(rows[-1]), flush=True)
            args.output.mkdir(parents=True, exist_ok=True)
            found = json.dumps({**header, "rows": rows}, indent=1) + "\n"
            write_atomic(args.output / "rank_memory.json", found)
            write_atomic(args.output / "rank_memory.md", table(rows, header))
    print((args.output / "rank_memory.md").read_text())


if __name__ == "__main__":
    if REPORT in os.environ:
        be_rank(Path(os.environ[REPORT]))
    else:
        main()
