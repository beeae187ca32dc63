"""``selfsteer push``: an exported folder, published on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.terminal import out, warn
from selfsteer.verbs.common import AsJson, emit


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder that selfsteer export wrote")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="repository on the hub, OWNER/NAME")],
    yes: Annotated[
        bool, typer.Option("--yes", help="upload; without it, only list what would be uploaded")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish an exported dataset or model on the Hugging Face hub."""
    from selfsteer.formats import hub

    upload = hub.plan_upload(folder, repo, private=private)
    url = hub.push(upload) if yes else None
    result = {
        "repo": repo,
        "kind": upload.kind,
        "private": private,
        "files": [{"path": name, "bytes": size} for name, size in upload.files],
        "url": url,
        "warnings": upload.warnings,
    }
    emit(result, as_json, _print)


def _print(result: dict[str, Any]) -> None:
    for warning in result["warnings"]:
        warn(warning)
    files = result["files"]
    if result["url"] is not None:
        out.print(f"{len(files):,} files are at {result['url']}")
        return
    for file in files:
        out.print(f"{file['bytes']:>15,}  {file['path']}", markup=False)
    who = "private" if result["private"] else "public"
    out.print(
        f"would upload {len(files):,} files, {sum(f['bytes'] for f in files):,} bytes, to the "
        f"{who} {result['kind']} {result['repo']}; nothing was uploaded. Add --yes to upload."
    )
