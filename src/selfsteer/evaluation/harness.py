"""Tasks of lm-evaluation-harness, in process, on a model that is already in memory.

The harness makes prompts, filters and metrics; the model, its chat template and its end of turn
are ours. What a task reports first is its score unless a metric is named. Values per question
are kept where the score is their mean, so that two models can be compared question by question.
"""

import difflib
import logging
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsteer.data.digests import digest_path
from selfsteer.data.records import Message
from selfsteer.errors import ArtifactError, ConfigError, SelfsteerError
from selfsteer.recipe.sections import Benchmarks, HarnessTask, resolve_path
from selfsteer.terminal import progress_bar, say

if TYPE_CHECKING:
    from selfsteer.models.load import LoadedModel

#: Questions kept to be read.
EXAMPLES = 5

#: Resamples of the harness for metrics that are no mean; its default of 100,000 takes minutes.
RESAMPLES = 1000


class Unavailable(ArtifactError):
    """A task cannot be asked here: its data or a package that it needs is missing."""


def benchmark_inputs(settings: Benchmarks) -> dict[str, Any]:
    """What benchmark figures depend on beside models and judge, for the fingerprint of a stage.

    Raises:
        ConfigError: a task folder is missing.
    """
    named = [n for s in settings.judged for n in (s.questions, s.baseline) if n is not None]
    paths = [Path(resolve_path(n)) for n in named]
    return {
        "settings": settings.model_dump(exclude={"judge", "batch_size"}),
        "harness": Harness(settings).identity,
        # what is not there is said by whoever reads it
        "judged": [digest_path(p) if p.is_file() else "missing" for p in paths],
    }


