"""The README of an exported data set or model: how it was made, how good it is, what it is not for.

A card is made of what the run folder says of itself (`selfsteer.report.summary.load`). Folders of
the machine that it was made on are cut down to their last name.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from selfsteer.run.folder import RunFolder
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


def dataset_card(
    found: Mapping[str, Any],
    *,
    iteration: int,
    baseline: bool,
    count: int,
    files: Sequence[str],
    left_out: Sequence[str],
    queries_license: str | None,
) -> str:
    """The card of one iteration's preferences.

    Args:
        found: what the run says of itself.
        iteration: counted from 1.
        baseline: whether these are the baseline's preferences.
        count: preferences.
        files: of the data, relative to the card.
        left_out: what the run has and the data set has not, one sentence each.
        queries_license: of the prompts, as an identifier of the hub; None is unknown.
    """
    recipe = found["recipe"]
    method = recipe["baseline"] if baseline else recipe["method"]
    data_files = [{"split": "train", "path": list(files)}]
    front = {
        **_license(queries_license),
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "self-steering-optimization", "synthetic"],
        "size_categories": [_size(count)],
        "configs": [{"config_name": "default", "data_files": data_files}],
    }
    licence = queries_license or "unknown, check before you publish"
    steered = (
        "The chosen one was written under a good principle and the rejected one under a bad one; "
        f"the principles were then taken away ([Self-Steering Optimization]({PAPER}))"
    )
    answers = "rejected answers" if method == "spin" else "answers"
    features = " `features`, if it is there: what the two principles were about."
    if "principles" not in recipe:
        features = ""
    risks = (
        "A rejected answer can be good, and a chosen one wrong."
        if "principles" not in recipe
        else "The rejected answers are **deliberately bad**: they were asked to be wrong, "
        "unhelpful, or unsafe. Never show them to people as answers and never fine-tune on them "
        "alone. A chosen answer can be wrong as well."
    )
    return _page(
        front,
        f"# {recipe['name']}: {count:,} preferences without annotators",
        "Each record is a prompt with a chosen and a rejected answer. "
        f"{_PAIRS.get(method, steered)}. "
        "No person compared the answers.",
        "## How it was made",
        _list(
            ("Method", _METHODS[method]),
            ("Iteration", f"{iteration} of {recipe['iterations']}"),
            ("Model", public_name(recipe["policy"]["model"])),
            *_principles(recipe, method),
            ("Sampling", _settings(recipe["sampling"], "temperature", "top_p", "max_new_tokens")),
            ("Queries", _queries(recipe["queries"])),
            ("Seed", str(recipe["seed"])),
            ("Made", _made(found, iteration, baseline=baseline)),
        ),
        "## Counts",
        _stage_table(found, iteration, baseline=baseline),
        f"Left out of the data set: {' '.join(left_out) or 'nothing.'}",
        "## Quality",
        _quality(found, method, iteration),
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


def model_card(found: Mapping[str, Any], *, iteration: int, baseline: bool) -> str:
    """The card of the policy that an iteration trained."""
    recipe = found["recipe"]
    method = recipe["baseline"] if baseline else recipe["method"]
    base = recipe["policy"]["model"]
    training = recipe["training"]
    where = f"{'baseline/' if baseline else ''}iteration-{iteration}/policy"
    entry = found["stages"].get(where, {})
    front = {
        **({"base_model": base} if _on_hub(base) else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["self-steering-optimization", "preference", "dpo"],
    }
    steered = (
        "Models wrote the one under a good and the other under a bad principle "
        f"([Self-Steering Optimization]({PAPER}))"
    )
    away = (
        "rejected answers" if "principles" not in recipe else "answers that were deliberately bad"
    )
    settings = _settings(
        training, "base", "beta", "learning_rate", "batch_size", "epochs", "max_length"
    )
    return _page(
        front,
        f"# {recipe['name']}",
        f"{public_name(base)}, trained on pairs of a chosen and a rejected answer. "
        f"{_PAIRS.get(method, steered)}. No person compared answers.",
        "## How it was made",
        _list(
            ("Method", _METHODS[method]),
            ("Iteration", f"{iteration} of {recipe['iterations']}"),
            ("Base model", public_name(base)),
            ("Trained on", f"{entry['n_out']:,} pairs" if "n_out" in entry else "unknown"),
            ("Training", settings),
            *_principles(recipe, method),
            ("Queries", _queries(recipe["queries"])),
            ("Seed", str(recipe["seed"])),
            ("Made", _made(found, iteration, baseline=baseline)),
        ),
        "## Data",
        _stage_table(found, iteration, baseline=baseline),
        _quality(found, method, iteration),
        "## Evaluation",
        _evaluation(found, f"{method}/iteration-{iteration}"),
        "## Licence",
        f"That of {public_name(base)}, whose weights these were; the queries' own terms may apply.",
        "## Intended use and risks",
        "A chat model for the uses of its base model, with the same limits. Training steered it "
        f"away from {away}; its safety was not evaluated. Prompts unlike those above were not "
        "measured.",
    )


def _principles(recipe: Mapping[str, Any], method: str) -> list[tuple[str, str]]:
    """The line about principles, where the method has any."""
    if "principles" not in recipe:
        return []
    settings = recipe["principles"]
    return [("Principles", f"{settings['mode']}: {_principle_source(settings)}")]


def _principle_source(settings: Mapping[str, Any]) -> str:
    """Where the principles come from."""
    if settings["mode"] == "fixed":
        return "texts given by the author of the run"
    own = settings.get("catalogue")
    texts = f"the texts of the catalogue {public_name(own)}" if own else "the built-in texts"
    if settings["mode"] == "picked":
        return f"{texts} of the features"
    writer = settings.get("writer")
    writer = public_name(writer) if isinstance(writer, str) else "the policy"
    return f"written per query by {writer}, {texts} where its answer was unusable"


def _queries(settings: Mapping[str, Any]) -> str:
    """Where the queries come from."""
    return public_name(settings["path"]) + (
        ", grown with the policy itself" if settings.get("augment") else ""
    )


def _page(front: Mapping[str, Any], *parts: str) -> str:
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def _license(given: str | None) -> dict[str, str]:
    """The hub knows licences by identifiers; another one is ``other``, with its name."""
    if given is None:
        return {"license": "unknown"}
    if re.fullmatch(r"[a-z0-9.+-]+", given):
        return {"license": given}
    return {"license": "other", "license_name": given}


def _size(count: int) -> str:
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")
    return names[min(max(len(str(count)) - 3, 0), len(names) - 1)]


def _list(*items: tuple[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in items)


def _settings(values: Mapping[str, Any], *names: str) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names)


def _made(found: Mapping[str, Any], iteration: int, *, baseline: bool) -> str:
    """When, and with which versions."""
    stage = f"{'baseline/' if baseline else ''}iteration-{iteration}/preferences"
    entries = [e for e in RunFolder(Path(found["run"])).ledger() if e.get("stage") == stage]
    began = [e for e in entries if e["event"] == "begin"]
    if not began:
        return "unknown"
    when = time.strftime("%Y-%m-%d", time.gmtime(began[-1]["time"]))
    return f"{when}, with {', '.join(f'{k} {v}' for k, v in began[-1]['versions'].items())}"


def _stage_table(found: Mapping[str, Any], iteration: int, *, baseline: bool) -> str:
    """Records in and out of each stage that led to the preferences, drops by reason."""
    where = f"{'baseline/' if baseline else ''}iteration-{iteration}/"
    shared = ("queries", "augment", f"iteration-{iteration}/principles")
    after = (f"{where}quality", f"{where}policy")
    rows = [
        (name, f"{e['n_in']:,}", f"{e['n_out']:,}", _counts(e["dropped"]))
        for name, e in found["stages"].items()
        if e["event"] == "finish"
        and (name in shared or (name.startswith(where) and name not in after))
    ]
    return _table(("stage", "in", "out", "dropped, by reason"), rows)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.items()) or "none"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def judge_name(judge: Any) -> str:
    """Who a recipe's judge is: its kind, or a section with ``kind`` and perhaps ``model``."""
    section = judge if isinstance(judge, Mapping) else {"kind": str(judge)}
    if section.get("kind") == "oracle":
        return "the testbed's oracle"
    if model := section.get("model"):
        return f"{public_name(model)} ({section.get('kind')})"
    return "people's labels" if section.get("kind") == "human" else str(section.get("kind"))


