"""Does anything grow that should not? The same run again and again in one process.

python benchmarks/soak.py --minutes 20

Each turn is a smoke run into a folder of its own, which is then removed. After each turn the
resident memory and the open file descriptors of the process are noted (Linux with glibc); of the
turns after the first few, which fill caches, the slopes are fitted. Slices of several calls stand
side by side in ``results/soak.json``: a leak shows within one, whatever was before it.

The library tokenizers (0.23.3) does not free its cache of words with a tokenizer. Unless
``--cache-words`` is given, tokenizers have none here, so that anything else that grows is seen.
"""

import argparse
import ctypes
import gc
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil

from selfsteer.run.execute import execute
from selfsteer.run.folder import versions

RESULTS = Path(__file__).parent / "results"

#: Turns before memory is compared: lazy imports, compiled kernels, caches of templates.
WARM_UP = 3


def slope(values: list[float]) -> float:
    """Of a straight line through the values, per turn; 0 for fewer than three."""
    return float(np.polyfit(range(len(values)), values, 1)[0]) if len(values) > 2 else 0.0


def turns(minutes: float, folder: Path, settings: list[str]) -> list[dict[str, float]]:
    """What the process held after each turn."""
    from selfsteer.methods import load_recipe

    process, begin, found = psutil.Process(), time.monotonic(), list[dict[str, float]]()
    libc = ctypes.CDLL("libc.so.6")
    while time.monotonic() - begin < 60 * minutes:
        recipe = load_recipe("smoke", [f"runs_dir={folder}", "name=turn", *settings])
        execute(recipe, {"name": "turn"})
        shutil.rmtree(folder / "turn")
        gc.collect()
        libc.malloc_trim(0)  # pages that the allocator keeps for itself are no leak
        memory = process.memory_info().rss / 2**20
        found.append(
            {
                "minutes": round((time.monotonic() - begin) / 60, 2),
                "rss_mib": round(memory, 1),
                "descriptors": process.num_fds(),
                "threads": process.num_threads(),
            }
        )
    return found


def forgetful(load: Any) -> Any:
    """``AutoTokenizer.from_pretrained``, but what it loads remembers no words."""

    def loading(*args: Any, **settings: Any) -> Any:
        tokenizer = load(*args, **settings)
        tokenizer.backend_tokenizer.model._resize_cache(0)
        return tokenizer

    return loading


def summary(found: list[dict[str, float]]) -> dict[str, Any]:
    """Slopes per turn after the warm-up, and the ends."""
    later = found[WARM_UP:]
    columns = {name: [turn[name] for turn in later] for name in found[0]}
    return {
        "minutes": found[-1]["minutes"],
        "turns": len(found),
        "first": later[0] if later else found[-1],
        "last": found[-1],
        "slope_per_turn": {
            name: round(slope(columns[name]), 4) for name in ("rss_mib", "descriptors", "threads")
        },
    }


def page(slices: list[dict[str, Any]]) -> str:
    """``soak.md``."""
    rows = [
        f"| {'on' if s['cache_words'] else 'off'} | {s['minutes']:.1f} | {s['turns']} | "
        f"{s['first']['rss_mib']:.0f} → {s['last']['rss_mib']:.0f} | "
        f"{s['slope_per_turn']['rss_mib']:+.2f} | "
        f"{s['first']['descriptors']} → {s['last']['descriptors']} | "
        f"{s['slope_per_turn']['descriptors']:+.2f} | {s['slope_per_turn']['threads']:+.2f} | "
        f"{' '.join(s['settings']) or 'of smoke'} |"
        for s in slices
    ]
    lines = [
        "# Soak: the same run again and again in one process",
        "",
        f"Made by `python benchmarks/soak.py --minutes N`; each line is a process of its own, "
        f"compared from turn {WARM_UP + 1} on. The library tokenizers does not free its cache of "
        "words with a tokenizer: that is what grows where it is on, as it is in runs.",
        "",
        "| cache of words | minutes | turns | RSS, MiB | per turn | descriptors | per turn | "
        "threads per turn | settings |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs, and adds its slice to ``results/soak.{json,md}``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--cache-words", action="store_true", help="as runs do")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE for the recipe smoke")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained
    chosen = load if arguments.cache_words else forgetful(load)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(AutoTokenizer, "from_pretrained", chosen),
    ):
        found = turns(arguments.minutes, Path(folder), arguments.settings)
    path = RESULTS / "soak.json"
    slices = json.loads(path.read_text())["slices"] if path.exists() else []
    slices.append(
        {
            "date": time.strftime("%Y-%m-%d"),
            "hardware": platform.machine(),
            "versions": versions(),
            "settings": arguments.settings,
            "cache_words": arguments.cache_words,
            **summary(found),
            "each": found,
        }
    )
    path.write_text(json.dumps({"slices": slices}, indent=1) + "\n")
    text = page(slices)
    (RESULTS / "soak.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
