"""Asks vLLM and transformers the same things with the tiny model; prints what both said."""

import json
from collections.abc import Sequence
from dataclasses import astuple

import psutil
import torch

from selfsteer.data.records import Message
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Advance, Completion, Engine, Request, SamplingParams, no_news
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


def ask(
    engine: Engine,
    sampling: SamplingParams,
    seed: int = 0,
    advance: Advance = no_news,
    questions: Sequence[str] = QUESTIONS,
) -> list[Completion]:
    """The answers in the order of the questions."""
    requests = [
        Request(f"q{i}", (Message("user", q),), 10 * seed + i) for i, q in enumerate(questions)
    ]
    return list(answers(engine, requests, sampling, advance=advance).values())


def main() -> None:
    torch.set_num_threads(1)
    source = resolve_path("package:selfsteer.testbed/checkpoint")
    policy = Policy(model=source, device="cpu")
    settings = EngineSettings(kind="vllm", memory=0.05, engine_args={"enforce_eager": True})
    sampled, greedy = SamplingParams(1.0, 0.95, 64), SamplingParams(0.0, 1.0, 64)
    loaded = load_model(source, policy, inference=True)
    told: list[tuple[int, int]] = []
    here = VllmEngine(settings, source, policy)
    found = {
        "transformers": ask(TransformersEngine(loaded), greedy),
        "greedy": ask(here, greedy, advance=lambda n, t: told.append((n, t))),
        "one": ask(here, sampled, 1),
        "one_again": ask(here, sampled, 1),
        "two": ask(here, sampled, 2),
        "cut": ask(here, SamplingParams(0.0, 1.0, 3)),
        "long": ask(here, greedy, questions=("Wait, " * 600, "\ud800", QUESTIONS[0])),
    }
    said = {name: [astuple(c)[1:] for c in completions] for name, completions in found.items()}
    processes = psutil.Process().children(recursive=True)
    workers = [p for p in processes if "resource_tracker" not in " ".join(p.cmdline())]
    here.close()
    _, left = psutil.wait_procs(workers, timeout=120)
    print(json.dumps({**said, "told": told, "workers": [len(workers), len(left)]}))


if __name__ == "__main__":
    main()
