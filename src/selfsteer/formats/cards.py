"""The README of an exported data set or model: how it was made, how good it is, what it is not for.

Folders of the machine that it was made on are cut down to their last name.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from selfsteer.data.digests import is_hub_id, split_revision
from selfsteer.formats.hub import WARNINGS
from selfsteer.methods import METHODS, Aligning, Paired, Principled
from selfsteer.recipe.read import method_of
from selfsteer.recipe.sections import JudgeConfig, Lora, PrinciplesConfig, Section, mark
from selfsteer.report import tables
from selfsteer.report.tables import inline, sentence, show_cell
from selfsteer.terminal import interval
from selfsteer.view import RoundView, StageView


def public_name(source: str) -> str:
    """A model or a file as the world may know it: a hub id as it is, of a path the last name.

    >>> public_name("some-lab/some-model-8b")
    'some-lab/some-model-8b'
    >>> public_name("/home/me/models/mine")
    'mine'
    """
    shown = _on_hub(source) or source.startswith("package:")
    return source if shown else source.rstrip("/").rpartition("/")[2]


def _on_hub(source: str) -> bool:
    return "/" in source and is_hub_id(source)


def dataset_card(
    of: RoundView,
    *,
    count: int,
    files: Sequence[str],
    left_out: Sequence[str],
    queries_license: str | None,
) -> str:
    """The card of one round's preferences.

    Args:
        of: the round.
        count: preferences.
        files: of the data, relative to the card.
        left_out: what the run has and the data set has not, one sentence each.
        queries_license: of the prompts, as an identifier of the hub; None is unknown.
    """
    recipe, method = of.recipe, _method(of)
    sizes = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")
    data_files = [{"split": "train", "path": list(files)}]
    front = {
        **_license(queries_license),
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "self-steering-optimization", "synthetic"],
        "size_categories": [sizes[min(max(len(str(count)) - 3, 0), len(sizes) - 1)]],
        "configs": [{"config_name": "default", "data_files": data_files}],
    }
    licence = queries_license or "unknown, check before you publish"
    given = method.needs_answers and not method.either_side
    answers = "rejected answers" if given else "answers"
    order = "a judge's opinion" if recipe.ranker else "assumed, not judged"
    features, risks = "", "A rejected answer can be good, and a chosen one wrong."
    if issubclass(method, Principled):
        features = " `features`, if it is there: what the principles were about."
    if method.bad_on_purpose:
        risks = (
            "The rejected answers are **deliberately bad**: they were asked to be wrong, "
            "unhelpful, or unsafe. Never show them to people as answers and never fine-tune on "
            "them alone. A chosen answer can be wrong as well."
        )
    return _page(
        front,
        f"# {recipe.name}: {count:,} preferences without annotators",
        f"Each record is a prompt with a chosen and a rejected answer. {method.pair}. "
        f"{compared(recipe)}",
        *_warnings(warnings_of(of, data=True)),
        "## How it was made",
        _how(
            of,
            next((s for s in of.stages if s.kind == "WritePairs"), None),
            ("Model", public_name(recipe.policy.model)),
            ("Sampling", _settings(recipe.sampling, "temperature", "top_p", "max_new_tokens")),
        ),
        "## Counts",
        _stages(of),
        f"Left out of the data set: {' '.join(left_out) or 'nothing.'}",
        "## Quality",
        _quality(of),
        "## Columns",
        "`id`, `prompt`, `chosen`, `rejected` (chats), and `finish_reasons`: `length` where an "
        f"answer was cut off by the token budget.{features}",
        "## Licence",
        f"Queries: {licence}. The {answers} are a model's, and its own terms apply to them.",
        "## Intended use",
        "Training with DPO and kin, training reward models, and research on automated alignment. "
        f"Not for evaluation: the order of each pair is {order} (see Quality).",
        "## Risks",
        f"{risks} Nothing was removed for personal data or safety beyond the drops above.",
    )


def model_card(of: RoundView) -> str:
    """The card of the policy that a round trained."""
    recipe, method = of.recipe, _method(of)
    source = recipe.policy.model
    base, paired = public_name(source), issubclass(method, Paired)
    kind = ["preference", "dpo"] if paired else ["distillation"]
    front = {
        **({"base_model": split_revision(source)[0]} if _on_hub(source) else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["self-steering-optimization", *kind],
    }
    away = "answers that were deliberately bad" if method.bad_on_purpose else "rejected answers"
    steered = f"Training steered it away from {away}; its" if paired else "Its"
    loss = ("base", "beta") if paired else ()
    names = (*loss, "learning_rate", "batch_size", "epochs", "max_length")
    others = _changed(recipe.training, *names)
    rounds = _rounds(of)
    trained = [s for r in rounds for s in r.stages if s.title == "policy" and s.done]
    learnt = _trained_on([s.n_out for s in trained], "pairs" if paired else "answers")
    for stage in (s for s in of.before if s.kind == "Train" and s.done):
        learnt += f"; before them, {stage.n_out:,} examples"
    lora = recipe.policy.lora
    return _page(
        front,
        f"# {recipe.name}",
        f"{base}, trained on {method.learnt}. {method.pair}. {compared(recipe)}",
        *_warnings(warnings_of(of)),
        "## How it was made",
        _how(
            of,
            trained[-1] if trained else None,
            ("Base model", base),
            ("Trained on", learnt),
            *_selected(of, trained),
            ("Training", ", ".join([_settings(recipe.training, *names), *others])),
            *([("LoRA", _settings(lora, *Lora.model_fields))] if lora else []),
        ),
        "## Data",
        _stages(*rounds),
        *([f"The pairs of iteration {of.k}:"] if paired and of.k > 1 else []),
        *([_quality(of)] if paired else []),
        "## Evaluation",
        *_evaluation(of),
        "## How to use it",
        "An ordinary checkpoint for `from_pretrained`. In its folder:",
        f"```\nvllm serve . --served-model-name {recipe.name}\n"
        f"ollama create {recipe.name} -f Modelfile\n```",
        "## Licence",
        f"That of {base}, whose weights these were; the queries' own terms may apply.",
        "## Intended use and limits",
        "A chat model for the uses of its base model, with the same limits. "
        f"{steered} safety was not evaluated. Prompts unlike those above were not measured. These "
        "are the figures of one run with one seed: another seed gives others.",
    )


def warnings_of(of: RoundView, *, data: bool = False) -> list[str]:
    """What the run warned of in the stages that made a round's policy, or only its data."""
    stages = [*of.before, *(s for r in _rounds(of) for s in r.stages)]
    if data:
        stages = [s for s in stages if (s.title, s.round) != ("policy", of.k)]
    return [f"{name}: {text}" for name, text in tables.warned(stages)]


