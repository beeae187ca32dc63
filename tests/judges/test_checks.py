import re
import sys
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.records import Preference, Query, Triple
from selfsteer.errors import ConfigError, DataError
from selfsteer.judges.base import Pair, ScoringJudge
from selfsteer.judges.checks import ChecksJudge
from selfsteer.judges.load import load_judge
from selfsteer.principles.catalogue import load_catalogue
from selfsteer.principles.fixed import Fixed
from selfsteer.principles.rules import Check, read_checks
from selfsteer.recipe.read import validate
from selfsteer.recipe.sections import JudgeConfig, PrinciplesConfig
from selfsteer.run.stage import identity
from selfsteer.stages.filter import to_preference

STYLE = """
closing: ""
features:
  - name: Brevity
    good_adjective: short
    bad_adjective: long
    good: Answer in one sentence.
    bad: Answer in many sentences.
    checks: [{sentences: {max: 1}}, {words: {max: 5}}]
  - name: Calm
    good_adjective: calm
    bad_adjective: excited
    good: Write calmly.
    bad: Shout.
    checks: [{no_match: "!"}]
  - name: Truth
    good_adjective: true
    bad_adjective: false
    good: State facts.
    bad: Invent facts.
"""


def judge_of(settings: Any) -> ChecksJudge:
    judge = load_judge(JudgeConfig.model_validate(settings))
    assert isinstance(judge, ChecksJudge)
    assert isinstance(judge, ScoringJudge)
    return judge


def query(**more: Any) -> Query:
    return Query.from_dict({"id": "q", "prompt": "What does the bee eat?", **more})


@pytest.fixture
def style(tmp_path: Path) -> Path:
    path = tmp_path / "style.yaml"
    path.write_text(STYLE.replace("true\n", '"true"\n').replace("false\n", '"false"\n'))
    return path


def test_an_expression_without_an_end_is_refused_by_its_name() -> None:
    endless = query(checks=[{"match": "^(a|aa)+$"}])
    said = r"The rule match: \^\(a\|aa\)\+\$ was not decided within 1 s .* 45 characters"
    with pytest.raises(ConfigError, match=said):
        judge_of("checks").compare_all([Pair(endless, "a" * 44 + "!", "no")])


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [
        ("a{e}", "a"),
        ("a{e}", "a{e}"),
        ("a{i<=1}b", "axb"),
        ("a{,2}b{1,}{x}", "ab{x}"),
        ("[[:alpha:]]x", "ax"),
        ("[a[:alpha:]]", "b"),
        (r"[\[x]", "\\"),
        (r"[^]\]]", "]"),
        ("[]{}[]", "["),
        (r"\N{BULLET}x{2}", "•xx"),
        (r"(?i)^yes\b.{2,3}$", "Yes no"),
    ],
)
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_an_expression_means_what_it_means_in_python(pattern: str, answer: str) -> None:
    found = re.search(pattern, answer) is not None
    assert Check(match=pattern).passes(answer) == found
    assert Check(no_match=pattern).passes(answer) != found


