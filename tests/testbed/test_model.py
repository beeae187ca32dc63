import json
import random
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import selfsteer.testbed.measure as measure_module
import selfsteer.testbed.train as train_module
from selfsteer.errors import ArtifactError
from selfsteer.testbed import knowledge as k
from selfsteer.testbed import model, world

FIGURES = {"plain": {"unparsed": 0.0}}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model.CHECKPOINT)


# ------------------------------------------------------------------------------ shipped checkpoint


def test_the_shipped_checkpoint_is_of_this_world():
    model.check(model.CHECKPOINT)


def test_the_shipped_files_are_small():
    assert (model.CHECKPOINT / "model.safetensors").stat().st_size <= 3_000_000


def test_the_recorded_figures_meet_what_is_promised():
    info = json.loads((model.CHECKPOINT / model.INFO_FILE).read_text())
    measured = info["measured"]
    totals = {context: measured[context]["total"] for context in ("plain", "good", "bad")}
    assert totals["good"] - totals["plain"] > 0.1
    assert totals["plain"] - totals["bad"] > 0.15
    assert measured["plain"]["unparsed"] < model.MAX_UNPARSED
    assert min(measured["features_ok"], measured["principles_ok"]) >= 0.95
    lengths = [measured[context]["tokens"] for context in totals]
    assert max(lengths) - min(lengths) < 1.5


def test_a_small_sample_is_better_under_good_and_worse_under_bad_principles():
    found = measure_module.measure(model.CHECKPOINT, seed=1, per_task=6)
    assert found["good"]["total"] > found["plain"]["total"] + 0.05
    assert found["bad"]["total"] < found["plain"]["total"] - 0.1
    assert found["principles_ok"] >= 0.9
    assert found["features_ok"] >= 0.9


def test_weights_are_bf16_with_tied_embeddings():
    loaded = AutoModelForCausalLM.from_pretrained(model.CHECKPOINT)
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


# ------------------------------------------------------------------------------ training


def test_training_sequences_end_with_one_end_of_turn_and_read_as_the_template(tokenizer):
    examples = list(world.corpus(60, 0))
    with model._progress(False) as bar:
        sequences = train_module._encode_all(tokenizer, examples, bar)
    assert {"good", "document", "plain"} <= {e.kind for e in examples}
    for example, (prompt, response) in zip(examples, sequences, strict=True):
        marks = {"system": "<sys>", "user": "<user>"}
        wanted = "".join(marks[m.role] + m.content for m in example.messages)
        wanted += "<asst>" if example.messages else ""
        assert tokenizer.decode(prompt) == wanted
        assert tokenizer.decode(response) == example.response + "<eos>"


def test_the_loss_is_the_mean_over_response_tokens_whatever_the_padding():
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).eval()
    short, long = ([3, 5], [6, 1]), ([3, 7, 8, 9], [10, 11, 12, 1])
    document: train_module.Tokens = ([], [5, 6, 7, 1])
    with torch.no_grad():
        one, two, whole = (train_module._loss(tiny, [s]).item() for s in (short, long, document))
        both = train_module._loss(tiny, [short, long]).item()
        logits = tiny(torch.tensor([[3, 5, 6]])).logits.log_softmax(-1)[0]
        logits_document = tiny(torch.tensor([[5, 6, 7]])).logits.log_softmax(-1)[0]
    assert one == pytest.approx(-(logits[1, 6] + logits[2, 1]).item() / 2, abs=1e-5)
    assert both == pytest.approx((2 * one + 4 * two) / 6, abs=1e-5)
    by_hand = -(logits_document[0, 6] + logits_document[1, 7] + logits_document[2, 1]).item() / 3
    assert whole == pytest.approx(by_hand, abs=1e-5)


def test_the_learning_rate_warms_up_and_falls():
    factors = [train_module._schedule(step, 10_000) for step in range(10_000)]
    assert factors[0] == pytest.approx(1 / train_module.WARMUP_STEPS, rel=0.01)
    assert max(factors) == factors[train_module.WARMUP_STEPS - 1] == pytest.approx(1.0, abs=0.001)
    # Half of the way down the cosine: half of 1 + 0.05.
    assert factors[5_000] == pytest.approx(0.525, abs=0.001)
    assert factors[-1] == pytest.approx(0.05, abs=0.001)


def test_batches_hold_every_sequence_once():
    sequences = [([0] * (i % 7), [i]) for i in range(200)]
    batches = train_module._batches(sequences, random.Random(0))
    assert sorted(r[0] for b in batches for _, r in b) == list(range(200))
    assert max(map(len, batches)) == train_module.BATCH_SIZE


# ------------------------------------------------------------------------------ build, check


def test_check_refuses_what_is_not_a_checkpoint_of_this_world(tmp_path):
    with pytest.raises(ArtifactError, match="not a testbed checkpoint"):
        model.check(tmp_path)
    (tmp_path / model.INFO_FILE).write_text('{"fingerprint": "other"}')
    with pytest.raises(ArtifactError, match="trained on the world other"):
        model.check(tmp_path)


def test_a_build_makes_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_module, "measure", lambda *_, **__: FIGURES)
    rng_before, threads_before = torch.get_rng_state(), torch.get_num_threads()
    output = tmp_path / "made"
    info = model.build(output, examples=128, progress=False)
    assert torch.equal(torch.get_rng_state(), rng_before)
    assert torch.get_num_threads() == threads_before
    model.check(output)
    assert json.loads((output / model.INFO_FILE).read_text()) == info
    assert info["arguments"] == {"examples": 128, "seed": 0, "lr": 3e-3, "threads": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(output))


def test_a_model_that_did_not_learn_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "train", lambda *_: {})
    monkeypatch.setattr(measure_module, "measure", lambda *_, **__: {"plain": {"unparsed": 0.03}})
    output = tmp_path / "made"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(ArtifactError, match=r"0\.030 sentences each that the oracle cannot parse"):
        model.build(output, examples=1, progress=False)
    assert [p.name for p in tmp_path.rglob("*")] == ["made", "old"]


def test_the_second_of_two_builders_takes_over_the_result_of_the_first(tmp_path, monkeypatch):
    trained = []

    def slow_train(folder, arguments, bar):
        trained.append(folder)
        time.sleep(0.5)
        return {}

    monkeypatch.setattr(train_module, "train", slow_train)
    monkeypatch.setattr(measure_module, "measure", lambda *_, **__: FIGURES)
    infos = []

    def build():
        infos.append(model.build(tmp_path / "made", examples=1, progress=False))

    builders = [threading.Thread(target=build) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(trained) == 1
    assert infos[0] == infos[1]
    assert infos[0]["fingerprint"] == world.fingerprint()


def test_a_rebuild_replaces_the_whole_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "train", lambda *_: {})
    monkeypatch.setattr(measure_module, "measure", lambda *_, **__: FIGURES)
    output = tmp_path / "made"
    output.mkdir()
    (output / "old").touch()
    model.build(output, examples=1, progress=False)
    assert [p.name for p in output.iterdir()] == [model.INFO_FILE]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
