"""Trains the testbed model: a BPE tokenizer and a small Llama, one pass over the corpus.

The sequences are exactly what the pipeline samples from and trains on: prompt ids by the chat
template with generation prompt, then the response, then the end-of-turn token::

    <sys>Your response should be accurate. …<user>What does the bee eat?<asst>The bee eats …<eos>

The loss is on response tokens, and on every token of a document.
"""

import json
import math
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsteer.testbed import world
from selfsteer.testbed.corpus import Example

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

#: Token ids of the prompt, and of the response with the end-of-turn token.
Tokens = tuple[list[int], list[int]]

#: Big enough that every word is one token: responses of all levels then have the same length.
VOCABULARY = 2048
#: In the order of their ids.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<sys>", "<user>", "<asst>")
PAD, EOS = 0, 1

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '<sys>' + message['content'] -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<user>' + message['content'] -}}"
    "{%- else -%}{{- '<asst>' + message['content'] + '<eos>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<asst>' -}}{%- endif -%}"
)

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.04,
}

BATCH_SIZE = 32
#: Batches are made of sequences of alike length, sorted within pools of this many batches.
POOL_BATCHES = 64
WARMUP_STEPS = 100
#: Texts that the tokenizer is trained on.
TOKENIZER_EXAMPLES = 8_000


def train(folder: Path, arguments: dict[str, Any], bar: "Progress") -> dict[str, Any]:
    """Trains tokenizer and model, saves both into the folder, and says how big it all was."""
    import torch

    data = list(world.corpus(arguments["examples"], arguments["seed"]))
    tokenizer = train_tokenizer(data[:TOKENIZER_EXAMPLES])
    sequences = _encode_all(tokenizer, data, bar)
    model = _new_model(len(tokenizer))
    final_loss = _fit(model, sequences, arguments, bar)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _name_tokenizer_class(folder / "tokenizer_config.json")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": sum(len(prompt) + len(response) for prompt, response in sequences),
        "final_loss": round(final_loss, 4),
    }


def train_tokenizer(examples: Sequence[Example]) -> Any:
    """A byte-level BPE tokenizer with the chat template; decoding gives back every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [t for e in examples for t in (*(m.content for m in e.messages), e.response)]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<sys>", "<user>", "<asst>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _name_tokenizer_class(path: Path) -> None:
    """Names the class as every version of transformers knows it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _new_model(vocabulary: int) -> Any:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        **ARCHITECTURE,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=EOS, pad_token_id=PAD)
    return model


def _encode_all(tokenizer: Any, data: Sequence[Example], bar: "Progress") -> list[Tokens]:
    """Token ids exactly as the pipeline makes them: chat template, response, end of turn."""

    @cache
    def prompt_ids(messages: tuple[Any, ...]) -> list[int]:
        if not messages:
            return []
        turns = [m.to_dict() for m in messages]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        return list(ids["input_ids"])

    responses = tokenizer([e.response for e in data], add_special_tokens=False)["input_ids"]
    return [
        (prompt_ids(e.messages), [*ids, EOS])
        for e, ids in bar.track(
            zip(data, responses, strict=True), len(data), description="encoding"
        )
    ]


def _fit(model: Any, sequences: list[Tokens], arguments: dict[str, Any], bar: "Progress") -> float:
    """One pass over the sequences; returns the mean loss of the last tenth of the steps."""
    import torch

    batches = _batches(sequences, random.Random(arguments["seed"]))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments["lr"], betas=(0.9, 0.98), weight_decay=0.05
    )
    losses = []
    model.train()
    for step, batch in enumerate(bar.track(batches, description="training")):
        for group in optimizer.param_groups:
            group["lr"] = arguments["lr"] * _schedule(step, len(batches))
        loss = _loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from 1 down to 0.05."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batches(sequences: list[Tokens], rng: random.Random) -> list[list[Tokens]]:
    """Shuffled batches of sequences of alike length: little padding, hence little waste."""
    order = rng.sample(sequences, len(sequences))
    out = []
    for start in range(0, len(order), BATCH_SIZE * POOL_BATCHES):
        pool = sorted(order[start : start + BATCH_SIZE * POOL_BATCHES], key=_length)
        batches = [pool[i : i + BATCH_SIZE] for i in range(0, len(pool), BATCH_SIZE)]
        rng.shuffle(batches)
        out += batches
    return out


def _length(sequence: Tokens) -> int:
    return len(sequence[0]) + len(sequence[1])


def _loss(model: Any, batch: list[Tokens]) -> "torch.Tensor":
    """Mean negative log-likelihood per response token."""
    import torch
    from torch.nn import functional

    width = max(map(_length, batch))
    ids_BT = torch.full((len(batch), width), PAD)
    learned_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(batch):
        end = len(prompt) + len(response)
        ids_BT[row, :end] = torch.tensor([*prompt, *response])
        learned_BT[row, len(prompt) : end] = True
    # Padding is on the right and attention is causal: no response token sees it, no mask is needed.
    hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    learned_BT = learned_BT[:, 1:]
    logits_NV = model.lm_head(hidden_BTD[learned_BT])
    return functional.cross_entropy(logits_NV, ids_BT[:, 1:][learned_BT])
