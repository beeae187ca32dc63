"""selfsteer: align a language model with nothing but prompts (Self-Steering Optimization).

The names that outside code may rely on are imported on first use, so that importing a light
module such as ``selfsteer.recipe.sections`` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsteer.data.records import Preference, Query, Triple
    from selfsteer.methods import load_recipe
    from selfsteer.models.score import score_records
    from selfsteer.objectives import Objective, steering_loss
    from selfsteer.run.execute import execute
    from selfsteer.view import RunView

__version__ = "0.1.0"
__all__ = [
    "Objective", "Preference", "Query", "RunView", "Triple",
    "execute", "load_recipe", "score_records", "steering_loss",
]  # fmt: skip

_HOMES = {
    "Objective": "selfsteer.objectives",
    "steering_loss": "selfsteer.objectives",
    "score_records": "selfsteer.models.score",
    "Triple": "selfsteer.data.records",
    "Query": "selfsteer.data.records",
    "Preference": "selfsteer.data.records",
    "load_recipe": "selfsteer.methods",
    "execute": "selfsteer.run.execute",
    "RunView": "selfsteer.view",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'selfsteer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
