"""Figures of a run for trackio, wandb, tensorboard or mlflow, by transformers' own integrations.

One run of the tracker takes the curves of every training and the figures of every stage. The names
carry the stage: ``train/iteration-1/policy/loss``. Nothing is required: without ``tracking`` in the
recipe nothing is imported, and ``metrics.jsonl`` and the ledger hold the same figures anyway.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typing_extensions import override

from selfsteer.engines.launch import out_of_world
from selfsteer.errors import ConfigError
from selfsteer.terminal import is_main_process, warn

#: Where each tracker's name for the run, and its folder, is read by the integrations.
_ENVIRONMENT = {
    "tensorboard": {"TENSORBOARD_LOGGING_DIR": "{run}/tracking"},
    "wandb": {"WANDB_PROJECT": "selfsteer", "WANDB_DIR": "{run}"},
    "mlflow": {"MLFLOW_EXPERIMENT_NAME": "selfsteer"},
    "trackio": {},
}


class Tracker:
    """The trackers of one run; without names it does nothing.

    Args:
        names: of the integrations.
        run: the run folder; its name becomes the run's name.

    Raises:
        ConfigError: a tracker is not installed.
    """

    def __init__(self, names: tuple[str, ...], run: Path) -> None:
        self._callbacks: list[Any] = []
        self._named: list[str] = []
        self._stages = 0
        self._run = run
        if not names or not is_main_process():
            return
        for name in names:
            if find_spec(name) is None:
                raise ConfigError(
                    f"tracking names {name}, which is not installed here. pip install {name}, or "
                    "take it out of the recipe."
                )
        from transformers import TrainerControl, TrainerState, TrainingArguments
        from transformers.integrations import get_reporting_integration_callbacks

        for name in names:
            for key, value in _ENVIRONMENT[name].items():
                if key not in os.environ:
                    os.environ[key] = value.format(run=run)
                    self._named.append(key)

        class Told(TrainingArguments):
            """What trackers show as the run's settings: its recipe, not transformers' defaults."""

            @override
            def to_dict(self) -> dict[str, Any]:
                return settings_of(run)

        arguments: dict[str, Any] = {"project": "selfsteer"} if "trackio" in names else {}
        with out_of_world():  # they would make a process group and wait for the other ranks
            self._args = Told(
                output_dir=str(run),
                run_name=run.name,
                report_to=list(names),
                use_cpu=True,
                **arguments,
            )
        self._state, self._control = TrainerState(), TrainerControl()
        self._callbacks = [made() for made in get_reporting_integration_callbacks(list(names))]

    def note(self, file_name: str, entry: Mapping[str, Any]) -> None:
        """Sends a new line of the run's logs: a training's step, or what a stage made.

        Args:
            file_name: ``metrics.jsonl`` or ``ledger.jsonl``.
            entry: the line.
        """
        if not self._callbacks:
            return
        figures = {k: v for k, v in entry.items() if k not in ("stage", "step")}
        if file_name == "metrics.jsonl":
            self._state.global_step = entry["step"]
        elif entry["event"] == "finish":
            self._stages += 1
            self._state.global_step = self._stages
            figures = stage_figures(self._run, entry)
        else:
            return
        numbers = {f"{entry['stage']}/{name}": value for name, value in flat(figures)}
        self._tell("on_log", lambda: {"logs": dict(numbers)})

    def close(self) -> None:
        """Ends the trackers' run; the next one of this process begins its own, under its name."""
        self._tell("on_train_end", dict)
        if self._callbacks and "wandb" in sys.modules:
            sys.modules["wandb"].finish()
        for key in self._named:
            os.environ.pop(key, None)

    def _tell(self, event: str, said: Callable[[], dict[str, Any]]) -> None:
        """A tracker that fails is left out from there on: a run does not end for its sake."""
        for callback in list(self._callbacks):
            try:
                getattr(callback, event)(self._args, self._state, self._control, **said())
            except Exception as e:  # whatever a server, a network or a full disk makes of it
                self._callbacks.remove(callback)
                name = type(callback).__name__.removesuffix("Callback")
                warn(f"{name} gets no more figures; metrics.jsonl and the ledger have them: {e}")


def settings_of(run: Path) -> dict[str, Any]:
    """The settings of a run's recipe by their dotted names."""

    def flattened(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from flattened(inner, f"{name}.{key}" if name else key)
        else:
            plain = value is None or isinstance(value, str | int | float)
            yield name, value if plain else json.dumps(value)

    recipe = run / "resolved.json"
    return dict(flattened(json.loads(recipe.read_text("utf-8")), "")) if recipe.exists() else {}


def flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested figures under its path; of (mean, low, high) the mean.

    Of a list those count that have a ``name``, as benchmarks do.

    >>> list(flat({"n": 2, "quality": {"accuracy": 0.5, "judge": "x"}, "score": [0.6, 0.5, 0.7]}))
    [('n', 2), ('quality/accuracy', 0.5), ('score', 0.6)]
    """
    for name, value in figures.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
        elif isinstance(value, list | tuple) and len(value) == 3 and isinstance(value[0], float):
            yield key, value[0]
        elif isinstance(value, list):
            named = [v for v in value if isinstance(v, Mapping) and isinstance(v.get("name"), str)]
            yield from flat({v["name"]: v for v in named}, f"{key}/")


def stage_figures(run: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Counts and notes of a stage, and the figures that it wrote."""
    figures = {k: entry[k] for k in ("n_in", "n_out", "dropped", "seconds", "notes")}
    for output in entry["outputs"]:
        if output.endswith(".json") and (run / output).is_file():
            figures |= json.loads((run / output).read_text("utf-8"))
    return figures
