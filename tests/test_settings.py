"""run_all.sh with the settings of the demo and with small ones, on given data."""

import json

import pytest
import served
from commands import ROOT, run, table


@pytest.mark.parametrize("settings", ["demo", "small"])
def test_smaller_settings_on_given_data(settings, pair, tmp_path):
    given = {"SOURCE": str(pair / "source"), "TARGET": str(pair / "target"), "SETTINGS": settings, "METHODS": "fastcut_l5"}
    given |= {"OUT": str(tmp_path), "PYTHON": str(served.python()), "FID_WEIGHTS": "random", "ADAPT_ARGS": "--batch-size 1"}
    given |= {"ITERATIONS_SCALE": "0.01667" if settings == "demo" else "0.0005"}
    given |= {"SEGMENTER_ARGS": "--encoder-weights none --batch-size 1"}
    result = run("bash", ROOT / "run_all.sh", **given)
    assert result.returncode == 0, result.stderr
    trained = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*ers/*/args.json")}
    steps = {name: args["iterations"] for name, args in trained.items() if "method" not in args}
    assert steps["clada"] == steps["control"] == steps["no_target"] and steps["source_only"] == steps["oracle"]
    adversarial = steps["clada"] - trained["clada"]["head_start"]  # as many steps as CLADA takes in all, or as FastCUT-L5
    assert steps["oracle"] == steps["fastcut_l5"] + (adversarial if settings == "demo" else 0)
    assert trained["clada"]["segmenter"] == trained["control"]["segmenter"] == str(tmp_path / "segmenters" / "fastcut_l5")
    models = ["Source Only", "FastCUT-L5", "control without target", "control", "CLADA", "Oracle"]
    assert [row["model"] for row in table(tmp_path / "results" / "table2.csv")] == models
