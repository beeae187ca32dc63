"""What the files of a finished stage were: bytes and SHA-256 of each, kept in the ledger.

Whoever uses what a stage made compares first, so that no damaged file is read as if it were whole.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from selfsteer.data.digests import file_digest
from selfsteer.errors import ArtifactError

#: Bytes and SHA-256 by path in the run folder.
Sums = Mapping[str, Sequence[int | str]]

#: Larger files are compared by size alone until something reads them.
SMALL_BYTES = 64 << 20

#: Stands for the weights that a stage removed on purpose, in the same folder.
REMOVED = "weights-removed.txt"


def sums_of(run: Path, names: Iterable[str], most: int | None = None) -> dict[str, list[int | str]]:
    """Bytes and SHA-256 of these files, and of all in these folders; about 1 GB/s.

    Args:
        run: the folder that the names start from; of those that are not there, there is none.
        names: files and folders.
        most: larger files have no SHA-256 but an empty text.
    """
    found: dict[str, list[int | str]] = {}
    for name in names:
        path = run / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (f for f in files if f.is_file()):
            size = file.stat().st_size
            is_small = most is None or size <= most
            found[file.relative_to(run).as_posix()] = [size, file_digest(file) if is_small else ""]
    return found


def is_in(name: str, above: Iterable[str]) -> bool:
    """Whether a file of a run is one of these files, or in one of these folders."""
    return any(name == path or name.startswith(f"{path}/") for path in above)


def fault_of(
    run: Path, sums: Sums, below: Path | None = None, *, most: int | None = None
) -> str | None:
    """What is wrong with the first file that is not as it was; None where all are.

    Args:
        run: the folder that the sums' names start from.
        sums: of the files that were there.
        below: the file or folder that counts; None: all.
        most: larger files are compared by their bytes alone, and neither they nor weights of any
            size need be there: whoever reads them compares without it.
    """
    mine = list(sums)
    if below is not None:
        if not below.is_relative_to(run):
            return None
        mine = [name for name in sums if is_in(name, [below.relative_to(run).as_posix()])]
    for name in mine:
        path, (size, sha256) = run / name, sums[name]
        if not path.is_file():
            weights = path.suffix == ".safetensors"
            unread = most is not None and (weights or cast(int, size) > most)
            if not unread and not (weights and path.with_name(REMOVED).exists()):
                return f"{path} is missing"
            continue
        found = path.stat().st_size
        if found != size:
            return f"{path} is damaged: it has {found:,} bytes, not {size:,}"
        if sha256 and (most is None or found <= most) and file_digest(path) != sha256:
            return f"{path} is damaged: its content has changed"
    for folder in {(run / name).parent for name in mine if Path(name).name.startswith("shard-")}:
        for path in sorted(folder.glob("shard-*.jsonl")):
            if path.relative_to(run).as_posix() not in sums:
                return f"{path} is one too many"
    return None


def check_sums(
    run: Path, maker: str, sums: Sums, below: Path | None = None, *, most: int | None = None
) -> None:
    """Fails where a file of a run is not as the stage ``maker`` wrote it; see `fault_of`.

    Raises:
        ArtifactError: names the file and the way out.
    """
    if fault := fault_of(run, sums, below, most=most):
        again = shlex.join(["selfsteer", "run", str(run), "--redo"])
        raise ArtifactError(
            f"{fault}. Stage {maker} finished with another one, so nothing of it is used. Restore "
            f"the file from a copy, or have it made again: {again} (what is left of the stage "
            "moves to superseded/)."
        )
