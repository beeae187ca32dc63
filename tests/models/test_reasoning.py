"""Thoughts apart from answers, whatever the marks are made of, and what is trained on."""

import pytest
from transformers import AddedToken

from selfsteer.data.records import Message, Triple
from selfsteer.models.chat import ChatFormat
from selfsteer.models.reasoning import split
from tests.make import SENTENCES, make_tokenizer

HI = (Message("user", "Hi"),)
TURNS = "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
#: Name → (how the template writes an answer, how the generation prompt goes on).
TEMPLATES = {
    "shows none": ("{{ m.content }}", ""),
    "opens a block": ("{{ m.content }}", "<think>\n"),
    "Qwen3": (
        "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}",
        "",
    ),
    "Qwen3.5": (
        "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}",
        "<think>\n",
    ),
    "Nemotron": (
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
        "<think>\n",
    ),
}
HARMONY = (
    "{%- for m in messages -%}<|start|>{{ m.role }}"
    "{%- if m.thinking -%}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant"
    "{%- endif -%}"
    "{%- if m.role == 'assistant' -%}<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{%- else -%}<|message|>{{ m.content }}<|end|>{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"
)


def thinker(template: str = "shows none", marks: str = "special") -> ChatFormat:
    """Marks are special tokens, ordinary tokens, or spelled with several."""
    tokenizer = make_tokenizer("qwen2", (*SENTENCES, "think about it"))
    if marks != "spelled":
        words = [AddedToken(t, special=marks == "special") for t in ("<think>", "</think>")]
        tokenizer.add_tokens(words)
    answer, prompt = TEMPLATES[template]
    tokenizer.chat_template = (
        f"{TURNS}{answer}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{prompt}{{% endif %}}"
    )
    return ChatFormat(tokenizer)


def harmonious() -> ChatFormat:
    tokenizer = make_tokenizer("qwen2")
    names = ("start", "end", "message", "channel", "return")
    tokenizer.add_tokens([AddedToken(f"<|{n}|>", special=True) for n in names])
    tokenizer.chat_template = HARMONY
    return ChatFormat(tokenizer)


def encode(chat: ChatFormat, text: str) -> list[int]:
    return list(chat.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("marks", ["special", "ordinary", "spelled"])
@pytest.mark.parametrize("opens", [False, True])
def test_the_answer_follows_the_thoughts_whatever_the_marks_are_made_of(
    marks: str, opens: bool
) -> None:
    chat = thinker("opens a block" if opens else "shows none", marks)
    assert chat.opens_reasoning is opens
    start = "" if opens else "<think>\n"
    for thoughts, gap in (("né, a 🐻?", "\n\n"), ("", "\n\n"), ("The bee", "")):
        reasoning = f"{start}{thoughts}\n</think>{gap}"
        found = chat.said(encode(chat, f"{reasoning}The bear eats honey."))
        assert (found.reasoning, found.text) == (reasoning, "The bear eats honey.")
        assert not found.special_tokens, "the marks are none of the answer's"
    for cut in (f"{start}The bee eats", f"{start}The bee</thi"):
        assert chat.said(encode(chat, cut))[:2] == (cut, "")
    bare = chat.said(encode(chat, "Honey."))
    assert (bare.reasoning, bare.text) == (("Honey.", "") if opens else ("", "Honey."))


def test_marks_that_an_answer_is_about_are_no_thoughts() -> None:
    said = "Between <think> and </think> a model thinks."
    assert split(said, begun=False) == split(said, begun=None) == ("", said)
    assert split("It ends with </think>, as a rule.", begun=False)[0] == ""
    assert split("So.\n</think>\nTwo.", begun=None) == ("So.\n</think>\n", "Two.")
    assert split("[THINK]So.[/THINK]Two.", begun=False) == ("[THINK]So.[/THINK]", "Two.")


def test_harmony_channels_are_thoughts_and_answer() -> None:
    chat = harmonious()
    thoughts = "<|channel|>analysis<|message|>So.<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>"
    for reasoning in (thoughts + final, final):
        found = chat.said(encode(chat, f"{reasoning}The bee eats nectar."))
        assert found == (reasoning, "The bee eats nectar.", False, False)
    assert chat.said(encode(chat, thoughts)) == (thoughts, "", False, False)
    assert chat.thoughts("So.") == thoughts + final
    prompt = chat.tokenizer.decode(chat.exchange(HI, "Nectar.").prompt_ids)
    assert prompt == f"<|start|>user<|message|>Hi<|end|><|start|>assistant{final}"


@pytest.mark.parametrize(
    ("template", "closed"),
    [
        ("shows none", ""),
        ("opens a block", "<think>\n\n</think>\n\n"),
        ("Qwen3", "<think>\n\n</think>\n\n"),
        ("Qwen3.5", "<think>\n\n</think>\n\n"),
        ("Nemotron", "<think></think>"),
    ],
)
def test_without_thoughts_the_prompt_ends_with_an_empty_block(template: str, closed: str) -> None:
    chat = thinker(template)
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    dropped = Triple("t", HI, None, {"good": "Honey."})
    found = chat.sequence(dropped, "plain/good")
    decode = chat.tokenizer.decode
    assert decode(found.prompt_ids) == start + closed
    assert decode(found.response_ids) == "Honey.<|im_end|>"
    assert decode(chat.prompt_ids(HI)) == start + TEMPLATES[template][1], "sampling may think"


@pytest.mark.parametrize("template", ["opens a block", "Qwen3"])
def test_kept_thoughts_are_trained_on_as_they_were_sampled(template: str) -> None:
    chat = thinker(template)
    start = "" if chat.opens_reasoning else "<think>\n"
    sampled = encode(chat, f"{start}A bear?\n</think>\n\nHoney.")
    said = chat.said(sampled)
    kept = Triple("t", HI, None, {"good": said.text}, reasoning={"good": said.reasoning})
    found = chat.sequence(kept, "plain/good")
    assert found.prompt_ids == chat.prompt_ids(HI)
    assert list(found.response_ids) == [*sampled, chat.end_of_turn]


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("shows none", "<think>\nSo.\n</think>\n\n"),
        ("opens a block", "So.\n</think>\n\n"),
        ("Qwen3", "<think>\nSo.\n</think>\n\n"),
        ("Qwen3.5", "So.\n</think>\n\n"),
    ],
)
def test_thoughts_of_a_server_get_their_marks_back(template: str, written: str) -> None:
    chat = thinker(template)
    assert chat.thoughts("So.") == written
    assert split(f"{written}Two.", begun=chat.opens_reasoning) == (written, "Two.")


def test_other_tokens_than_those_of_the_text_are_noticed() -> None:
    chat = thinker()
    honest = encode(chat, "The bear eats honey.")
    assert chat.said(honest) == ("", "The bear eats honey.", False, False)
    letters = [i for c in "The bear eats honey." for i in encode(chat, c)]
    assert len(letters) > len(honest)
    assert chat.said(letters) == ("", "The bear eats honey.", True, False)
    thoughts = encode(chat, "<think>\nSo.\n</think>\n\n")
    assert not chat.said([*thoughts, *honest]).retokenised
    assert chat.said([*thoughts, *letters]).retokenised
    for white in (" The bear", "The bear \n"):
        assert chat.said(encode(chat, white)) == ("", "The bear", True, False)
    special = [*honest, *encode(chat, "<|im_start|>")]
    assert chat.said(special) == ("", "The bear eats honey.", True, True)
