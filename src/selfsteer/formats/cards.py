"""The README of an exported data set or model: how it was made, how good it is, what it is not for.

A card is made of an `Origin`, which whoever reads the run fills in. Folders of the machine that it
was made on are cut down to their last name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from selfsteer.terminal import interval

PAPER = "https://arxiv.org/abs/2410.17131"

_METHODS = {
    "sso": "SSO, the generator way (version 2 of the paper): a data generator, trained from the "
    "policy on its own triples, wrote the answers",
    "sso-online": "SSO, the online way (version 1 of the paper): the policy of each iteration "
    "wrote the answers",
    "pbaa": "PBAA, the paper's baseline: the policy itself wrote the answers",
    "best-of-n": "best of n: the policy wrote several plain answers, a judge ranked them",
    "self-rewarding": "self-rewarding: the policy wrote several plain answers and ranked them",
    "sgpo": "SGPO: the policy's answers, written again, against what they were",
    "spin": "SPIN: given answers, against the policy's own",
}

#: How the two answers of a pair came about; methods that are not here write under principles.
_PAIRS = {
    "best-of-n": "Both were written by a model to the prompt alone; of several a judge ranked the "
    "chosen one first and the rejected one last",
    "self-rewarding": "Both were written by a model to the prompt alone; of several it ranked the "
    "chosen one first and the rejected one last itself",
    "sgpo": "The rejected one was written by a model to the prompt alone, the chosen one is what a "
    "model made of it when asked to write it again, better",
    "spin": "The chosen one came with the prompt, the rejected one was written by a model",
}


class Step(NamedTuple):
    """A stage that led to the preferences: records in and out, drops by reason."""

    name: str
    n_in: int
    n_out: int
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class Origin:
    """What a card tells of the run that a data set or a model comes from.

    Args:
        name: of the run.
        method: that made these pairs; the baseline's, if they are the baseline's.
        iteration: counted from 1.
        iterations: of the run.
        model: the policy that the run began with.
        principles: where they came from, in words; None where the method has none.
        sampling: settings, of which temperature, top_p and max_new_tokens are told.
        training: settings of the policy's training.
        queries: where they came from, in words.
        seed: of the run.
        made: when, and with which versions.
        steps: the stages up to the preferences.
        quality: figures of the pairs (``preferences`` of ``quality.json``); None: not measured.
        judge: who judged, in words; None: nobody.
        trained_on: pairs that the policy was trained on, if it was.
        evaluation: held-out queries, and the figures of the start and of this model.
    """

    name: str
    method: str
    iteration: int
    iterations: int
    model: str
    principles: str | None
    sampling: Mapping[str, Any]
    training: Mapping[str, Any]
    queries: str
    seed: int
    made: str
    steps: Sequence[Step]
    quality: Mapping[str, Any] | None = None
    judge: str | None = None
    trained_on: int | None = None
    evaluation: tuple[int, Mapping[str, Any], Mapping[str, Any]] | None = None


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
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not (
        source.startswith(".") or Path(source).exists()
    )


def judge_name(judge: Any) -> str:
    """Who a recipe's judge is: its kind, or a section with ``kind`` and perhaps ``model``."""
    section = judge if isinstance(judge, Mapping) else {"kind": str(judge)}
    if section.get("kind") == "oracle":
        return "the testbed's oracle"
    if model := section.get("model"):
        return f"{public_name(model)} ({section.get('kind')})"
    return "people's labels" if section.get("kind") == "human" else str(section.get("kind"))


def dataset_card(
    origin: Origin,
    *,
    count: int,
    files: Sequence[str],
    left_out: Sequence[str],
    queries_license: str | None,
) -> str:
    """The card of one iteration's preferences.

    Args:
        origin: the run.
        count: preferences.
        files: of the data, relative to the card.
        left_out: what the run has and the data set has not, one sentence each.
        queries_license: of the prompts, as an identifier of the hub; None is unknown.
    """
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
    pairs = _PAIRS.get(
        origin.method,
        "The chosen one was written under a good principle and the rejected one under a bad one; "
        f"the principles were then taken away ([Self-Steering Optimization]({PAPER}))",
    )
    answers = "rejected answers" if origin.method == "spin" else "answers"
    features, risks = "", "A rejected answer can be good, and a chosen one wrong."
    if origin.principles is not None:
        features = " `features`, if it is there: what the two principles were about."
        risks = (
            "The rejected answers are **deliberately bad**: they were asked to be wrong, "
            "unhelpful, or unsafe. Never show them to people as answers and never fine-tune on "
            "them alone. A chosen answer can be wrong as well."
        )
    return _page(
        front,
        f"# {origin.name}: {count:,} preferences without annotators",
        f"Each record is a prompt with a chosen and a rejected answer. {pairs}. "
        "No person compared the answers.",
        "## How it was made",
        _how(
            origin,
            ("Model", public_name(origin.model)),
            sampling=_settings(origin.sampling, "temperature", "top_p", "max_new_tokens"),
        ),
        "## Counts",
        _steps(origin),
        f"Left out of the data set: {' '.join(left_out) or 'nothing.'}",
        "## Quality",
        _quality(origin),
        "## Columns",
        "`id`, `prompt`, `chosen`, `rejected` (chats), and `finish_reasons`: `length` where an "
        f"answer was cut off by the token budget.{features}",
        "## Licence",
        f"Queries: {licence}. The {answers} are a model's, and its own terms apply to them.",
        "## Intended use",
        "Training with DPO and kin, training reward models, and research on automated alignment. "
        "Not for evaluation: the order of each pair is assumed, not judged (see Quality).",
        "## Risks",
        f"{risks} Nothing was removed for personal data or safety beyond the drops above.",
    )


