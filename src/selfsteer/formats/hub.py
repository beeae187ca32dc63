"""A folder to the Hugging Face hub: first said, then done, and only if it was asked for."""

import html
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from selfsteer.errors import ArtifactError, ConfigError, short

#: Not published: hidden files, among them what an interrupted write leaves.
_HIDDEN = [".*", "*/.*"]

#: Heads what a run warned of in a card, one line each.
WARNINGS = "## Warnings"


@dataclass(frozen=True)
class Upload:
    """What a push will do; ``files`` are names relative to the folder, with their bytes."""

    folder: Path
    repo: str
    kind: Literal["model", "dataset"]
    private: bool
    files: list[tuple[str, int]]
    warnings: list[str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def plan_upload(folder: Path, repo: str, *, private: bool) -> Upload:
    """Looks at a folder that is to be published; touches no network.

    Raises:
        ConfigError: the folder is absent, empty or a whole run, or the name is none of the hub.
    """
    from huggingface_hub.utils import (
        HFValidationError,
        filter_repo_objects,
        validate_repo_id,
    )

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise ConfigError(f"{short(repo)} is not the name of a hub repository: {e}") from None
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}; give one that `selfsteer export` wrote.")
    if (folder / "resolved.json").exists():
        raise ConfigError(
            f"{folder} is a whole run. Export what is to be published first: selfsteer export "
            f"{folder} --format parquet --to DIR, or --model --to DIR."
        )
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    home = folder.resolve()
    for path in paths:
        if not (folder / path).resolve().is_relative_to(home):
            raise ConfigError(
                f"{folder / path} is a link that leads out of the folder, and what it leads to may "
                "not be meant for others. Put the file itself there, or remove the link."
            )
    names = filter_repo_objects(map(str, paths), ignore_patterns=_HIDDEN)
    shown = [(name, (folder / name).stat().st_size) for name in names]
    if not shown:
        raise ConfigError(f"{folder} holds no file to publish.")
    model = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
    return Upload(
        folder, repo, "model" if model else "dataset", private, shown, _warnings(folder, model)
    )


def _warnings(folder: Path, model: bool) -> list[str]:
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    if not card.exists():
        return ["there is no README.md to say what this is and how it was made"]
    try:
        known = (metadata_load(card) or {}).get("license")
    except yaml.YAMLError:
        known = None
    _, _, after = card.read_text("utf-8", "replace").partition(f"\n{WARNINGS}\n")
    lines = after.partition("\n#")[0].splitlines()
    found = [_plain(x.removeprefix("- ")) for x in lines if x.startswith("- ")]
    if not model and known in (None, "unknown"):
        found.append("the licence of the queries is unknown; find it out before you publish them")
    return found


def _plain(text: str) -> str:
    """What `selfsteer.report.tables.inline` was given."""
    return html.unescape(text.replace("]\\(", "](").replace("\\|", "|"))


def push(upload: Upload, api: Any = None) -> str:
    """Makes the repository if need be and uploads the folder in one commit.

    Args:
        upload: of `plan_upload`.
        api: a ``huggingface_hub.HfApi``; the default takes the token that ``hf auth login`` stored
            or the environment's ``HF_TOKEN``.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: no or a wrong token, no network, or a repository that is public while a
            private one was asked for; nothing was uploaded then.
    """
    from huggingface_hub import HfApi

    hub: Any = HfApi() if api is None else api
    repo = {"repo_id": upload.repo, "repo_type": upload.kind}
    try:
        url = hub.create_repo(**repo, private=upload.private, exist_ok=True)
        # the hub leaves an existing repository as public as it is
        if upload.private and not hub.repo_info(**repo).private:
            raise ArtifactError(
                f"{upload.repo} is there already and is public, but --private was given. Make it "
                "private in its settings or choose another name. Nothing was uploaded."
            )
        hub.upload_folder(
            **repo,
            folder_path=upload.folder,
            ignore_patterns=_HIDDEN,
            commit_message="Upload with selfsteer",
        )
    except ArtifactError:
        raise
    except Exception as e:
        raise _explained(e, upload.repo) from None
    return str(url)


def _explained(error: Exception, repo: str) -> Exception:
    """Why the hub took nothing and what to do, in one paragraph; other errors as they are."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    said = " ".join(str(error).split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    # the client's transport has error classes of its own, which differ between versions
    transport = type(error).__module__.startswith(("httpx", "httpcore"))
    if isinstance(error, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and try again."
    elif isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        why = (
            f"The hub refused to write to {repo} (status {status}): no token, or not one that may. "
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write, then try "
            "again."
        )
    elif isinstance(error, HfHubHTTPError):
        why = f"The hub refused to write to {repo} (status {status}): {said}. Try again later."
    elif isinstance(error, AttributeError | KeyError | TypeError | json.JSONDecodeError):
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        why = (
            f"{host} answered in a way that no hub does ({type(error).__name__}: {said[:200]}), so "
            f"whether {repo} has the upload is not known. Check HF_ENDPOINT and any proxy, look at "
            "the repository, then try again."
        )
    elif isinstance(error, ValueError):  # above all, what the hub says of the front matter
        why = f"The hub does not take what would go to {repo}: {said}. Set that right, try again."
    elif transport or isinstance(error, ConnectionError | TimeoutError):
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        why = f"The hub at {host} cannot be reached ({said}). Check the network and HF_ENDPOINT."
    else:
        return error
    return ArtifactError(why)
