"""The HTML page of an evaluation in a real browser, and both pages made anew by launch/report.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from online_runs import forget_precision
from report_pages import page_viewer
from reward_model_folders import save_reward_model

from drpo.models.tokenizer import load_tokenizer
from eval.reward_models.evaluate import evaluate_reward_model
from eval.reward_models.recipe import EvaluateRewardModelRecipe
from launch.report import main

PLOTS = ["Reliability", "Margin by length difference", "Scores"]
ATTACK = "</td><script>window.pwned=1</script><img src=x onerror='window.pwned=2'>{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def evaluated(policy_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    save_reward_model(folder / "rm", load_tokenizer(str(policy_folder)))
    forget_precision()
    recipe = EvaluateRewardModelRecipe(
        run_dir=str(folder / "run"),
        models=[{"path": str(folder / "rm"), "name": "mine"}],
        data={"task": "demo", "demo": {"num_train": 24, "num_eval": 30}},
        mixed_precision="no",
        num_references=0,
    )
    assert evaluate_reward_model(recipe, print) == folder / "run" / "evaluation.html"
    forget_precision()
    return folder / "run"


@pytest.fixture
def folder(evaluated, tmp_path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


def test_the_page_shows_the_tables_and_the_plots(evaluated, chromium):
    with page_viewer(chromium) as show:
        page = show(evaluated / "evaluation.html")
        assert page.locator("h1").inner_text() == "Reward models on demo"
        markdown = (evaluated / "evaluation.md").read_text()
        titles = [line[3:] for line in markdown.splitlines() if line.startswith("## ")]
        assert titles[-len(PLOTS) - 1 : -1] == PLOTS
        assert page.locator("main h2").all_inner_texts() == [
            *titles[: -len(PLOTS) - 1],
            "Plots",
            "What the numbers are",
        ]
        found = json.loads((evaluated / "evaluation.json").read_text())["models"][0]["accuracy"]
        cells = page.locator("#table-1 tbody tr > *").all_inner_texts()
        assert cells[0] == "mine" and cells[1].startswith(f"{found['accuracy']['value']:.3f} [")
        assert cells[2:6] == [str(found[name]) for name in ("n", "right", "ties", "wrong")]
        images = page.locator("#plots img")
        assert [image.get_attribute("alt") for image in images.all()] == PLOTS
        assert images.evaluate_all("images => images.every(image => image.naturalWidth > 100)")


@pytest.mark.parametrize("named", ["", "evaluation.json"])
def test_both_pages_are_made_anew(folder, named, capsys):
    pages = [folder / name for name in ("evaluation.html", "evaluation.md")]
    first = [page.read_bytes() for page in pages]
    for page in pages:
        page.unlink()
    main([str(folder / named)])
    assert [page.read_bytes() for page in pages] == first
    assert capsys.readouterr().out == f"{folder.resolve() / 'evaluation.html'}\n"


def test_names_of_models_are_never_markup(folder, chromium):
    file = folder / "evaluation.json"
    evaluation = json.loads(file.read_text())
    evaluation["models"][0]["name"] = evaluation["data"]["path"] = ATTACK
    file.write_text(json.dumps(evaluation))
    main([str(folder)])
    with page_viewer(chromium) as show:
        page = show(folder / "evaluation.html", width=360, height=640)
        assert page.locator("h1").inner_text() == f"Reward models on {ATTACK}"
        assert page.locator("#table-1 tbody th").inner_text() == ATTACK
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_what_cannot_be_shown_is_one_message(folder):
    (folder / "scores.png").unlink()
    with pytest.raises(SystemExit, match=r"no plot at .*scores.png: No such file.*evaluate_reward_model.py"):
        main([str(folder)])
    (folder / "evaluation.json").write_text('{"models": [{"name": "a"}]}')
    with pytest.raises(SystemExit, match="is no evaluation of this version .*'best_of_n'"):
        main([str(folder)])
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(SystemExit, match="evaluation.json is not JSON"):
        main([str(folder)])
    (folder / "comparison.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds comparison.json and evaluation.json: name one of them"):
        main([str(folder)])
    with pytest.raises(SystemExit, match="no evaluation at .*launch/evaluate_reward_model.py writes one"):
        main([str(folder / "none" / "evaluation.json")])
