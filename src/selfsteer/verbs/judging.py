"""`selfsteer judge`: one or two judges on preferences that are there already."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import dump_lines, read_jsonl, write_atomic
from selfsteer.data.records import Preference, Query
from selfsteer.errors import ArtifactError, DataError
from selfsteer.judges.base import Pair, load_judge
from selfsteer.judges.stats import agreement, judge_report
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.stages.inputs import stored_preferences


def load_preferences(path: Path) -> list[Preference]:
    """Preferences of a JSONL file or of a folder of shards.

    Raises:
        DataError: none there, or a record is none.
        ArtifactError: a folder without shards.
    """
    if path.is_dir():
        if not any(path.glob("shard-*.jsonl")):
            raise ArtifactError(f"{path} has no preferences yet; run it first.")
        return list(stored_preferences(path))
    found = []
    for number, value in read_jsonl(path):
        try:
            found.append(Preference.from_dict(value))
        except DataError as e:
            raise DataError(f"{path}, line {number}: {e}.") from None
    if not found:
        raise DataError(f"{path} holds no preference.")
    return found


def pick(preferences: Sequence[Preference], limit: int | None, seed: int) -> list[Preference]:
    """At most ``limit`` of them: a seeded subset that does not depend on their order."""
    if limit is None or len(preferences) <= limit:
        return list(preferences)
    chosen = sorted(preferences, key=lambda p: derive_seed(seed, "judge", p.id))[:limit]
    return sorted(chosen, key=lambda p: p.id)


def judge_preferences(
    preferences: Sequence[Preference],
    judges: Sequence[JudgeConfig],
    folder: Path | None,
    seed: int,
) -> dict[str, Any]:
    """What the judges say of chosen against rejected, and how far two of them agree.

    Args:
        preferences: N records.
        judges: one or two.
        folder: where answers are kept and found again.
        seed: of the intervals.
    """
    pairs = [Pair(Query(p.id, p.prompt), p.chosen, p.rejected) for p in preferences]
    report: dict[str, Any] = {"pairs": len(pairs), "judges": []}
    found = []
    for settings in judges:
        judge = load_judge(settings, folder)
        assert judge is not None
        judge.check([p.query for p in pairs])
        found.append(judge.compare_all(pairs))
        report["judges"].append({"name": judge.name, **judge_report(found[-1])})
    if len(found) == 2:
        report["agreement"] = agreement(found[0], found[1], np.random.default_rng(seed))
    return report


def write_label_sheet(preferences: Sequence[Preference], path: Path, seed: int) -> int:
    """Writes pairs for people to label: blind, in a seeded order of place, ``verdict`` null.

    Filled in, the file is what a judge of kind ``human`` reads.

    Raises:
        ArtifactError: the file is there already and may hold labels.
    """
    if path.exists():
        raise ArtifactError(f"{path} is there already and may hold labels; choose another name.")
    lines = []
    for p in preferences:
        pair = [p.chosen, p.rejected]
        if derive_seed(seed, "label", p.id) % 2:
            pair.reverse()
        prompt = [m.to_dict() for m in p.prompt]
        lines.append(
            {"id": p.id, "prompt": prompt, "first": pair[0], "second": pair[1], "verdict": None}
        )
    write_atomic(path, dump_lines(lines))
    return len(lines)
