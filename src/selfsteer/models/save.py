"""What training puts on a model, and how the result is written: adapters, checkpoints."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from selfsteer.data.digests import (
    ADAPTER_CONFIG,
    BASE,
    adapter_base,
    hub_commit,
    is_hub_id,
    split_revision,
    weights_digest,
)
from selfsteer.data.jsonl import write_atomic
from selfsteer.errors import ConfigError, NumericsError, short
from selfsteer.models import tree
from selfsteer.models.finite import broken_weight

if TYPE_CHECKING:
    from selfsteer.models.chat import ChatFormat
    from selfsteer.recipe.sections import Lora

#: Where a trained model's folder holds its adapters, beside the weights that they were merged into.
ADAPTER = "adapter"


def disable_dropout(model: Any) -> None:
    """Sets every dropout of a model to 0, as TRL does by default.

    The reference is scored without it: with it, log-ratios of the first step would be noise.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # attention modules hand a number to the attention function
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def add_lora(model: Any, lora: Lora, task: str = "CAUSAL_LM", source: str = "") -> Any:
    """Wraps a model in trainable low-rank adapters that start at zero.

    Args:
        model: to wrap.
        lora: rank, scale and modules.
        task: peft's name of it; with SEQ_CLS the head is trained whole.
        source: what the model was loaded from; of a hub id the adapters name the commit.

    Raises:
        ConfigError: the model has no such modules, or one is the output projection of a model in
            the tree layout, which reads that as plain weights.
    """
    from peft import LoraConfig, get_peft_model

    revision = None
    if is_hub_id(source) and is_hub_id(model.name_or_path):  # else it was made of that, in a cache
        revision = hub_commit(source) or split_revision(source)[1]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.targets,
        task_type=task,
        revision=revision,
    )
    try:
        with _peft_warnings():
            wrapped = get_peft_model(model, config)
    except ValueError as e:
        raise ConfigError(f"lora.targets does not fit {type(model).__name__}: {e}") from e
    if tree.is_installed(model) and hasattr(model.get_output_embeddings(), "base_layer"):
        raise ConfigError(
            f"lora.targets {short(lora.targets)} includes the output projection of "
            f"{type(model).__name__}, which the tree layout reads as plain weights: the adapter "
            "would never be used. Leave it out, or set layout: padded."
        )
    return wrapped


def full(value: torch.Tensor) -> torch.Tensor:
    """A tensor itself, or what its parts on all ranks make; all of them must ask together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def save_model(
    model: Any, chat: ChatFormat, folder: Path, dtype: torch.dtype, *, writes: bool = True
) -> None:
    """Writes a checkpoint that ``from_pretrained`` and servers load.

    Where ranks hold a model in parts, all of them must call this, and one writes: it collects the
    weights one by one, so that no other rank ever holds more than one that is whole.

    Adapters are written to ``adapter/`` in it, and merged. Weights are stored in the precision they
    were trained to compute in. generation_config says ``do_sample``: servers answer greedily
    without it, whatever the temperature.

    Raises:
        NumericsError: a weight is NaN, infinite, or too large for the precision.
    """
    plain = model
    if hasattr(model, "merge_and_unload"):
        plain = _save_adapter(model, folder / ADAPTER, dtype)
    tree.uninstall(plain)
    if getattr(plain, "generation_config", None) is not None:  # a reward model has none
        plain.generation_config.do_sample = True
    state = _collected(plain, dtype, keep=writes)
    if not writes:
        return
    learnt = {n for n, _ in plain.named_parameters(remove_duplicate=False)}
    _refuse_broken(((k, v) for k, v in state.items() if k in learnt), dtype)
    plain.save_pretrained(folder, state_dict=state)
    plain.config.use_cache = True  # the Trainer switched it off
    plain.config.dtype = dtype  # save_pretrained wrote that of the weights in memory
    plain.config.save_pretrained(folder)
    as_umask(folder)
    save_tokenizer(chat.tokenizer, folder)


def as_umask(folder: Path) -> None:
    """Gives weights the mode of the files beside them: safetensors leaves 0600."""
    plain = next(path for path in folder.iterdir() if path.suffix == ".json")
    for path in folder.glob("*.safetensors"):
        shutil.copymode(plain, path)


def _refuse_broken(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    if broken := broken_weight(weights):
        raise NumericsError(
            f"{broken} are NaN or infinite as {dtype}; the model was not saved. Train with "
            "policy.dtype: bfloat16 or float32, or lower the learning rate."
        )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer as transformers 4 and converters to other formats read it, too.

    transformers 5 has a class and a list of its own in tokenizer_config.json; the old names of both
    are read by all versions.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text("utf-8"))
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    write_atomic(path, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


@torch.no_grad()
def _collected(model: Any, dtype: torch.dtype, *, keep: bool) -> dict[str, torch.Tensor]:
    """What is stored of a model, on the CPU and in this precision; names alone without ``keep``."""
    cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    state = {}
    for name, value in stored(model):
        if id(value) not in cast:
            found = full(value.detach())
            if not keep:
                found = found.new_empty(0)
            cast[id(value)] = found.to("cpu", dtype) if found.is_floating_point() else found
        state[name] = cast[id(value)]
    return state


def stored(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What a state dict holds; asking a sharded model for one would take it apart again."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _sort_modules(path: Path) -> None:
    """Gives the names of modules an order: peft holds a set, which each process orders anew."""
    found = json.loads(path.read_text("utf-8"))
    if isinstance(found["target_modules"], list):
        found["target_modules"].sort()
        write_atomic(path, json.dumps(found, indent=2, sort_keys=True))


def _note_base(adapter: Path, base: str) -> None:
    """Writes beside adapters which weights they were trained on, where they are on this machine."""
    if weights := weights_digest(base):
        write_atomic(adapter / BASE, json.dumps({"weights": weights}) + "\n")


def _save_adapter(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Writes a peft model's adapters; returns the plain model that they make with their base."""
    _refuse_broken(((n, p) for n, p in model.named_parameters() if p.requires_grad), dtype)
    with _peft_warnings():
        # it would like to know whether a vocabulary of the hub was changed: it never is
        warnings.filterwarnings("ignore", "Could not find a config file")
        model.save_pretrained(folder, state_dict={n: v.detach() for n, v in stored(model)})
    as_umask(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card, all of it placeholders
    _sort_modules(folder / ADAPTER_CONFIG)
    _note_base(folder, adapter_base(folder) or "")
    if not getattr(model, "is_quantized", False):
        return model.merge_and_unload()
    # merged into the weights as they were before quantisation, which rounded them
    config = model.peft_config["default"]
    # of the class that it has, as its author may be the one who brought the code
    kind = type(model.get_base_model())
    base = kind.from_pretrained(
        config.base_model_name_or_path, revision=config.revision or "main", dtype=dtype
    )
    # a checkpoint that was stored quantised has no other weights
    return merged(base.dequantize() if getattr(base, "is_quantized", False) else base, folder)


def merged(base: Any, adapter: Path) -> Any:
    """A model with adapters added to its weights; a key without a place in it is an error."""
    from peft import PeftModel

    with _peft_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


@contextmanager
def _peft_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft 0.21 asks transformers for a property that is deprecated; nothing a user can do
        warnings.simplefilter("ignore", FutureWarning)
        yield
