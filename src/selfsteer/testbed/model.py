"""The testbed model: a 1M-parameter Llama trained from scratch on the tiny world, and its files.

It has a real chat template and an ordinary Hugging Face folder, so that the pipeline treats it as
any other model::

    checkpoint/  config.json  generation_config.json  model.safetensors  tokenizer.json
                 tokenizer_config.json  chat_template.jinja  testbed.json
    queries/     align.jsonl  tune.jsonl  final.jsonl

``testbed.json`` says which world the model was trained on and how well it came out.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsteer.data.jsonl import dump_lines
from selfsteer.errors import ArtifactError
from selfsteer.testbed import world
from selfsteer.testbed.corpus import as_query
from selfsteer.testbed.questions import stable_number

if TYPE_CHECKING:
    from rich.progress import Progress

#: The checkpoint that the package ships.
CHECKPOINT = Path(__file__).parent / "checkpoint"

#: Split: the query file that the package ships.
QUERIES = {
    split: Path(__file__).parent / "queries" / f"{split}.jsonl"
    for split in world.SPLITS
    if split != "train"
}

#: More unparsed sentences per plain response than this: the model has not learned the grammar.
MAX_UNPARSED = 0.03

INFO_FILE = "testbed.json"


def check(path: Path) -> None:
    """Checks that a testbed checkpoint belongs to the world as it is now.

    Raises:
        ArtifactError: the folder is no testbed checkpoint, or of another world.
    """
    try:
        info = json.loads((path / INFO_FILE).read_text(encoding="utf-8"))
        found = info["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(
            f"{path} is not a testbed checkpoint: it has no readable {INFO_FILE}. "
            "Build one, or use the one that the package ships."
        ) from None
    if found != world.fingerprint():
        raise ArtifactError(
            f"The testbed checkpoint in {path} was trained on the world {found}, but the oracle "
            f"and the queries are of the world {world.fingerprint()}: scores would mean nothing. "
            "Build the checkpoint again."
        )


def write_queries() -> None:
    """Writes the query files that the package ships.

    In the order of the ids, which are hashes: any slice of a file is a mixture of all tasks.
    """
    for split, path in QUERIES.items():
        queries = sorted(map(as_query, world.questions(split)), key=lambda query: query.id)
        lines = [{"id": query.id, "prompt": query.text} for query in queries]
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(dump_lines(lines), encoding="utf-8")
        os.replace(draft, path)


def build(
    output: Path,
    *,
    examples: int = 64_000,
    seed: int = 0,
    lr: float = 3e-3,
    threads: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains the testbed model from scratch, measures it, and puts it in place in one step.

    A second builder of the same folder waits for the first and, if it asked for the same, takes
    over its result. Building the packaged checkpoint writes the query files too.

    Args:
        output: the checkpoint folder; replaced if it exists.
        examples: training examples, each seen once.
        seed: of the examples, their order, the weights and the samples measured.
        lr: peak learning rate of AdamW, after warm-up, with cosine decay.
        threads: CPU threads.
        progress: whether a bar is shown.

    Returns:
        What ``testbed.json`` says: fingerprint, build arguments, measured figures.

    Raises:
        ArtifactError: plain responses have too many sentences that the oracle cannot parse.
    """
    output = Path(output).absolute()
    arguments = {"examples": examples, "seed": seed, "lr": lr, "threads": threads}
    output.parent.mkdir(parents=True, exist_ok=True)
    with _sole_builder(output) as waited:
        if waited and (done := _finished(output, arguments)):
            return done
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            with _progress(progress) as bar:
                info = _build_into(draft, arguments, bar)
            _replace_folder(draft, output)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    if output == CHECKPOINT.absolute():
        write_queries()
    return info


# ------------------------------------------------------------------------------ files


@contextmanager
def _sole_builder(output: Path) -> Iterator[bool]:
    """Holds the folder's lock; yields whether another builder held it before."""
    from filelock import FileLock, Timeout

    # Not beside the folder: a lock file cannot be removed safely, and would end up in the package.
    name = f"selfsteer-testbed-{stable_number(str(output)):x}.lock"
    lock, waited = FileLock(Path(tempfile.gettempdir()) / name), False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waited = True
        lock.acquire()
    try:
        yield waited
    finally:
        lock.release()


def _finished(output: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    try:
        check(output)
    except ArtifactError:
        return None
    info: dict[str, Any] = json.loads((output / INFO_FILE).read_text(encoding="utf-8"))
    return info if info["arguments"] == arguments else None


def _replace_folder(draft: Path, output: Path) -> None:
    """Renames the draft to the output; a folder that is in the way is removed after that."""
    # Temporary folders and weight files are made for their owner only.
    draft.chmod(0o755)
    for file in draft.iterdir():
        file.chmod(0o644)
    if not output.exists():
        draft.rename(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    output.rename(aside / "old")
    draft.rename(output)
    shutil.rmtree(aside)


@contextmanager
def _progress(shown: bool) -> Iterator["Progress"]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield bar


# ------------------------------------------------------------------------------ build


def _build_into(folder: Path, arguments: dict[str, Any], bar: "Progress") -> dict[str, Any]:
    from selfsteer.testbed.measure import measure
    from selfsteer.testbed.train import train

    started = time.monotonic()
    with _quiet_torch(arguments["threads"], arguments["seed"]):
        trained = train(folder, arguments, bar)
        # The shipped folder is measured, not the model in memory: bf16 rounds the weights.
        measured = measure(folder, seed=arguments["seed"], bar=bar)
    unparsed = measured["plain"]["unparsed"]
    if unparsed >= MAX_UNPARSED:
        raise ArtifactError(
            f"The testbed model was trained, but its plain responses have {unparsed:.3f} sentences "
            f"each that the oracle cannot parse (at most {MAX_UNPARSED} are accepted), so its "
            "scores would measure noise. Train on more examples."
        )
    info = {
        "fingerprint": world.fingerprint(),
        "arguments": arguments,
        "trained": {**trained, "seconds": round(time.monotonic() - started)},
        "measured": measured,
    }
    text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
    (folder / INFO_FILE).write_text(text, encoding="utf-8")
    return info


@contextmanager
def _quiet_torch(threads: int, seed: int) -> Iterator[None]:
    """Sets threads and seed, hides the bars of transformers; all is as before afterwards."""
    import torch
    from transformers.utils import logging

    threads_before, bars_before = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads_before)
        if bars_before:
            logging.enable_progress_bar()