# -- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"words": {"max": 4}}, "The bee eats nectar.", "The bee eats - only - nectar."),
        ({"words": {"min": 2}}, "Sweet nectar", "Nectar -- !"),
        (
            {"sentences": {"min": 2, "max": 2}},
            'It is 3.5 m long. "Really?"',
            "One. Two. Three.",
        ),
        ({"sentences": {"max": 1}}, "Nectar…", "Nectar\nPollen"),
        ({"sentences": {"max": 2}}, "蜜蜂吃花蜜。熊吃蜂蜜。", "一。二。三。"),
        ({"paragraphs": {"max": 1}}, "Nectar\nand pollen", "Nectar\n \nand pollen"),
        ({"bullets": {"max": 0}}, "Nectar - and 3. pollen\n-5 degrees", "Eats:\n  1) nectar"),
        ({"bullets": {"min": 2, "marker": "-"}}, "- nectar\n- pollen", "- nectar\n* pollen\n- x"),
        ({"bullets": {"min": 1, "marker": "number"}}, "1. nectar\n2) pollen", "• nectar"),
        ({"match": "(?i)nectar$"}, "It eats NECTAR", "Nectar it eats"),
        ({"no_match": r"\bI\b"}, "It eats nectar", "I eat nectar"),
        ({"format": "json"}, '{"food": "nectar"}', "{food: nectar}"),
        ({"format": "json"}, "[[]]", "[" * 100_000),
        ({"script": "Cyrillic"}, "Пчела ест нектар (nectar)", "The bee ест nectar"),
        ({"contains": ["nectar", "bee"]}, "A Bee: nectar!", "Beer and nectar"),
        ({"lacks": "certainly"}, "Uncertainly", "It certainly does"),
        ({"lacks": "!"}, "Nectar.", "Nectar!"),
        ({"contains": "C++"}, "In (C++)", "In C+"),
        ({"starts_with": ["yes", "no"]}, "Yes, it does", "It does, yes"),
        ({"ends_with": [".", "?"]}, "Nectar. \n", "Nectar"),
    ],
)
def test_a_rule_holds_or_not(rule: dict[str, Any], good: str, bad: str) -> None:
    check = Check.model_validate(rule)
    assert (check.passes(good), check.passes(bad), check.passes(" \n")) == (True, False, False)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"word": {"max": 3}}, "unknown key 'checks.0.word' (did you mean 'checks.words'?)"),
        ({"words": {"mx": 3}}, "did you mean 'checks.words.max'?"),
        ({"words": {"min": 3, "max": 2}}, "min 3 exceeds max 2"),
        ({"words": {}}, "give min, max or both"),
        ({"match": "(", "words": {"max": 3}}, "is not a regular expression"),
        ({"match": "a", "no_match": "b"}, "a check has one rule, found match, no_match"),
        ({"script": "latn"}, "Did you mean Latin?"),
        ("words", "found 'words'"),
    ],
)
def test_a_malformed_rule_is_named(rule: Any, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        read_checks([rule], "style")
    assert message in str(e.value)


def test_a_catalogue_names_the_line_of_a_malformed_rule(style: Path) -> None:
    style.write_text(style.read_text().replace("no_match", "no_mtch"))
    with pytest.raises(
        ConfigError, match=r"line 15, Calm.checks.0.no_mtch: .*did you mean 'no_match'"
    ):
        load_catalogue(str(style))


def test_rules_bear_on_no_principle(style: Path) -> None:
    settings = PrinciplesConfig(mode="picked", catalogue=str(style), features="random")
    before = identity(settings)
    judged = identity(JudgeConfig.model_validate(f"checks:{style}"))
    style.write_text(style.read_text().replace("max: 5", "max: 6"))
    assert identity(settings) == before
    assert identity(JudgeConfig.model_validate(f"checks:{style}")) != judged


# -- the judge -------------------------------------------------------------------------------------


def test_the_score_is_the_share_of_rules_kept(style: Path) -> None:
    judge, bee = judge_of(f"checks:{style}"), query()
    answers = ["It eats nectar.", "It eats nectar! And pollen.", ""]
    assert judge.score_all([(bee, a) for a in answers]) == [1.0, 1 / 3, 0.0]
    pairs = [Pair(bee, answers[0], answers[1]), Pair(bee, "", answers[1]), Pair(bee, "A.", "B.")]
    assert [j.verdict for j in judge.compare_all(pairs)] == ["first", "second", "tie"]


def test_rules_of_the_query_are_added(style: Path) -> None:
    judge, bee = judge_of(f"checks:{style}"), query(checks=[{"contains": "pollen"}])
    assert judge.score_all([(bee, "It eats nectar.")]) == [0.75]
    assert judge_of("checks").score_all([(bee, "It eats nectar."), (bee, "Pollen")]) == [0, 1]


def test_answers_are_told_by_rule_and_those_of_queries_by_kind(style: Path) -> None:
    judge = judge_of(f"checks:{style}")
    river = query(checks=[{"lacks": "Nile"}, {"lacks": "Loire"}, {"words": {"max": 2}}])
    answers = {"before": ["It eats nectar!", "The Nile"], "after": ["It eats nectar.", "The Po"]}
    calm, brief = "Calm: no_match: !", "Brevity: words: max 5"
    found = judge.by_rule([query(), river], answers)
    assert len(found) == 5
    assert found[calm] == {"before": [0, 1], "after": [1, 1]}
    assert found[brief] == {"before": [1, 1], "after": [1, 1]}
    assert found["lacks (of queries)"] == {"before": [0.5], "after": [1]}


def test_a_query_without_a_rule_is_named_in_time() -> None:
    judge = judge_of("checks")
    with pytest.raises(DataError, match="1 of 2 queries have no rule, the first is 'bare'"):
        judge.check([query(checks=[{"words": {"max": 3}}]), query(id="bare")])
    (found,) = judge.compare_all([Pair(query(), "a", "b")])
    assert (found.verdict, found.reason) == ("unparseable", "no_rule")


def test_a_catalogue_without_rules_cannot_judge(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no feature of"):
        judge_of("checks:package:selfsteer/catalogue.yaml")


def test_the_judge_needs_no_path_and_no_model() -> None:
    assert validate(JudgeConfig, {"kind": "checks"}, "judge").path is None
    with pytest.raises(ConfigError, match="model has no effect with a judge of kind checks"):
        validate(JudgeConfig, {"kind": "checks", "model": "m"}, "judge")


def test_rules_stay_beside_what_is_made_of_a_query() -> None:
    settings = PrinciplesConfig(mode="fixed", good="Be brief.", bad="Be long.")
    asked = query(checks=[{"words": {"max": 1}}], source="a book")
    triple = Fixed(settings).triple(asked)
    whole = Triple.from_dict(
        {**triple.to_dict(), "responses": {"good": "Nectar", "bad": "No nectar"}}
    )
    made = Preference.from_dict(to_preference(whole).to_dict())
    pairs = [Pair(r.query, "Nectar", "No nectar") for r in (whole, made, made.to_triple())]
    assert [j.verdict for j in judge_of("checks").compare_all(pairs)] == ["first"] * 3
    assert "source" not in made.extra


# -- IFEval ----------------------------------------------------------------------------------------


def instructed(*ids: str, kwargs: list[Any] | None = None) -> Query:
    return query(instruction_id_list=list(ids), kwargs=kwargs or [{} for _ in ids])


def test_ifeval_decides_its_own_instructions() -> None:
    asked = instructed(
        "punctuation:no_comma",
        "length_constraints:number_words",
        kwargs=[{"num_words": None}, {"relation": "at least", "num_words": 4}],
    )
    judge = judge_of("checks")
    judge.check([asked])
    answers = ["The bee eats nectar.", "Nectar, pollen", "Nectar"]
    assert judge.score_all([(asked, a) for a in answers]) == [1.0, 0.0, 0.5]


def test_a_sign_is_counted_and_no_letter_drawn_in_its_place() -> None:
    hashes = {"letter": "#", "let_frequency": 4, "let_relation": "at least"}
    few = {"letter": "!", "let_frequency": 2, "let_relation": "less than"}
    letters = {"letter": "E", "let_frequency": 2, "let_relation": "at least"}
    name = "keywords:letter_frequency"
    asked = instructed(name, "punctuation:no_comma", name, name, kwargs=[hashes, {}, few, letters])
    judge = judge_of("checks")
    judge.check([asked])
    answers = {"# # # # see": 1.0, "### see, no!": 0.5, "#### a!!": 0.5, " ": 0.0}
    for _ in range(8):
        assert judge.score_all([(asked, a) for a in answers]) == [*answers.values()]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            instructed(
                "length_constraints:number_words",
                kwargs=[{"num_words": -4, "relation": "at least"}],
            ),
            "would draw a value anew",
        ),
        (
            instructed(
                "keywords:letter_frequency",
                kwargs=[{"letter": "ab", "let_frequency": 4, "let_relation": "at least"}],
            ),
            "would draw a value anew",
        ),
        (
            instructed(
                "keywords:letter_frequency",
                kwargs=[{"letter": "#", "let_frequency": -1, "let_relation": "at least"}],
            ),
            "would draw a value anew",
        ),
        (instructed("punctuation:no_coma"), "Did you mean punctuation:no_comma?"),
        (instructed("punctuation:no_comma", kwargs=[{"words": 3}]), "do not fit"),
        (
            instructed("length_constraints:number_words", kwargs=[{"num_words": 4}]),
            "its kwargs lack relation",
        ),
        (instructed("punctuation:no_comma", kwargs=[{}, {}]), "a list in step with it"),
    ],
)
def test_what_ifeval_does_not_know_is_named(asked: Query, message: str) -> None:
    with pytest.raises(DataError) as e:
        judge_of("checks").check([asked])
    assert message in str(e.value)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval", None)
    with pytest.raises(ConfigError, match=r"pip install 'selfsteer\[eval\]'"):
        judge_of("checks").check([instructed("punctuation:no_comma")])
