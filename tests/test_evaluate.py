"""evaluate.py: scores compared with cityscapesscripts, hand-made confusion matrices and a plain loop; rows and --skip-done."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from commands import table
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from scipy.ndimage import map_coordinates

import data
import evaluate
import models

EVALUATED = [c.id for c in data.CLASSES]  # label ids
EVERY_ID = list(range(34))
OPTIONS = types.SimpleNamespace(**vars(official.args) | {"evalInstLevelScore": False, "JSONOutput": False, "quiet": True})


def assert_equal_scores(pairs, folder):
    """Score files of (predicted, true) label ids by cityscapesscripts, and by data.py and evaluate.py."""
    names, total = [[], []], 0
    for i, pair in enumerate(pairs):
        for kind, ids, listed in zip(("pred", "gt"), pair, names):
            listed.append(str(folder / f"{kind}{i}.png"))
            Image.fromarray(ids).save(listed[-1])
        prediction, label = (data.load_label(listed[-1]).as_subclass(torch.Tensor) for listed in names)
        total += evaluate.confusion_matrix(prediction, label)
    ours, theirs = evaluate.scores(total), official.evaluateImgLists(*names, OPTIONS)

    # Pixels by label id; void is not part of the truth. Classes as cityscapesscripts defines them.
    confusion = np.array(theirs["confMatrix"])[EVALUATED]
    in_truth, predicted = confusion.sum(1) > 0, confusion.sum(0)[EVALUATED] > 0
    means = {}
    for i, (name, iou) in enumerate(zip(data.CLASS_NAMES, ours["iou"].tolist())):
        if in_truth[i]:
            means[name] = theirs["classScores"][name]
            assert iou == pytest.approx(means[name], abs=1e-9), name
        else:  # the one difference: a class that is only predicted counts as 0 for them, as absent for us
            expected = 0 if predicted[i] else math.nan
            assert math.isnan(iou) and theirs["classScores"][name] == pytest.approx(expected, nan_ok=True), name
    assert ours["miou"] == pytest.approx(official.getScoreAverage(means, OPTIONS), abs=1e-9, nan_ok=True)
    if in_truth.any():
        weights = confusion.sum(1) / confusion.sum()
        fwiou = sum(weight * means[name] for name, weight in zip(data.CLASS_NAMES, weights) if weight > 0)
        accuracy = confusion[:, EVALUATED].trace() / confusion.sum()
        assert (ours["fwiou"], ours["pixel_accuracy"]) == pytest.approx((fwiou, accuracy), abs=1e-9)


def ids_of(choices, seed, shape=(2, 24, 40), block=1):
    """Random maps of the label ids in `choices`, constant over blocks."""
    small = np.random.default_rng(seed).choice(choices, (shape[0], *(side // block for side in shape[1:]))).astype(np.uint8)
    return small.repeat(block, 1).repeat(block, 2)


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize(
    ("in_prediction", "in_truth"),
    [
        (EVALUATED, EVALUATED),
        (EVALUATED, EVERY_ID),  # void in the truth
        (EVALUATED, [*EVALUATED[:7], *EVERY_ID[:7]]),  # classes missing from the truth,
        (EVALUATED[5:9], EVERY_ID),  # from the prediction,
        (EVALUATED[:12], [*EVALUATED[4:14], 0, 9]),  # from either and from both
        ([26], [26]),
        (EVALUATED, [0, 4, 29]),  # nothing but void
    ],
)
def test_scores_equal_cityscapesscripts(tmp_path, in_prediction, in_truth, block):
    assert_equal_scores(list(zip(ids_of(in_prediction, 1, block=block), ids_of(in_truth, 2, block=block))), tmp_path)


@pytest.mark.parametrize("wrong", [0, 0.05, 1])
def test_scores_of_mostly_right_predictions_equal_cityscapesscripts(tmp_path, wrong):
    truth = ids_of(EVERY_ID, 3, block=4)
    guess = ids_of(EVALUATED, 4)
    right = np.isin(truth, EVALUATED) & (np.random.default_rng(5).random(truth.shape) >= wrong)
    assert_equal_scores(list(zip(np.where(right, truth, guess), truth)), tmp_path)


@st.composite
def small_pairs(draw):
    shape = draw(array_shapes(min_dims=2, max_dims=2, max_side=9))
    return [draw(arrays(np.uint8, shape, elements=st.sampled_from(ids))) for ids in (EVALUATED, EVERY_ID)]


@given(pair=small_pairs())
def test_any_scores_equal_cityscapesscripts(tmp_path_factory, pair):
    assert_equal_scores([pair], tmp_path_factory.getbasetemp())


@given(arrays(np.int64, (6, 6), elements=st.integers(0, 10**6)), st.permutations(range(6)))
def test_scores_do_not_depend_on_the_order_of_classes(confusion, order):
    a = evaluate.scores(torch.from_numpy(confusion))
    b = evaluate.scores(torch.from_numpy(confusion[np.ix_(order, order)]))
    np.testing.assert_allclose(a["iou"][list(order)], b["iou"])
    for name in ("miou", "fwiou", "pixel_accuracy"):
        assert a[name] == pytest.approx(b[name], nan_ok=True) and not (a[name] < 0 or a[name] > 1)


def test_scores_of_a_confusion_made_by_hand():
    # Truth: 4 pixels of class 0, 6 of class 1, none of class 2, which is predicted once.
    result = evaluate.scores(torch.tensor([[3, 1, 0], [2, 3, 1], [0, 0, 0]]))
    assert result["iou"][:2].tolist() == pytest.approx([3 / 6, 3 / 7])
    assert math.isnan(result["iou"][2])  # absent from the truth: left out of the means
    assert result["miou"] == pytest.approx((3 / 6 + 3 / 7) / 2)
    assert result["fwiou"] == pytest.approx((4 * 3 / 6 + 6 * 3 / 7) / 10)
    assert result["pixel_accuracy"] == pytest.approx(6 / 10)


def test_a_class_that_is_never_predicted_counts_as_zero():
    result = evaluate.scores(torch.tensor([[4, 0], [3, 0]]))
    assert result["iou"].tolist() == pytest.approx([4 / 7, 0]) and result["miou"] == pytest.approx(2 / 7)


def test_confusion_matrix_is_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(5, (7, 9), generator=generator)
    label = torch.randint(6, (7, 9), generator=generator).to(torch.uint8)
    label[label == 5] = 255
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for p, t in zip(prediction.flatten().tolist(), label.flatten().tolist()):
        if t != 255:
            expected[t, p] += 1
    assert torch.equal(evaluate.confusion_matrix(prediction, label, num_classes=5), expected)


def test_confusion_matrix_refuses_what_it_would_miscount():
    with pytest.raises(ValueError, match="shape"):
        evaluate.confusion_matrix(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="prediction holds"):
        evaluate.confusion_matrix(torch.full((2, 2), 19), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="label holds"):
        evaluate.confusion_matrix(torch.zeros(2, 2), torch.full((2, 2), 19))


@pytest.mark.parametrize("size", [(6, 8), (12, 16), (13, 9)])
def test_logits_are_resized_bilinearly_before_argmax(size):
    """Pixel centres are aligned: output i of n samples (i + 1/2) * side / n - 1/2, clamped at the borders."""
    logits = torch.randn(1, 3, 6, 8)
    image = torch.randint(256, (3, 6, 8), dtype=torch.uint8)

    def segmenter(x):
        torch.testing.assert_close(x, image[None] / 255)  # what the UNet takes
        return logits

    prediction = evaluate.predict(segmenter, image, size)
    places = [np.clip((np.arange(n) + 0.5) * side / n - 0.5, 0, side - 1) for n, side in zip(size, (6, 8))]
    grid = np.meshgrid(*places, indexing="ij")
    expected = np.stack([map_coordinates(c, grid, order=1) for c in logits[0].double().numpy()]).argmax(0)
    assert np.array_equal(prediction.numpy(), expected)


def test_a_row_is_in_percent_with_empty_cells_for_absent_classes():
    confusion = torch.zeros(19, 19, dtype=torch.int64)
    confusion[0, 0], confusion[0, 1], confusion[13, 13] = 1, 2, 5
    exact = evaluate.table_row("CUT", evaluate.scores(confusion))
    assert exact["mIoU"] == pytest.approx(200 / 3, rel=1e-12) and exact["train"] is None
    row = evaluate.rounded(exact)
    assert row.pop("model") == "CUT" and list(row) == [*evaluate.MEANS, *data.CLASS_NAMES]
    expected = {"mIoU": "66.67", "fwIoU": "75.00", "pixel_accuracy": "75.00", "road": "33.33", "car": "100.00"}
    assert {name: cell for name, cell in row.items() if cell != ""} == expected


def test_frames_resize_the_image_and_keep_the_labels_size(run):
    frame = data.list_frames(run.parent / "frames")[1]
    image, label = evaluate.read_frame(frame, 30)
    assert torch.equal(image, data.resize_to_width(data.load_image(frame.image), 30)) and image.shape == (3, 15, 30)
    assert torch.equal(label, data.load_label(frame.label)) and label.shape == (24, 48)


@pytest.fixture
def run(tmp_path):
    """A data set of two frames in the GTA5 layout, and a run whose network predicts road everywhere."""
    for part in ("images", "labels"):
        (tmp_path / "frames" / part).mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.full((24, 48, 3), 90 * i, np.uint8)).save(tmp_path / "frames" / "images" / f"{i}.png")
        label = np.full((24, 48), 26, np.uint8)  # car
        label[: 12 * i] = 7  # road in a quarter of all pixels
        Image.fromarray(label).save(tmp_path / "frames" / "labels" / f"{i}.png")
    segmenter = models.UNet(encoder="efficientnet-b0")
    segmenter.head.weight.data.zero_()
    segmenter.head.bias.data.copy_(torch.eye(19)[0])
    (tmp_path / "run").mkdir()
    torch.save(models.network_state(segmenter, 32), tmp_path / "run" / "weights.pt")
    return tmp_path / "run"


@pytest.fixture
def call(run, monkeypatch, capsys):
    """Call evaluate.py on that run with more words -> what it prints."""

    def call(*words):
        fixed = ["--segmenter", run, "--data", run.parent / "frames", "--device", "cpu", "--workers", "0"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, (*fixed, *words))])
        evaluate.main()
        return capsys.readouterr().out

    return call


ROAD = {"mIoU": "12.50", "fwIoU": "6.25", "pixel_accuracy": "25.00", "road": "25.00", "car": "0.00"}
DONE = "CLADA: already evaluated\n"


def test_an_evaluation_is_noted_in_its_run_and_not_repeated(call, run):
    assert call() == "run: mIoU 12.50, fwIoU 6.25, pixel_accuracy 25.00\n"
    assert json.loads((run / "evaluation.json").read_text())["row"]["model"] == "run"
    assert call("--skip-done", "--name", "CLADA") != DONE  # a row of another name
    row = json.loads((run / "evaluation.json").read_text())["row"]
    assert {column: cell for column, cell in evaluate.rounded(row).items() if cell} == {"model": "CLADA", **ROAD}
    assert call("--skip-done", "--name", "CLADA") == DONE
    assert call("--skip-done", "--name", "CLADA", "--precision", "bf16") != DONE
    assert call("--name", "CLADA", "--precision", "bf16") != DONE  # without --skip-done


def test_out_adds_or_replaces_a_row_and_leaves_the_evaluation(call, run):
    out = run.parent / "tables" / "t.csv"
    call("--name", "CLADA")
    for name in ("CLADA", "CUT", "CUT"):
        call("--name", name, "--out", out)
    rows = table(out)
    assert [row["model"] for row in rows] == ["CLADA", "CUT"] and list(rows[0]) == [*evaluate.COLUMNS, *data.CLASS_NAMES]
    assert {column: cell for column, cell in rows[1].items() if cell} == {"model": "CUT", **ROAD}
    assert call("--name", "CLADA", "--skip-done") == DONE


@pytest.mark.parametrize("flag", ["--out", "--save-predictions"])
def test_skip_done_is_refused_with_what_is_written_at_every_call(call, run, flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        call("--skip-done", flag, run.parent / "x")
    assert "--skip-done cannot be combined with" in capsys.readouterr().err


def test_out_must_be_a_table_of_scores_outside_the_data(call, run):
    (run / "log.csv").write_text("iteration,loss\n1,2.5\n")
    with pytest.raises(ValueError, match=r"log.csv: no column model, mIoU"):
        call("--out", run / "log.csv")
    with pytest.raises(OSError, match="directory"):
        call("--out", run)
    with pytest.raises(ValueError, match="--save-predictions .*frames.* only read"):
        call("--save-predictions", run.parent / "frames" / "p")
    assert not (run / "evaluation.json").exists()


def test_a_run_that_cannot_be_written_is_evaluated_into_a_table(call, run):
    (run / "evaluation.json").mkdir()
    with pytest.raises(OSError, match="evaluation.json"):
        call()
    call("--out", run.parent / "t.csv")
    assert table(run.parent / "t.csv")[0]["mIoU"] == "12.50"


ROW = dict.fromkeys((*evaluate.COLUMNS, *data.CLASS_NAMES), 1.0) | {"model": "CUT", "train": None}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        '{"frames"',
        '{"frames": ""}',
    ],
)
def test_an_evaluation_that_is_damaged_is_refused_by_name(call, run, content):
    (run / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=r"evaluation\.json: "):
        call("--skip-done")
