"""Digests of values, files and models, and the seeds derived from them."""

import hashlib
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import readable

#: What peft calls the file that makes a folder one of adapters.
ADAPTER_CONFIG = "adapter_config.json"

#: Beside adapters: ``weights``, the digest of those that they were trained on. Their config names
#: the base by a path, which may later lead to another model.
BASE = "base.json"

#: Begins what stands in a fingerprint for a file that is not there; its name follows.
MISSING = "missing: "


def digest(value: Any) -> str:
    """16 hex digits over any JSON value; equal values give equal digests."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@cache
def _file_digest(path: Path, size: int, modified_ns: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex, read once a process unless its time or size changes."""
    found = path.stat()
    return _file_digest(path.absolute(), found.st_size, found.st_mtime_ns).hex()


def digest_path(path: Path) -> str:
    """16 hex digits over the whole content of a file or a folder (about 1 GB/s, once a process).

    Raises:
        DataError: it is a pipe or a device.
    """
    total = hashlib.sha256()
    paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for p in paths:
        if path.is_dir():
            total.update(os.fsencode(p.relative_to(path)))
        with readable(p):
            found = p.stat()
            total.update(_file_digest(p.absolute(), found.st_size, found.st_mtime_ns))
    return total.hexdigest()[:16]


def is_hub_id(source: str) -> bool:
    """Whether it is ``name``, ``org/name`` or ``org/name@REVISION``, and no path here."""
    looks = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?", source)
    return bool(looks) and len(source) < 256 and not Path(source).exists()


def split_revision(hub_id: str) -> tuple[str, str | None]:
    """Repository and revision of ``org/name@REVISION``; None: the hub's default."""
    repo, _, revision = hub_id.partition("@")
    return repo, revision or None


@cache
def hub_commit(hub_id: str) -> str | None:
    """The commit that a hub id stands for, asked once a process.

    Offline it is the one of the last download; None where neither the hub nor the cache knows.
    """
    from huggingface_hub import HfApi, constants

    repo, revision = split_revision(hub_id)
    try:
        found = HfApi().resolve_revision(
            repo, revision=revision, local_files_only=constants.HF_HUB_OFFLINE
        )
    except Exception:  # whatever the hub says; loading asks again, and reports it
        return None
    return found.resolved


def model_digest(source: str) -> str:
    """Identifies a model: by content, adapters with their base; of a hub id by its commit."""
    path = Path(source)
    if is_hub_id(source):
        return digest(f"{split_revision(source)[0]}@{hub_commit(source) or source}")
    if not path.exists():
        return digest(source)
    own, base = digest_path(path), adapter_base(path)
    return digest([own, model_digest(base)]) if base else own


def adapter_base(folder: Path) -> str | None:
    """The base model that a folder of adapters names; None where it names none, or is none."""
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        base, revision = found.get("base_model_name_or_path"), found.get("revision")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if not base or not isinstance(base, str):
        return None
    return f"{base}@{revision}" if revision and is_hub_id(base) else base


def _downloaded(hub_id: str) -> Path | None:
    """The folder of a model of the hub; None where nothing of it is on this machine."""
    from huggingface_hub import snapshot_download

    repo, revision = split_revision(hub_id)
    try:
        commit = hub_commit(hub_id) or revision
        return Path(snapshot_download(repo, revision=commit, local_files_only=True))
    except Exception:  # nothing of it is here
        return None


def weights_digest(model: str) -> str | None:
    """Identifies the weights of a folder, a file or a hub id, whatever is beside them.

    None where there are none, or not on this machine.
    """
    if not model:
        return None
    path = _downloaded(model) if is_hub_id(model) else Path(model)
    if path is None:
        return None
    if path.is_file():
        return digest_path(path)
    # beside the ones that are loaded, repositories of Mistral hold consolidated.safetensors
    kinds = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.bin")
    found = next(filter(None, (sorted(path.glob(kind)) for kind in kinds)), [])
    return digest([[p.name, digest_path(p)] for p in found]) if found else None


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from the run's seed, stage, iteration, shard …: equal parts, equal seed."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
