"""evaluate.py: scores against hand-made confusion matrices and a plain loop; tables."""

import math

import pytest
import torch

import data
import evaluate


def test_scores_of_a_confusion_made_by_hand():
    # Truth: 4 pixels of class 0, 6 of class 1, none of class 2, which is predicted once.
    result = evaluate.scores(torch.tensor([[3, 1, 0], [2, 3, 1], [0, 0, 0]]))
    assert result["iou"][:2].tolist() == pytest.approx([3 / 6, 3 / 7])
    assert math.isnan(result["iou"][2])  # absent from the truth: counts in no mean
    assert result["miou"] == pytest.approx((3 / 6 + 3 / 7) / 2)
    assert result["fwiou"] == pytest.approx((4 * 3 / 6 + 6 * 3 / 7) / 10)
    assert result["pixel_accuracy"] == pytest.approx(6 / 10)


def test_a_class_of_the_truth_never_predicted_counts_as_zero():
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


def row(miou, **iou):
    return {"mIoU": miou} | dict.fromkeys(data.CLASS_NAMES, "10.00") | iou


def test_table3_is_the_recovered_part():
    rows = evaluate.table3(
        row("20.00", car="30.00", train="", bus="50.00"),
        row("30.00", car="70.00", train="", bus="60.00"),
        row("45.00", car="60.00", train="", bus="40.00"),
    )
    table = {r["class"]: r for r in rows}
    assert list(table) == [*data.CLASS_NAMES, "mIoU"]
    assert table["mIoU"] == {"class": "mIoU", "source_gap": "25.00", "clada_gap": "15.00", "recovered": "40.0"}
    assert table["car"]["recovered"] == "133.3"  # above the Oracle
    assert table["train"] == {"class": "train", "source_gap": "", "clada_gap": "", "recovered": ""}
    assert table["bus"]["recovered"] == "" and table["bus"]["source_gap"] == "-10.00"  # no gap to recover
