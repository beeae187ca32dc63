"""What a folder of LoRA adapters says of itself, checked before peft believes it."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import (
    ADAPTER_CONFIG,
    BASE,
    adapter_base,
    is_hub_id,
    weights_digest,
)
from selfsteer.errors import ArtifactError, ConfigError, SelfsteerError, clip
from selfsteer.recipe.sections import Loading, resolve_path
from selfsteer.terminal import warn

#: Seconds that all expressions of a config may take on the names of a model's modules.
MATCH_S = 10.0

#: Matches expressions as peft does, by the same ``re``, in a process that can be ended.
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for way, pattern in patterns:
    for name in names:
        getattr(re, way)(pattern, name)
"""


class AdapterConfig(BaseModel):
    """The fields of adapter_config.json that decide which adapters there are; others are peft's."""

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: PositiveInt = 8
    lora_alpha: float = 8
    lora_dropout: float = 0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None

    def expressions(self) -> list[tuple[str, str]]:
        """Its regular expressions, each with the function of ``re`` that peft matches it by."""
        whole = [x for x in (self.target_modules, self.exclude_modules) if isinstance(x, str)]
        layers = self.layers_pattern or []
        within = [
            *(
                rf"(.*\.)?({key})$"
                for key in [*(self.rank_pattern or {}), *(self.alpha_pattern or {})]
            ),
            *(rf"(^|.*\.){name}($|\..*)" for name in self.modules_to_save or []),
            *(
                rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\."
                for text in ([layers] if isinstance(layers, str) else layers)
            ),
        ]
        return [("fullmatch", x) for x in whole] + [("match", x) for x in within]


def adapter_config(adapter: Path, settings: Loading) -> AdapterConfig:
    """What a folder of adapters says of itself.

    Args:
        adapter: the folder that peft wrote.
        settings: permissions.

    Raises:
        ArtifactError: it holds no LoRA adapters of a causal language model, they are not in
            safetensors format, or a field of their config is not what peft writes there.
    """
    path = adapter / ADAPTER_CONFIG
    if not path.is_file():
        raise ArtifactError(
            f"{adapter} holds no adapters: there is no file {ADAPTER_CONFIG}. Give the folder that "
            "peft wrote; that of a run is …/policy/adapter."
        )
    found = read_json(
        dict[str, Any], path, "Give the folder that peft wrote; that of a run is …/policy/adapter."
    )
    kind = (found.get("peft_type"), found.get("task_type") or "CAUSAL_LM")
    if kind != ("LORA", "CAUSAL_LM"):
        raise ArtifactError(
            f"{adapter} holds adapters of type {clip(str(kind[0]))} for {clip(str(kind[1]))}; only "
            "LORA for CAUSAL_LM can be added to a base."
        )
    config: AdapterConfig = read_json(AdapterConfig, path, "Fetch the adapters again.")
    safe = (adapter / "adapter_model.safetensors").is_file()
    if not safe and (adapter / "adapter_model.bin").exists() and not settings.allow_pickle:
        raise ArtifactError(
            f"The adapters in {adapter} are not in safetensors format, and loading adapter_model."
            "bin could run code. If you trust its author, set allow_pickle: true (selfsteer merge "
            "--allow-pickle)."
        )
    return config


def check_base(
    adapter: Path, base: str, found: str, *, given: bool, other_weights: bool = False
) -> None:
    """Fails where adapters say that they were trained on other weights.

    Args:
        adapter: their folder.
        base: what they are to be added to; of a hub id that is not here nothing is known.
        found: the checkpoint that it is, or that was made of it.
        given: whether it was named with ``--base``, not by the adapters.
        other_weights: warn instead.

    Raises:
        ArtifactError: they do, and name this base themselves.
        ConfigError: they do, and the base was given.
    """
    noted = _noted(adapter)
    if noted is None:
        return
    held = {weights_digest(base), weights_digest(found)} - {None}
    if noted in held:
        return
    if not held and is_hub_id(base):
        warn(f"it is not known whether the adapters in {adapter} were trained on {base}")
        return
    said = f"he adapters in {adapter} were trained on other weights than "
    said += base if given else f"{base} now holds, which is what they name as their base"
    if other_weights:
        warn(f"t{said}; they are added to it all the same")
        return
    raise (ConfigError if given else ArtifactError)(
        f"T{said}. {base_advice(adapter)} If these are the same weights in another precision or in "
        "other files: add --other-weights."
    )


def _noted(adapter: Path) -> str | None:
    """The digest of the weights that adapters were trained on; None where it was not noted."""
    path = adapter / BASE
    noted = read_json(dict[str, str], path, "Fetch the adapters again.") if path.is_file() else {}
    return noted.get("weights")


def base_advice(adapter: Path) -> str:
    """Which base is the right one, as far as it can be told from where the adapters lie.

    In a run those of iteration K were trained on the policy of iteration K-1, and those of the
    first on the recipe's model; a run that was moved keeps both names.
    """
    noted, named = _noted(adapter), adapter_base(adapter)
    places = [Path(named)] if named else []
    for folder in Path(os.path.abspath(adapter)).parents:
        if found := re.fullmatch(r"iteration-(\d+)", folder.name):
            places.append(folder.with_name(f"iteration-{int(found[1]) - 1}") / "policy")
        if (folder / "resolved.json").is_file():
            with contextlib.suppress(SelfsteerError, KeyError, TypeError):
                recipe = read_json(dict[str, Any], folder / "resolved.json")
                places.append(Path(resolve_path(recipe["policy"]["model"])))
    right = next((p for p in places if noted and weights_digest(str(p)) == noted), None)
    if right is None:
        return "Give the model that they were trained on: selfsteer merge --base MODEL."
    return f"They were trained on {right}: selfsteer merge --base {shlex.quote(str(right))}."


def check_expressions(config: AdapterConfig, adapter: Path, names: Iterable[str]) -> None:
    """Refuses regular expressions that are none, or that would not end.

    Args:
        config: of the adapters.
        adapter: their folder.
        names: of the base's modules.

    Raises:
        ArtifactError: says which file holds them.
    """
    given = json.dumps([config.expressions(), list(names)])
    path = adapter / ADAPTER_CONFIG
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=given, capture_output=True, text=True, timeout=MATCH_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        fault = f"took more than {MATCH_S:g} s on the names of the base's modules"
    else:
        if not ended.returncode:
            return
        fault = f"cannot be read ({ended.stderr.strip().rpartition(': ')[2]})"
    raise ArtifactError(
        f"{path} holds a regular expression that {fault}. Name the modules in a list instead, or "
        "fetch the adapters again."
    )
