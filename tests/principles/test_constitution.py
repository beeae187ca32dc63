"""Rules from files, and what a writer's answers make of them."""

from pathlib import Path

import pytest

from selfsteer.engines.base import Request
from selfsteer.errors import ConfigError, DataError
from selfsteer.principles.catalogue import Feature, load_catalogue
from selfsteer.principles.constitution import Rule, read_feature, read_rules, rule_answer
from selfsteer.principles.lint import lint
from selfsteer.stages import oppose_rules
from selfsteer.verbs.principles import import_rules
from tests.fakes import FakeEngine, Said, answer_with
from tests.make import write_jsonl

TEXT = """Be brief.

Name your sources.
be brief.
"""

MARKDOWN = """# Our rules

We write plainly.

- Be **brief**.
- Name your sources,
  each with its year.
1. Be kind
"""

OPEN_CHARACTER = Path("../shared/data/open-character/goodness.jsonl")


def told(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_a_rule_is_a_line_or_an_item_of_a_list_and_what_is_none_is_counted(tmp_path: Path) -> None:
    rules, dropped = read_rules(told(tmp_path / "a.txt", TEXT))
    assert rules == [Rule("line 1", "Be brief."), Rule("line 3", "Name your sources.")]
    assert [(d.id, d.reason) for d in dropped] == [("line 4", "duplicate")]
    rules, dropped = read_rules(told(tmp_path / "a.md", MARKDOWN))
    assert [r.text for r in rules] == [
        "Be brief.", "Name your sources, each with its year.", "Be kind",
    ]  # fmt: skip
    assert [(d.id, d.reason) for d in dropped] == [
        ("line 1", "heading"), ("line 3", "outside_a_list"),
    ]  # fmt: skip
    rows = [{"trait": "I am kind."}, {"question": "Why?"}]
    rules, dropped = read_rules(write_jsonl(tmp_path / "a.jsonl", *rows))
    assert rules[0].is_trait
    assert dropped[0].reason == "no_trait"
    for text in ("", "# Only a heading\n"):
        with pytest.raises(DataError, match="holds no rule"):
            read_rules(told(tmp_path / "none", text))


@pytest.mark.skipif(not OPEN_CHARACTER.exists(), reason="needs ../shared")
def test_open_character_trainings_traits_are_read() -> None:
    rules, dropped = read_rules(OPEN_CHARACTER)
    assert (len(rules), dropped) == (15, [])
    assert sum(r.is_trait for r in rules) > 10


FEATURE = Feature(
    name="Brevity",
    good_adjective="brief",
    bad_adjective="long-winded",
    good="Be brief.",
    bad="Ramble on.",
)


@pytest.mark.parametrize(
    ("text", "reason", "found"),
    [
        (rule_answer(FEATURE, with_good=False), "stop", FEATURE),
        ("**Bad rule:** Ramble on\n**Name**: brevity\nGood adjective: Brief\n"
         "Bad adjective: long-winded.", "stop", FEATURE),
        (rule_answer(FEATURE, with_good=False), "length", "unfinished"),
        ("", "request_failed:500", "request_failed:500"),
        ("I cannot.", "stop", "one_sided"),
        ("Bad: Be brief.\nName: A", "stop", "identical"),
        ("Bad: Dismiss the reader coldly before the joke.", "stop", "leaks_example"),
        ("Bad: Ramble on.\nName: B\nGood adjective: warm\nBad adjective: cold", "stop",
         "leaks_example"),
        ("Bad: Ramble on.", "stop", "no_name"),
        ("Bad: Ramble on.\nName: Brevity\nGood adjective: brief", "stop", "no_adjectives"),
        ("Bad: Ramble on.\nName: B\nGood adjective: brief\nBad adjective: brief", "stop",
         "no_adjectives"),
    ],
)  # fmt: skip
def test_an_answer_makes_a_feature_or_says_why_not(
    text: str, reason: str, found: Feature | str
) -> None:
    assert read_feature(Rule("line 1", "Be brief."), text, reason) == found


def test_a_trait_becomes_a_rule_and_its_own_words_are_not_the_good_one() -> None:
    trait = Rule("line 1", "I like to be brief.")
    text = rule_answer(FEATURE, with_good=True)
    assert read_feature(trait, text, "stop") == FEATURE
    assert read_feature(trait, text.partition("\n")[2], "stop") == "one_sided"
    own = text.replace("Ramble on.", "I ramble on.")
    assert read_feature(trait, own, "stop") == "first_person"


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oppose_rules, "check_writer", lambda *given: iter(()))


