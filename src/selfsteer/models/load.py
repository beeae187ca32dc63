"""Models with their tokenizers, from a folder or a hub id; safetensors only, unless allowed."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from selfsteer.data.digests import digest, model_digest
from selfsteer.errors import ArtifactError, ConfigError, short
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.models.score import settle_layout
from selfsteer.models.sources import (
    check_quantised,
    checkpoint,
    load_config,
    load_whole,
    pretrained,
)
from selfsteer.recipe.sections import PERMISSIONS, Loading, Lora
from selfsteer.terminal import say

CPU = torch.device("cpu")


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
        with self.evaluating():
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

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode and `precision`: while it samples or scores, maybe amid its training."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self.precision():
                yield
        finally:
            self.model.train(was_training)

    @property
    def context_length(self) -> int | None:
        """See `context_length`."""
        return context_length(self.model.config)


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


def load_chat(source: str, settings: Loading) -> ChatFormat:
    """The tokenizer of a checkpoint with its chat template.

    Raises:
        ArtifactError: it cannot be read, or has no chat template.
        ConfigError: the template reads none of the variables that the settings give.
    """
    return _chat(source, checkpoint(source, settings), settings)


def read_chat(source: str, settings: Loading) -> ChatFormat:
    """`load_chat` of files that are on this machine, as they are; for models that others named.

    No permission holds, the hub is not asked, and adapters are not added to their base.

    Raises:
        ArtifactError: as `load_chat`, or a model of the hub is not on this machine.
        ConfigError: as `load_chat`.
    """
    bare = settings.model_copy(update=dict.fromkeys(PERMISSIONS, False))
    return _chat(source, source, bare, local_files_only=True)


def _chat(source: str, held: str, settings: Loading, **more: Any) -> ChatFormat:
    tokenizer = pretrained(AutoTokenizer, "tokenizer", held, settings, **more)
    core = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(core, "dropout", None):  # BPE dropout, arXiv 1910.13267
        raise ArtifactError(
            f"{source}: its tokenizer.json has a dropout of {dropout:g}, so the same text makes "
            "other tokens each time, and nothing could be scored as it was sampled. Set dropout "
            "to null there, under model."
        )
    return ChatFormat(
        tokenizer,
        source,
        settings.chat_template_kwargs,
        day=settings.date,
        stops=lambda: _stops(held, settings, **more),
    )


def configured_stops(source: str, settings: Loading) -> list[int]:
    """The ids that end an answer by a checkpoint's generation config, or else by its config."""
    return _stops(checkpoint(source, settings), settings)


def _stops(held: str, settings: Loading, **more: Any) -> list[int]:
    try:
        found = pretrained(
            GenerationConfig, "generation config", held, settings, **more
        ).eos_token_id
    except ArtifactError:
        config = pretrained(AutoConfig, "config", held, settings, **more)
        found = config.get_text_config().eos_token_id
    return stop_tokens(held, found)


#: Of a generation config, what changes the likeliest answer, and the values that change nothing.
_REWEIGHING: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
}


def serving_notes(source: str, settings: Loading) -> list[str]:
    """What its generation config has others do, and a run does not."""
    held = checkpoint(source, settings)
    try:
        config = pretrained(GenerationConfig, "generation config", held, settings)
    except ArtifactError:
        return []  # it has none
    values = {name: getattr(config, name, None) for name in _REWEIGHING}
    found = [f"{k}: {short(v, 40)}" for k, v in values.items() if v not in _REWEIGHING[k]]
    return found and [
        f"{source} has {', '.join(found)} in its generation_config.json, and the trained model "
        "keeps the file: whoever generates by it gets other answers than this run, which samples "
        "and evaluates without"
    ]


def stop_tokens(source: str, configured: Any) -> list[int]:
    """The ids of tokens that a configuration's ``eos_token_id`` names.

    Raises:
        ArtifactError: they are none.
    """
    found = configured if isinstance(configured, list | tuple) else [configured]
    found = [i for i in found if i is not None]
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in found):
        raise ArtifactError(
            f"{source}: eos_token_id is {short(configured)}, which is neither the id of a token "
            "nor a list of some. Correct its generation_config.json (or config.json)."
        )
    return found


#: Makes the model of a plain checkpoint on a device; None: it has to be loaded as any other.
Build = Callable[[str, Loading, torch.device], Any]


def load_model(
    source: str,
    settings: Loading,
    *,
    inference: bool = False,
    bits: int | None = None,
    build: Build | None = None,
) -> LoadedModel:
    """A causal language model in eval mode, with float32 weights.

    Args:
        source: see `selfsteer.models.sources`.
        settings: precision, device and permissions.
        inference: weights in the computing precision, for models that only answer.
        bits: of quantised weights, 4 or 8, under adapters (QLoRA); None: not quantised.
        build: makes the model, if it can, in place of ``from_pretrained``.

    Raises:
        ArtifactError: it cannot be read or used, or its tokenizer does not fit it.
        ConfigError: quantisation is asked for where it cannot be had.
    """
    return _load(
        AutoModelForCausalLM, source, settings, inference=inference, bits=bits, build=build
    )


