"""Tokenizer, policy and LoRA; from a local folder or a hub id, safetensors only unless allowed."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils.logging import disable_progress_bar

from selfsteer.data.digests import digest, model_digest
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.models import tree
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.models.score import settle_layout
from selfsteer.recipe.sections import Loading, Lora
from selfsteer.terminal import say

#: Where a trained model's folder holds its adapters, beside the weights that they were merged into.
ADAPTER = "adapter"

CPU = torch.device("cpu")

# a bar per checkpoint shard says nothing beside the stage's own
disable_progress_bar()


@dataclass
class LoadedModel:
    """A model with its tokenizer, where it runs and in which precision it computes.

    Weights are float32 and bfloat16 is autocast around the forward, for training and scoring
    alike: updates at a learning rate of 5e-7 vanish in bfloat16 weights.
    """

    model: Any
    chat: ChatFormat
    device: torch.device
    dtype: torch.dtype
    source: str
    digest: str
    #: As asked for until `settle` has chosen, then ``tree`` or ``padded``.
    layout: str = "padded"
    _settled: bool = False

    def settle(self, sequences: Sequence[EncodedSequence]) -> None:
        """Chooses the layout once, proving it on some of the sequences, and says what it chose."""
        if self._settled:
            return
        asked = self.layout
        self.model.eval()
        with self.precision():
            self.layout = settle_layout(self.model, asked, _probe(sequences), self.dtype)
        self._settled = True
        if asked == "auto":
            say(f"  layout: {self.layout}")

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The autocast that every forward of this model runs under."""
        enabled = self.dtype != next(self.model.parameters()).dtype
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            yield

    @property
    def context_length(self) -> int | None:
        """Longest sequence that the model was made for, tokens; None if it does not say."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU of this rank if there is one, else the CPU.

    Raises:
        ConfigError: a device that is not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device cuda is not available here: torch sees no GPU. Use auto or cpu.")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ConfigError(
            f"There is no GPU for rank {local} of this machine (from 0): torch sees {there}. "
            f"Start {there} ranks, or set device: cpu."
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU (the paper's) and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def check_source(source: str) -> None:
    """Refuses early what cannot be a model.

    Raises:
        ArtifactError: no folder, no config in it, and not shaped like a hub id either.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ArtifactError(
                f"{source} is a folder but not a model: it has no config.json. Give the folder "
                "that save_pretrained wrote."
            )
    elif path.is_file():
        raise ArtifactError(f"{source} is a file; give the folder of a Hugging Face checkpoint.")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise ArtifactError(f"There is no model folder {source!r}, and it is not a hub id.")


def load_chat(source: str, settings: Loading) -> ChatFormat:
    """The tokenizer of a checkpoint with its chat template.

    Raises:
        ArtifactError: it cannot be read, or has no chat template.
    """
    check_source(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=settings.trust_remote_code
        )
    except Exception as e:
        raise _unreadable("tokenizer", source, e) from e
    return ChatFormat(tokenizer, source)


def load_model(
    source: str, settings: Loading, *, inference: bool = False, bits: int | None = None
) -> LoadedModel:
    """A causal language model in eval mode, with float32 weights.

    Args:
        source: folder or hub id.
        settings: precision, device and permissions.
        inference: weights in the computing precision, for models that only answer.
        bits: of quantised weights, 4 or 8, under adapters (QLoRA); None: not quantised.

    Raises:
        ArtifactError: it cannot be read, or its tokenizer does not fit it.
        ConfigError: quantisation is asked for where it cannot be had.
    """
    chat = load_chat(source, settings)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    quantised = _quantised(bits, dtype, device) if bits else {}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if inference or bits else torch.float32,
            use_safetensors=None if settings.allow_pickle else True,
            trust_remote_code=settings.trust_remote_code,
            **quantised,
        )
    except Exception as e:
        raise _unreadable("model", source, e) from e
    _check_vocabulary(model, chat)
    if bits is None:
        model.to(device)
    model.eval()
    parts = [model_digest(source), str(dtype), device.type, *([bits] if bits else [])]
    return LoadedModel(model, chat, device, dtype, source, digest(parts), settings.layout)


