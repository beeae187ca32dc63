import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer.errors import ArtifactError
from selfsteer.models.chat import ChatFormat
from selfsteer.testbed import build, world
from selfsteer.testbed import knowledge as k

FIGURES = {"plain": {"unparsed": 0.0}}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(world.CHECKPOINT)


# ------------------------------------------------------------------------------ shipped checkpoint


def test_the_shipped_checkpoint_is_of_this_world():
    info = json.loads((world.CHECKPOINT / build.INFO_FILE).read_text())
    assert info["fingerprint"] == world.fingerprint()


def test_the_shipped_files_are_small():
    assert (world.CHECKPOINT / "model.safetensors").stat().st_size <= 3_000_000


def test_the_recorded_figures_meet_what_is_promised():
    info = json.loads((world.CHECKPOINT / build.INFO_FILE).read_text())
    measured = info["measured"]
    totals = {context: measured[context]["total"] for context in ("plain", "good", "bad")}
    assert totals["good"] - totals["plain"] > 0.1
    assert totals["plain"] - totals["bad"] > 0.15
    assert measured["plain"]["unparsed"] < build.MAX_UNPARSED
    assert min(measured["features_ok"], measured["principles_ok"]) >= 0.95
    lengths = [measured[context]["tokens"] for context in totals]
    assert max(lengths) - min(lengths) < 1.5


def test_a_small_sample_is_better_under_good_and_worse_under_bad_principles():
    found = build.measure(world.CHECKPOINT, seed=1, per_task=6)
    assert found["good"]["total"] > found["plain"]["total"] + 0.05
    assert found["bad"]["total"] < found["plain"]["total"] - 0.1
    assert found["principles_ok"] >= 0.9
    assert found["features_ok"] >= 0.9


def test_weights_are_bf16_with_tied_embeddings():
    loaded = AutoModelForCausalLM.from_pretrained(world.CHECKPOINT)
    assert loaded.dtype == torch.bfloat16
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert loaded.generation_config.do_sample
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (1, 0)


def test_the_chat_template_has_roles_and_turns_and_nothing_else(tokenizer):
    turns = [
        {"role": "system", "content": " Be kind.\n\nAnd short. "},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And now?"},
    ]
    text = "<sys> Be kind.\n\nAnd short. <user>Hi?<asst>Yes.<eos><user>And now?"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == text + "<asst>"
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(asked)["input_ids"]
    assert [ids.count(i) for i in range(5)] == [0, 1, 1, 2, 2]


def test_every_text_survives_the_tokenizer_and_nothing_is_added(tokenizer):
    for text in ("The bee eats nectar.", " leading", "line\nbreak  two ", "Zürich 東京 🙂", ""):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("task", k.TASK_FEATURES)
def test_flawed_and_odd_responses_have_as_many_tokens_as_good_ones(tokenizer, task):
    asked = [q for q in world.questions() if q.task == task][::3]
    for feature in k.TASK_FEATURES[task]:
        lengths = []
        for level in k.LEVELS:
            rng = random.Random(2)
            texts = [
                world.respond(
                    q, {f: rng.choice(k.LEVELS) for f in q.features} | {feature: level}, rng
                )
                for q in asked
            ]
            lengths.append(sum(map(len, tokenizer(texts)["input_ids"])) / len(asked))
        assert max(lengths) - min(lengths) < 1.5, (feature, lengths)


# ------------------------------------------------------------------------------ building


def test_training_sequences_end_with_one_end_of_turn_and_read_as_the_template(tokenizer):
    examples = list(world.corpus(60, 0))
    rows = build.encode(ChatFormat(tokenizer), examples)
    assert {"good", "document", "plain"} <= {e.kind for e in examples}
    for example, row in zip(examples, rows, strict=True):
        marks = {"system": "<sys>", "user": "<user>"}
        wanted = "".join(marks[m.role] + m.content for m in example.messages)
        wanted += "<asst>" if example.messages else ""
        learnt = [i for i in row["labels"] if i != -100]
        assert tokenizer.decode(learnt) == example.response + "<eos>"
        assert row["input_ids"][-len(learnt) :] == learnt
        assert tokenizer.decode(row["input_ids"][: -len(learnt)]) == wanted


def test_batches_hold_every_sequence_once():
    rows = [{"input_ids": [i] * (1 + i % 7)} for i in range(200)]
    batches = build.in_batches(list(rows), random.Random(0))
    assert sorted(r["input_ids"] for b in batches for r in b) == sorted(
        r["input_ids"] for r in rows
    )
    assert max(map(len, batches)) == build.BATCH_SIZE


def test_a_build_makes_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "measure", lambda *_, **__: FIGURES)
    output = tmp_path / "made"
    info = build.build(output, examples=128)
    assert json.loads((output / build.INFO_FILE).read_text()) == info
    assert info["fingerprint"] == world.fingerprint()
    assert info["arguments"] == {"examples": 128, "seed": 0, "lr": 3e-3, "threads": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    loaded = AutoModelForCausalLM.from_pretrained(output)
    shipped = AutoModelForCausalLM.from_pretrained(world.CHECKPOINT)
    again = AutoTokenizer.from_pretrained(output)
    assert loaded.config.vocab_size == len(again)
    assert loaded.dtype == torch.bfloat16
    assert again.padding_side == "left"
    assert {n: p.shape for n, p in loaded.named_parameters() if "embed" not in n} == {
        n: p.shape for n, p in shipped.named_parameters() if "embed" not in n
    }
    files = {p.name for p in output.iterdir()}
    assert files == {p.name for p in world.CHECKPOINT.iterdir()}


def test_a_model_that_did_not_learn_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "train", lambda folder, **_: {})
    monkeypatch.setattr(build, "measure", lambda *_, **__: {"plain": {"unparsed": 0.03}})
    output = tmp_path / "made"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(ArtifactError, match=r"0\.030 sentences each that the oracle cannot parse"):
        build.build(output, examples=1)
    assert [p.name for p in tmp_path.rglob("*")] == ["made", "old"]


def test_a_rebuild_replaces_the_whole_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "train", lambda folder, **_: folder.mkdir() or {})
    monkeypatch.setattr(build, "measure", lambda *_, **__: FIGURES)
    output = tmp_path / "made"
    output.mkdir()
    (output / "old").touch()
    build.build(output, examples=1)
    assert [p.name for p in output.iterdir()] == [build.INFO_FILE]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
