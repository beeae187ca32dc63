"""From a recipe's settings to a judge."""

from collections.abc import Iterable
from pathlib import Path
from typing import assert_never

from selfsteer.judges.base import Judge
from selfsteer.judges.checks import ChecksJudge
from selfsteer.judges.oracle import OracleJudge
from selfsteer.judges.people import HumanJudge
from selfsteer.recipe.sections import JudgeConfig, resolve_path


def load_judge(settings: JudgeConfig | None, folder: Path | None = None) -> Judge | None:
    """The judge that a recipe names; its model is loaded when it is first asked something new.

    Args:
        settings: None is no judge.
        folder: where the answers of judges that cost something are kept and found again, by
            content; None keeps them in memory.
    """
    if settings is None:
        return None
    if settings.kind == "oracle":
        return OracleJudge()
    if settings.kind == "checks":
        return ChecksJudge(settings)
    if settings.kind == "human":
        return HumanJudge(Path(resolve_path(str(settings.path))))
    if settings.kind == "chat":
        from selfsteer.judges.chat import ChatJudge

        return ChatJudge(settings, folder)
    if settings.kind == "reward":
        from selfsteer.judges.reward import RewardJudge

        return RewardJudge(settings, folder)
    if settings.kind == "principles":
        from selfsteer.judges.principles import PrinciplesJudge

        return PrinciplesJudge(settings, folder)
    assert_never(settings.kind)


def load_judges(settings: Iterable[JudgeConfig]) -> list[Judge]:
    """`load_judge` of several, without a folder."""
    return [judge for s in settings if (judge := load_judge(s)) is not None]
