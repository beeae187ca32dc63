"""What the tables need of a finished run: scores by query, figures of its data, compute."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed, digest
from selfsteer.data.jsonl import read_jsonl, read_shards
from selfsteer.data.records import Query, Triple
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.judges.oracle import OracleJudge
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.judges.quality import GAP_SEQUENCES
from selfsteer.models.chat import ChatFormat
from selfsteer.models.load import load_model
from selfsteer.models.score import score_sequences
from selfsteer.objectives import ContrastObjective, Objective, TokenObjective
from selfsteer.principles import writer
from selfsteer.recipe.sections import EngineConfig, Loading
from selfsteer.testbed.world import CHECKPOINT


def figures(folder: Path) -> dict[str, Any]:
    """What the tables need of a finished run.

    ``scores`` and ``base_scores`` are the oracle's totals of each evaluation query in thousandths,
    in the order of the query file, for the last policy and the base.
    """
    recipe = json.loads((folder / "resolved.json").read_text("utf-8"))
    evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
    (last,) = evaluation["finals"].values()
    entries = [e for _, e in read_jsonl(folder / "ledger.jsonl") if e["event"] == "finish"]
    iterations = []
    for k in range(1, recipe["iterations"] + 1):
        label = last.replace(f"-{recipe['iterations']}", f"-{k}")
        model = evaluation["models"][label]
        iterations.append({"score": model["score"][0], "tokens": model["tokens"]})
        measured = folder / f"iteration-{k}" / "quality.json"
        if not measured.exists():  # a method without pairs
            continue
        quality = json.loads(measured.read_text("utf-8"))
        data = quality["preferences"]
        of_triples = quality.get("triples")
        iterations[-1].update(
            {
                "pairs": data["of"],
                "accuracy": data["accuracy"],
                "on_policyness": data["on_policyness"],
                "steering_gap": data["steering_gap"],
                "pair_tokens": data["tokens"],
                "triples_accuracy": of_triples and of_triples["accuracy"],
            }
        )
    return {
        "queries": digest([row["id"] for _, row in read_jsonl(answers_file(folder, "base"))]),
        "scores": scores(folder, last),
        "base_scores": scores(folder, "base"),
        "win_rate": evaluation["models"][last]["win_rate"][0],
        "base_tokens": evaluation["models"]["base"]["tokens"],
        "iterations": rounded(iterations),
        "compute": compute(folder, recipe),
        "seconds": {e["stage"]: round(e["seconds"], 1) for e in entries},
    }


#: Queries that are answered several times for the share of distinct answers, and how often.
REPEATED, TIMES = 128, 4


def sharpness(model: str, asked: Path, seed: int) -> dict[str, Any]:
    """What tells a better policy from one that is merely surer of itself.

    Args:
        model: its folder.
        asked: JSONL of the evaluation queries.
        seed: of the samples.

    Returns:
        ``greedy`` and ``hot`` (temperature 1): the oracle's totals of each query in thousandths.
        ``entropy``: nats per token, minus the mean log-prob of what is sampled at temperature 1.
        ``distinct``: the share of different answers among `TIMES` at temperature 0.7.
    """
    queries = [Query.from_dict(row) for _, row in read_jsonl(asked)]
    judge, loading = OracleJudge(), Loading()
    found: dict[str, list[str]] = {}
    plans = {
        "greedy": (queries, 0.0, 1),
        "hot": (queries, 1.0, 1),
        "warm": (queries[:REPEATED], 0.7, TIMES),
    }
    with Engines(None) as engines:
        engine = engines.sampler(EngineConfig(), model, loading, 256)
        for name, (part, temperature, times) in plans.items():
            requests = [
                Request(f"{q.id}/{i}", q.messages, derive_seed(seed, name, q.id, i))
                for q in part
                for i in range(times)
            ]
            said = answers(engine, requests, SamplingParams(temperature, 1.0, 96))
            found[name] = [said[r.id].text for r in requests]
    loaded = load_model(model, loading, inference=True)
    flat = [
        loaded.chat.exchange(q.messages, text)
        for q, text in zip(queries, found["hot"], strict=True)
    ]
    loaded.settle(flat)
    with loaded.evaluating():
        logps = score_sequences(loaded.model, flat, layout=loaded.layout, batch_size=32)
    totals = {
        name: [round(1000 * judge.score(q, t)) for q, t in zip(queries, found[name], strict=True)]
        for name in ("greedy", "hot")
    }
    warm = [found["warm"][i : i + TIMES] for i in range(0, len(found["warm"]), TIMES)]
    return {
        **totals,
        "entropy": -float(np.concatenate([np.asarray(v) for v in logps]).mean()),
        "distinct": float(np.mean([len(set(texts)) / TIMES for texts in warm])),
    }


def rounded(value: Any) -> Any:
    """All floats to four digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def answers_file(folder: Path, label: str) -> Path:
    """A model's answers to the evaluation queries."""
    return folder / "evaluation" / f"answers-{label.replace('/', '-')}.jsonl"


def scores(folder: Path, label: str) -> list[int]:
    """The oracle's total of each answer, in thousandths."""
    judge = OracleJudge()
    rows = [row for _, row in read_jsonl(answers_file(folder, label))]
    return [round(1000 * judge.score(Query.from_dict(row), row["response"])) for row in rows]


