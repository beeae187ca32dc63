"""`selfsteer merge`: adapters added to their base, on the CPU."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer.data.digests import adapter_base
from selfsteer.data.jsonl import disk_errors, replacing_folder
from selfsteer.errors import ArtifactError
from selfsteer.models.adapters import (
    adapter_config,
    base_advice,
    check_base,
    check_expressions,
)
from selfsteer.models.chat import ChatFormat
from selfsteer.models.load import CPU, resolve_dtype
from selfsteer.models.save import merged, save_model
from selfsteer.models.sources import (
    check_finite,
    checkpoint,
    load_whole,
    pretrained,
    quantisation,
)
from selfsteer.recipe.sections import Loading


def merge_adapter(
    adapter: Path,
    output: Path,
    settings: Loading,
    base: str | None,
    *,
    other_weights: bool = False,
) -> str:
    """Adds LoRA adapters to their base and writes a plain checkpoint, on the CPU.

    Args:
        adapter: a folder that peft wrote.
        output: folder to make.
        settings: precision of the result (``auto`` is the base's own), and permissions.
        base: see `selfsteer.models.sources`; None: what the adapters say they were trained on.
        other_weights: take a base that holds others than the adapters were trained on.

    Returns:
        The base that was used.

    Raises:
        ArtifactError: no LoRA adapters, they name no base or one that has changed, base and
            adapters do not fit, or the disk is full.
        ConfigError: the output is there already, or the base that was given is not theirs.
    """
    config = adapter_config(adapter, settings)
    given, base = base, base or adapter_base(adapter)
    if not base:
        raise ArtifactError(
            f"{adapter} does not name its base model. Merge it with selfsteer merge --base MODEL."
        )
    try:
        found = checkpoint(base, settings)
        method = quantisation(found, settings)
    except ArtifactError as e:
        raise ArtifactError(
            f"The base of the adapters in {adapter} cannot be used. {e} {base_advice(adapter)}"
        ) from e
    if method:
        raise ArtifactError(
            f"The base of the adapters in {adapter}, {base}, is quantised as {method}, which would "
            "round what they add. Merge them with the model that it was made from: selfsteer merge "
            "--base MODEL --other-weights."
        )
    check_base(adapter, base, found, given=given is not None, other_weights=other_weights)
    with replacing_folder(output) as partial:
        chat = ChatFormat(_tokenizer(adapter, found, settings), str(adapter))
        kept = "auto" if settings.dtype == "auto" else resolve_dtype(settings.dtype, CPU)
        model = load_whole(AutoModelForCausalLM, "base", found, settings, dtype=kept)
        dtype = model.dtype
        check_expressions(config, adapter, (name for name, _ in model.named_modules()))
        try:
            plain = merged(model, adapter)
        except Exception as e:  # peft believes the fields that `adapter_config` does not know
            first = " ".join(str(e).split())[:300]
            raise ArtifactError(
                f"The adapters in {adapter} do not fit {base}: {first} "
                f"{_advice(str(e), base, given=given is not None)}"
            ) from e
        check_finite(plain.named_parameters(), str(adapter))
        with disk_errors(output, "folder"):
            save_model(plain, chat, partial, dtype)
    return base


def _tokenizer(adapter: Path, base: str, settings: Loading) -> Any:
    """The adapters' own tokenizer and chat template, and the base's where they have none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    own = any((adapter / name).is_file() for name in names)
    found = pretrained(AutoTokenizer, "tokenizer", str(adapter) if own else base, settings)
    template = adapter / "chat_template.jinja"
    if template.is_file():
        found.chat_template = template.read_text("utf-8")
    elif not found.chat_template:
        found.chat_template = pretrained(AutoTokenizer, "tokenizer", base, settings).chat_template
    return found


def _advice(said: str, base: str, *, given: bool) -> str:
    """What helps, by how peft says that adapters and base do not go together.

    Args:
        said: by peft.
        base: that was used.
        given: whether it was named with ``--base``, not by the adapters.
    """
    if "tie_word_embeddings" in said or "tied" in said:
        return (
            f"{base} uses one matrix for its input and its output tokens, and the adapters change "
            "only one of the two uses. Save the base untied (tie_word_embeddings: false) and merge "
            "them with that: selfsteer merge --base FOLDER --other-weights."
        )
    if "size mismatch" in said and ("embed" in said or "lm_head" in said):
        return (
            f"They were trained with a larger or smaller vocabulary than that of {base}. Resize "
            "its embeddings as their training did (resize_token_embeddings), save it, and "
            "merge them with that: selfsteer merge --base FOLDER --other-weights."
        )
    if given:
        return f"They were trained on another model than {base}, which --base names."
    return "Merge them with the model that they were trained on: selfsteer merge --base MODEL."
