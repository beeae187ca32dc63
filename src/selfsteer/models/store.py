"""Log-probs on disk: each sequence is scored once per model, whoever asks.

Filter, quality report and trainer ask for overlapping sequences of the same triples under the
same model. The store is addressed by content: model (weights, precision, device) and token ids.
A file that was cut short or belongs to another model is scored again, never used.
"""

import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import batched, write_atomic
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.load import LoadedModel
from selfsteer.models.score import score_sequences
from selfsteer.terminal import is_main_process, progress_bar

#: Sequences per file, the unit of resumption.
CHUNK = 2048

#: Says whose log-probs a folder holds.
ABOUT = "model.json"

#: Names of a store's own files.
_OURS = re.compile(r"scores-([0-9]{5,9})-[0-9]+\.npz")


def sequence_key(sequence: EncodedSequence) -> bytes:
    """16 bytes that identify a context and a response by their token ids."""
    text = f"{sequence.prompt_ids}|{sequence.response_ids}"
    return hashlib.sha256(text.encode()).digest()[:16]


class ScoreStore:
    """Per-token log-probs of sequences under one model and layout, kept in a folder.

    Memory holds about 150 bytes of each sequence: which file has it, at which place.
    """

    def __init__(self, folder: Path, model_key: str) -> None:
        self.folder = folder / model_key
        self._places: dict[bytes, int] = {}
        self._paths: list[Path] = []
        self._number = 0
        for path in sorted(self.folder.glob("scores-*.npz")):
            if not (name := _OURS.fullmatch(path.name)):
                continue  # a copy that somebody made
            self._number = max(self._number, int(name[1]) + 1)
            try:
                keys, _ = read_chunk(path)
            except ValueError:
                continue
            self._note(path, keys)

    def __len__(self) -> int:
        return len(self._places)

    def _note(self, path: Path, keys: Sequence[bytes]) -> None:
        first = len(self._paths) * CHUNK
        self._paths.append(path)
        self._places.update((key, first + i) for i, key in enumerate(keys))

    def score(
        self, loaded: LoadedModel, sequences: Sequence[EncodedSequence], **told: Any
    ) -> list[Tensor]:
        """Per-token log-probs (float32) of each sequence's response, in the order given.

        ``told`` is for `fill`.
        """
        self.fill(loaded, sequences, **told)
        return [value for value in self.find(sequences) if value is not None]

    def fill(
        self,
        loaded: LoadedModel,
        sequences: Sequence[EncodedSequence],
        *,
        label: str | None = None,
        advance: Callable[[int, int], None] = lambda items, tokens: None,
    ) -> None:
        """Scores what is not there yet; no more than `CHUNK` sequences are held at a time.

        Args:
            loaded: the model.
            sequences: what is asked for.
            label: of a progress bar; None: ``advance`` is told instead.
            advance: told the sequences and tokens that were scored.
        """
        missing: dict[bytes, int] = {}
        for number, sequence in enumerate(sequences):
            if (key := sequence_key(sequence)) not in self._places:
                missing.setdefault(key, number)
        if not missing:
            return
        with ExitStack() as stack:
            stack.enter_context(loaded.evaluating())
            if label is not None:
                advance = stack.enter_context(progress_bar(label, len(missing))).advance
            for part in batched(missing.items(), CHUNK):
                found = score_sequences(
                    loaded.model,
                    [sequences[number] for _, number in part],
                    layout=loaded.layout,
                    batch_size=32,
                    advance=advance,
                )
                self._add([k for k, _ in part], [v.numpy() for v in found])

    def find(self, sequences: Sequence[EncodedSequence]) -> list[Tensor | None]:
        """Per-token log-probs of each sequence's response, None where it is not here."""
        places = [self._places.get(sequence_key(s)) for s in sequences]
        out: list[Tensor | None] = [None] * len(places)
        held = -1
        values: list[np.ndarray] = []
        known = [(place, i) for i, place in enumerate(places) if place is not None]
        for place, i in sorted(known):
            file, row = divmod(place, CHUNK)
            if file != held:
                held, (_, values) = file, read_chunk(self._paths[file])
            out[i] = torch.from_numpy(values[row].copy())
        return out

    def _add(self, keys: list[bytes], values: list[np.ndarray]) -> None:
        buffer = BytesIO()
        np.savez(
            buffer,
            keys=np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16),
            lengths=np.array([len(v) for v in values]),
            values=np.concatenate(values),
        )
        # ranks write at the same time
        name = f"scores-{self._number:05d}-{os.environ.get('RANK', '0')}.npz"
        write_atomic(self.folder / name, buffer.getvalue())
        self._number += 1
        self._note(self.folder / name, keys)


def read_chunk(path: Path) -> tuple[list[bytes], list[np.ndarray]]:
    """Keys and log-probs of a file, which takes no more memory than the file does.

    Raises:
        ValueError: it was cut short, or is none that `ScoreStore` wrote.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            keys = _stored(packed, "keys", "u1").reshape(-1, 16)
            lengths, values = _stored(packed, "lengths", "i8"), _stored(packed, "values", "f4")
    except Exception as e:  # zipfile and numpy fail in many ways at bytes of anyone
        raise ValueError(f"{path} is not whole: {e}") from e
    whole = len(keys) == len(lengths) <= CHUNK and ((lengths >= 0) & (lengths <= len(values))).all()
    if not whole or lengths.sum() != len(values):
        raise ValueError(f"{path} is not whole")
    return [k.tobytes() for k in keys], np.split(values, np.cumsum(lengths)[:-1])


def _stored(packed: zipfile.ZipFile, name: str, kind: str) -> np.ndarray:
    """An array, flat, that lies in a file as it is, not compressed.

    Raises:
        ValueError: it is compressed, larger than the file, or of another kind or size than it says.
    """
    about = packed.getinfo(f"{name}.npy")
    size = Path(str(packed.filename)).stat().st_size
    if about.compress_type != zipfile.ZIP_STORED or about.file_size > size:
        raise ValueError(f"{name} is compressed")
    with packed.open(about) as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        held = member.read()
    if dtype != kind or math.prod(shape) * dtype.itemsize != len(held):
        raise ValueError(f"{name} is not what it says")
    return np.frombuffer(held, dtype)


def open_scores(
    folder: Path, loaded: LoadedModel, sequences: Sequence[EncodedSequence]
) -> ScoreStore:
    """The store of a model, whose layout is settled on some of the sequences."""
    loaded.settle(sequences)
    store = ScoreStore(folder, digest([loaded.digest, loaded.layout]))
    if is_main_process():  # a digest says nothing to a reader
        about = {"model": loaded.source, "dtype": str(loaded.dtype), "layout": loaded.layout}
        write_atomic(store.folder / ABOUT, json.dumps(about) + "\n")
    return store


def scored(
    folder: Path, loaded: LoadedModel, sequences: Sequence[EncodedSequence], label: str
) -> list[Tensor]:
    """Per-token log-probs of each sequence's response, from the folder or computed now."""
    return open_scores(folder, loaded, sequences).score(loaded, sequences, label=label)
