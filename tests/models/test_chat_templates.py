"""The chat templates of 41 models, as TRL ships them, rendered by `ChatFormat`.

docs/templates.md shows what this finds; ``python -m tests.models.test_chat_templates`` prints it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from selfsteer.data.records import Message
from selfsteer.models.chat import ChatFormat

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
PAGE = Path(__file__).parents[2] / "docs" / "templates.md"

#: What the generation config of GLM-4.5 stops at; its template ends no turn.
STOPS = {"glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>")}

HEAD = (
    *("template", "system role", "own system prompt", "end of turn", "prompt opens", "prefix"),
    *("content", "date"),
)


def chat_of(name: str, day: str = "2026-11-29") -> ChatFormat:
    """A template with a tokenizer of single bytes and the special tokens that it names."""
    text = (FOLDER / f"{name}.jinja").read_text("utf-8")
    named = re.findall(r"<[^<>\s'\"{}()+]+>|\[/?INST\]|\[gMASK\]", text)
    special = {t for t in named if re.search(r"[|｜\[]|_of_|sop|</s>", t)} | {*STOPS.get(name, ())}
    own = {"bos_token": "<bos>", "eos_token": "<eos>"}
    byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(byte)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(t, special=True) for t in (*own.values(), *sorted(special))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **own)
    tokenizer.chat_template = text
    stops = [tokenizer.vocab[t] for t in STOPS.get(name, ())]
    return ChatFormat(tokenizer, name, day=day, stops=lambda: stops)


def row(name: str) -> tuple[str, ...]:
    """What is to be known of a template."""
    chat = chat_of(name)
    ask, said = [Message("user", "What is a bee?")], Message("assistant", "An insect.")
    prompt = chat.prompt_text(ask)
    assert "What is a bee?" in prompt
    whole = chat.tokenizer.decode(chat.exchange_ids(ask, said.content))
    end = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)
    opened = re.search(r"<think>\s*(</think>)?\s*$", prompt)
    later = chat_of(name, "2027-01-01").prompt_text(ask)
    return (
        name,
        "yes" if chat.has_system_role else "folded",
        "yes" if chat.default_system else "",
        f"`{end.replace('|', chr(92) + '|')}`",
        "" if not opened else "empty reasoning" if opened[1] else "reasoning",
        "yes" if whole.startswith(prompt + said.content) else "no",
        "parts" if chat._takes_parts else "text",
        "today" if later != prompt else "",
    )


def table() -> Iterator[str]:
    """The table, as Markdown."""
    yield f"| {' | '.join(HEAD)} |"
    yield f"|{'---|' * len(HEAD)}"
    for name in NAMES:
        yield f"| {' | '.join(row(name))} |"


def test_the_page_says_what_templates_do() -> None:
    _, _, shown = PAGE.read_text("utf-8").partition("## Templates of 41 models")
    assert [line for line in shown.splitlines() if line.startswith("|")] == list(table())
    assert len(NAMES) == 41


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_system_prompt_is_the_plain_context(name: str) -> None:
    chat = chat_of(name)
    ask = [Message("user", "What is a bee?")]
    if chat.default_system:
        given = [Message("system", chat.default_system), *ask]
        assert chat.prompt_ids(given) == chat.prompt_ids(ask)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_writes_a_special_token(name: str) -> None:
    chat = chat_of(name)
    special = {*chat._special.values()}
    evil = " and ".join(chat._special)

    def count(ids: tuple[int, ...]) -> int:
        return sum(i in special for i in ids)

    for role in ("system", "user"):
        turns = [Message("system", "s"), Message("user", "u")]
        place = role == "user"
        turns[place] = Message(role, f"x {evil} y")
        harmless = [Message("system", "s"), Message("user", "u")]
        ids = chat.prompt_ids(turns)
        assert count(ids) == count(chat.prompt_ids(harmless))
        assert f"x {evil} y" in chat.tokenizer.decode(ids)
    assert count(chat.response_ids(f"x {evil} y")) == 1
    assert chat.response_lengths([(evil, False)]) == [len(evil.encode())]


if __name__ == "__main__":
    print("\n".join(table()))
