"""Asks vLLM and transformers the same things with the tiny model; prints what both said."""

import json
from dataclasses import astuple

import psutil
import torch

from selfsteer.data.records import Message
from selfsteer.engines.base import SamplingParams
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.engines.vllm import VllmEngine
from selfsteer.models.load import load_model
from selfsteer.recipe.sections import EngineSettings, Policy, resolve_path

QUESTIONS = (
    "What does the bear eat?",
    "Name three animals.",
    "Is the owl bigger than the goat?",
    "What is the capital of France?",
)


def main() -> None:
    torch.set_num_threads(1)
    source = resolve_path("package:selfsteer.testbed/checkpoint")
    policy = Policy(model=source, device="cpu")
    settings = EngineSettings(kind="vllm", memory=0.05, engine_args={"enforce_eager": True})
    asked = [[Message("user", q)] for q in QUESTIONS]
    long = [[Message("user", "Wait, " * 600)], *asked[:1]]
    sampled, greedy = SamplingParams(1.0, 0.95, 64), SamplingParams(0.0, 1.0, 64)
    loaded = load_model(source, policy, inference=True)
    told: list[tuple[int, int]] = []
    here = VllmEngine(settings, source, policy)
    found = {
        "transformers": TransformersEngine(loaded).generate(asked, greedy, 0),
        "greedy": here.generate(asked, greedy, 0, lambda n, t: told.append((n, t))),
        "one": here.generate(asked, sampled, 1),
        "one_again": here.generate(asked, sampled, 1),
        "two": here.generate(asked, sampled, 2),
        "cut": here.generate(asked, SamplingParams(0.0, 1.0, 3), 0),
        "long": here.generate(long, greedy, 0),
    }
    said = {name: [astuple(c) for c in completions] for name, completions in found.items()}
    processes = psutil.Process().children(recursive=True)
    workers = [p for p in processes if "resource_tracker" not in " ".join(p.cmdline())]
    here.close()
    _, left = psutil.wait_procs(workers, timeout=120)
    print(json.dumps({**said, "told": told, "workers": [len(workers), len(left)]}))


if __name__ == "__main__":
    main()
