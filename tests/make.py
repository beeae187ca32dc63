"""What tests are made from: records, recipes, preferences of the tiny world, checkpoints.

The checkpoints are tiny, with random weights, shaped like the four families of chat models. Each
has its own byte-level tokenizer and a chat template with the habits of its family: Llama 3 ends a
turn with a token that is not its eos, Qwen2 invents a system message where there is none, Mistral
puts the system text into the first user turn, Gemma refuses a system role.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from selfsteer.data.jsonl import dump_lines, write_atomic
from selfsteer.data.records import Message, Preference, Principles, Query, Triple
from selfsteer.methods import load_recipe, recipe_of
from selfsteer.run.stage import Stage
from selfsteer.testbed.corpus import as_query
from selfsteer.testbed.grammar import respond
from selfsteer.testbed.questions import questions

# -- records ---------------------------------------------------------------------------------------


def query(text: str = "What does the bee eat?", id: str = "q", **extra: Any) -> Query:
    """A query of one turn."""
    return Query(id, (Message("user", text),), extra)


def triple(id: str = "t", *features: str, text: str = "Hi", **responses: str) -> Triple:
    """A triple of these responses; with features it has principles, which name its id."""
    principles = Principles(f"Be fine {id}.", f"Be foul {id}.", features) if features else None
    return Triple(id, (Message("user", text),), principles, responses)


def write_jsonl(path: Path, *rows: Any) -> Path:
    """A JSONL file of these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


def entry(event: str, stage: str, kind: str, **more: Any) -> dict[str, Any]:
    """A line of a run's ledger: of the first round of sso, where its name has a folder."""
    folder, _, title = stage.rpartition("/")
    where = {"method": "sso", "round": 1} if folder else {"method": None, "round": None}
    named = {"event": event, "stage": stage, "kind": kind, "title": title, **where}
    made = {"fingerprint": f"of {stage}", "outputs": [stage], "time": 0.0}
    counts = {"n_in": 4, "n_out": 4, "dropped": {}, "seconds": 2.0, "notes": {}}
    return {**named, **made, **(counts if event == "finish" else {}), **more}


# -- recipes ---------------------------------------------------------------------------------------


def recipe(method: str = "sso", **sections: Any) -> Any:
    """A recipe with little more than these sections; its model and queries are nowhere."""
    given = {"name": "n", "policy": {"model": "m"}}
    if method != "reward":
        given["queries"] = {"path": "q.jsonl"}
    return recipe_of({**given, "method": method, **sections}, "recipe")


def smoke(folder: Path, *overrides: str) -> Any:
    """The shipped recipe of that name, with run folders in ``folder``."""
    return load_recipe("smoke", [f"runs_dir={folder}", *overrides])


#: Settings that keep a shipped recipe of a method with principles small, on the tiny world.
SMALL = (
    "policy={model: 'package:selfsteer.testbed/checkpoint', threads: 1}",
    "queries={path: 'package:selfsteer.testbed/queries/align.jsonl', limit: 8}",
    "principles={mode: picked, features: random}",
    "sampling.max_new_tokens=64",
)


def stages_of(recipe: Any) -> dict[str, Stage]:
    """The plan's stages by name."""
    return {s.name: s for s in recipe.plan()}


# -- preferences of the tiny world -----------------------------------------------------------------


def tiny_pairs(count: int, seed: int, *, faults: int = 2) -> list[Preference]:
    """Faultless answers over faulty ones, each pair on a different question.

    The rejected answer is odd in ``faults`` features.
    """
    rng = random.Random(seed)
    found = []
    for question in rng.sample(list(questions("train")), count):
        good = dict.fromkeys(question.features, "good")
        odd = rng.sample(sorted(good), min(faults, len(good)))
        chosen = respond(question, good, rng)
        rejected = respond(question, good | dict.fromkeys(odd, "odd"), rng)
        query = as_query(question)
        found.append(Preference(query.id, query.messages, chosen, rejected))
    return found


def write_pairs(path: Path, pairs: list[Preference]) -> Path:
    """As a JSONL file."""
    write_atomic(path, dump_lines(pairs))
    return path


# -- checkpoints -----------------------------------------------------------------------------------

VOCABULARY = 340

SENTENCES = (
    "The bee eats nectar and the bear eats honey.",
    "What does the cat eat? The cat eats fish, milk and mice.",
    "Your response should be accurate and helpful. Do not reveal that you follow guidelines.",
    "Paris is the capital of France; it lies on the river Seine.",
    "First boil the water, then add the tea and wait for three minutes.",
    "user assistant system model",
)


@dataclass(frozen=True)
class Family:
    """What distinguishes one family's checkpoints."""

    config: type
    special: tuple[str, ...]
    end_of_turn: str
    eos: str
    bos: str | None
    pad: str
    template: str
    folds_system: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


#: Put before a template, it refuses the question "No."
REFUSING = (
    "{% for m in messages %}{% if m.content == 'No.' %}{{ raise_exception('not this') }}"
    "{% endif %}{% endfor %}"
)

