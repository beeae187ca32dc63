"""What is trained on, encoded: its numbers lie in files, and memory does not grow with its texts.

Memory holds about 200 bytes of an example. One example, as it comes from the files::

    Example("q1", {"plain/good": EncodedSequence(…), "plain/bad": …},
            reference={"plain/good": tensor of per-token log-probs, …})
"""

import copy
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsteer.data.jsonl import disk_errors
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.teacher import Lesson

#: Sequences whose log-probs are in memory at a time.
AT_ONCE = 2048


@dataclass(frozen=True)
class Example:
    """One triple, encoded, with the reference's per-token log-probs where the base needs them."""

    id: str
    sequences: Mapping[str, EncodedSequence]
    reference: Mapping[str, Tensor] | None = None
    #: Where the targets of its tokens lie, for objectives of tokens.
    lesson: Lesson | None = None
    #: Its weight or margin, where the objective has them computed beforehand.
    figures: Mapping[str, float] = field(default_factory=dict)

    def tokens(self) -> int:
        """Tokens of the sequences, each prompt counted once."""
        prompts = {s.prompt_ids for s in self.sequences.values()}
        return sum(map(len, prompts)) + sum(len(s.response_ids) for s in self.sequences.values())


class Rows:
    """Rows of numbers in a file; memory holds 8 bytes of each row.

    The file has no name and goes with the process. Rows are read by their places, not mapped, so
    that what was read does not count as the process's memory.

    Args:
        kind: numpy's name of the numbers.
        folder: on the disk that holds the file.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind, self._folder = np.dtype(kind), folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._ends = array("q", [0])
        weakref.finalize(self, self._file.close)

    def append(self, row: Any) -> None:
        """Adds a row as the last one."""
        numbers = np.asarray(row, self._kind)
        with disk_errors(self._folder):
            self._file.write(numbers.tobytes())
        self._ends.append(self._ends[-1] + numbers.size)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> np.ndarray:
        start, end = (n * self._kind.itemsize for n in self._ends[place : place + 2])
        with disk_errors(self._folder):
            self._file.flush()
        # no seek: processes that were forked share the file's position
        return np.frombuffer(os.pread(self._file.fileno(), end - start, start), self._kind)


class Examples(Sequence[Example]):
    """Examples whose token ids and reference log-probs lie on disk.

    Args:
        names: of the sequences that each has.
        folder: on the disk that holds them.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.names = tuple(names)
        self.lessons: Mapping[str, Lesson] = {}
        self.figures: Mapping[str, Mapping[str, float]] = {}
        self._folder = folder
        self._ids: list[str] = []
        self._tokens = Rows("int32", folder)
        self._reference: Rows | None = None
        #: Of its examples among all that were added.
        self._places = array("q")

    def append(self, id: str, sequences: Mapping[str, EncodedSequence]) -> None:
        """Adds one as the last; its sequences are those of ``names``."""
        self._places.append(len(self._ids))
        self._ids.append(id)
        for name in self.names:
            self._tokens.append(sequences[name].prompt_ids)
            self._tokens.append(sequences[name].response_ids)

    @property
    def ids(self) -> list[str]:
        """Of the examples, in their order."""
        return [self._ids[place] for place in self._places]

    def without(self, ids: Collection[str]) -> "Examples":
        """The others, in the same files; asked for before the reference is known."""
        assert self._reference is None
        left = copy.copy(self)
        left._places = array("q", (p for p in self._places if self._ids[p] not in ids))
        return left

    def refer(self, logps: Callable[[Sequence[EncodedSequence]], Iterable[Tensor]]) -> None:
        """Takes the reference's log-probs.

        Args:
            logps: per token of the responses of the sequences that it is given; it is given all
                in turn, many at a time.
        """
        flat, found = self.flat(), Rows("float32", self._folder)
        for start in range(0, len(flat), AT_ONCE):
            part = flat[start : start + AT_ONCE]
            for _, values in zip(part, logps(part), strict=True):
                found.append(values.numpy())
        self._reference = found

    def flat(self, rank: int = 0, ranks: int = 1) -> "Flat":
        """The sequences of all examples, one after another, or of a rank's share of them."""
        return Flat(self, range(rank, len(self), ranks))

    def sequence(self, number: int, name: int) -> EncodedSequence:
        """One sequence, by the numbers of its example and of its name."""
        place = self._places[number]
        row = 2 * (place * len(self.names) + name)
        prompt, response = (tuple(self._tokens[r].tolist()) for r in (row, row + 1))
        return EncodedSequence(prompt, response, self._ids[place])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        number = range(len(self))[number]
        id, count = self._ids[self._places[number]], len(self.names)
        sequences = {name: self.sequence(number, k) for k, name in enumerate(self.names)}
        reference = None
        if self._reference is not None:
            rows = (self._reference[number * count + k].copy() for k in range(count))
            reference = dict(zip(self.names, map(torch.from_numpy, rows), strict=True))
        lesson, figures = self.lessons.get(id), self.figures.get(id, {})
        return Example(id, sequences, reference, lesson, figures)


class Flat(Sequence[EncodedSequence]):
    """The sequences of some examples, one after another, read as they are asked for."""

    def __init__(self, examples: Examples, numbers: range) -> None:
        self._examples, self._numbers = examples, numbers

    def __len__(self) -> int:
        return len(self._numbers) * len(self._examples.names)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[n] for n in range(len(self))[place]]
        number, name = divmod(range(len(self))[place], len(self._examples.names))
        return self._examples.sequence(self._numbers[number], name)
