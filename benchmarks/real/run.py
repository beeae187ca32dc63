"""A house style on a real model: runs the recipe per seed, measures what came out, writes the page.

    python benchmarks/real/run.py --out DIR --seeds 0 1 2 --methods base good pbaa sso --ifeval FILE
    python benchmarks/real/run.py --config first-try --prompts FILE … --seeds 0
    python benchmarks/real/run.py --page               # the page alone

Resumable: a result is one JSON under ``--out``, a run that was broken off goes on where it was.
``base`` is the model as it is and ``good`` the same under the good principle; any other method is
one of selfsteer's, with the settings of the recipe that it has. Those that rank answers also need
``--set sampling.keep_unfinished=false``, and in the first try those that distil need ``true``. Of
IFEval's prompts (``--ifeval``, the project does not contain them) a seeded quarter is asked,
greedily.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import page

from selfsteer.data.digests import derive_seed, digest
from selfsteer.data.jsonl import dump_lines, write_atomic
from selfsteer.data.queries import load_queries
from selfsteer.data.records import Principles, Query
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.errors import ConfigError, DataError
from selfsteer.judges.checks import ChecksJudge
from selfsteer.judges.load import load_judge
from selfsteer.methods import METHODS, Aligning, Principled, recipe_of
from selfsteer.principles.contexts import context_messages
from selfsteer.principles.writer import specimen
from selfsteer.recipe.read import choose, load_values, merge
from selfsteer.recipe.sections import JudgeConfig, Queries, resolve_path
from selfsteer.run.execute import execute
from selfsteer.run.stage import identity
from selfsteer.stages.principles import kept_system
from selfsteer.view import RunView

HERE = Path(__file__).parent

#: What is measured without training: the base model in the plain and in the good context.
UNTRAINED = ("base", "good")

#: The first try: two fixed principles, and answers of at most 30 words.
SHORT = "Answer in one short sentence."
LONG = "Answer at great length, with many paragraphs."
ALIGN, HELD_OUT, CHARS, WORDS = 128, 48, 220, 30

#: Tokens of an answer that is measured: the recipe's.
TOKENS = 96

#: Share and seed of IFEval's prompts, and the tokens of an answer.
SHARE, IFEVAL_SEED, IFEVAL_TOKENS = 4, 0, 256


def first_try(prompts: Sequence[Path], folder: Path, sizes: tuple[int, int]) -> list[str]:
    """The settings of the first try; writes its two query files.

    Raises:
        DataError: the files hold too few prompts.
    """
    found = {q.messages: q for p in prompts for q in load_queries(asked(p)).queries}
    wanted = sorted(found.values(), key=lambda q: derive_seed(0, "first-try", q.text))
    if len(wanted) < sum(sizes):
        raise DataError(f"{sum(sizes)} prompts are needed, found {len(wanted)}; add --prompts.")
    rules = [{"words": {"max": WORDS}}]
    parts = {"align": wanted[: sizes[0]], "held-out": wanted[sizes[0] : sum(sizes)]}
    for name, part in parts.items():
        rows = [{"id": q.id, "prompt": q.text, "checks": rules} for q in part]
        write_atomic(folder / f"{name}.jsonl", dump_lines(rows))
    return [
        f"queries.path={folder / 'align.jsonl'}",
        f"evaluation.queries.path={folder / 'held-out.jsonl'}",
        f"principles={{mode: fixed, good: '{SHORT}', bad: '{LONG}'}}",
        "sampling.keep_unfinished=false",
        "judge=checks",
    ]


def asked(path: Path) -> Queries:
    """Prompts short enough for a CPU."""
    return Queries(path=str(path), max_chars=CHARS)


def recipe_for(method: str, settings: Sequence[str], beside: Iterable[str]) -> Aligning:
    """The recipe with this method; settings that the method does not have are left out."""
    values = merge(load_values("smollm2"), [*settings, f"method={method}"])
    if method == "pbaa" or "pbaa" not in beside:
        values["baseline"] = None
    kind = choose(METHODS, values, "recipe")
    known = {name: value for name, value in values.items() if name in kind.model_fields}
    made = recipe_of(known, f"recipe smollm2 with method {method}")
    assert isinstance(made, Aligning)
    return made


def measure(
    model: str,
    recipe: Aligning,
    ifeval: Sequence[Query],
    good: Principles | None,
    store: Path,
) -> dict[str, Any]:
    """The model's answers to held-out prompts, sampled and greedy, and to IFEval's."""
    s, judge = recipe.sampling, load_judge(recipe.judge)
    assert recipe.evaluation is not None
    assert isinstance(judge, ChecksJudge)
    held_out = load_queries(recipe.evaluation.queries).queries
    context = "good" if good else "plain"
    found: dict[str, Any] = {}
    # a method may train on longer answers than are measured; a trial has tiny ones here, too
    tokens = min(TOKENS, s.max_new_tokens)
    ifeval_tokens = min(IFEVAL_TOKENS, 4 * s.max_new_tokens)
    plans = {
        "sampled": (held_out, s.temperature, tokens, judge),
        "greedy": (held_out, 0.0, tokens, judge),
        "ifeval": (ifeval, 0.0, ifeval_tokens, IFEVAL_JUDGE),
    }
    for name, (queries, temperature, tokens, by) in plans.items():
        if not queries:
            continue
        start = time.monotonic()
        requests = [
            Request(
                q.id,
                tuple(context_messages(q.messages, good, context)),
                derive_seed(recipe.seed, name, q.id),
            )
            for q in queries
        ]
        with Engines(None) as engines:
            said = answers(
                engines.sampler(s.engine, model, recipe.policy.loading, s.batch_size),
                requests,
                SamplingParams(temperature, s.top_p, tokens),
                store=store.with_suffix(f".{name}.jsonl"),
            )
        rows = [(q, said[q.id]) for q in queries]
        found[name] = figures(rows, by) | {"seconds": time.monotonic() - start}
    return found


IFEVAL_JUDGE = ChecksJudge(JudgeConfig(kind="checks"))


def figures(rows: Sequence[tuple[Query, Any]], judge: ChecksJudge) -> dict[str, Any]:
    """What is kept of a model's answers: rules by query, lengths, how many differ."""
    rules = [judge.results(q, a.text) for q, a in rows]
    texts = [a.text for _, a in rows]
    return {
        "ids": [q.id for q, _ in rows],
        "kept": [sum(kept for _, kept in own) for own in rules],
        "of": [len(own) for own in rules],
        "by_rule": by_rule(rules),
        "words": [len(t.split()) for t in texts],
        "tokens": [a.completion_tokens for _, a in rows],
        "unfinished": sum(a.finish_reason == "length" for _, a in rows),
        "distinct": len(set(texts)),
    }