def _rounds(of: RoundView) -> list[RoundView]:
    """Those of its method up to this one."""
    return [*(r for r in of.run.rounds_of(of.method) if r.k < of.k), of]


def _method(of: RoundView) -> type[Aligning]:
    found = next(m for m in METHODS if method_of(m) == of.method)
    assert issubclass(found, Aligning)
    return found


# -- parts ---------------------------------------------------------------------------------------


def _page(front: Mapping[str, Any], *parts: str) -> str:
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def _license(given: str | None) -> dict[str, str]:
    """The hub knows licences by identifiers; another one is ``other``, with its name."""
    if given is None or re.fullmatch(r"[a-z0-9.+-]+", given):
        return {"license": given or "unknown"}
    return {"license": "other", "license_name": given}


def _how(of: RoundView, stage: StageView | None, *about: tuple[str, str]) -> str:
    recipe, method = of.recipe, _method(of)
    grown = getattr(recipe.queries, "augment", None) is not None
    principles = []
    if issubclass(method, Principled) and isinstance(recipe, Principled):
        principles = [("Principles", _principles(recipe.principles))]
    made = "unknown"
    if stage is not None:
        versions = ", ".join(f"{k} {v}" for k, v in stage.versions.items())
        made = f"{time.strftime('%Y-%m-%d', time.gmtime(stage.began))}, with {versions}"
    return _list(
        ("Method", f"{of.method}. {str(method.__doc__).splitlines()[0]}"),
        ("Iteration", f"{of.k} of {recipe.iterations}"),
        *about,
        *principles,
        (
            "Queries",
            public_name(recipe.queries.path) + (", grown with the policy itself" if grown else ""),
        ),
        ("Seed", str(recipe.seed)),
        ("Made", made),
    )


def _principles(settings: PrinciplesConfig) -> str:
    """Where the principles come from."""
    own, writer = settings.catalogue, settings.writer
    texts = f"the texts of the catalogue {public_name(own)}" if own else "the built-in texts"
    if settings.mode == "fixed":
        return "fixed: texts given by the author of the run"
    if settings.mode == "picked":
        return f"picked: {texts}, by feature"
    by = public_name(writer.model) if writer and writer.model else "the policy"
    return f"generated: written per query by {by}, {texts} where its answer was unusable"


