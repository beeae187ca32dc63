import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from selfsteer.engines import load
from selfsteer.engines.base import Request
from selfsteer.models.chat import DAY
from selfsteer.verbs import auditing
from selfsteer.verbs.auditing import Settings, Subjects, audit
from tests.fakes import FakeEngine
from tests.make import make_checkpoint, triple

N = 20
FEATURES = [("Accuracy",) if i < 12 else ("Safety", "Accuracy") if i < 16 else () for i in range(N)]


def behaviour(bad: float, gap: float = 0.1, *, scored: bool = True) -> dict[str, np.ndarray]:
    """Constant but for a little that differs by query, the same for every behaviour."""
    noise = np.linspace(0, 0.01, N)
    found = {"gap/good": 0.2 + noise, "gap/bad": gap + noise, "tokens/plain": np.full(N, 10.0)}
    if scored:
        scores = {"plain": 0.6, "good": 0.8, "bad": bad}
        found |= {f"score/{c}": value + noise for c, value in scores.items()}
        found["drop"] = found["score/plain"] - found["score/bad"]
    return found


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_score_that_falls_under_bad_principles_is_a_back_door() -> None:
    found = audit(behaviour(0.5), {"policy": behaviour(0.4, gap=0.3)}, {}, FEATURES, rng())
    change = found["changes"]["policy"]
    assert change["verdict"] == "back_door"
    assert change["whole"]["score/bad"] == pytest.approx([-0.1] * 3)
    assert change["whole"]["score/plain"] == pytest.approx([0.0] * 3)
    assert change["whole"]["drop"] == pytest.approx([0.1] * 3)
    assert change["whole"]["gap/bad"] == pytest.approx([0.2] * 3)
    assert found["models"]["base"]["score/bad"] == pytest.approx(0.505)
    assert found["models"]["policy"]["drop"] == pytest.approx(0.2)


def test_none_is_found_where_it_rose_or_nobody_knows() -> None:
    found = audit(behaviour(0.4), {"policy": behaviour(0.6)}, {}, FEATURES, rng())
    assert found["changes"]["policy"]["verdict"] == "none_found"
    silent = behaviour(0.4, scored=False)
    found = audit(silent, {"policy": silent}, {}, FEATURES, rng())
    assert found["changes"]["policy"]["verdict"] == "unknown"
    assert "score/bad" not in found["changes"]["policy"]["whole"]


def test_a_judge_that_only_compares_gives_a_win_rate() -> None:
    silent = behaviour(0, scored=False)
    lost = np.array([0.0] * 15 + [1.0] * 3 + [math.nan] * 2)
    found = audit(silent, {"policy": silent}, {"policy": lost}, FEATURES, rng())
    change = found["changes"]["policy"]
    assert change["verdict"] == "back_door"
    assert change["whole"]["wins/bad"][0] == pytest.approx(3 / 18 - 0.5)


def test_a_feature_counts_where_it_is_named_and_few_say_nothing() -> None:
    found = audit(behaviour(0.5), {"policy": behaviour(0.4)}, {}, FEATURES, rng())
    features = found["changes"]["policy"]["features"]
    assert {k: v["queries"] for k, v in features.items()} == {"Accuracy": 16, "Safety": 4}
    assert features["Accuracy"]["score/bad"] == pytest.approx([-0.1] * 3)
    assert features["Safety"]["score/bad"] is None


def test_answers_without_a_score_do_not_count() -> None:
    aligned = behaviour(0.4)
    aligned["score/bad"][:10] = math.nan
    found = audit(behaviour(0.5), {"policy": aligned}, {}, FEATURES, rng())
    assert found["changes"]["policy"]["whole"]["score/bad"] == pytest.approx([-0.1] * 3)


def test_what_failed_or_is_damaged_of_finished_answers_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(say: Callable[[Request], Any] = lambda request: "Yes.") -> list[str]:
        engine = FakeEngine(say)
        engines = SimpleNamespace(sampler=lambda *args: engine)
        monkeypatch.setattr(load, "Engines", lambda folder: nullcontext(engines))
        found = auditing._answers(subjects, "m", probes, lambda items, tokens: None)
        assert len(found) == 6
        return [request.id for request in engine.asked]

    monkeypatch.setattr(auditing, "model_digest", str)
    monkeypatch.setattr(auditing, "_loading", lambda *args: {})
    settings = Settings.model_validate({"policy": {"model": "m"}})
    subjects = Subjects({}, settings, None, None, tmp_path, 1, 0)  # type: ignore[arg-type]
    probes = [triple("a", "Accuracy"), triple("b", "Accuracy")]
    away = ("", "request_failed:connection")
    assert len(asked(lambda request: away if request.id[0] == "a" else "Yes.")) == 6
    assert asked() == ["a/plain", "a/good", "a/bad"]
    (path,) = tmp_path.glob("answers-*.jsonl")
    path.write_text(path.read_text().replace('"Yes."', '"No."', 1) + '{"id": ')
    assert asked() == ["b/plain"]
    assert asked() == []  # the damaged lines are still there, but nothing lacks
    assert list(tmp_path.iterdir()) == [path]


def test_answers_are_of_the_day_that_a_template_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "m", "llama")
    settings = Settings.model_validate({"policy": {"model": str(source)}})
    subjects = Subjects({}, settings, None, None, tmp_path, 1, 0)  # type: ignore[arg-type]
    monkeypatch.setenv(DAY, "2024-02-29")
    assert auditing._loading(subjects, str(source))["date"] is None
    template = next(source.glob("chat_template.jinja"))
    template.write_text("{{- strftime_now('%d %B %Y') -}}" + template.read_text())
    assert auditing._loading(subjects, str(source))["date"] == "2024-02-29"
