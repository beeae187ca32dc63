"""Makes the testbed model: a 1M-parameter Llama trained from scratch on the tiny world.

A tool: nothing imports it but its verb. It writes an ordinary Hugging Face folder with a real chat
template, so that the pipeline treats the model as any other, and the query files::

    checkpoint/  config.json  generation_config.json  model.safetensors  tokenizer.json
                 tokenizer_config.json  chat_template.jinja  testbed.json
    queries/     align.jsonl  tune.jsonl  final.jsonl

``testbed.json`` says which world the model was trained on and how well it came out. A training
sequence is exactly what the pipeline samples from and trains on; the loss is on response tokens,
and on every token of a document::

    <sys>Your response should be accurate. …<user>What does the bee eat?<asst>The bee eats …<eos>
"""

import json
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from selfsteer.data.jsonl import dump_lines, write_atomic
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Completion, Request, SamplingParams
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.errors import ArtifactError
from selfsteer.models.chat import ChatFormat
from selfsteer.models.load import load_model
from selfsteer.models.save import as_umask
from selfsteer.principles import catalogue, writer
from selfsteer.principles.contexts import CONTEXTS, context_messages
from selfsteer.recipe.sections import Loading
from selfsteer.terminal import progress_bar
from selfsteer.testbed import knowledge, oracle, world
from selfsteer.testbed.corpus import Example, as_query, choosable

INFO_FILE = "testbed.json"

#: More unparsed sentences per plain response than this: the model has not learned the grammar.
MAX_UNPARSED = 0.03

#: Big enough that every word is one token: responses of all levels then have the same length.
VOCABULARY = 2048
#: In the order of their ids.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<sys>", "<user>", "<asst>")
#: Texts that the tokenizer is trained on.
TOKENIZER_EXAMPLES = 8_000

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

#: ``input_ids`` and ``labels`` of a training sequence.
Row = dict[str, list[int]]

#: As the pipeline samples; questions per task, which count equally however many there are of them.
SAMPLING = SamplingParams(0.7, 0.8, 128)
PER_TASK = 60


def build(
    output: Path,
    *,
    examples: int = 64_000,
    seed: int = 0,
    lr: float = 3e-3,
    threads: int = 1,
    uneven: bool = False,
) -> dict[str, Any]:
    """Trains the testbed model from scratch, measures it, and puts it in place in one step.

    Building the packaged checkpoint writes the query files too.

    Args:
        output: the checkpoint folder; replaced if it exists.
        examples: training examples, each seen once.
        seed: of the examples, their order, the weights and the samples measured.
        lr: peak learning rate of AdamW, after warm-up, with cosine decay.
        threads: CPU threads.
        uneven: of the harder world (`corpus.corpus`).

    Returns:
        What ``testbed.json`` says: fingerprint, build arguments, measured figures.

    Raises:
        ArtifactError: plain responses have too many sentences that the oracle cannot parse.
    """
    output, began = Path(output).absolute(), time.monotonic()
    arguments = {"examples": examples, "seed": seed, "lr": lr, "threads": threads}
    arguments |= {"uneven": True} if uneven else {}
    torch.set_num_threads(threads)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
        draft = Path(work) / "draft"
        trained = train(draft, examples=examples, seed=seed, lr=lr, uneven=uneven)
        trained["seconds"] = round(time.monotonic() - began)
        # the folder is measured, not the model in memory: bfloat16 rounds the weights
        measured = measure(draft, seed=seed)
        unparsed = measured["plain"]["unparsed"]
        if unparsed >= MAX_UNPARSED:
            raise ArtifactError(
                f"The testbed model was trained, but its plain responses have {unparsed:.3f} "
                f"sentences each that the oracle cannot parse (at most {MAX_UNPARSED} are "
                "accepted), so its scores would measure noise. Train on more examples."
            )
        info = {
            "fingerprint": world.fingerprint(),
            "arguments": arguments,
            "trained": trained,
            "measured": measured,
        }
        text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
        (draft / INFO_FILE).write_text(text, encoding="utf-8")
        if output.exists():
            output.rename(Path(work) / "old")
        draft.rename(output)
    if output == world.CHECKPOINT.absolute():
        write_queries()
    return info


def write_queries() -> None:
    """Writes the query files that the package ships.

    In the order of the ids, which are hashes: any slice of a file is a mixture of all tasks.
    """
    for split, path in world.QUERIES.items():
        queries = sorted(map(as_query, world.questions(split)), key=lambda query: query.id)
        write_atomic(path, dump_lines({"id": q.id, "prompt": q.text} for q in queries))


# -- training --------------------------------------------------------------------------------------


class _Bar(TrainerCallback):
    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance(1)


