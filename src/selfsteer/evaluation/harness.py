"""Tasks of lm-evaluation-harness, in process, on a model that is already in memory.

The harness makes prompts, filters and metrics; the model, its chat template and its end of turn
are ours. What a task reports first is its score unless a metric is named. Values per question
are kept if the score is their mean, so that two models can be compared question by question.
"""

import difflib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from glob import glob
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from selfsteer.data.digests import digest_path
from selfsteer.data.records import Message
from selfsteer.errors import ArtifactError, ConfigError, short
from selfsteer.models.reasoning import UNFINISHED_REASONING, opened
from selfsteer.recipe.sections import Benchmarks, HarnessTask, resolve_path
from selfsteer.terminal import progress_bar, say, warn

if TYPE_CHECKING:
    from selfsteer.models.load import LoadedModel

#: Questions kept to be read.
EXAMPLES = 5

#: Resamples of the harness for metrics that are no mean; its default of 100,000 takes minutes.
RESAMPLES = 1000


class Unavailable(ArtifactError):
    """A task cannot be asked here: its data or a package that it needs is missing."""


def harness_identity(settings: Benchmarks) -> dict[str, Any]:
    """What scores depend on beside model and task; the batch size changes rounding only.

    Raises:
        ConfigError: a task folder is missing.
    """
    own = settings.model_dump(include={"chat_template", "limit"})
    folders = _folders(settings)
    data: dict[str, str] = {}
    for path in sorted(_local_data(folders)):
        inside = sorted(p for p in path.iterdir() if p.is_file()) if _holds_work(path) else [path]
        data |= {str(p): digest_path(p) for p in inside}
    return {**own, "folders": [digest_path(f) for f in folders], "data": data}


def _local_data(folders: Iterable[Path]) -> set[Path]:
    """The files and folders that tasks of these folders name, patterns spelled out."""
    named, seen = set[str](), set[Path]()
    todo = list(chain.from_iterable(f.rglob("*.y*ml") for f in folders))
    while todo:
        path = todo.pop().absolute()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        with suppress(yaml.YAMLError, UnicodeDecodeError):
            # nodes alone: what tags such as !function stand for is not made
            root = yaml.compose(path.read_text("utf-8"), yaml.SafeLoader)
            for key, value in _entries(root):
                if key in ("dataset_path", "dataset_kwargs"):
                    named.update(_texts(value))
                elif key == "include":  # often a file without an ending
                    todo += [path.parent / text for text in _texts(value)]
    return {Path(name) for text in named for name in glob(text, recursive=True)}


def _holds_work(path: Path) -> bool:
    """Whether the present folder lies in it: runs and results are written there as well."""
    return path.is_dir() and Path.cwd().is_relative_to(path.resolve())


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """A node and those in it, each once: aliases share them."""
    todo, seen = [root] if root else [], set[int]()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            todo += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value


