"""selfsteer: align a language model with nothing but prompts (Self-Steering Optimization).

The names that outside code may rely on are imported on first use, so that importing a light
module such as ``selfsteer.config`` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsteer.models.logprobs import score_records
    from selfsteer.objectives import Objective, steering_loss
    from selfsteer.records import Preference, Query, Triple

__version__ = "0.1.0"
__all__ = ["Objective", "Preference", "Query", "Triple", "score_records", "steering_loss"]

_HOMES = {
    "Objective": "selfsteer.objectives",
    "steering_loss": "selfsteer.objectives",
    "score_records": "selfsteer.models.logprobs",
    "Triple": "selfsteer.records",
    "Query": "selfsteer.records",
    "Preference": "selfsteer.records",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'selfsteer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