def model_card(origin: Origin) -> str:
    """The card of the policy that an iteration trained."""
    base = public_name(origin.model)
    front = {
        **({"base_model": origin.model} if _on_hub(origin.model) else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["self-steering-optimization", "preference", "dpo"],
    }
    pairs = _PAIRS.get(
        origin.method,
        "Models wrote the one under a good and the other under a bad principle "
        f"([Self-Steering Optimization]({PAPER}))",
    )
    steered = origin.principles is not None
    away = "answers that were deliberately bad" if steered else "rejected answers"
    names = ("base", "beta", "learning_rate", "batch_size", "epochs", "max_length")
    count = "unknown" if origin.trained_on is None else f"{origin.trained_on:,} pairs"
    return _page(
        front,
        f"# {origin.name}",
        f"{base}, trained on pairs of a chosen and a rejected answer. {pairs}. "
        "No person compared answers.",
        "## How it was made",
        _how(
            origin,
            ("Base model", base),
            ("Trained on", count),
            ("Training", _settings(origin.training, *names)),
        ),
        "## Data",
        _steps(origin),
        _quality(origin),
        "## Evaluation",
        _evaluation(origin),
        "## Licence",
        f"That of {base}, whose weights these were; the queries' own terms may apply.",
        "## Intended use and risks",
        "A chat model for the uses of its base model, with the same limits. Training steered it "
        f"away from {away}; its safety was not evaluated. Prompts unlike those above were not "
        "measured.",
    )


def _page(front: Mapping[str, Any], *parts: str) -> str:
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def _license(given: str | None) -> dict[str, str]:
    """The hub knows licences by identifiers; another one is ``other``, with its name."""
    if given is None or re.fullmatch(r"[a-z0-9.+-]+", given):
        return {"license": given or "unknown"}
    return {"license": "other", "license_name": given}


def _how(origin: Origin, *about: tuple[str, str], sampling: str | None = None) -> str:
    return _list(
        ("Method", _METHODS[origin.method]),
        ("Iteration", f"{origin.iteration} of {origin.iterations}"),
        *about,
        ("Principles", origin.principles),
        ("Sampling", sampling),
        ("Queries", origin.queries),
        ("Seed", str(origin.seed)),
        ("Made", origin.made),
    )


def _list(*items: tuple[str, str | None]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in items if text is not None)


def _settings(values: Mapping[str, Any], *names: str) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names)


def _steps(origin: Origin) -> str:
    """Records in and out of each stage that led to the preferences, drops by reason."""
    rows = [(s.name, f"{s.n_in:,}", f"{s.n_out:,}", _counts(s.dropped)) for s in origin.steps]
    return _table(("stage", "in", "out", "dropped, by reason"), rows)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.items() if n) or "none"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _quality(origin: Origin) -> str:
    figures = origin.quality
    if figures is None:
        return "Not measured."
    accuracy = "not measured, since the run had no judge"
    if origin.judge is not None and figures["accuracy"] is not None:
        accuracy = (
            f"{figures['accuracy']:.3f} of {figures['pairs']:,} pairs, by {origin.judge} ("
            f"{_counts(figures['verdicts'])}; first is the chosen answer)"
        )
    policyness, tokens = figures["on_policyness"], figures["tokens"]
    gap = figures.get("steering_gap")
    return _list(
        ("Accuracy of the pairs", accuracy),
        (
            "On-policyness (mean probability per token under the policy before training)",
            f"chosen {policyness['chosen']:.3f}, rejected {policyness['rejected']:.3f}",
        ),
        (
            "Steering gap (nats per token)",
            f"good {gap['good']:+.2f}, bad {gap['bad']:+.2f}" if gap else "not measured",
        ),
        ("Mean tokens", f"chosen {tokens['chosen']:.1f}, rejected {tokens['rejected']:.1f}"),
    )


def _evaluation(origin: Origin) -> str:
    if origin.evaluation is None:
        return "Not evaluated."
    queries, *models = origin.evaluation
    rows = []
    for name, figures in zip(("start", "this model"), models, strict=True):
        cells = [figures.get(key) for key in ("score", "win_rate")]
        shown = [interval(cell, ".3f") if cell else "" for cell in cells]
        rows.append((name, *shown, f"{figures['tokens']:.1f}"))
    who = "No judge." if origin.judge is None else f"Judge: {origin.judge}."
    table = _table(("model", "score", "win rate against the start", "mean tokens"), rows)
    return f"{queries:,} held-out queries, 95 % intervals. {who}\n\n{table}"
