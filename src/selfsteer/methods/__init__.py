"""One file a method; `AnyRecipe` is their union, told apart by ``method``."""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from selfsteer.methods.bad_to_plain import BadToPlain
from selfsteer.methods.base import Aligning, Paired, Principled, Recipe
from selfsteer.methods.best_of_n import BestOfN
from selfsteer.methods.best_of_n_principles import BestOfNByPrinciples
from selfsteer.methods.contrast import ContrastDistillation
from selfsteer.methods.distil import ContextDistillation
from selfsteer.methods.dlma import DLMA
from selfsteer.methods.good_over_plain import GoodOverPlain
from selfsteer.methods.irft import IRFT
from selfsteer.methods.online import SSOOnline
from selfsteer.methods.pbaa import PBAA
from selfsteer.methods.pbaa_best_of_n import PBAABestOfN
from selfsteer.methods.reward import RewardModel
from selfsteer.methods.rlcd import RLCD
from selfsteer.methods.self_rewarding import SelfRewarding
from selfsteer.methods.sgpo import SGPO
from selfsteer.methods.spin import SPIN
from selfsteer.methods.spin_judged import JudgedSPIN
from selfsteer.methods.sso import SSO
from selfsteer.recipe.read import choose, load_values, merge, validate

AnyRecipe = (
    SSO
    | SSOOnline
    | PBAA
    | DLMA
    | ContrastDistillation
    | ContextDistillation
    | GoodOverPlain
    | BadToPlain
    | BestOfN
    | BestOfNByPrinciples
    | PBAABestOfN
    | RLCD
    | SelfRewarding
    | SGPO
    | SPIN
    | JudgedSPIN
    | IRFT
    | RewardModel
)

#: Their classes, in the order of the documentation; the first is the default.
METHODS: tuple[type[AnyRecipe], ...] = get_args(AnyRecipe)

__all__ = [
    "METHODS", "Aligning", "AnyRecipe", "Paired", "Principled", "Recipe",
    "load_recipe", "recipe_of",
]  # fmt: skip


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> AnyRecipe:
    """Reads and checks a recipe; ``overrides`` are ``a.b=value`` with YAML values.

    Raises:
        ConfigError: anything the recipe says that cannot be honoured.
    """
    return recipe_of(merge(load_values(name_or_path), overrides), f"recipe {name_or_path}")


def recipe_of(values: Mapping[str, Any], where: str) -> AnyRecipe:
    """The recipe that settings make: of the class that their ``method`` names.

    Raises:
        ConfigError: no such method, or a setting that it cannot honour.
    """
    return validate(choose(METHODS, values, where), values, where, METHODS)