def check_bits(bits: int | None, device: torch.device) -> None:
    """Refuses quantisation where it cannot be had.

    Raises:
        ConfigError: no GPU, or bitsandbytes is missing; names the extra.
    """
    if bits is None:
        return
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"lora.bits {bits} needs bitsandbytes, which is not installed: "
            "pip install 'selfsteer[quant]'."
        )
    if device.type == "cpu":
        raise ConfigError(f"lora.bits {bits} needs a GPU; torch sees none. Leave bits unset.")


def _quantised(bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How transformers loads quantised weights (QLoRA, arXiv 2305.14314: NF4, quantised twice)."""
    from transformers import BitsAndBytesConfig

    check_bits(bits, device)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def check_reward(source: str, settings: Loading) -> None:
    """Refuses, from its config alone, a checkpoint that is no reward model.

    Raises:
        ArtifactError: unreadable, or not a classifier with one label.
    """
    load_chat(source, settings)
    labels = _load_config(source, settings).num_labels
    if labels != 1:
        raise ArtifactError(
            f"{source} is not a reward model: it has {labels} labels, and a score needs "
            "a sequence classifier with one. For a chat model use chat:MODEL."
        )


def is_reward_model(source: str, settings: Loading) -> bool:
    """Whether a checkpoint's config is that of a classifier with one label.

    Raises:
        ArtifactError: unreadable.
    """
    check_source(source)
    return int(_load_config(source, settings).num_labels) == 1


def _load_config(source: str, settings: Loading) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    except Exception as e:
        raise _unreadable("config", source, e) from e


def load_reward(source: str, settings: Loading) -> LoadedModel:
    """A reward model in eval mode, weights in the computing precision.

    Raises:
        ArtifactError: unreadable, not a classifier with one label, without a trained head, or its
            tokenizer does not fit it.
    """
    check_reward(source, settings)
    loaded, missing = _load_classifier(source, settings, inference=True)
    if missing:
        raise ArtifactError(
            f"{source} lacks the weights {', '.join(sorted(missing)[:3])}, which "
            "would start at random: it was not trained as a reward model."
        )
    return loaded


def load_reward_start(source: str, settings: Loading, seed: int) -> LoadedModel:
    """A classifier with one label to train as a reward model, weights float32.

    A reward model keeps its head; on a chat model a new one is drawn from the seed. Where the
    tokenizer has no padding token it gets one, if possible another than ends a turn, and pads on
    the right: the score is read at the last token that is none.

    Raises:
        ArtifactError: unreadable, not of a family with such a head, or its tokenizer does not fit.
    """
    torch.manual_seed(seed)
    loaded, _ = _load_classifier(source, settings, inference=False)
    tokenizer = loaded.chat.tokenizer
    if tokenizer.pad_token is None:
        ends = loaded.chat.end_of_turn
        special = sorted(tokenizer.all_special_ids, key=lambda i: i != tokenizer.eos_token_id)
        chosen = next((i for i in special if i != ends), ends)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    tokenizer.padding_side = "right"
    loaded.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return loaded


def _load_classifier(
    source: str, settings: Loading, *, inference: bool
) -> tuple[LoadedModel, Sequence[str]]:
    """A sequence classifier with one label, and the weights that its checkpoint lacks."""
    chat = load_chat(source, settings)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=1,
            dtype=dtype if inference else torch.float32,
            use_safetensors=None if settings.allow_pickle else True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as e:
        raise _unreadable("reward model", source, e) from e
    _check_vocabulary(model, chat)
    model.to(device).eval()
    identity = digest([model_digest(source), str(dtype), device.type])
    return LoadedModel(model, chat, device, dtype, source, identity), info["missing_keys"]


def _check_vocabulary(model: Any, chat: ChatFormat) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(chat.tokenizer) > rows:
        raise ArtifactError(
            f"{chat.source}: the tokenizer has {len(chat.tokenizer)} tokens, the model embeds only "
            f"{rows}. They do not belong together."
        )


def _probe(sequences: Sequence[EncodedSequence], prompts: int = 3) -> list[EncodedSequence]:
    """A few sequences of a few prompts, such prompts first as have several; responses cut short.

    The padded side of the proof holds full logits: 12 responses of 64 tokens at a vocabulary of
    128k are 0.4 GB.
    """
    by_prompt: dict[tuple[int, ...], list[EncodedSequence]] = {}
    for s in sequences[:10_000]:
        by_prompt.setdefault(s.prompt_ids, []).append(s)
    trees = sorted(by_prompt.values(), key=len, reverse=True)[:prompts]
    return [
        EncodedSequence(s.prompt_ids, s.response_ids[:64]) for members in trees for s in members[:4]
    ]


def _unreadable(what: str, source: str, error: Exception) -> ArtifactError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = ""
    if "trust_remote_code" in str(error):
        hint = " If you trust its author, set trust_remote_code: true."
    elif "safetensors" in str(error):
        hint = " If you trust its author, set allow_pickle: true."
    return ArtifactError(f"The {what} {source} cannot be loaded: {first}{hint}")


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


def add_lora(model: Any, lora: Lora, task: str = "CAUSAL_LM") -> Any:
    """Wraps a model in trainable low-rank adapters that start at zero.

    Args:
        model: to wrap.
        lora: rank, scale and modules.
        task: peft's name of it; with SEQ_CLS the head is trained whole.

    Raises:
        ConfigError: the model has no such modules, or one is the output projection of a model in
            the tree layout, which reads that as plain weights.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.targets,
        task_type=task,
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers for a property that is deprecated; nothing a user can do
        warnings.simplefilter("ignore", FutureWarning)
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as e:
            raise ConfigError(f"lora.targets does not fit {type(model).__name__}: {e}") from e
    if tree.is_installed(model) and hasattr(model.get_output_embeddings(), "base_layer"):
        raise ConfigError(
            f"lora.targets {lora.targets!r} includes the output projection of "
            f"{type(model).__name__}, which the tree layout reads as plain weights: the adapter "
            "would never be used. Leave it out, or set layout: padded."
        )
    return wrapped


def save_model(model: Any, chat: ChatFormat, folder: Path, dtype: torch.dtype) -> None:
    """Writes a checkpoint that ``from_pretrained`` and servers load.

    Adapters are written to ``adapter/`` in it, and merged. Weights are stored in the precision they
    were trained to compute in. generation_config says ``do_sample``: servers answer greedily
    without it, whatever the temperature.
    """
    plain = model
    if hasattr(model, "merge_and_unload"):
        plain = _save_adapter(model, folder / ADAPTER, dtype)
    tree.uninstall(plain)
    if getattr(plain, "generation_config", None) is not None:  # a reward model has none
        plain.generation_config.do_sample = True
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}  # tied weights stay one tensor
    state = {
        k: cast.setdefault((v.data_ptr(), v.shape), v.to(CPU, dtype))
        if v.is_floating_point()
        else v
        for k, v in _stored(plain)
    }
    plain.save_pretrained(folder, state_dict=state)
    plain.config.use_cache = True  # the Trainer switched it off
    plain.config.dtype = dtype  # save_pretrained wrote that of the weights in memory
    plain.config.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


