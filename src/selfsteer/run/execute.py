"""The stages and the iteration loop: read this file first.

    queries ─► principles ─► triples ─► generator ─► preferences ─► policy ─► evaluation
      x         p+, p-      y+, y-, yo   (trained)     (x, y+, y-)   (trained)  (judged)

The query set may be grown with the policy before anything else (stage ``augment``).

Generator way (SSO v2): the policy's triples train a generator, the generator writes preferences,
the original policy is trained on them. Online way (v1): the policy trains on its own triples,
iteration after iteration. PBAA: the policy itself writes the preferences. Rivals: plain answers,
ranked by a judge or set against given ones. A reward model can be trained on the preferences of any
of them, or, with method reward, on given ones.

`plan` only lists stages; nothing heavy is imported before one of them works.
"""

import gc
import shutil
import sys
import time
from typing import Any

import yaml

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import RESPONSES
from selfsteer.errors import ConfigError
from selfsteer.recipe.sections import PLAIN_METHODS, Recipe, resolve_path
from selfsteer.run import ranks
from selfsteer.run.folder import RunFolder, Stage, StageResult, refuse
from selfsteer.run.progress import reported
from selfsteer.run.tracking import tracking
from selfsteer.stages.plan import Made, Plan
from selfsteer.terminal import duration, is_main_process, say


def plan(recipe: Recipe, run: RunFolder) -> list[Stage]:
    """All stages of a recipe, in the order they run."""
    p = Plan(recipe, run)
    if recipe.method == "reward":
        p.train_reward(None)
        return p.stages
    policies: dict[str, list[Made]] = {recipe.method: []}
    principles: list[Made] = []
    exhibit: dict[str, Made] = {}
    policy = p.base
    for k in range(1, recipe.iterations + 1):
        where = f"iteration-{k}"
        if recipe.method in PLAIN_METHODS:
            policy = rival(p, where, policy)
            policies[recipe.method].append(policy)
            continue
        principles.append(p.principles(where, k, policy))
        if recipe.method == "pbaa":
            trained = pbaa(p, where, principles[-1], policy)
        else:
            limit = recipe.generator.queries if recipe.method == "sso" else None
            writers = dict.fromkeys(RESPONSES, policy)
            triples = p.sample(where, "triples", principles[-1], writers, limit)
            kept = p.filter(where, triples, policy, trained_on=recipe.method == "sso-online")
            if recipe.method == "sso":
                if recipe.generator.per_half:
                    good = p.generator(where, kept, policy, "plus")
                    bad = p.generator(where, kept, policy, "minus")
                else:
                    good = bad = p.generator(where, kept, policy)
                    exhibit = {"policy": policy, "generator": good}
                samples = p.sample(where, "samples", principles[-1], {"good": good, "bad": bad})
                preferences = p.preferences(where, samples)
                p.quality(where, preferences, principles[-1], policy, kept)
                trained = p.policy(where, "pbaa", preferences, policy)
            else:
                preferences = p.preferences(where, kept, cleaned=True)
                p.quality(where, preferences, principles[-1], policy, kept)
                trained = p.policy(where, "sso-online", kept, policy)
        policies[recipe.method].append(trained)
        policy = trained
    if recipe.reward is not None:
        p.train_reward(p.pairs)
    if recipe.baseline == "pbaa":
        policies["pbaa"] = []
        policy = p.base
        for k, same_principles in enumerate(principles, 1):
            policy = pbaa(p, f"baseline/iteration-{k}", same_principles, policy)
            policies["pbaa"].append(policy)
    p.evaluation(policies, exhibit)
    p.benchmarks(policies)
    return p.stages


def pbaa(p: Plan, where: str, principles: Made, policy: Made) -> Made:
    """Principle-based automated alignment: pairs from the policy itself, one plain term."""
    samples = p.sample(where, "samples", principles, {"good": policy, "bad": policy})
    preferences = p.preferences(where, samples)
    p.quality(where, preferences, principles, policy, None)
    return p.policy(where, "pbaa", preferences, policy)


def rival(p: Plan, where: str, policy: Made) -> Made:
    """Pairs of plain answers, without principles (docs/methods.md), and the same one plain term."""
    made = {"spin": p.opponents, "sgpo": p.improved}.get(p.recipe.method, p.ranked)
    pairs = made(where, policy)
    preferences = p.preferences(where, pairs)
    p.quality(where, preferences, None, policy, None)
    return p.policy(where, "pbaa", preferences, policy)


def select(stages: list[Stage], until: str | None) -> list[Stage]:
    """The stages up to and with the first one called ``until``.

    Raises:
        ConfigError: no stage is called that.
    """
    if until is None:
        return stages
    for i, stage in enumerate(stages):
        if until in (stage.name, stage.name.partition("/")[2], stage.name.rpartition("/")[2]):
            return stages[: i + 1]
    names = list(dict.fromkeys(s.name.partition("/")[2] or s.name for s in stages))
    raise ConfigError(f"There is no stage {until!r}; stages are {', '.join(names)}.")