class Harness:
    """The tasks that a recipe names.

    Raises:
        ConfigError: a task folder is not there.
    """

    def __init__(self, settings: Benchmarks) -> None:
        self.settings = settings
        self.folders = [Path(resolve_path(f)) for f in settings.task_folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise ConfigError(f"benchmarks.task_folders: there is no folder {folder}.")

    @property
    def identity(self) -> dict[str, Any]:
        """What scores depend on beside model and task; the batch size changes rounding only."""
        own = self.settings.model_dump(include={"chat_template", "limit"})
        return {**own, "folders": [digest_path(f) for f in self.folders]}

    @property
    def _manager(self) -> Any:
        folders = tuple(self.folders)
        with quiet():
            own = _index(folders, everything=False)
            # a group may hold tasks of the harness, which only its whole index finds
            kinds = [own.task_index.get(t.name) for t in self.settings.tasks]
            if all(e is not None and e.kind.name == "TASK" for e in kinds):
                return own
            return _index(folders, everything=True)

    def check(self) -> None:
        """Fails now if a task has no such name, or no score of its own.

        Raises:
            ConfigError: says which, and what is near; or the harness is not installed.
        """
        if find_spec("lm_eval") is None:
            raise ConfigError(
                "benchmarks.tasks needs lm-evaluation-harness: pip install 'selfsteer[eval]'."
            )
        for task in self.settings.tasks:
            entry = self._manager.task_index.get(task.name)
            if entry is None:
                names = [n for n in self._manager.all_tasks if "/" not in n]
                near = difflib.get_close_matches(task.name, names, n=3)
                hint = f" Did you mean {' or '.join(near)}?" if near else ""
                raise ConfigError(
                    f"benchmarks.tasks: lm-evaluation-harness {version('lm_eval')} has no task "
                    f"{task.name!r}, nor do the task folders.{hint}"
                )
            if entry.kind.name == "TAG":
                members = sorted(entry.tags)
                raise ConfigError(
                    f"benchmarks.tasks: {task.name} is a label of {len(members)} tasks without a "
                    f"score of its own. Name the one you mean: {', '.join(members[:20])}."
                )

    def run(self, task: HarnessTask, loaded: "LoadedModel", seed: int) -> dict[str, Any]:
        """Asks a task of a model.

        Returns:
            ``score``, ``stderr`` (None where the harness gives none), ``metric``, ``questions``,
            ``truncated`` (requests whose beginning was cut off to fit the model), ``all`` (every
            figure that the harness reports), ``examples`` (a few questions as they were asked) and
            ``values``: question → value of the score's metric, None where the score is not their
            mean.

        Raises:
            Unavailable: data or a package that the task needs is missing.
            ConfigError: the task has no such metric, or leaves the model no room.
        """
        from lm_eval.evaluator import evaluate

        with quiet(), in_process(), seeded(seed):
            try:
                tasks = self._manager.load([task.name])
            except Exception as e:  # whatever the task's own code and its data set raise
                raise _unavailable(task.name, e) from e
            _set_fewshot(task, tasks["tasks"], seed)
            lm = harness_model(loaded, self.settings.batch_size, task.name)
            try:
                found: Any = evaluate(
                    lm,
                    tasks,
                    limit=self.settings.limit,
                    bootstrap_iters=RESAMPLES,
                    apply_chat_template=self.settings.chat_template,
                    fewshot_as_multiturn=self.settings.chat_template,
                )
            except AssertionError as e:
                if "max tokens to generate" not in str(e):
                    raise
                raise ConfigError(
                    f"Task {task.name} leaves no room for a prompt: {e} Choose a task that "
                    "generates less, or a model with a longer context."
                ) from e
        return summarise(task, found, lm.truncated)


@cache
def _index(folders: tuple[Path, ...], *, everything: bool) -> Any:
    """The harness' index of tasks; reading its own 14,000 takes seconds."""
    from lm_eval.tasks import TaskManager

    if everything:
        say("  reading the tasks of lm-evaluation-harness (some seconds)")
    return TaskManager(include_path=list(folders), include_defaults=everything)


@contextmanager
def quiet() -> Iterator[None]:
    """The harness' own news is left out; its warnings about us are not the user's to mend.

    What it and its tasks print goes to stderr: stdout belongs to our results.
    """
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def in_process() -> Iterator[None]:
    """The harness' bootstrap is done here: its pool would fork a process that holds a model."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators, which tasks draw from: GPQA shuffles its choices while loading.

    What they were is put back.
    """
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - what the harness draws from
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _unavailable(task: str, error: Exception) -> SelfsteerError:
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        todo = (
            "Install what it names; pip install 'selfsteer[eval]' has what the papers' tasks need."
        )
    else:
        todo = (
            "With a connection, run the same command again; without one, fetch its data set "
            "elsewhere into the Hugging Face cache (HF_HOME) and copy that here, or name a task "
            "folder whose YAML reads local files. A gated data set needs `hf auth login`."
        )
    return Unavailable(f"Task {task} cannot be asked here: {said[:300].rstrip('.')}. {todo}")


def _set_fewshot(task: HarnessTask, leaves: Mapping[str, Any], seed: int) -> None:
    """The number of worked examples, drawn by this seed."""
    for name, leaf in leaves.items():
        own = leaf.get_config("num_fewshot")
        if task.fewshot and own == 0:
            raise ConfigError(
                f"benchmarks.tasks: fewshot {task.fewshot} has no effect on {name}, which is made "
                "to be asked without examples; remove it."
            )
        leaf.set_config(key="num_fewshot", value=own or 0 if task.fewshot is None else task.fewshot)
        leaf.set_fewshot_seed(seed=seed)


def summarise(task: HarnessTask, found: Mapping[str, Any], truncated: int) -> dict[str, Any]:
    """What is kept of the harness' results; see `Harness.run`.

    Raises:
        ConfigError: there is no such metric.
    """
    figures = found["results"][task.name]
    scores = {
        key: value
        for key, value in figures.items()
        if "," in key and "_stderr," not in key and _is_number(value)
    }
    wanted = task.metric
    chosen = next((k for k in scores if wanted in (None, k, k.partition(",")[0])), None)
    if chosen is None:
        raise ConfigError(
            f"benchmarks.tasks: {task.name} reports no metric {wanted or 'that is a number'}; it "
            f"reports {', '.join(scores) or 'none'}."
        )
    metric, _, kind = chosen.partition(",")
    stderr = figures.get(f"{metric}_stderr,{kind}")
    values = {
        f"{leaf}/{row['doc_id']}": row[metric]
        for leaf, rows in found["samples"].items()
        for row in rows
        if row["filter"] == kind and _is_number(row.get(metric))
    }
    numbers = {key: float(value) for key, value in values.items()}
    score = float(scores[chosen])
    is_mean = bool(numbers) and math.isclose(
        math.fsum(numbers.values()) / len(numbers), score, rel_tol=0, abs_tol=1e-9
    )
    asked = {(leaf, row["doc_id"]) for leaf, rows in found["samples"].items() for row in rows}
    return {
        "metric": chosen,
        "score": score,
        "stderr": float(stderr) if _is_number(stderr) else None,
        "higher_is_better": _direction(found, task.name, metric),
        "questions": len(asked),
        "truncated": truncated,
        "all": {k: v for k, v in figures.items() if _is_number(v)},
        "examples": [
            {
                "prompt": row["arguments"][0][0],
                "answers": [str(a) for a in row["filtered_resps"]],
                "target": str(row["target"]),
            }
            for rows in found["samples"].values()
            for row in rows[:EXAMPLES]
            if row["filter"] == kind
        ][:EXAMPLES],
        "values": numbers if is_mean else None,
    }


def _is_number(value: Any) -> bool:
    """Also a truth value; not NaN, which the harness gives where there is nothing to average."""
    return isinstance(value, int | float) and math.isfinite(value)


def _direction(found: Mapping[str, Any], task: str, metric: str) -> bool | None:
    said = found["higher_is_better"].get(task, {}).get(metric)
    return said if isinstance(said, bool) else None


def harness_model(loaded: "LoadedModel", batch_size: int, label: str) -> Any:
    """The harness' own model class around ours: our template, our end of turn, one progress bar.

    ``truncated`` counts the requests that did not fit and lost their beginning.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # type: ignore[misc, unused-ignore]  # the harness ships partly untyped
        truncated = 0
        _advance: Callable[[int], None]

        @property
        def eot_token_id(self) -> int:
            return loaded.chat.end_of_turn

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            turns = loaded.chat.folded([Message(m["role"], m["content"]) for m in chat_history])
            return super().apply_chat_template([m.to_dict() for m in turns], add_generation_prompt)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            with self._shown(len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            with self._shown(len(requests)):
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = True
        ) -> list[float]:
            with self._shown(len(requests)):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        @contextmanager
        def _shown(self, total: int) -> Iterator[None]:
            with progress_bar(label, total) as bar:
                self._advance = bar.advance
                yield

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            out = super()._model_generate(context, *args, **kwargs)
            self._advance(len(context))
            return out

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            out = super()._model_call(inps, *args, **kwargs)
            self._advance(len(inps))
            return out

        def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            room = self.max_length + 1
            self.truncated += sum(len(ctx) + len(cont) > room for _, ctx, cont in requests)
            kwargs["disable_tqdm"] = True  # rolling requests would bring a bar of their own
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> Any:
            room = kwargs.get("left_truncate_len")
            if room:
                lengths = Counter(len(self.tok_encode(text)) > room for text in strings)
                self.truncated += lengths[True]
            return super().tok_batch_encode(strings, *args, **kwargs)

    return Model(pretrained=loaded.model, tokenizer=loaded.chat.tokenizer, batch_size=batch_size)