def opposite(request: Request) -> Said:
    """An answer to what is asked last; the first try of each rule is of no use."""
    asked = request.messages[-1].content
    if request.id.endswith("/0"):
        return "I would rather not."
    if "Be brief." in asked:
        return rule_answer(FEATURE, with_good=False)
    if "sources" in asked:
        bad = "Hide where it comes from."
        return f"Bad: {bad}\nName: Brevity\nGood adjective: open\nBad adjective: secret"
    return ("Bad: Be", "length")


def test_rules_become_a_catalogue_that_a_recipe_can_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = answer_with(monkeypatch, FakeEngine(opposite))
    file, to = told(tmp_path / "rules.txt", TEXT + "Be kind.\n"), tmp_path / "rules.yaml"
    report = import_rules(file, "writer", to, settings=["rules.tries=2"])
    assert (report["n_in"], report["n_out"]) == (4, 2)
    assert report["dropped"] == {"duplicate": 1, "one_sided": 1}
    assert report["outcomes"] == {"one_sided": 3, "ok": 2, "unfinished": 1}
    assert report["findings"] == []
    made = load_catalogue(str(to)).features
    assert [f.name for f in made] == ["Brevity", "Brevity 2"]
    assert [f.good for f in made] == ["Be brief.", "Name your sources."]
    assert lint(to.read_text()) == []
    assert len(engine.asked) == 6
    assert import_rules(file, "writer", to, settings=["rules.tries=2"]) == report
    assert len(engine.asked) == 6
    with pytest.raises(ConfigError, match="there already"):
        import_rules(file, "another", to)
    assert not (tmp_path / "rules.yaml.partial").exists()


def test_features_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A catalogue takes no two names that differ in their case alone."""
    names = ["Warmth 2", "Warmth", "WARMTH", "warmth", "Warm tone", "Warm Tone"]

    def named(request: Request) -> str:
        number = int(request.id.partition("/")[0])
        words = f"Good adjective: warm{number}\nBad adjective: cold{number}"
        return f"Bad: Never greet guest {number}.\nName: {names[number]}\n{words}"

    answer_with(monkeypatch, FakeEngine(named))
    text = "".join(f"Always greet guest {n} kindly.\n" for n in range(len(names)))
    import_rules(told(tmp_path / "rules.txt", text), "writer", tmp_path / "rules.yaml")
    made = load_catalogue(str(tmp_path / "rules.yaml")).features
    assert [f.name for f in made] == [
        "Warmth 2", "Warmth", "WARMTH 3", "Warmth 4", "Warm tone", "Warm Tone 2",
    ]  # fmt: skip


def test_more_rules_than_a_catalogue_can_have_are_refused_before_they_are_asked(
    tmp_path: Path,
) -> None:
    file = told(tmp_path / "many.txt", "".join(f"Keep rule {n}.\n" for n in range(1001)))
    with pytest.raises(DataError, match="holds 1,001 rules, and a catalogue has at most 1,000"):
        read_rules(file)


def test_where_no_answer_is_of_use_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, FakeEngine(lambda request: "No."))
    file = told(tmp_path / "rules.txt", TEXT)
    with pytest.raises(DataError, match="8 one_sided"):
        import_rules(file, "writer", tmp_path / "rules.yaml")
    answer_with(monkeypatch, FakeEngine(opposite))  # another model is not refused
    assert import_rules(file, "another", tmp_path / "rules.yaml")["n_out"] == 2


def test_a_folder_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml.partial").mkdir()
    told(tmp_path / "rules.yaml.partial" / "mine.txt", "kept")
    with pytest.raises(DataError, match="nowhere"):
        import_rules(tmp_path / "nowhere.txt", "writer", tmp_path / "rules.yaml")
    assert (tmp_path / "rules.yaml.partial" / "mine.txt").read_text() == "kept"


def test_the_partial_work_of_a_kill_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(request: Request) -> Said:
        if request.id == "1/1":
            raise KeyboardInterrupt
        return opposite(request)

    file, to = told(tmp_path / "rules.txt", TEXT), tmp_path / "rules.yaml"
    answer_with(monkeypatch, FakeEngine(dies))
    with pytest.raises(KeyboardInterrupt):
        import_rules(file, "writer", to, settings=["rules.tries=2"])
    # a command that finds no rules takes nothing of it away
    begun = sorted((tmp_path / "rules.yaml.partial").rglob("*"))
    with pytest.raises(DataError, match="a pipe or a device"):
        import_rules(Path("/dev/null"), "writer", to, settings=["rules.tries=2"])
    assert sorted((tmp_path / "rules.yaml.partial").rglob("*")) == begun
    engine = answer_with(monkeypatch, FakeEngine(opposite))
    assert import_rules(file, "writer", to, settings=["rules.tries=2"])["n_out"] == 2
    assert len(engine.asked) < 4