def _load(
    kind: Any,
    source: str,
    settings: Loading,
    *,
    inference: bool,
    bits: int | None = None,
    build: Build | None = None,
    **more: Any,
) -> LoadedModel:
    """A model of the given class."""
    chat = load_chat(source, settings)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    stored = check_quantised(source, settings, device)
    if bits:
        more |= _quantised(bits, dtype, device)
    elif stored:
        more["device_map"] = {"": device}
    more["dtype"] = dtype if inference or bits or stored else torch.float32
    held = checkpoint(source, settings)
    model = build(held, settings, device) if build else None
    placed = bool(bits or stored) or model is not None
    if model is None:
        model = load_whole(kind, "model", held, settings, **more)
    rows = model.get_input_embeddings().num_embeddings
    if len(chat.tokenizer) > rows:
        raise ArtifactError(
            f"{source}: the tokenizer has {len(chat.tokenizer)} tokens, the model embeds only "
            f"{rows}. They do not belong together."
        )
    if not placed:
        model.to(device)
    parts = [model_digest(source), str(dtype), device.type, *([bits] if bits else [])]
    return LoadedModel(model.eval(), chat, device, dtype, source, digest(parts), settings.layout)


def check_trainable(source: str, settings: Loading, lora: Lora | None) -> None:
    """Refuses, from its config alone, a checkpoint that is quantised and cannot be trained here.

    Raises:
        ArtifactError: its format cannot be trained at all.
        ConfigError: adapters are not asked for, or are to be put on other bits.
    """
    method = check_quantised(source, settings, resolve_device(settings.device))
    if method and lora is None:
        raise ConfigError(
            f"The weights of {source} are quantised as {method}, and only adapters can be trained "
            "on them: set policy.lora.rank=16 (train: lora.rank=16), or give the checkpoint that "
            "it was made from."
        )
    if method and lora and lora.bits:
        raise ConfigError(
            f"lora.bits has no effect: the weights of {source} are quantised as {method} already. "
            "Leave it unset."
        )


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
    labels = load_config(source, settings).num_labels
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
    return int(load_config(source, settings).num_labels) == 1


def load_context_length(source: str, settings: Loading) -> int | None:
    """The longest sequence a checkpoint was made for, from its config alone.

    Raises:
        ArtifactError: the config cannot be read.
    """
    return context_length(load_config(source, settings))


def context_length(config: Any) -> int | None:
    """Longest sequence that a model was made for, tokens; None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_reward(source: str, settings: Loading) -> LoadedModel:
    """A reward model in eval mode, weights in the computing precision.

    Raises:
        ArtifactError: unreadable, not a classifier with one label, without a trained head, or its
            tokenizer does not fit it.
    """
    check_reward(source, settings)
    return _load(AutoModelForSequenceClassification, source, settings, inference=True, num_labels=1)


def load_reward_start(source: str, settings: Loading, seed: int) -> LoadedModel:
    """A classifier with one label to train as a reward model, weights float32.

    A reward model keeps its head; on a chat model a new one is drawn from the seed. Where the
    tokenizer has no padding token it gets one, if possible another than ends a turn, and pads on
    the right: the score is read at the last token that is none.

    Raises:
        ArtifactError: unreadable, not of a family with such a head, or its tokenizer does not fit.
    """
    torch.manual_seed(seed)
    loaded = _load(
        AutoModelForSequenceClassification,
        source,
        settings,
        inference=False,
        headless=True,
        num_labels=1,
    )
    tokenizer = loaded.chat.tokenizer
    if tokenizer.pad_token is None:
        ends = loaded.chat.end_of_turn
        special = sorted(tokenizer.all_special_ids, key=lambda i: i != tokenizer.eos_token_id)
        chosen = next((i for i in special if i != ends), ends)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    tokenizer.padding_side = "right"
    loaded.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return loaded


def _probe(sequences: Sequence[EncodedSequence], prompts: int = 3) -> list[EncodedSequence]:
    """A few sequences of a few prompts, such prompts first as have several; responses cut short.

    The padded side of the proof holds full logits: 12 responses of 64 tokens at a vocabulary of
    128k are 0.4 GB.
    """
    by_prompt: dict[tuple[int, ...], list[EncodedSequence]] = {}
    for s in sequences[:10_000]:
        by_prompt.setdefault(s.prompt_ids, []).append(s)
    trees = sorted(by_prompt.values(), key=len, reverse=True)[:prompts]
    return [replace(s, response_ids=s.response_ids[:64]) for members in trees for s in members[:4]]
