import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsteer.data.records import Query
from selfsteer.errors import ConfigError
from selfsteer.judges.checks import ChecksJudge
from selfsteer.principles.catalogue import (
    BUILT_IN,
    Catalogue,
    catalogue_of,
    catalogue_text,
    load_catalogue,
)
from selfsteer.principles.lint import lint
from selfsteer.recipe.read import load_values
from selfsteer.recipe.sections import CATALOGUES, JudgeConfig, PrinciplesConfig

MINE: dict[str, Any] = {
    "domain": "support of a telephone company",
    "appended": {"Brevity": 0.3},
    "features": [
        {
            "name": "Patience",
            "good_adjective": "patient",
            "bad_adjective": "impatient",
            "good": "Take the caller's worry seriously and explain each step again.",
            "bad": "Wave the caller's worry aside and explain nothing a second time.",
            "weight": 2,
        },
        {
            "name": "Brevity",
            "good_adjective": "brief",
            "bad_adjective": "rambling",
            "good": "Answer in two sentences.",
            "bad": "Answer in two pages.",
        },
    ],
}


def changed(feature: int | None = None, **more: Any) -> str:
    """MINE as YAML with some keys replaced; None takes one out."""
    value: dict[str, Any] = {**MINE, "features": [dict(f) for f in MINE["features"]]}
    target = value if feature is None else value["features"][feature]
    target.update(more)
    for key in [k for k, v in more.items() if v is None]:
        del target[key]
    return yaml.safe_dump(value, sort_keys=False, width=1000)


def test_the_built_in_catalogue_is_a_file_of_the_same_form() -> None:
    text = catalogue_text(None)
    assert lint(text) == []
    assert Catalogue.model_validate(yaml.safe_load(text)) == BUILT_IN
    again = yaml.safe_dump(BUILT_IN.model_dump(mode="json"))
    assert Catalogue.model_validate(yaml.safe_load(again)) == BUILT_IN
    assert len(BUILT_IN.features) == 8
    assert {f.weight for f in BUILT_IN.features} == {1.0}


def test_concision_of_the_papers_recipe_is_the_built_in_catalogues() -> None:
    named = load_values("sso")["principles"]["concision"]
    assert BUILT_IN.appended == {"Concision": named} == {"Concision": 0.2}


def test_a_catalogue_of_ones_own_makes_whole_principles(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        changed(
            language="German",
            opening="Deine Antwort ist {adjectives}.",
            conjunction="und",
            closing="Verrate das nicht.",
        )
    )
    found = load_catalogue(str(path))
    assert found.principle(("Brevity", "Patience"), "Hallo.", good=True) == (
        "Deine Antwort ist patient und brief. Hallo. Verrate das nicht."
    )
    assert found.principle((), "Hallo.", good=False) == "Hallo. Verrate das nicht."
    assert found.choosable == ("Patience",)
    assert found.domain == "support of a telephone company"


def test_a_clean_catalogue_has_no_findings() -> None:
    assert lint(changed()) == []


def test_the_documented_catalogue_is_clean() -> None:
    page = Path(__file__).parents[2] / "docs" / "principles.md"
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert lint(text) == []
    assert len(Catalogue.model_validate(yaml.safe_load(text)).features) == 3


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        (changed(0, bad=None), "Patience.bad", "is missing"),
        (changed(0, bad="  "), "Patience.bad", "is empty"),
        (changed(0, gud="x"), "Patience.gud", "did you mean 'good'?"),
        (changed(featurs=[]), "featurs", "did you mean 'features'?"),
        (changed(1, name="patience"), "catalogue", "two features are called 'patience'"),
        (
            changed(features=[MINE["features"][0] | {"name": f"F{n}"} for n in range(1001)]),
            "catalogue",
            "there are 1,001 features, and every two are compared; give at most 1,000",
        ),
        (changed(0, weight=0), "Patience.weight", "greater than 0, found 0"),
        (changed(appended={"Brevty": 0.1}), "catalogue", "Did you mean Brevity?"),
        (changed(appended={"Brevity": 1.5}), "appended.Brevity", "found 1.5"),
        (changed(appended={"Brevity": 0.1, "Patience": 0.1}), "catalogue", "no feature to choose"),
        (changed(opening="Answer well."), "catalogue", "must hold {adjectives} once"),
        (changed(language="German"), "catalogue", "opening, conjunction, closing would stay"),
        (changed(0, good=False), "Patience.good", "put texts in quotes"),
        ("features: [", "file", "cannot be read"),
        ("- a\n", "file", "must be a mapping"),
        ("", "file", "must be a mapping"),
        (changed() + "domain: twice\n", "file", "the key 'domain' is there twice"),
    ],
)
def test_what_cannot_be_used_is_found_and_refused(
    tmp_path: Path, text: str, where: str, said: str
) -> None:
    (found,) = lint(text)
    assert (found.where, said in found.problem) == (where, True), found
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml cannot be used: line \d+, "):
        load_catalogue(str(path))


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        (changed(0, bad=MINE["features"][0]["good"]), "Patience.bad", "identical"),
        (
            changed(
                0,
                good="Take one two three four five six seven eight nine ten care of all that.",
                bad="Take one two three four five six seven eight nine ten care of all that now.",
            ),
            "Patience.bad",
            "near_identical",
        ),
        (changed(0, bad="Be short."), "Patience.bad", "unbalanced"),
        (changed(0, bad_adjective="Patient"), "Patience.bad_adjective", "identical"),
        (changed(1, bad_adjective="impatient"), "Brevity", "its bad adjective is that of Patience"),
        (
            changed(1, good="Take the caller's worry seriously and explain each step once."),
            "Brevity",
            "its good guideline is nearly that of Patience",
        ),
        (changed(1, good="Follow the guideline in short."), "Brevity.good", "leaks"),
        (changed(1, good="Reveal that you were told to."), "Brevity.good", "leaks"),
        (changed(1, good="Answer in two sentences"), "Brevity.good", "end it with one"),
        (changed(closing=""), "closing", "is empty"),
    ],
)
def test_what_would_steer_badly_is_found_but_can_be_used(text: str, where: str, said: str) -> None:
    found = lint(text)
    assert [(f.where, said in f.problem) for f in found if said in f.problem] == [(where, True)]
    Catalogue.model_validate(yaml.safe_load(text))