def _stored(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What a state dict holds; asking a sharded model for one would take it apart again."""
    yield from ((n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _save_adapter(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Writes a peft model's adapters; returns the plain model that they make with their base."""
    model.save_pretrained(folder, state_dict=dict(_stored(model)))
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card, all of it placeholders
    if not getattr(model, "is_quantized", False):
        return model.merge_and_unload()
    # merged into the weights as they were before quantisation, which rounded them
    config = model.peft_config["default"]
    # of the class that it has, as its author may be the one who brought the code
    kind = type(model.get_base_model())
    base = kind.from_pretrained(config.base_model_name_or_path, dtype=dtype)
    return _merged(base, folder)


def _merged(base: Any, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as in add_lora
        warnings.simplefilter("error", UserWarning)  # keys without a place in the base, or missing
        return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


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
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype="auto" if settings.dtype == "auto" else resolve_dtype(settings.dtype, CPU),
            use_safetensors=None if settings.allow_pickle else True,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as e:
        raise _unreadable("base", base, e) from e
    dtype = model.dtype
    try:
        plain = _merged(model, adapter)
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


def load_context_length(source: str, settings: Loading) -> int | None:
    """The longest sequence a checkpoint was made for, from its config alone.

    Raises:
        ArtifactError: the config cannot be read.
    """
    config = _load_config(source, settings)
    return getattr(config.get_text_config(), "max_position_embeddings", None)
