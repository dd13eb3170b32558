"""The recipes of docs/export.md, run as they stand there but for paths and sizes."""

import re

import numpy as np
import pytest
import torch
from commands import ROOT

import models

EXPORT, RUN = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)
GENERATOR, UNET = (lambda: models.ResnetGenerator(base_channels=4)), (lambda: models.UNet(5, "efficientnet-b0"))


def demo_generator():
    generator = models.ResnetGenerator(base_channels=4, antialias=True, residual=True)
    torch.nn.init.normal_(generator.head.weight, 0.0, 0.02)  # zero at first
    return generator


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "multiple", "shapes"),
    [
        (GENERATOR, 4, [(2, 36, 44)]),
        (demo_generator, 4, [(1, 36, 44), (3, 64, 20)]),
        (GENERATOR, 4, [(1, 36, 44), (3, 64, 20)]),
        (UNET, 32, [(1, 64, 96)]),
        pytest.param(UNET, 32, [(1, 64, 96), (3, 96, 32)], marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_computes_what_we_do(make, multiple, shapes, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    network = make().eval()
    torch.save(models.network_state(network, 64), "weights.pt")
    recipe = re.sub(r'"runs/demo/translators/fastcut_l5"\), 4', f'"weights.pt"), {multiple}', EXPORT)
    assert recipe != EXPORT
    if len(shapes) == 1:
        batch, height, width = shapes[0]
        recipe = recipe.replace(", dynamic_shapes=sizes", "")
        recipe = re.sub("torch.rand(.*)", f"torch.rand({batch}, 3, {height}, {width})", recipe)
    exec(recipe, {})
    for batch, height, width in shapes:
        images = torch.rand(batch, 3, height, width)
        names = {}
        exec(RUN.replace("torch.rand(1, 3, 256, 512)", "images"), {"images": images, "torch": torch}, names)
        with torch.inference_mode():
            expected = network(images).numpy()
        assert np.abs(names["output"] - expected).max() < 1e-4 * max(1, np.abs(expected).max())
