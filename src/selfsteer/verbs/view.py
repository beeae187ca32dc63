"""``selfsteer view``: the pages of runs in a browser, while they go on."""

import json
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from selfsteer.verbs.common import AsJson


def view(
    folder: Annotated[Path, typer.Argument(help="a run folder, or a folder of runs")] = Path(
        "runs"
    ),
    port: Annotated[
        int | None,
        typer.Option(
            help="port to listen on; default: 8327 or, if it is taken, a free one; 0: a free one",
            min=0,
            max=65535,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="address to listen on; any other than this machine's own requires a token"
        ),
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="another host name to accept, such as that of a proxy; repeatable"),
    ] = None,
    browser: Annotated[bool, typer.Option(help="open a browser, if there is one")] = True,
    as_json: AsJson = False,
) -> None:
    """Watch runs in a browser: progress, curves, samples, every triple; compare finished runs.

    Reads run folders and never changes them. On any address other than this machine's own (--host),
    access requires the token in the printed URL; SELFSTEER_VIEW_TOKEN sets that token.
    """
    from selfsteer.errors import ConfigError
    from selfsteer.recipe.secrets import is_loopback
    from selfsteer.run.sums import SMALL_BYTES
    from selfsteer.terminal import out, say
    from selfsteer.view import RunView

    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Give a run folder, or a folder of runs.")
    if (
        folder / "resolved.json"
    ).is_file():  # of several runs, others are shown beside a damaged one
        RunView.open(folder).check(most=SMALL_BYTES)
    try:
        from selfsteer.report import server
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"selfsteer view needs {e.name}, which is not installed: "
            "python -m pip install 'selfsteer[view]'."
        ) from None
    token = os.environ.get("SELFSTEER_VIEW_TOKEN") or None
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    bound = server.bind(host, port)
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    known = f"?token={quote(token, safe='')}" if token else ""
    url = f"http://{name}:{bound.getsockname()[1]}/{known}"
    if as_json:
        print(json.dumps({"url": url}), flush=True)
    else:
        out.print(url, markup=False, style=None)
        out.file.flush()
        say(f"showing {folder}; Ctrl-C ends it")
    if browser and not as_json and sys.stdout.isatty():
        import webbrowser

        webbrowser.open(url)
    server.serve(folder, bound, token, [host, *(allow_host or [])])