def _entries(root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """The keys with their values at any depth: a group may define tasks in itself."""
    for node in _nodes(root):
        if isinstance(node, yaml.MappingNode):
            yield from ((str(key.value), value) for key, value in node.value)


def _texts(root: yaml.Node) -> Iterator[str]:
    """The texts in a node."""
    return (str(node.value) for node in _nodes(root) if isinstance(node, yaml.ScalarNode))


def check_tasks(settings: Benchmarks) -> None:
    """Fails now if a task has no such name, or no score of its own.

    Raises:
        ConfigError: says which, and what is near; or the harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "benchmarks.tasks needs lm-evaluation-harness: pip install 'selfsteer[eval]'."
        )
    for path in filter(_holds_work, sorted(_local_data(_folders(settings)))):
        warn(
            f"benchmarks.task_folders: tasks name the folder {path}, in which this command runs. "
            "Scores are kept until a file directly in it is another one; what changes in its own "
            "folders is not noticed. Put the data into a folder of their own."
        )
    manager = _manager(settings)
    for task in settings.tasks:
        entry = manager.task_index.get(task.name)
        if entry is None:
            names = [n for n in manager.all_tasks if "/" not in n]
            near = difflib.get_close_matches(task.name, names, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(
                f"benchmarks.tasks: neither lm-evaluation-harness {version('lm_eval')} nor the "
                f"task folders have a task {short(task.name)}.{hint}"
            )
        if entry.kind.name == "TAG":
            members = sorted(entry.tags)
            raise ConfigError(
                f"benchmarks.tasks: {task.name} is a label of {len(members)} tasks without a "
                f"score of its own. Name the one you mean: {', '.join(members[:20])}."
            )


def run_task(
    task: HarnessTask, settings: Benchmarks, loaded: "LoadedModel", seed: int
) -> dict[str, Any]:
    """Asks a task of a model.

    The global generators are seeded: tasks draw from them (GPQA shuffles its choices while
    loading).

    Returns:
        ``score``, ``stderr`` (None if the harness gives none), ``metric``, ``questions``,
        ``truncated`` (requests whose beginning was cut off to fit the model),
        ``unfinished_reasoning`` (answers that are thoughts alone), ``all`` (every figure that the
        harness reports), ``examples`` (a few questions as they were asked) and ``values``: figure →
        question → value of the score's metric, empty if the score is not their mean.

    Raises:
        Unavailable: data or a package that the task needs is missing.
        ConfigError: the task has no such metric, or leaves the model no room.
    """
    from lm_eval.evaluator import evaluate
    from transformers import set_seed

    set_seed(seed % 2**32)
    # the harness would bootstrap in a pool, which forks a process that holds a model
    os.environ["DISABLE_MULTIPROC"] = "1"
    manager = _manager(settings)
    with _quiet():
        try:
            tasks = manager.load([task.name])
        except TypeError as e:
            raise ConfigError(
                f"Task {task.name} cannot be made of its YAML: {e}. Correct the file, or name "
                "another task."
            ) from e
        except Exception as e:  # whatever the task's own code and its data set raise
            raise _unavailable(task.name, e) from e
        _set_fewshot(task, tasks["tasks"], seed)
        lm = _harness_model(loaded, settings, task.name)
        try:
            found: Any = evaluate(
                lm,
                tasks,
                limit=settings.limit,
                bootstrap_iters=RESAMPLES,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )
        except AssertionError as e:
            if "max tokens to generate" not in str(e):
                raise
            raise ConfigError(
                f"Task {task.name} leaves no room for a prompt: {e} Choose a task that "
                "generates less, or a model with a longer context."
            ) from e
        except (ImportError, LookupError, OSError) as e:
            if isinstance(e, KeyError | IndexError):  # a fault of the task's code
                raise
            # what its scoring needs: NLTK raises LookupError for data that is not there
            raise _unavailable(task.name, e) from e
    return {
        **_summarise(task, found),
        "truncated": lm.truncated,
        UNFINISHED_REASONING: lm.unfinished,
    }


def _folders(settings: Benchmarks) -> tuple[Path, ...]:
    folders = tuple(Path(resolve_path(f)) for f in settings.task_folders)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"benchmarks.task_folders: there is no folder {folder}.")
    return folders


def _manager(settings: Benchmarks) -> Any:
    """The index of the task folders; with the harness's own if a named task may need it."""
    folders = _folders(settings)
    own = _index(folders, everything=False)
    # a group may hold tasks of the harness, which only its whole index finds
    kinds = [own.task_index.get(t.name) for t in settings.tasks]
    if all(e is not None and e.kind.name == "TASK" for e in kinds):
        return own
    return _index(folders, everything=True)


@cache
def _index(folders: tuple[Path, ...], *, everything: bool) -> Any:
    """The harness's index of tasks; reading its own 14,000 takes seconds."""
    from lm_eval.tasks import TaskManager

    if everything:
        say("  reading the tasks of lm-evaluation-harness (some seconds)")
    with _quiet():
        return TaskManager(include_path=list(folders), include_defaults=everything)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the harness's log and warnings; what it and its tasks print goes to stderr."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _unavailable(task: str, error: Exception) -> Unavailable:
    cause = " ".join(str(error).split()) or type(error).__name__
    todo = (
        "With a connection, run the same command again; without one, fetch its data set "
        "elsewhere into the Hugging Face cache (HF_HOME) and copy that here, or name a task "
        "folder whose YAML reads local files. A gated data set needs `hf auth login`."
    )
    if isinstance(error, ImportError):
        todo = "Install it; pip install 'selfsteer[eval]' has what the papers' tasks need."
    return Unavailable(f"Task {task} cannot be asked here: {cause[:300].rstrip('.')}. {todo}")


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


def _summarise(task: HarnessTask, found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the harness's results; see `run_task`."""
    figures = {k: v for k, v in found["results"][task.name].items() if _is_number(v)}
    scores = [k for k in figures if "," in k and "_stderr," not in k]
    chosen = next((k for k in scores if task.metric in (None, k, k.partition(",")[0])), None)
    if chosen is None:
        raise ConfigError(
            f"benchmarks.tasks: {task.name} reports no metric "
            f"{task.metric or 'that is a number'}; it reports {', '.join(scores) or 'none'}."
        )
    metric, _, kind = chosen.partition(",")
    rows = [(leaf, row) for leaf, found_rows in found["samples"].items() for row in found_rows]
    mine = [(leaf, row) for leaf, row in rows if row["filter"] == kind]
    values = {
        f"{leaf}/{row['doc_id']}": float(row[metric])
        for leaf, row in mine
        if _is_number(row.get(metric))
    }
    score = float(figures[chosen])
    is_mean = bool(values) and math.isclose(
        math.fsum(values.values()) / len(values), score, rel_tol=0, abs_tol=1e-9
    )
    return {
        "metric": chosen,
        "score": score,
        "stderr": figures.get(f"{metric}_stderr,{kind}"),
        "higher_is_better": found["higher_is_better"].get(task.name, {}).get(metric),
        "questions": len({(leaf, row["doc_id"]) for leaf, row in rows}),
        "all": figures,
        "examples": [
            {
                "prompt": row["arguments"][0][0],
                "answers": [str(a) for a in row["filtered_resps"]],
                "target": str(row["target"]),
            }
            for _, row in mine[:EXAMPLES]
        ],
        "values": {"": values} if is_mean else {},
    }


def _is_number(value: Any) -> bool:
    """Also a truth value; not NaN, which the harness gives where there is nothing to average."""
    return isinstance(value, int | float) and math.isfinite(value)


def _harness_model(loaded: "LoadedModel", settings: Benchmarks, label: str) -> Any:
    """The harness's own model class around ours: our template, our end of turn, one progress bar.

    ``truncated`` counts the requests that did not fit and lost their beginning, ``unfinished`` the
    answers that are thoughts alone. Tasks see answers without thoughts.
    """
    from lm_eval.models.huggingface import HFLM

    chat, reasons = loaded.chat, settings.chat_template and loaded.chat.may_reason

    class Model(HFLM):  # type: ignore[misc, unused-ignore]  # the harness ships partly untyped
        truncated = unfinished = 0

        @property
        def eot_token_id(self) -> int:
            return loaded.chat.end_of_turn

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            turns = [Message(m["role"], m["content"]) for m in chat_history]
            return loaded.chat.prompt_text(turns, continued=not add_generation_prompt)

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            if reasons and skip_special_tokens:
                said = chat.said(tokens)
                self.unfinished += bool(said.reasoning and not said.text)
                if said.reasoning:
                    return said.text
            return str(super().tok_decode(tokens, skip_special_tokens))

        def _encode_pair(self, context: str, continuation: str) -> Any:
            if reasons and opened(context):  # the choices are answers, not thoughts
                context = chat.without_thoughts(context)
            return super()._encode_pair(context, continuation)

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            if reasons:  # what ends an answer may stand in thoughts; the harness cuts there later
                kwargs["stop"] = kwargs["stop"][-1:]  # the end of turn
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
            if room := kwargs.get("left_truncate_len"):
                self.truncated += sum(len(self.tok_encode(text)) > room for text in strings)
            return super().tok_batch_encode(strings, *args, **kwargs)

    def with_bar(ask: Any) -> Any:
        def asked(self: Any, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            with progress_bar(label, len(requests)) as bar:
                self._advance = bar.advance
                return ask(self, requests, disable_tqdm=True)

        return asked

    for kind in ("generate_until", "loglikelihood", "loglikelihood_rolling"):
        setattr(Model, kind, with_bar(getattr(HFLM, kind)))
    return Model(pretrained=loaded.model, tokenizer=chat.tokenizer, batch_size=settings.batch_size)
