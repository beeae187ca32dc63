"""Thoughts apart from answers: where a model's answer begins in what it says.

Models that reason write their thoughts first, between marks of their chat template. A mark may be
one special token, one ordinary token or several; what counts is its text.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Marks(NamedTuple):
    """What stands before thoughts, and between them and the answer."""

    start: str
    end: str


#: In order: Qwen, DeepSeek, GLM, Nemotron and most others; Magistral; gpt-oss; Gemma 4; Muse.
MARKS = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    Marks("<|channel>thought", "<channel|>"),
    Marks("to=self<|message|>", "to=user<|message|>"),
)

#: Why there is no answer: the budget ended within the thoughts, or the turn did.
UNFINISHED_REASONING, NO_ANSWER = "unfinished_reasoning", "no_answer"


def unanswered(text: str, reasoning: str, finish_reason: str) -> str | None:
    """Why there are thoughts and no answer; None where there is one, or no thoughts."""
    if text or not reasoning:
        return None
    return UNFINISHED_REASONING if finish_reason == "length" else NO_ANSWER


def opened(prompt: str) -> Marks | None:
    """The block that a prompt leaves open for the model's thoughts.

    >>> opened("<|im_start|>assistant <think>")
    Marks(start='<think>', end='</think>')
    """
    return next((m for m in MARKS if prompt.rstrip().endswith(m.start)), None)


def split(said: str, *, begun: bool | None) -> tuple[str, str | None]:
    r"""(thoughts, answer) of what a model said; one is the rest of the other.

    Thoughts have their marks and the white space before the answer. The answer is None where they
    never end.

    Args:
        said: special tokens included.
        begun: whether the prompt left a block open; None: not known, then a closing mark that no
            opening one precedes closes such a block.

    >>> split("<think>\nTwo.\n</think>\n\nIt is 2.", begun=False)
    ('<think>\nTwo.\n</think>\n\n', 'It is 2.')
    >>> split("Two.</think>It is 2.", begun=True)
    ('Two.</think>', 'It is 2.')
    >>> split("<think>Two, or", begun=False)
    ('<think>Two, or', None)
    >>> split("Write <think> and </think>.", begun=None)
    ('', 'Write <think> and </think>.')
    """
    for marks in MARKS:
        before, end, after = said.partition(marks.end)
        starts = before.lstrip().startswith(marks.start)
        unmarked = begun or not before.strip() or (begun is None and marks.start not in before)
        if end and (starts or unmarked):
            answer = after.lstrip()
            return said.removesuffix(answer), answer
        if starts:
            return said, None
    return (said, None) if begun else ("", said)


def marked(thoughts: str) -> str:
    r"""Thoughts with their opening mark, where it is a prompt that has it.

    >>> marked("So.</think>")
    '<think>\nSo.</think>'
    """
    if any(thoughts.lstrip().startswith(m.start) for m in MARKS):
        return thoughts
    start = next((m.start for m in MARKS if m.end in thoughts), "")
    return f"{start}\n{thoughts}" if start else thoughts


def bare_thoughts(text: str, *, begun: bool = False) -> str:
    """Thoughts without marks in the marks that most models use; see `split`."""
    start = "" if begun else "<think>\n"
    return f"{start}{text}\n</think>\n\n"


def answer_at(ids: Sequence[int], thoughts: str, decode: Callable[[Sequence[int]], str]) -> int:
    """How many of the sampled ids, at least, hold these thoughts and the marks that end them."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode(ids[:middle])) < len(thoughts.rstrip()):
            low = middle + 1
        else:
            high = middle
    return low
