"""Pages from templates: one skeleton, one style sheet, nothing loaded from anywhere.

What a model or a data set wrote is hostile until shown otherwise: templates escape it, and the
page's policy runs the scripts it was made with and no other.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from selfsteer.report.tables import inline, show_cell

PACKAGE = "selfsteer.report"


def asset(name: str) -> str:
    """The text of a file of this package, for example ``style.css``."""
    return files(PACKAGE).joinpath(name).read_text("utf-8")


def finite(value: Any) -> Any:
    """JSON as browsers read it: a float that is no number, as a broken file may hold it, is None.

    >>> finite({"gap": [float("nan"), 1.5]})
    {'gap': [None, 1.5]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list) else value


def environment() -> Environment:
    """Templates of this package; all text in pages is escaped, an unknown name is an error.

    ``show`` is `show_cell`; ``inline`` escapes text in Markdown.
    """
    found = Environment(
        loader=PackageLoader(PACKAGE),
        autoescape=lambda name: name is None or not name.endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"show": show_cell, "inline": inline}
    return found


def security_policy(scripts: Sequence[str], connect: str = "'none'") -> str:
    """A Content-Security-Policy that allows these scripts by their hashes, and no network.

    Args:
        scripts: texts of the inline scripts.
        connect: what scripts may talk to: ``'self'`` on a live page.
    """
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        f"img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def render(
    template: str,
    *,
    title: str,
    scripts: Sequence[str] = (),
    connect: str = "'none'",
    wide: bool = False,
    **values: Any,
) -> str:
    """A page that extends ``base.html.j2``.

    Args:
        template: its name in ``templates/``.
        title: of the window.
        scripts: names of files in ``templates/`` that run after the page's own.
        connect: see `security_policy`.
        wide: use the whole width of the window.
        values: what the template needs.
    """
    texts = [asset(f"templates/{name}").strip() for name in ("theme.js", *scripts)]
    return render_text(
        template,
        title=title,
        style=asset("style.css"),
        scripts=texts,
        csp=security_policy(texts, connect),
        wide=wide,
        **values,
    )


def render_text(template: str, **values: Any) -> str:
    """What a template of `environment` makes of these values."""
    return environment().get_template(template).render(**values)
