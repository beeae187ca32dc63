"""The one reader of JSON files that selfsteer wrote: they are whole and of the right shape."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from selfsteer.errors import ArtifactError, clip
from selfsteer.recipe.texts import ENDLESS, is_endless


def read_json(
    kind: Any,
    path: Path,
    way_out: str = "Restore it from a copy, or remove it and run the command that made it again.",
) -> Any:
    """The value in a file, as ``kind`` says.

    Args:
        kind: a type that pydantic knows, such as ``dict[str, int]`` or a dataclass.
        path: the file.
        way_out: what a person can do where it is damaged.

    Raises:
        ArtifactError: it cannot be read, is no JSON or holds something else.
    """
    if is_endless(path):
        raise ArtifactError(f"{path} {ENDLESS}.")
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as e:
        fault = str(e.strerror)
    except ValidationError as e:
        first = e.errors()[0]
        fault = f"{clip('.'.join(map(str, first['loc'])))} {first['msg']}".strip()
    raise ArtifactError(f"{path} is damaged ({fault}). {way_out}")
