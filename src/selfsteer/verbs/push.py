"""``selfsteer push``: an exported folder, published on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.terminal import out, warn
from selfsteer.verbs.common import AsJson


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
    if as_json:
        files = [{"path": name, "bytes": size} for name, size in upload.files]
        result = {"repo": repo, "kind": upload.kind, "private": private, "files": files, "url": url}
        out.print_json(data={**result, "warnings": upload.warnings})
        return
    for warning in upload.warnings:
        warn(warning)
    if url is not None:
        out.print(f"{len(upload.files):,} files are at {url}")
        return
    for name, size in upload.files:
        out.print(f"{size:>15,}  {name}", markup=False)
    who = "private" if private else "public"
    out.print(
        f"would upload {len(upload.files):,} files, {upload.size:,} bytes, to the {who} "
        f"{upload.kind} {repo}; nothing was uploaded. Add --yes to do it."
    )