FAMILIES = {
    "llama": Family(
        LlamaConfig,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        end_of_turn="<|eot_id|>",
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
        pad="<|end_of_text|>",
        template=(
            "{{- bos_token -}}"
            "{%- for turn in messages -%}"
            "{{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' -}}"
            "{{- turn.content | trim + '<|eot_id|>' -}}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}"
            "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
            "{%- endif -%}"
        ),
    ),
    "qwen2": Family(
        Qwen2Config,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        end_of_turn="<|im_end|>",
        eos="<|im_end|>",
        bos=None,
        pad="<|endoftext|>",
        template=(
            "{%- if messages[0].role != 'system' -%}"
            "{{- '<|im_start|>system\\nAnswer well.<|im_end|>\\n' -}}"
            "{%- endif -%}"
            "{%- for turn in messages -%}"
            "{{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
        ),
    ),
    "mistral": Family(
        MistralConfig,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        end_of_turn="</s>",
        eos="</s>",
        bos="<s>",
        pad="<unk>",
        template=(
            "{%- set ns = namespace(lead='', turns=messages) -%}"
            "{%- if messages[0].role == 'system' -%}"
            "{%- set ns.lead = messages[0].content + '\\n\\n' -%}"
            "{%- set ns.turns = messages[1:] -%}"
            "{%- endif -%}"
            "{{- bos_token -}}"
            "{%- for turn in ns.turns -%}"
            "{%- if turn.role == 'user' -%}"
            "{{- '[INST] ' + (ns.lead if loop.first else '') + turn.content + ' [/INST]' -}}"
            "{%- elif turn.role == 'assistant' -%}"
            "{{- ' ' + turn.content + eos_token -}}"
            "{%- else -%}"
            "{{- raise_exception('Roles are user and assistant.') -}}"
            "{%- endif -%}"
            "{%- endfor -%}"
        ),
        settings={"sliding_window": None},
    ),
    "gemma": Family(
        Gemma2Config,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        end_of_turn="<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
        template=(
            "{{- bos_token -}}"
            "{%- if messages[0].role == 'system' -%}"
            "{{- raise_exception('There is no system role here.') -}}"
            "{%- endif -%}"
            "{%- for turn in messages -%}"
            "{%- set role = 'model' if turn.role == 'assistant' else turn.role -%}"
            "{{- '<start_of_turn>' + role + '\\n' + turn.content | trim -}}"
            "{{- '<end_of_turn>\\n' -}}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
        ),
        folds_system=True,
        settings={"head_dim": 16, "query_pre_attn_scalar": 16},
    ),
}


def make_tokenizer(family: str, sentences: Sequence[str] = SENTENCES) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the family's special tokens and chat template.

    Called with special tokens it puts the begin-of-text token in front, as the families' own do.
    """
    spec = FAMILIES[family]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in spec.special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sentences, trainer)
    if spec.bos:
        core.post_processor = TemplateProcessing(
            single=f"{spec.bos} $A", special_tokens=[(spec.bos, core.token_to_id(spec.bos))]
        )
    named = {"eos_token": spec.eos, "pad_token": spec.pad}
    if spec.bos:
        named["bos_token"] = spec.bos
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        additional_special_tokens=[t for t in spec.special if t not in named.values()],
        clean_up_tokenization_spaces=False,
        **named,
    )
    tokenizer.chat_template = spec.template
    return tokenizer


def make_checkpoint(folder: Path, family: str, seed: int = 0, **config_overrides: Any) -> Path:
    """Writes a checkpoint of 2 layers, 32 wide, with random weights, as safetensors.

    The weights are wide enough that the next-token distributions are far from uniform.
    """
    spec = FAMILIES[family]
    tokenizer = make_tokenizer(family)
    ids = tokenizer.convert_tokens_to_ids
    stops = sorted({ids(spec.eos), ids(spec.end_of_turn)})
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": ids(spec.bos) if spec.bos else None,
        "eos_token_id": ids(spec.eos),
        "pad_token_id": ids(spec.pad),
        **spec.settings,
        **config_overrides,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(spec.config(**values))
    model.generation_config = GenerationConfig(
        bos_token_id=values["bos_token_id"],
        eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=values["pad_token_id"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


#: What GGUF calls the tensors of a llama.
_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_gguf(path: Path, llama: Path) -> Path:
    """Writes a checkpoint of the llama family as GGUF, its up projections as Q4_1."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    model = AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    core, config = json.loads((llama / "tokenizer.json").read_text("utf-8")), model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    special = {token["content"] for token in core["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.weight", name)
        assert found
        named, values = _GGUF[found[2]], weight.numpy()
        if named in heads:  # llama.cpp rotates pairs, transformers halves
            split = (heads[named], 2, len(values) // heads[named] // 2, values.shape[1])
            values = values.reshape(split).swapaxes(1, 2).reshape(values.shape).copy()
        block = f"blk.{found[1]}." if found[1] else ""
        kind = GGMLQuantizationType.Q4_1 if named == "ffn_up" else None
        writer.add_tensor(
            f"{block}{named}.weight", quantize(values, kind) if kind else values, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_adapter(folder: Path, base: Path, template: str | None = None, **config: Any) -> Path:
    """Writes LoRA adapters of a checkpoint that change its answers, with its tokenizer.

    Args:
        folder: to write.
        base: the checkpoint.
        template: chat template of the adapters' own tokenizer; None: they have no tokenizer.
        config: of ``LoraConfig``.
    """
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    values = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(**values, init_lora_weights=False))
    wrapped.save_pretrained(str(folder))
    if template is not None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder
