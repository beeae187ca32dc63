"""Where a target of contrast distillation lets an answer end, beside the contexts it is made of.

    python benchmarks/endings.py RUN --feature Brevity     # a run folder with triples: minutes

At every end of a sentence in the policy's plain answers: how likely is the end of the answer next,
in the plain, good and bad context and in the target, at several strengths λ and clips c; and how
likely an answer ends at one of them at all. Queries whose good principle asks for the feature are
told apart from the others: the policy sees no principle, so it learns the mean of both. Writes
``benchmarks/results/endings.json`` and ``.md``.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch

from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Triple
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.objectives import ContrastObjective
from selfsteer.recipe.sections import resolve_path
from selfsteer.run.folder import versions
from selfsteer.view import RunView

RESULTS = Path(__file__).parent / "results"
CONTEXTS = ("plain/plain", "good/plain", "bad/plain")
TARGETS = ((4.0, 1.0), (4.0, 2.0), (2.0, 1.0), (2.0, 2.0))


@torch.no_grad()
def endings(loaded: LoadedModel, triple: Triple, stop: int) -> dict[str, list[float]]:
    """Row → probabilities that the answer ends after each of its sentences."""
    logps = []
    for context in CONTEXTS:
        sequence = loaded.chat.sequence(triple, context)
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        size = len(sequence.response_ids)
        logits = loaded.model(input_ids=ids).logits[0, -size - 1 : -1]
        logps.append(logits.float().log_softmax(dim=-1))
    said = [loaded.chat.tokenizer.decode([i]).strip() for i in sequence.response_ids]
    at = [i for i in range(1, size) if said[i - 1].endswith((".", "!", "?"))]
    logps = [logp[at] for logp in logps]
    found = dict(zip(("plain", "good", "bad"), logps, strict=True))
    for strength, clip in TARGETS:
        made = ContrastObjective(strength=strength, clip=clip)
        found[f"target, λ {strength:g}, c {clip:g}"] = made.target(*logps)
    return {name: logp[:, stop].exp().tolist() for name, logp in found.items()}


def figures(rows: Iterable[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Per row: the mean over ends of sentences, and over answers that one of them ends it."""
    ends, whole = defaultdict(list), defaultdict(list)
    for row in rows:
        for name, values in row.items():
            ends[name] += values
            whole[name].append(1 - float(torch.tensor([1 - v for v in values]).prod()))
    return {n: {"at_a_sentence": fmean(ends[n]), "within": fmean(whole[n])} for n in ends}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--feature", default="Brevity")
    parser.add_argument("--limit", type=int, default=36, help="most queries of each kind")
    args = parser.parse_args()
    run = RunView.open(args.run)
    loaded = load_model(resolve_path(run.recipe.policy.model), run.loading, inference=True)
    stop = loaded.chat.end_of_turn
    report = {"feature": args.feature, "versions": versions(), "kinds": {}}
    lines = ["# Where the target of contrast distillation lets an answer end", ""]
    for kind in (True, False):
        triples = [
            t
            for t in run.rounds_of(run.recipe.method)[-1].triples
            if t.principles and (args.feature in t.principles.features) is kind
        ][: args.limit]
        made = figures(endings(loaded, t, stop) for t in triples)
        asks = f"asks for {args.feature}" if kind else f"does not ask for {args.feature}"
        report["kinds"][asks] = {"queries": len(triples), "rows": made}
        lines += [
            f"{len(triples)} queries whose good principle {asks}:",
            "",
            "| distribution | end of the answer, after a sentence | answers that end at one |",
            "|---|---|---|",
            *(f"| {n} | {v['at_a_sentence']:.3f} | {v['within']:.2f} |" for n, v in made.items()),
            "",
        ]
    lines.append(
        f"Plain answers of the run {run.folder.name}. Made by `python benchmarks/endings.py`."
    )
    write_atomic(RESULTS / "endings.json", json.dumps(report, indent=1) + "\n")
    write_atomic(RESULTS / "endings.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
