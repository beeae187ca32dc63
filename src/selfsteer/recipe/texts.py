"""What a path may be that is to be read: a text, and no pipe, device, archive or table."""

from contextlib import suppress
from pathlib import Path

#: How files begin that are no text, with what to do about it.
BEGINNINGS = {
    b"\xff\xfe": "is UTF-16 text. Convert it, for example with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16 text. Convert it, for example with iconv -f UTF-16 -t UTF-8",
    b"PK\x03\x04": "is a zip archive. Unpack it",
    b"BZh": "is packed by bzip2. Unpack it, or pack it by gzip or zstd",
    b"\xfd7zXZ": "is packed by xz. Unpack it, or pack it by gzip or zstd",
    b"PAR1": "is a Parquet file. Give it a name that ends in .parquet",
    b"version https://git-lfs": (
        "is a Git LFS pointer, not the data. Fetch the data with `git lfs pull`"
    ),
}

#: Those that data sets may have, and single texts may not.
PACKED = {
    b"\x1f\x8b": "is packed by gzip. Unpack it",
    b"\x28\xb5\x2f\xfd": "is packed by zstd. Unpack it",
}

#: What is wrong with a path that `is_endless`.
ENDLESS = "is a pipe or a device, not a file. Save what it holds as a file"


def is_endless(path: Path) -> bool:
    """Whether it is a pipe or a device: it may never end, and cannot be read a second time."""
    return path.exists() and not (path.is_file() or path.is_dir())


def unfit(path: Path) -> str:
    """Why a path is no text, by its kind and its first bytes; nothing where it may be one."""
    if is_endless(path):
        return ENDLESS
    with suppress(OSError), open(path, "rb") as file:
        begins = file.read(32)
        known = (BEGINNINGS | PACKED).items()
        return next((what for beginning, what in known if begins.startswith(beginning)), "")
    return ""
