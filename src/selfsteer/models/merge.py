"""`selfsteer merge`: adapters added to their base, on the CPU."""

import json
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM

from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.models.load import CPU, load_chat, pretrained, resolve_dtype
from selfsteer.models.save import merged, save_model
from selfsteer.recipe.sections import Loading


def merge_adapter(adapter: Path, output: Path, settings: Loading, base: str | None) -> str:
    """Adds LoRA adapters to their base and writes a plain checkpoint, on the CPU.

    Args:
        adapter: a folder that peft wrote.
        output: folder to make.
        settings: precision of the result (``auto`` is the base's own), and permissions.
        base: folder or hub id; None: what the adapters say they were trained on.

    Returns:
        The base that was used.

    Raises:
        ArtifactError: no LoRA adapters, they name no base, or base and adapters do not fit.
        ConfigError: the output is there already.
    """
    try:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ArtifactError(
            f"{adapter} holds no adapters: adapter_config.json cannot be read ({e}). Give the "
            "folder that peft wrote; that of a run is …/policy/adapter."
        ) from e
    kind = (config.get("peft_type"), config.get("task_type") or "CAUSAL_LM")
    if kind != ("LORA", "CAUSAL_LM"):
        raise ArtifactError(
            f"{adapter} holds adapters of type {kind[0]} for {kind[1]}; only LORA for CAUSAL_LM "
            "can be added to a base."
        )
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ArtifactError(f"{adapter} does not name its base model. Give it: --base MODEL.")
    if output.exists():
        raise ConfigError(f"{output} is there already; choose another folder or move it away.")
    chat = load_chat(base, settings)
    kept = "auto" if settings.dtype == "auto" else resolve_dtype(settings.dtype, CPU)
    model = pretrained(AutoModelForCausalLM, "base", base, settings, dtype=kept)
    dtype = model.dtype
    try:
        plain = merged(model, adapter)
    except (RuntimeError, ValueError, KeyError, UserWarning) as e:
        first = " ".join(str(e).split())[:300]
        raise ArtifactError(
            f"The adapters in {adapter} do not fit {base}: {first} Give the model that they were "
            "trained on with --base."
        ) from e
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(plain, chat, partial, dtype)
    partial.replace(output)
    return base