@cache
def chat_format() -> ChatFormat:
    """All bases are of one shape and count tokens alike to within a percent."""
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(CHECKPOINT))


def compute(folder: Path, recipe: dict[str, Any]) -> dict[str, float]:
    """Tokens through the model in forward passes, millions: sampling 1, reference 1, training 3.

    The backward pass costs two forward ones (arXiv 2001.08361, table 1). Shared prompts count once
    per query and context in training, and once per answer in sampling. What a teacher or a ranker
    reads counts 1. Evaluation, the quality
    report and judging are left out: they are not the method.
    """
    chat, found = chat_format(), {"principles": 0.0, "sampling": 0.0, "training": 0.0}
    method = recipe["method"]
    for where in [*folder.glob("ranker"), *sorted(folder.glob("iteration-*"))]:
        if (where / "principles.jsonl").exists():
            found["principles"] += sum(map(written_tokens, triples(where / "principles.jsonl")))
        whole = [where / name for name in ("triples", "samples", "ranked/candidates")]
        for part in list(where.glob("answers/*")) or filter(Path.exists, whole):
            found["sampling"] += sum(map(sampled_tokens, read_shards(part)))
        if where.name == "ranker":  # rlcd's reward model, trained on plain pairs
            pairs, names = triples(where / "filtered.jsonl"), ("plain/good", "plain/bad")
            found["training"] += 3 * recipe["reward"]["epochs"] * tree_tokens(pairs, names)
            continue
        if (where / "generator").exists():
            names = Objective.named(recipe["generator"]["objective"]).sequences
            cost = 1 + 3 * recipe["generator"]["epochs"]
            found["training"] += cost * tree_tokens(triples(where / "filtered.jsonl"), names)
        cost = 1 + 3 * recipe["training"]["epochs"]
        if method == "sso-online":
            settings = {k: recipe["training"][k] for k in ("use_weight", "use_steer")}
            names = Objective.named("sso-online", **settings).sequences
            found["training"] += cost * tree_tokens(triples(where / "filtered.jsonl"), names)
        elif (where / "teacher").exists():
            learnt = [Triple.from_dict(row) for row in read_shards(where / "samples")]
            teacher = TokenObjective if method == "distil" else ContrastObjective
            found["training"] += tree_tokens(learnt, teacher.read)
            found["training"] += (cost - 1) * tree_tokens(learnt, ContrastObjective.sequences)
        else:
            if method in ("best-of-n-principles", "rlcd"):
                reads = ("plain/plain",) if method == "rlcd" else PrincipleContrast.read
                ranked = read_shards(where / "ranked/candidates")
                found["sampling"] += sum(ranking_tokens(row, reads) for row in ranked)
            scored = [*where.glob("answers/*"), *([where / "samples"] if method == "dlma" else [])]
            for part in scored:
                written = map(Triple.from_dict, read_shards(part))
                found["sampling"] += tree_tokens(written, GAP_SEQUENCES)
            for row in read_shards(where / "preferences"):
                prompt = chat.prompt_ids(Query.from_dict({"messages": row["prompt"]}).messages)
                answers = [row["chosen"][-1]["content"], row["rejected"][-1]["content"]]
                tokens = len(prompt) + sum(len(chat.response_ids(text)) for text in answers)
                found["training"] += cost * tokens
    found["all"] = sum(found.values())
    return {name: round(value / 1e6, 4) for name, value in found.items()}


def triples(path: Path) -> list[Triple]:
    """Triples of a JSONL file."""
    return [Triple.from_dict(row) for _, row in read_jsonl(path)]


def written_tokens(triple: Triple) -> int:
    """Both questions to the writer of principles, and about what it answers."""
    assert triple.principles is not None
    p, query = triple.principles, Query(triple.id, triple.messages)
    chat = chat_format()
    asked = (
        writer.feature_prompt(query, len(p.features)),
        writer.principle_prompt(query, tuple(p.features)),
    )
    answers = (", ".join(p.features), p.good, p.bad)
    return sum(len(chat.prompt_ids(tuple(a))) for a in asked) + sum(
        len(chat.response_ids(text)) for text in answers
    )


def sampled_tokens(row: dict[str, Any]) -> int:
    """Prompts and answers of one query."""
    if "answers" in row:
        query = Query.from_dict({k: v for k, v in row.items() if k != "answers"})
        answers = [len(chat_format().response_ids(text)) for text in row["answers"]]
        return len(answers) * len(chat_format().prompt_ids(query.messages)) + sum(answers)
    triple = Triple.from_dict(row)
    return sum(len(chat_format().sequence(triple, f"{r}/{r}")) for r in triple.responses)


def ranking_tokens(row: dict[str, Any], reads: Sequence[str]) -> int:
    """What a ranker reads of the candidates of one query."""
    rest = {k: v for k, v in row.items() if k != "answers"}
    one_each = [Triple.from_dict({**rest, "responses": {"plain": a}}) for a in row["answers"]]
    return tree_tokens(one_each, reads)


def tree_tokens(found: Iterable[Triple], names: Sequence[str]) -> int:
    """Tokens of the sequences, each prompt counted once."""
    total = 0
    for triple in found:
        sequences = [chat_format().sequence(triple, name) for name in names]
        total += sum(map(len, {s.prompt_ids for s in sequences}))
        total += sum(len(s.response_ids) for s in sequences)
    return total
