"""One place renders: what every part of the program makes of one conversation is the same ids."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaModel

from selfsteer.data.records import Query
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.evaluation.harness import run_task
from selfsteer.judges.chat import ChatJudge, Exchange, rating_question
from selfsteer.judges.reward import RewardJudge
from selfsteer.models.load import load_chat, load_model
from selfsteer.models.score import score_sequences
from selfsteer.recipe.read import validate
from selfsteer.recipe.sections import (
    Benchmarks,
    EngineConfig,
    HarnessTask,
    JudgeConfig,
    Policy,
    TrainConfig,
)
from selfsteer.stages.offline import train_offline
from tests.fakes import serving
from tests.make import make_checkpoint, triple, write_jsonl

#: What the template writes where it is told to think, or is not.
LOUD, QUIET = "Think!", "Answer!"
HEAD = "{{- 'Think!' if enable_thinking | default(true) else 'Answer!' -}}"
KWARGS = {"chat_template_kwargs": {"enable_thinking": False}}
QUESTION = "What does the bear eat?"
#: The conversation as the tiny family's template writes it.
WRITTEN = (
    "<|start_header_id|>user<|end_header_id|>\n\nWhat does the bear eat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
TASK = """\
task: bear
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {max_gen_toks: 2, until: ["\\n"]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint whose template has a variable."""
    made = make_checkpoint(tmp_path / "model", "llama")
    template = made / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{- bos_token -}}", HEAD))
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All ids that any model of the family reads, in order."""
    ids: list[int] = []
    forward = LlamaModel.forward

    def spy(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        ids.extend(input_ids.flatten().tolist())
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", spy)
    return ids


def policy(folder: Path, **more: Any) -> Policy:
    return Policy(model=str(folder), device="cpu", dtype="float32", layout="padded", **more)


def judge(folder: Path, kind: str, **more: Any) -> JudgeConfig:
    values = {"kind": kind, "model": str(folder), "device": "cpu", "dtype": "float32", **more}
    return validate(JudgeConfig, values, "judge")


def test_every_place_reads_the_same_ids(folder: Path, read: list[int], tmp_path: Path) -> None:
    settings = policy(folder, **KWARGS)
    loaded = load_model(str(folder), settings, inference=True)
    plain = load_model(str(folder), policy(folder), inference=True).chat
    ask = triple("t", text=QUESTION, good="Honey.", bad="Bricks.")
    wanted = loaded.chat.prompt_ids(ask.messages)
    assert loaded.chat.tokenizer.decode(wanted) == QUIET + WRITTEN
    assert plain.prompt_text(ask.messages) == LOUD + WRITTEN
    row, loud = (str(list(c.prompt_ids(ask.messages)))[1:-1] for c in (loaded.chat, plain))

    def seen(expected: str = row) -> None:
        text = str(read)
        assert text.count(expected) >= 1, "the prompt was not read"
        assert loud not in text
        read.clear()

    greedy = SamplingParams(0.0, 1.0, 2)
    with Engines(None) as engines:
        engine = engines.get(EngineConfig(), str(folder), settings.loading, 1)
        answers(engine, [Request("q", ask.messages, 0)], greedy)
    seen()

    score_sequences(loaded.model, [loaded.chat.sequence(ask, "plain/good")], layout="padded")
    seen()

    given = {"output": str(tmp_path / "out"), "objective": "pbaa", "epochs": 1, **KWARGS}
    config = validate(TrainConfig, {**given, "device": "cpu", "layout": "padded"}, "train")
    train_offline(str(folder), write_jsonl(tmp_path / "t.jsonl", ask.to_dict()), config)
    seen()

    exchange = Exchange(Query("q", ask.messages), "Honey.")
    asked = ChatJudge(judge(folder, "chat", max_new_tokens=2, **KWARGS))
    asked.rate_all([exchange])
    seen(str(list(loaded.chat.prompt_ids(rating_question(exchange))))[1:-1])

    rows = write_jsonl(tmp_path / "tasks" / "rows.jsonl", {"q": QUESTION, "a": "Honey."})
    (tmp_path / "tasks" / "bear.yaml").write_text(TASK % rows)
    bear = Benchmarks(
        tasks=(HarnessTask(name="bear"),), task_folders=(str(tmp_path / "tasks"),), batch_size=1
    )
    run_task(bear.tasks[0], bear, loaded, 0)
    seen()


def test_a_reward_judge_renders_with_its_own_variables(folder: Path, read: list[int]) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(folder)
    config.num_labels = 1
    with torch.random.fork_rng():
        LlamaForSequenceClassification(config).save_pretrained(folder)
    query = Query("q", triple("t", text=QUESTION).messages)
    RewardJudge(judge(folder, "reward", **KWARGS)).score_all([(query, "Honey.")])
    chat = load_chat(str(folder), policy(folder, **KWARGS))
    assert str(list(chat.exchange_ids(query.messages, "Honey.")))[1:-1] in str(read)


@pytest.mark.parametrize("at_hand", [True, False])
def test_a_server_is_told_the_variables(folder: Path, at_hand: bool) -> None:
    with serving() as server, Engines(None) as engines:
        own: dict[str, Any] = {"base_url": server.url, "extra_body": {"top_k": 3}}
        kind = EngineConfig(kind="openai", model="canned", **own)
        for settings in (policy(folder, **KWARGS), policy(folder)):
            engine = engines.get(kind, str(folder), settings.loading, 1, at_hand=at_hand)
            answers(engine, [Request("q", triple().messages, 0)], SamplingParams(0.0, 1.0, 2))
        told, untold = server.asked
    assert told["chat_template_kwargs"] == {"enable_thinking": False}
    assert told["top_k"] == untold["top_k"] == 3
    assert "chat_template_kwargs" not in untold
    assert json.dumps(told["messages"]) == json.dumps(untold["messages"])