def execute(
    recipe: Recipe,
    given: dict[str, Any],
    *,
    until: str | None = None,
    redo: bool = False,
) -> int:
    """Runs what of a recipe is not done yet; returns how many stages it ran.

    Of several ranks the first does the work; the others join where a stage is for all of them.

    Args:
        recipe: checked and complete.
        given: the recipe as the user gave it, overrides merged; kept as ``recipe.yaml``.
        until: stop after this stage.
        redo: replace work that was made with other settings (it moves to ``superseded/``).

    Raises:
        SelfsteerError: see the errors' own texts; finished stages and shards stay.
    """
    run = RunFolder(recipe.folder)
    whole = plan(recipe, run)
    stages = select(whole, until)
    alone = [s for s in stages if s.name == "train_reward" and not run.is_done(s)]
    if ranks.size() > 1 and alone:
        raise ConfigError(
            "The reward model is trained by one process. Stop the ranks before it with --until, "
            "then run the same recipe without --nproc."
        )
    if not is_main_process():
        if any(s.on_ranks and not run.is_done(s) for s in stages):
            _check_device(recipe)
        follow(stages)
        return 0
    with run.locked(), ranks.leading() as call:
        stale = run.stale(whole)
        if stale and not redo:
            refuse(run, stale)
        todo = [s for s in stages if not run.is_done(s)]
        with (
            reported(run, [s.name for s in todo]) as reporter,
            tracking(recipe.tracking if todo else (), run) as tracker,
        ):
            run.watch = tracker.note
            for note in check_models(recipe) if todo else []:
                say(note)
            run.supersede(stale)
            _write_recipe(run, recipe, given)
            for i, stage in enumerate(todo, 1):
                say(f"[{i}/{len(todo)}] {stage.name}", "bold")
                reporter.stage(stage.name)
                if stage.on_ranks:
                    call(stage.name, stage.fingerprint)
                begin = time.monotonic()
                result = run.execute(stage)
                _free_memory()
                say(f"  {summary_line(result)}; {duration(time.monotonic() - begin)}")
        if until is None and not recipe.keep.generator:
            drop_generators(run)
    return len(todo)


def follow(stages: list[Stage]) -> None:
    """What the other ranks do: they work where the first one calls them, and write no ledger."""
    known = {s.name: s for s in stages}
    for name, fingerprint in ranks.following():
        if name not in known or known[name].fingerprint != fingerprint:
            ranks.refuse_stage(name)
        known[name].work()
        _free_memory()


def _free_memory() -> None:
    """Gives back what a stage's models held of a GPU: the next engine may be another process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def summary_line(result: StageResult) -> str:
    """``1,400 in, 1,391 out, dropped 9 (5 unfinished, 4 equals_plain)``."""
    drops = ", ".join(f"{n:,} {reason}" for reason, n in result.dropped.most_common())
    lost = sum(result.dropped.values())
    tail = f", dropped {lost:,} ({drops})" if lost else ""
    return f"{result.n_in:,} in, {result.n_out:,} out{tail}"


def check_models(recipe: Recipe) -> list[str]:
    """Fails now, not after a night of sampling, if a model cannot be loaded.

    Returns:
        What is odd about them but works.

    Raises:
        ArtifactError: no such model, or a chat template is missing.
        ConfigError: the response budget exceeds the model's context.
    """
    from selfsteer.engines.load import check_engine
    from selfsteer.judges.base import load_judges
    from selfsteer.models.load import load_chat, load_context_length
    from selfsteer.stages.benchmark import check_benchmarks

    for judge in load_judges(recipe.judges):
        judge.check(())
    writer = recipe.principles.writer if recipe.principles.mode == "generated" else None
    for engine in (recipe.sampling.engine, recipe.improver, writer):
        if engine is not None:
            check_engine(engine)
    check_benchmarks(recipe)
    _check_device(recipe)
    notes = []
    sampled = {"sampling.max_new_tokens": recipe.sampling.max_new_tokens}
    budgets = dict(sampled)
    written = {"principles.max_new_tokens": recipe.principles.max_new_tokens}
    if recipe.principles.asks_a_model:
        budgets |= written
    if recipe.queries.augment is not None:
        budgets["queries.augment.max_new_tokens"] = recipe.queries.augment.max_new_tokens
    asked = {recipe.policy.model: {} if recipe.method == "reward" else budgets}
    if recipe.reward is not None and recipe.reward.model is not None:
        asked.setdefault(recipe.reward.model, {})
    writer = recipe.principles.writer
    if recipe.principles.mode == "generated" and writer and not writer.base_url:
        asked.setdefault(str(writer.model), written)
    if recipe.improver and not recipe.improver.base_url:
        asked.setdefault(str(recipe.improver.model), {}).update(sampled)
    for name, needed in asked.items():
        source = resolve_path(name)
        chat = load_chat(source, recipe.policy)
        if not chat.has_system_role:
            notes.append(
                f"{source} has no system role: principles go in front of the first user turn"
            )
        limit = load_context_length(source, recipe.policy)
        for key, budget in needed.items():
            if limit is not None and budget >= limit:
                raise ConfigError(
                    f"{key} {budget} leaves no room for a prompt: {source} has a context of "
                    f"{limit} tokens. Lower it."
                )
    return notes


def _check_device(recipe: Recipe) -> None:
    from selfsteer.models.load import check_bits, resolve_device

    device = resolve_device(recipe.policy.device)
    if recipe.policy.lora:
        check_bits(recipe.policy.lora.bits, device)


def drop_generators(run: RunFolder) -> None:
    """Deletes the generators' weights, as the recipe wishes; the folders stay as a record."""
    for weights in run.path.glob("iteration-*/generator/**/*.safetensors"):
        weights.unlink()
        write_atomic(weights.with_name("weights-removed.txt"), "keep.generator was false\n")


def _write_recipe(run: RunFolder, recipe: Recipe, given: dict[str, Any]) -> None:
    resolved = recipe.model_dump_json(indent=1) + "\n"
    path = run / "resolved.json"
    if path.exists():
        old = path.read_text("utf-8")
        if old == resolved:
            return
        stamp = digest(old)
        for name in ("resolved.json", "recipe.yaml"):
            target = run / "superseded" / f"recipe-{stamp}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (run / name).exists() and not target.exists():
                shutil.copy2(run / name, target)
    write_atomic(run / "recipe.yaml", yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
    write_atomic(path, resolved)
