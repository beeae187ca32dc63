"""Examples in files: what comes out is what went in, and memory does not hold it."""

import tracemalloc
from pathlib import Path

import pytest
import torch

from selfsteer.models.chat import EncodedSequence
from selfsteer.training.examples import AT_ONCE, Examples, Rows

NAMES = ("plain/good", "plain/bad")


def sequences(i: int, tokens: int = 3) -> dict[str, EncodedSequence]:
    prompt = (7, i, 151_000)
    return {
        name: EncodedSequence(prompt, tuple(range(k + 1, k + 1 + tokens + i % 2)), f"q{i}")
        for k, name in enumerate(NAMES)
    }


def filled(folder: Path, count: int, tokens: int = 3) -> Examples:
    examples = Examples(NAMES, folder)
    for i in range(count):
        examples.append(f"q{i}", sequences(i, tokens))
    return examples


def test_examples_come_back_as_they_were_added(tmp_path: Path) -> None:
    examples = filled(tmp_path, 5)
    assert [e.id for e in examples] == ["q0", "q1", "q2", "q3", "q4"] == examples.ids
    assert [e.sequences for e in examples] == [sequences(i) for i in range(5)]
    assert examples[-1].id == "q4"
    assert [e.id for e in examples[1:3]] == ["q1", "q2"]
    assert examples[0].tokens() == 3 + 3 + 3  # the prompt once
    with pytest.raises(IndexError):
        examples[5]
    assert not list(tmp_path.iterdir())  # the files have no names


def test_examples_left_out_take_their_sequences_with_them(tmp_path: Path) -> None:
    examples = filled(tmp_path, 5).without({"q1", "q4"})
    assert examples.ids == ["q0", "q2", "q3"]
    assert list(examples.flat()) == [s for i in (0, 2, 3) for s in sequences(i).values()]
    assert list(examples.flat(1, 2)) == list(sequences(2).values())


@pytest.mark.parametrize("count", [3, AT_ONCE // 2 + 2])
def test_log_probs_of_the_reference_stay_with_their_sequences(count: int, tmp_path: Path) -> None:
    examples = filled(tmp_path, count).without({"q1"})
    asked: list[int] = []

    def logps(part: list[EncodedSequence]) -> list[torch.Tensor]:
        asked.append(len(part))
        return [torch.tensor(s.response_ids) / -8.0 - int(s.record[1:]) for s in part]

    examples.refer(logps)  # type: ignore[arg-type]
    assert sum(asked) == 2 * (count - 1)
    assert max(asked) <= AT_ONCE
    for e in examples:
        assert e.reference is not None
        for name, s in e.sequences.items():
            expected = torch.tensor(s.response_ids) / -8.0 - int(e.id[1:])
            assert torch.equal(e.reference[name], expected)


def test_memory_does_not_hold_the_tokens(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        examples = filled(tmp_path, 300, tokens=2000)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(examples) == 300
    assert held < 300_000  # the token ids alone are 4.8 MB


def test_rows_of_floats_come_back_to_the_bit(tmp_path: Path) -> None:
    rows = Rows("float32", tmp_path)
    rows.append([0.1, -2.5])
    rows.append([])
    first = rows[0].tolist()
    rows.append([3e38])
    assert first == torch.tensor([0.1, -2.5]).tolist()
    assert [len(rows[i]) for i in range(len(rows))] == [2, 0, 1]
