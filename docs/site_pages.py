"""What the site takes from outside ``docs/``: README, changelog and committed results.

Links in the repository are written for the repository; here they are turned to where the same
files lie in the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN_AS_TEXT = {".py", ".yaml", ".json", ".toml"}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the pages, and the files that pages link to and that the site does not render."""
    outside = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md"}
    for path in sorted((ROOT / "benchmarks").rglob("*")):
        if path.suffix in {".md", ".json", ".png", ".svg"} and ".runs" not in path.parts:
            name = path.relative_to(ROOT).as_posix()
            outside[name] = name
    examples = (p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "examples").iterdir()))
    for name in (*examples, "src/selfsteer/run/execute.py"):
        outside[name] = name
    for source, target in outside.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between the repository's rooms into links between the site's."""
    if page.file.src_uri == "index.md":
        first = min(p.name for p in (ROOT / "docs/decisions").glob("*.md"))
        markdown = markdown.replace("](docs/decisions/)", f"](decisions/{first})")
        return re.sub(r"\]\(docs/", "](", markdown)
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri.startswith("benchmarks/"):
        return re.sub(rf"\]\({re.escape(up)}docs/", f"]({up}", markdown)
    return re.sub(rf"\]\({re.escape(up)}\.\./(benchmarks|examples|src)/", rf"]({up}\1/", markdown)
