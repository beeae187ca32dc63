"""Answers of judges on disk: each question is asked once per judge, whichever stage asks it.

Addressed by content, like the log-probs in ``scores/``: the folder by what the judge is, each line
by what it was asked. A run killed while judging resumes after its last finished chunk.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from selfsteer.data.digests import digest, model_digest
from selfsteer.data.jsonl import dump_lines, read_jsonl, write_atomic
from selfsteer.engines.base import REQUEST_FAILED
from selfsteer.errors import DataError
from selfsteer.judges.base import judge_source
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.terminal import progress_bar

#: Questions per file, the unit of resumption.
CHUNK = 256

#: Names of a store's own files.
_OURS = re.compile(r"answers-([0-9]{5,9})\.jsonl")

Advance = Callable[[int, int], None]


class AnswerStore:
    """JSON objects by key in ``answers-00000.jsonl`` … of a folder; None keeps them in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._values: dict[str, dict[str, Any]] = {}
        self._files = 0
        for path in sorted(folder.glob("answers-*.jsonl")) if folder else []:
            if not (name := _OURS.fullmatch(path.name)):
                continue  # a copy that somebody made
            self._files = max(self._files, int(name[1]) + 1)
            try:
                rows = [row for _, row in read_jsonl(path)]
                if all(map(_is_whole, rows)):
                    self._values |= {row["key"]: row["answer"] for row in rows}
            except DataError:
                continue  # torn or changed, so not used: its questions are asked again

    @classmethod
    def of(cls, settings: JudgeConfig, folder: Path | None, *asked: Any) -> Self:
        """The store of a judge with a model, in a subfolder named after what its answers depend on.

        Args:
            settings: of kind ``chat`` or ``reward``.
            folder: None keeps the answers in memory.
            asked: what they depend on beside model, engine and precision.
        """
        from selfsteer.models.load import resolve_device, resolve_dtype

        model, engine = model_digest(judge_source(settings)), settings.engine
        template = settings.chat_template_kwargs
        made_of: list[Any] = [settings.kind, model, engine.identity, template, *asked]
        if engine.kind != "openai":
            device = resolve_device(settings.device)
            made_of += [str(resolve_dtype(settings.dtype, device)), device.type]
        return cls(folder and folder / digest(made_of))

    def known(self, key: str) -> dict[str, Any] | None:
        """The stored answer to a question, if there is one."""
        return self._values.get(key)

    def fetch(
        self,
        questions: Mapping[str, Any],
        ask: Callable[[Sequence[str], Sequence[Any], Advance], Sequence[dict[str, Any]]],
        label: str,
        *,
        at_once: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """The answer to each question, stored or asked now.

        Args:
            questions: key → whatever ``ask`` understands.
            ask: (keys, questions, advance) → one JSON object each; ``seconds`` is added to it,
                the chunk's wall time in equal shares.
            label: of the progress bar.
            at_once: ask all of them together, not a file's worth at a time.
        """
        missing = [key for key in questions if key not in self._values]
        if missing:
            with progress_bar(label, len(missing)) as bar:
                chunk = len(missing) if at_once else CHUNK
                for start in range(0, len(missing), chunk):
                    keys = missing[start : start + chunk]
                    began = time.monotonic()
                    answers = ask(keys, [questions[k] for k in keys], bar.advance)
                    share = (time.monotonic() - began) / len(keys)
                    self._add(keys, [{**a, "seconds": round(share, 6)} for a in answers])
        return {key: self._values[key] for key in questions}

    def _add(self, keys: Sequence[str], answers: Sequence[dict[str, Any]]) -> None:
        found = dict(zip(keys, answers, strict=True))
        if self.folder is not None:
            # what a server failed to answer is asked again another time
            lines = dump_lines(
                {"key": k, "answer": a, "sum": digest([k, a])}
                for k, a in found.items()
                if not str(a.get("finish_reason")).startswith(REQUEST_FAILED)
            )
            write_atomic(self._own_file(self.folder), lines)
        self._values |= found

    def _own_file(self, folder: Path) -> Path:
        """A file that no other command writes, though it may use the same store."""
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder / f"answers-{self._files:05d}.jsonl"
            self._files += 1
            with suppress(FileExistsError):
                path.touch(exist_ok=False)  # empty until it is written: read as no answers
                return path


def _is_whole(row: Mapping[str, Any]) -> bool:
    key, answer = row.get("key"), row.get("answer")
    typed = isinstance(key, str) and isinstance(answer, dict)
    return typed and row.get("sum") == digest([key, answer])
