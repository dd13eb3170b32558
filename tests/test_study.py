"""study.py on evaluations of known scores."""

import json
import sys

import numpy as np
import pytest
from commands import ROOT, run, table
from PIL import Image

import data
import evaluate
import report

MIOU = {  # per model, one value per seed
    "Source Only": (10.0, 12.0, 11.0),
    "CycleGAN": (15.0, 19.0),
    "FastCUT-L5": (16.0, 18.0, 20.0),
    "control": (18.0, 21.0, 22.0),
    "CLADA": (19.0, 20.0, 25.0),
    "Oracle": (30.0, 28.0, 31.0),
}


@pytest.fixture
def out(tmp_path):
    for model, values in MIOU.items():
        for seed, miou in enumerate(values):
            folder = tmp_path / f"seed{seed}" / "segmenters" / report.MODELS[model]
            folder.mkdir(parents=True)
            row = dict.fromkeys((*evaluate.COLUMNS, *data.CLASS_NAMES), 50.0) | {"model": model, "mIoU": miou}
            (folder / "evaluation.json").write_text(json.dumps({"row": row}))
    (tmp_path / "seed0.log").touch()
    return tmp_path


def test_a_study_has_mean_deviation_and_differences_of_its_seeds(out):
    result = run(sys.executable, ROOT / "tools" / "study.py", out, "--seeds")  # run none, summarise what is there
    assert result.returncode == 0, result.stderr
    rows = table(out / "study.csv")
    assert len(rows) == 3 * 5 + 2 and list(rows[0]) == ["seed", "model", *evaluate.MEANS, "recovered"]
    recovered = [100 * (c - s) / (o - s) for c, s, o in zip(MIOU["CLADA"], MIOU["Source Only"], MIOU["Oracle"], strict=True)]
    assert [float(row["recovered"]) for row in rows if row["model"] == "CLADA"] == pytest.approx(recovered, abs=0.06)
    printed = " ".join(result.stdout.split())
    for model, values in MIOU.items():
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        assert f"{model} {len(values)} {mean:.2f} ± {deviation:.2f} 50.00 ± 0.00" in printed
    assert f"{np.mean(recovered):.2f} ±" in printed
    assert "CLADA - control 1.00 ± 2.00 2 of 3" in printed and "FastCUT-L5 - CycleGAN 0.00 ± 1.41 1 of 2" in printed
    assert Image.open(out / "study.png").width > 600


def test_a_damaged_evaluation_is_one_line(out):
    path = out / "seed1" / "segmenters" / "clada" / "evaluation.json"
    path.write_text(path.read_text()[:50])
    result = run(sys.executable, ROOT / "tools" / "study.py", out, "--seeds")
    assert result.returncode == 2 and str(path) in result.stderr and result.stderr.count("\n") == 1