def _quality(found: Mapping[str, Any], method: str, iteration: int) -> str:
    measured = found["quality"].get(method, [])
    if len(measured) < iteration:
        return "Not measured."
    figures = measured[iteration - 1]["preferences"]
    judge = found["recipe"].get("judge")
    if judge is None or figures["accuracy"] is None:
        accuracy = "not measured, since the run had no judge"
    else:
        accuracy = (
            f"{figures['accuracy']:.3f} of {figures['pairs']:,} pairs, by {judge_name(judge)} ("
            f"{_counts({k: n for k, n in figures['verdicts'].items() if n})}; first is the chosen "
            "answer)"
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


def _evaluation(found: Mapping[str, Any], label: str) -> str:
    evaluation = found["evaluation"]
    if evaluation is None or label not in evaluation["models"]:
        return "Not evaluated."
    rows = []
    for name, shown in (("base", "start"), (label, "this model")):
        figures = evaluation["models"][name]
        cells = [_interval(figures.get(key)) for key in ("score", "win_rate")]
        rows.append((shown, *cells, f"{figures['tokens']:.1f}"))
    judge = found["recipe"].get("judge")
    who = "No judge." if judge is None else f"Judge: {judge_name(judge)}."
    table = _table(("model", "score", "win rate against the start", "mean tokens"), rows)
    return f"{evaluation['queries']:,} held-out queries, 95 % intervals. {who}\n\n{table}"


def _interval(value: Sequence[float | None] | None) -> str:
    return interval(value, ".3f") if value else ""