def train(
    folder: Path, *, examples: int, seed: int, lr: float, uneven: bool = False
) -> dict[str, Any]:
    """Trains tokenizer and model, saves both into the folder, and says how big it all was."""
    set_seed(seed)
    data = list(world.corpus(examples, seed, uneven=uneven))
    tokenizer = train_tokenizer(data[:TOKENIZER_EXAMPLES])
    batches = in_batches(encode(ChatFormat(tokenizer), data), random.Random(seed))
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
        **ARCHITECTURE,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=eos, pad_token_id=pad)
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=1,  # each item is a batch, in its place
        train_sampling_strategy="sequential",
        learning_rate=lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=100,
        adam_beta2=0.98,
        weight_decay=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    pad_batch = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=batches,  # type: ignore[arg-type]
        data_collator=lambda items: pad_batch(items[0]),
    )
    trainer.remove_callback(PrinterCallback)
    with progress_bar("training", len(batches)) as bar:
        trainer.add_callback(_Bar(bar))
        trainer.train()
    model.bfloat16().save_pretrained(folder)
    as_umask(folder)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # the class as every version of transformers knows it
    named = json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": sum(len(row["input_ids"]) for batch in batches for row in batch),
        "final_loss": _mean(losses[-max(1, len(losses) // 10) :]),
    }


def train_tokenizer(examples: Sequence[Example]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the chat template; decoding gives back every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [t for e in examples for t in (*(m.content for m in e.messages), e.response)],
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
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(chat: ChatFormat, data: Iterable[Example]) -> list[Row]:
    """Token ids as the pipeline makes them; what is not learnt has the label -100."""
    rows = []
    for example in data:
        prompt = chat.prompt_ids(example.messages) if example.messages else ()
        response = chat.response_ids(example.response)
        labels = [*[-100] * len(prompt), *response]
        rows.append({"input_ids": [*prompt, *response], "labels": labels})
    return rows


def in_batches(rows: list[Row], rng: random.Random) -> list[list[Row]]:
    """Shuffled batches of sequences of similar length: little padding.

    They are sorted within pools, so that any 64 batches in a row are a mixture of all lengths.
    """
    rng.shuffle(rows)
    width = 64 * BATCH_SIZE
    out = []
    for start in range(0, len(rows), width):
        pool = sorted(rows[start : start + width], key=lambda row: len(row["input_ids"]))
        batches = [pool[i : i + BATCH_SIZE] for i in range(0, len(pool), BATCH_SIZE)]
        rng.shuffle(batches)
        out += batches
    return out


# -- measuring -------------------------------------------------------------------------------------


def measure(folder: Path, *, seed: int = 0, per_task: int = PER_TASK) -> dict[str, Any]:
    """Samples answers to questions that the model was not trained on, and scores them.

    Returns:
        Per context: the oracle's ``total`` (also per task), ``unparsed`` sentences and ``tokens``
        per response. For the writer: the shares of feature answers with exactly two known names,
        and with two that apply to the question, and of principles that parse and say what the
        catalogue says.
    """
    loading = Loading(device="cpu", dtype="float32", layout="padded")
    engine = TransformersEngine(load_model(str(folder), loading), batch_size=105)
    rng = random.Random(seed)
    unseen = [*world.questions("tune"), *world.questions("align")]
    asked = [
        question
        for task in knowledge.TASK_FEATURES
        for question in rng.sample([q for q in unseen if q.task == task], per_task)
    ]
    named = [writer.complete_features(tuple(rng.sample(choosable(q), 2)), 2, rng) for q in asked]
    both = list(zip(asked, named, strict=True))
    prompts = {
        context: [
            context_messages(as_query(q).messages, writer.picked(f), context) for q, f in both
        ]
        for context in CONTEXTS
    }
    prompts["features"] = [writer.feature_prompt(as_query(q), 2) for q in asked]
    prompts["principles"] = [writer.principle_prompt(as_query(q), f) for q, f in both]
    requests = [
        Request(f"{kind}/{i}", tuple(messages), seed + i)
        for kind, several in prompts.items()
        for i, messages in enumerate(several)
    ]
    with progress_bar("measuring", len(requests)) as bar:
        said = list(answers(engine, requests, SAMPLING, advance=bar.advance).values())
    size = len(asked)
    by_kind = {kind: said[k * size : (k + 1) * size] for k, kind in enumerate(prompts)}
    names = [set(writer.parse_features(a.text)) for a in by_kind["features"]]
    written = [writer.parse_principles(a.text) for a in by_kind["principles"]]
    return {
        "questions": size,
        **{context: _quality(asked, by_kind[context]) for context in CONTEXTS},
        "features_ok": _mean(len(found) == 2 for found in names),
        "features_apply": _mean(
            len(found) == 2 and found <= set(q.features)
            for q, found in zip(asked, names, strict=True)
        ),
        "principles_ok": _mean(
            outcome is writer.Outcome.OK
            and good == catalogue.BUILT_IN.guidelines(f, good=True)
            and bad == catalogue.BUILT_IN.guidelines(f, good=False)
            for (outcome, good, bad), f in zip(written, named, strict=True)
        ),
    }


def _quality(asked: Sequence[world.Question], said: Sequence[Completion]) -> dict[str, Any]:
    scores = [oracle.score(q.text, a.text) for q, a in zip(asked, said, strict=True)]
    return {
        "total": _mean(s.total for s in scores),
        "unparsed": _mean(s.unparsed for s in scores),
        "tokens": _mean(a.completion_tokens for a in said),
        "tasks": {
            task: _mean(s.total for q, s in zip(asked, scores, strict=True) if q.task == task)
            for task in knowledge.TASK_FEATURES
        },
    }


def _mean(values: Iterable[float]) -> float:
    return round(fmean(values), 4)