def _list(*items: tuple[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in items)


def _settings(section: Section, *names: str) -> str:
    return ", ".join(f"{name} {getattr(section, name)}" for name in names)


def _changed(section: Section, *but: str, other: Section | None = None) -> list[str]:
    """Settings that results depend on and that are not at their default, or as another's."""
    found = []
    for name, declared in type(section).model_fields.items():
        value = getattr(section, name)
        default = getattr(other, name) if other else declared.get_default()
        if name in but or value == default or mark(declared, "costs_only"):
            continue
        if isinstance(value, Section):
            inner = (
                _changed(value, other=default)
                if isinstance(default, Section)
                else [_settings(value, *type(value).model_fields)]
            )
            found.append(f"{name} ({', '.join(inner)})")
        else:
            found.append(f"{name} {value}")
    return found


def _trained_on(counts: Sequence[int], unit: str) -> str:
    """How many of them, over all iterations.

    >>> _trained_on([8, 8, 7], "pairs")
    '23 pairs: 8, 8 and 7 in iterations 1 to 3'
    """
    if len(counts) < 2:
        return f"{counts[0]:,} {unit}" if counts else "unknown"
    *first, last = [f"{n:,}" for n in counts]
    return f"{sum(counts):,} {unit}: {', '.join(first)} and {last} in iterations 1 to {len(counts)}"


def _selected(of: RoundView, trained: Sequence[StageView]) -> Iterator[tuple[str, str]]:
    """The step that each training kept, which need not be its last one."""
    for stage in trained:
        if "selection" not in stage.notes:
            continue
        said, found, epochs = stage.notes["selection"]["text"], stage.selection, ""
        if found and found.chosen < found.steps:
            done = of.recipe.training.epochs * found.chosen / found.steps
            epochs = f": {done:.3g} of {of.recipe.training.epochs:g} epochs"
        yield f"Selection{f', iteration {stage.round}' if len(trained) > 1 else ''}", said + epochs


def _warnings(found: Sequence[str]) -> list[str]:
    return [WARNINGS, "\n".join(f"- {inline(text)}" for text in found)] if found else []


def _stages(*rounds: RoundView) -> str:
    """Records in and out of each stage that led to the preferences, drops by reason."""
    first = rounds[0]
    before = [s for s in first.run.stages if s.kind in ("ReadQueries", "GrowQueries")]
    rows = [
        (s.name, f"{s.n_in:,}", f"{s.n_out:,}", _counts(s.dropped))
        for s in (*before, *first.before, *(s for r in rounds for s in r.stages))
        if s.done and s.title not in ("quality", "policy", "train_reward")
    ]
    return _table(("stage", "in", "out", "dropped, by reason"), rows)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.items() if n) or "none"


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(recipe: Aligning) -> str:
    """Who said which answer is the better one."""
    judge = recipe.ranker
    if judge is None:
        return "No person compared the answers."
    if judge.kind in ("chat", "reward"):
        return (
            f"The judge was the model {_judge(judge)}. No person compared these answers, but that "
            "model may have learnt from people's comparisons of others."
        )
    return f"The judge was {_judge(judge)}; no person compared the answers."


def _judge(judge: JudgeConfig) -> str:
    named = {"oracle": "the testbed's oracle", "checks": "exact rules", "human": "human labels"}
    named["principles"] = "the contrast of the principles"
    own = f"{public_name(judge.model)} ({judge.kind})" if judge.model else judge.kind
    return named.get(judge.kind, own)


def _quality(of: RoundView) -> str:
    if of.quality is None:
        return "Not measured."
    figures, judge = of.quality.preferences, of.recipe.judge
    accuracy = "not measured, since the run had no judge"
    if judge is not None:
        known = "unknown" if figures.accuracy is None else f"{figures.accuracy:.3f}"
        accuracy = (
            f"{known} of {figures.pairs:,} pairs, by {_judge(judge)} ("
            f"{_counts(figures.verdicts or {})}; first is the chosen answer)"
        )
    likely, tokens, gap = figures.on_policyness, figures.tokens, figures.steering_gap
    steered = f"good {gap['good']:+.2f}, bad {gap['bad']:+.2f}" if gap else ""
    return _list(
        ("Accuracy of the pairs", accuracy),
        (
            "On-policyness (mean probability per token under the policy before training)",
            f"chosen {likely['chosen']:.3f}, rejected {likely['rejected']:.3f}",
        ),
        *([("Steering gap (nats per token)", steered)] if steered else []),
        ("Mean tokens", f"chosen {tokens['chosen']:.1f}, rejected {tokens['rejected']:.1f}"),
    )


def _evaluation(of: RoundView) -> list[str]:
    """Held-out queries by score and by rule, and benchmarks, as far as the run has them."""
    found, label, run = of.run.evaluation, f"{of.method}/iteration-{of.k}", of.run.recipe
    judge = run.judge if isinstance(run, Aligning) else None
    parts = []
    if found is not None and label in found.models:
        rows, models = [], {"start": "base", "this model": label}
        for shown, name in models.items():
            figures = found.models[name]
            cells = [interval(value, ".3f") for value in (figures.score, figures.win_rate)]
            rows.append((shown, *cells, f"{figures.tokens:.1f}"))
        who = "No judge." if judge is None else f"Judge: {_judge(judge)}."
        scale = f" Score: {found.score_scale}." if found.score_scale else ""
        head = ("model", "score", "win rate against the start", "mean tokens")
        parts = [
            f"{found.queries:,} held-out queries, 95 % intervals. {who}{scale}",
            _table(head, rows),
        ]
        rules = tables.rules(of.run, models)
        if rules.rows:
            kept = ([inline(show_cell(cell)) for cell in row] for row in rules.rows)
            parts += [f"{rules.title}:", _table(rules.columns, kept)]
        if of.k == run.last_round and (beside := sentence(of.run)):
            parts.append(beside)
    if of.k == run.last_round and (measured := tables.benchmarks(of.run)):  # of last policies
        # without the notes, which may name folders
        parts.append("Benchmarks, ± standard error, [ ] 95 % interval over questions:")
        parts += [_table(s.columns, [map(show_cell, row) for row in s.rows]) for s in measured]
    return parts or ["Not evaluated."]
