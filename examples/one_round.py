"""One round of Self-Steering Optimization, flat: the short path beside `selfsteer run`.

Generator way (SSO v2) minus run folder, resumption, filter and quality report, on the tiny model
that ships with the package.

    python examples/one_round.py --queries 200
"""

import argparse
import copy
import json
import random
from pathlib import Path

import torch

from selfsteer import Objective, Triple, steering_loss
from selfsteer.data.digests import derive_seed
from selfsteer.data.records import Query
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.score import batch_logps, pad, score_sequences, sums_by_row
from selfsteer.principles import writer
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import Loading
from selfsteer.testbed import oracle, world

LOADING = Loading(dtype="float32", device="cpu", layout="padded")
SAMPLING = SamplingParams(temperature=0.7, top_p=0.8, max_new_tokens=96)


def answer(loaded: LoadedModel, triples: list[Triple], contexts: tuple[str, ...]) -> list[Triple]:
    """Each triple with its responses in these contexts; unfinished ones are left out."""
    engine = TransformersEngine(loaded, batch_size=256)
    kept = {t.id: dict[str, str]() for t in triples}
    for context in contexts:
        asked = [
            Request(
                t.id,
                tuple(context_messages(t.messages, t.principles, context)),
                derive_seed(0, context, t.id),
            )
            for t in triples
        ]
        for a in engine.generate(asked, SAMPLING):
            if a.finish_reason == "stop":
                kept[a.id][context] = a.text
    whole = [t for t in triples if len(kept[t.id]) == len(contexts)]
    return [Triple(t.id, t.messages, t.principles, kept[t.id]) for t in whole]


def train(loaded: LoadedModel, triples: list[Triple], objective: Objective, lr: float) -> None:
    """One epoch of AdamW; the reference is the model before its first step."""
    names, model = objective.sequences, loaded.model
    encoded = [[loaded.chat.sequence(t, n) for n in names] for t in triples]
    reference = [score_sequences(model, e) for e in encoded]
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    order = random.Random(0).sample(range(len(triples)), len(triples))
    batches = [order[i : i + 32] for i in range(0, len(order), 32)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=len(batches) + 1)
    model.train()
    for batch in batches:
        size = len(batch)
        flat = pad([encoded[i][k] for k in range(len(names)) for i in batch], pad_id=0)
        ref = torch.cat([reference[i][k] for k in range(len(names)) for i in batch])
        count = len(names) * size
        ones = torch.ones_like(flat.target)
        policy = sums_by_row(batch_logps(model, flat), flat.row, count).view(-1, size)
        out = steering_loss(
            objective,
            dict(zip(names, policy, strict=True)),
            dict(zip(names, sums_by_row(ref, flat.row, count).view(-1, size), strict=True)),
            dict(zip(names, sums_by_row(ones, flat.row, count).long().view(-1, size), strict=True)),
        )
        optimiser.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def oracle_score(loaded: LoadedModel, queries: list[Query]) -> float:
    """Mean oracle score of plain answers: the testbed's own measure."""
    engine = TransformersEngine(loaded, batch_size=256)
    asked = [Request(q.id, q.messages, derive_seed(1, q.id)) for q in queries]
    texts = {q.id: q.text for q in queries}
    scores = [oracle.score(texts[a.id], a.text).total for a in engine.generate(asked, SAMPLING)]
    return sum(scores) / len(scores)


def read(path: Path, limit: int) -> list[Query]:
    """The first queries of a JSONL file."""
    return [Query.from_dict(json.loads(line)) for line in path.read_text().splitlines()[:limit]]


def main() -> None:
    """Aligns, and prints the oracle score before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=400)
    queries = read(world.QUERIES["align"], parser.parse_args().queries)
    held_out = read(world.QUERIES["tune"], 200)
    policy = load_model(str(world.CHECKPOINT), LOADING)
    before = oracle_score(policy, held_out)

    # 1 principles: two features a query, the built-in text
    rng = random.Random(0)
    chosen = [writer.complete_features((), 2, rng) for _ in queries]
    triples = [
        Triple(q.id, q.messages, writer.picked(f)) for q, f in zip(queries, chosen, strict=True)
    ]
    # 2 triples: the policy answers in all three contexts
    sampled = answer(policy, triples, ("plain", "good", "bad"))
    # 3 generator: a copy of the policy, trained to steer and to stay itself (eq. 1, 2, 4)
    generator = copy.copy(policy)
    generator.model = copy.deepcopy(policy.model)
    train(generator, sampled, Objective.named("sso", gamma=1.0), lr=1e-4)
    # 4 preferences: the generator answers, principles are dropped
    pairs = answer(generator, triples, ("good", "bad"))
    pairs = [p for p in pairs if p.responses["good"] != p.responses["bad"]]
    # 5 policy: the original one, on plain pairs
    train(policy, pairs, Objective.named("pbaa"), lr=2e-4)

    after = oracle_score(policy, held_out)
    print(f"{len(queries)} queries, {len(sampled)} triples, {len(pairs)} pairs")
    print(f"oracle score of plain answers: {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