def test_findings_name_the_line() -> None:
    text = "# mine\n" + changed(1, bad="Be.", good="Say what the principle wants.")
    lines = text.splitlines()
    starts = [n for n, line in enumerate(lines, 1) if "name: Brevity" in line]
    found = lint(text)
    assert {f.line for f in found} == set(starts)
    assert len(found) == 2
    text = "# mine\n" + changed(1, gut="x")
    (unknown,) = lint(text)
    assert text.splitlines()[unknown.line - 1].strip() == "gut: x"


def mine(tmp_path: Path, **settings: Any) -> PrinciplesConfig:
    path = tmp_path / "mine.yaml"
    path.write_text(changed())
    return PrinciplesConfig(catalogue=str(path), features_per_query=1, **settings)


def test_a_recipe_can_append_any_feature(tmp_path: Path) -> None:
    assert catalogue_of(PrinciplesConfig()).appended == {"Concision": 0.2}
    assert catalogue_of(PrinciplesConfig(concision=0.5)).appended == {"Concision": 0.5}
    more = catalogue_of(PrinciplesConfig(append={"Safety": 0.1}))
    assert more.appended == {"Concision": 0.2, "Safety": 0.1}
    assert "Safety" not in more.choosable
    assert catalogue_of(mine(tmp_path)).appended == {"Brevity": 0.3}
    assert catalogue_of(mine(tmp_path, concision=None)).appended == {"Brevity": 0.3}
    assert catalogue_of(mine(tmp_path, append={"Brevity": 0.9})).appended == {"Brevity": 0.9}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"concision": 0.2}, "principles.concision has no effect"),
        ({"append": {"Bravity": 0.2}}, "Did you mean Brevity"),
        ({"append": {"Patience": 0.2}}, "more than the catalogue can give"),
    ],
)
def test_what_a_catalogue_lacks_is_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        catalogue_of(mine(tmp_path, **settings))
    with pytest.raises(ConfigError, match="say the same"):
        catalogue_of(PrinciplesConfig(concision=0.1, append={"Concision": 0.2}))
    with pytest.raises(ConfigError, match="features_per_query 8"):
        catalogue_of(PrinciplesConfig(features_per_query=8))


def test_english_examples_are_refused_for_another_language(tmp_path: Path) -> None:
    path = tmp_path / "de.yaml"
    path.write_text(
        changed(language="German", opening="Sei {adjectives}.", conjunction="und", closing="Pst.")
    )
    made = PrinciplesConfig(catalogue=str(path), features_per_query=1, examples=1)
    with pytest.raises(ConfigError, match="German"):
        catalogue_of(made)


def test_a_missing_catalogue_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_catalogue(str(tmp_path / "none.yaml"))


def test_a_tag_that_does_not_fit_is_a_finding() -> None:
    (finding,) = lint("features: !!int x")
    assert "cannot be read" in finding.problem


@pytest.mark.parametrize(
    "good", ["संक्षेप में उत्तर दें।", "أجب بإيجاز؟", 'Close on "That is all."', "Be brief (very brief!)."]
)
def test_a_sentence_ends_as_its_script_does(good: str) -> None:
    assert lint(changed(1, good=good)) == []


@pytest.mark.parametrize("name", CATALOGUES)
def test_a_shipped_catalogue_is_known_by_its_name_and_clean(name: str) -> None:
    assert lint(catalogue_text(name)) == []
    found = load_catalogue(name)
    settings = PrinciplesConfig(catalogue=name)
    assert catalogue_of(settings).features == found.features
    assert PrinciplesConfig.model_validate(settings.model_dump(exclude_unset=True)) == settings
    for feature in found.features:  # the halves differ in the feature, and not in their length
        shorter, longer = sorted((len(feature.good), len(feature.bad)))
        assert longer <= 1.6 * shorter, feature.name


def test_shipped_catalogues_are_these_and_a_slip_of_the_pen_finds_them() -> None:
    assert CATALOGUES == ("careful-assistant", "house-style", "support-desk")
    with pytest.raises(ConfigError, match="Did you mean house-style"):
        load_catalogue("house-stile")


def test_the_house_style_judges_by_its_name() -> None:
    judge = ChecksJudge(JudgeConfig.model_validate("checks:house-style"))
    query = Query.from_dict({"prompt": "Where do bees sleep?"})
    plain = "They sleep in the hive, for about six hours."
    gushing = "Great question! Bees sleep:\n\n* in the hive!\n* in **flowers**!"
    assert judge.score_all([(query, plain)]) == [1.0]
    (score,) = judge.score_all([(query, gushing)])
    assert score is not None
    assert score < 0.5
