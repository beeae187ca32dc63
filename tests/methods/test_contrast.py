"""The whole method on the tiny world: what it learns from, what it resumes, what it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from selfsteer.errors import ConfigError
from selfsteer.formats.cards import model_card
from selfsteer.methods import load_recipe
from selfsteer.models.teacher import Teacher
from selfsteer.report.document import write_report
from selfsteer.run.execute import execute
from selfsteer.run.folder import RunFolder
from selfsteer.run.stage import Artifact
from selfsteer.stages import teach
from selfsteer.stages.inputs import stored_triples
from selfsteer.stages.teach import taught
from selfsteer.verbs.exporting import export_round
from selfsteer.verbs.judge import judge
from selfsteer.view import RunView
from tests.make import SMALL, write_jsonl

OWN = (
    "queries.limit=12",
    "sampling.max_new_tokens=24",  # too few for most answers
    "training={learning_rate: 4e-4, batch_size: 4, epochs: 2}",
)


def recipe(folder: Path, *more: str) -> Any:
    return load_recipe("contrast", [*SMALL, *OWN, f"runs_dir={folder}", *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = recipe(tmp_path_factory.mktemp("runs"))
    execute(made, {"name": "given"})
    return Path(made.folder)


def test_answers_without_an_end_are_learnt_from_too(done: Path) -> None:
    answers = list(stored_triples(done / "iteration-1/samples"))
    reasons = [t.finish_reasons["plain"] for t in answers]
    assert "length" in reasons
    assert sorted(taught(done / "iteration-1/teacher")) == sorted(t.id for t in answers)


def test_the_policy_moves_towards_its_target(done: Path) -> None:
    lines = RunView.open(done).curves["iteration-1/policy"]
    first, last = lines[0]["kl"], lines[-1]["kl"]
    assert last < first / 2


def test_the_ledger_says_how_much_of_the_target_is_kept(done: Path) -> None:
    stage = RunView.open(done).stage("Teach")
    assert stage is not None
    assert stage.notes["covered"] >= 0.99
    assert 1 <= stage.notes["entries"] < 512


def test_targets_that_are_there_are_not_made_again(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach, "ANSWERS", 5)
    made = recipe(tmp_path)
    execute(made, {"name": "given"}, until="teacher")
    files = sorted((made.folder / "iteration-1/teacher").iterdir())
    before = [f.read_bytes() for f in files]
    assert len(files) == 3
    files[1].unlink()
    mark = files[0].stat().st_mtime_ns
    ledger = made.folder / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    lines = [x for x in lines if not ('"finish"' in x and '"iteration-1/teacher"' in x)]
    ledger.write_text("\n".join(lines) + "\n")  # as if it had been killed there
    execute(made, {"name": "given"}, until="teacher")
    assert [f.read_bytes() for f in files] == before
    assert files[0].stat().st_mtime_ns == mark
    whole = load_file(done / "iteration-1/teacher/targets-00000.safetensors")
    assert sum(len(load_file(f)["kept"]) for f in files) == len(whole["kept"])


def test_what_is_finished_of_a_file_outlives_an_interruption(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked = recipe(tmp_path), list[int]()
    execute(made, {"name": "given"}, until="samples")
    stage, own = made.plan()[-2], Teacher._of

    def of(self: Teacher, group: Any) -> Any:
        asked.append(len(group))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return own(self, group)

    monkeypatch.setattr(Teacher, "_of", of)
    with pytest.raises(KeyboardInterrupt):
        stage.run(RunFolder(made.folder))
    folder = made.folder / "iteration-1/teacher"
    (_part,) = folder.iterdir()
    assert taught(folder) == {}, "half a file is none"
    stage.run(RunFolder(made.folder))
    assert sum(asked) - asked[2] == 12, "none of them twice"
    (whole,) = folder.iterdir()
    assert whole.read_bytes() == (done / "iteration-1/teacher" / whole.name).read_bytes()


def test_a_bound_that_is_too_low_names_one_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(top_k: int, coverage: str) -> str:
        folder = tmp_path / f"{top_k}-{coverage}"
        more = (f"contrast={{top_k: {top_k}, coverage: {coverage}}}", "queries.limit=3")
        execute(recipe(folder, *more), {"name": "given"}, until="teacher")
        return " ".join(capsys.readouterr().err.split())

    found = re.search(r"more than top_k 2 .* Set top_k (\d+), enough for 95%", said(2, "0.99"))
    assert found is not None
    enough = int(found[1])
    assert "need more than top_k" not in said(enough, "0.99")


def test_targets_of_other_answers_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path)
    execute(made, {"name": "given"}, until="teacher")
    whole = taught(made.folder / "iteration-1/teacher")
    monkeypatch.setattr(teach, "ANSWERS", 7)  # as another version cut them
    stage = next(s for s in made.plan() if s.title == "teacher")
    stage.run(RunFolder(made.folder))
    again = taught(made.folder / "iteration-1/teacher")
    assert again.keys() == whole.keys()
    assert sorted({len(load_file(x.path)["tokens"]) for x in again.values()}) == [5, 7]


def test_the_teacher_has_the_bits_of_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU here: what would be loaded is looked at."""
    asked: dict[str, Any] = {}

    def load(source: str, loading: Any, **given: Any) -> Any:
        asked.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr("selfsteer.models.load.load_model", load)
    made = recipe(tmp_path, "policy.lora={rank: 4, bits: 4}")
    teacher = next(s for s in made.plan() if s.title == "teacher")
    answers = write_jsonl(tmp_path / "samples.jsonl", {"id": "q", "prompt": "Hi", "responses": {}})
    with pytest.raises(KeyboardInterrupt):
        replace(teacher, answers=Artifact(answers)).run(RunFolder(tmp_path))
    assert asked == {"inference": True, "bits": 4}