def by_rule(rules: Iterable[Iterable[tuple[str, bool]]]) -> dict[str, list[int]]:
    """Rule → how often it was kept, and how often asked for."""
    found: dict[str, list[int]] = {}
    for own in rules:
        for name, kept in own:
            count = found.setdefault(name, [0, 0])
            count[0] += kept
            count[1] += 1
    return found


def quarter(path: Path | None, limit: int | None) -> tuple[list[Query], list[str]]:
    """A seeded quarter of IFEval's prompts; left out are those whose checkers lack their data."""
    if path is None:
        return [], []
    queries = load_queries(Queries(path=str(path))).queries
    chosen = sorted(queries, key=lambda q: derive_seed(IFEVAL_SEED, "ifeval", q.text))
    chosen = chosen[: len(chosen) // SHARE][:limit]
    kept, lost = [], []
    for q in chosen:
        try:
            IFEVAL_JUDGE.check([q])
            kept.append(q)
        except ConfigError:
            lost.append(q.id)
    return kept, lost


def trained(recipe: Aligning, method: str) -> dict[str, Any]:
    """Figures of the pairs and the seconds of each stage, read from the run folder."""
    run = RunView.open(recipe.folder)
    _, pairs = run.last(method)
    stages = {s.name: s for s in run.stages if s.method in (method, None)}
    return {
        "pairs": None if pairs is None else {
            "pairs": pairs.pairs,
            "accuracy": pairs.accuracy,
            "on_policyness": pairs.on_policyness,
            "tokens": pairs.tokens,
        },
        "seconds": {name: s.seconds for name, s in stages.items()},
        "dropped": {name: dict(s.dropped) for name, s in stages.items() if s.dropped},
    }  # fmt: skip


def settings_digest(recipe: Aligning, method: str, ifeval: Sequence[Query]) -> str:
    """Tells results of other settings apart."""
    policies = [
        s.fingerprint for s in recipe.plan() if (s.where.method, s.title) == (method, "policy")
    ]
    measured = [identity(s) for s in (recipe.sampling, recipe.evaluation, recipe.judge)]
    return digest([policies or recipe.policy.model, measured, [q.id for q in ifeval]])


def fill(method: str, seed: int, args: argparse.Namespace, given: Sequence[str]) -> None:
    """Runs what is missing of one method and seed, and writes its result."""
    trains = method not in UNTRAINED
    beside = args.methods if method in ("sso", "pbaa") else ()
    by = "sso" if not trains or (method == "pbaa" and "sso" in beside) else method
    name = f"{args.config}-{args.label or by}-{seed}"
    settings = [f"name={name}", f"runs_dir={args.runs.absolute()}", f"seed={seed}", *given]
    recipe = recipe_for(by, settings, beside)
    ifeval, undecided = quarter(args.ifeval, args.limit)
    label = args.label or method
    path = args.out / f"{args.config}-{label}-{seed}.json"
    settings_are = settings_digest(recipe, method, ifeval)
    if path.exists():
        if json.loads(path.read_text("utf-8"))["settings"] != settings_are:
            raise SystemExit(f"{path} has other settings; choose another --out, or remove it")
        return
    model = resolve_path(recipe.policy.model)
    result: dict[str, Any] = {"config": args.config, "method": label, "seed": seed}
    if trains:
        execute(recipe, recipe.model_dump(mode="json", exclude_unset=True))
        model = str(policy_of(recipe, method))
        result |= trained(recipe, method)
    store = args.runs / f"{args.config}-{label}-{seed}"
    result["settings"], result["ifeval_undecided"] = settings_are, len(undecided)
    result["given"] = list(args.set)
    if method == "good":  # the style is asked for; IFEval asks for other things
        assert isinstance(recipe, Principled)
        # after the template's own system prompt, as in training
        system = kept_system(recipe.principles, model, recipe.policy.loading)
        good = replace(specimen(recipe.principles), system=system)
        result |= measure(model, recipe, (), good, store)
    else:
        result |= measure(model, recipe, ifeval, None, store)
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    print(f"{path}: {page.summary(result)}", flush=True)


def policy_of(recipe: Aligning, method: str) -> Path:
    """The last policy of a method."""
    return RunView.open(recipe.folder).rounds_of(method)[-1].folder / "policy"


def main() -> None:
    """Fills what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=["style", "first-try"], default="style")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--runs", type=Path, default=HERE / ".runs", help="scratch folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["base", "good", "pbaa", "sso"])
    parser.add_argument("--ifeval", type=Path, help="IFEval's input_data.jsonl")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[], help="of the first try")
    parser.add_argument("--limit", type=int, help="most prompts of each kind, for a trial")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--label", help="what the page calls a method that --set changes")
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    if not args.page:
        args.out.mkdir(parents=True, exist_ok=True)
        args.runs.mkdir(parents=True, exist_ok=True)
        given = list(args.set)
        if args.config == "first-try":
            if not args.prompts:
                parser.error("--config first-try needs --prompts FILE")
            sizes = (args.limit or ALIGN, args.limit or HELD_OUT)
            given = [*first_try(args.prompts, args.runs.absolute(), sizes), *given]
        elif args.limit:
            limits = [f"queries.limit={args.limit}", f"evaluation.queries.limit={args.limit}"]
            given = [*limits, *given]
        for seed in args.seeds:
            for method in args.methods:
                if method not in UNTRAINED or seed == args.seeds[0]:
                    fill(method, seed, args, given)
    print(page.write(args.out))


if __name__ == "__main__":
    main()