def test_what_leaves_nothing_to_learn_is_dropped_and_counted(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    execute(made, {"name": "given"}, until="samples")
    shard = made.folder / "iteration-1/samples/shard-00000.jsonl"
    rows = [json.loads(line) for line in shard.read_text().splitlines()]
    rows[0]["responses"]["plain"] = ""
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher, training = made.plan()[-2:]
    result = teacher.run(RunFolder(made.folder))
    assert result.dropped == {"empty": 1}
    assert result.n_out == len(rows) - 1
    trained = training.run(RunFolder(made.folder))
    assert trained.dropped == {"no_targets": 1}
    assert trained.n_out == len(rows) - 1


def test_another_direction_has_the_same_targets(tmp_path: Path) -> None:
    def prints(*more: str) -> dict[str, str]:
        return {s.title: s.fingerprint for s in recipe(tmp_path, *more).plan()}

    before, after = prints(), prints("contrast.direction=jsd")
    assert [title for title in before if before[title] != after[title]] == ["policy"]


def test_the_card_of_the_model_tells_of_no_pairs(done: Path) -> None:
    card = model_card(RunView.open(done).round())
    assert "12 answers" in card
    for word in ("pair", "dpo", "rejected", "Not measured", "unknown"):
        assert word not in card


def test_the_report_speaks_of_what_there_is(done: Path, tmp_path: Path) -> None:
    made = write_report(done, tmp_path / "page.html")
    text = made.markdown.read_text()
    drawn = {p.stem for p in made.figures}
    assert "kl" in drawn
    assert set(re.findall(r"\(page/(\S+)\.png\)", text)) == drawn, "each has its caption"
    for word in ("DPO", "Chosen", "preferences", "generator", "log-probs"):
        assert word not in text


def test_there_are_no_pairs_to_export(done: Path) -> None:
    with pytest.raises(ConfigError, match="method contrast makes none"):
        export_round(RunView.open(done).round(), "trl", done / "out")
    with pytest.raises(ConfigError, match="holds no pairs to judge"):
        judge(done, judges=["oracle"])


@pytest.mark.parametrize("setting", ["hygiene.min_chars=3", "reward.data=x", "training.beta=0.2"])
def test_settings_of_pairs_are_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.split(".")[0]):
        recipe(tmp_path, setting)


def test_answers_without_an_end_cannot_be_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="remove sampling"):
        recipe(tmp_path, "sampling.keep_unfinished=false")
