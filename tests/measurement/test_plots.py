import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.structures import Boxes, BoxMode, Instances

from deqdet.drawing import arrange
from deqdet.errors import UserError
from deqdet.measurement.plots import MARGIN, contact_sheet, draw_pair, plot_curves, plot_losses, plot_residuals


@pytest.fixture
def pair(tmp_path):
    """A grey image with one true box at the left; two detections at the right, one of them below the threshold.

    The names of the classes would be wrong formulas to matplotlib.
    """
    file_name = str(tmp_path / "grey.png")
    cv2.imwrite(file_name, np.full((60, 80, 3), 128, np.uint8))
    annotation = {"bbox": [4, 20, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    detections = Instances((60, 80))
    detections.pred_boxes = Boxes(torch.tensor([[50.0, 20.0, 70.0, 40.0], [4.0, 20.0, 24.0, 40.0]]))
    detections.scores = torch.tensor([0.9, 0.1])
    detections.pred_classes = torch.tensor([1, 0])
    record = {"file_name": file_name, "height": 60, "width": 80, "annotations": [annotation]}
    return draw_pair(record, detections, ["$_$", "$_$ right"], width=160, threshold=0.5)


def drawn_columns(half: np.ndarray) -> tuple[int, int]:
    """The first and last column in which the grey was drawn over, in rows of the box below its label."""
    columns = np.abs(half[62:75].astype(int) - 128).max(axis=(0, 2)).nonzero()[0]
    return columns.min(), columns.max()


def test_pair_shows_truth_left_and_sure_detections_right(pair):
    assert pair.shape == (120, 2 * 160 + MARGIN, 3)
    left, right = drawn_columns(pair[:, :160]), drawn_columns(pair[:, 160 + MARGIN :])
    assert left == pytest.approx((2 * 4, 2 * 24), abs=4)  # the image is drawn at twice its size
    assert right == pytest.approx((2 * 50, 2 * 70), abs=4)


def test_sheet_holds_every_pair(pair, tmp_path):
    path = tmp_path / "sheet.png"
    contact_sheet([pair] * 3, columns=2, path=path)
    sheet = cv2.imread(str(path))[:, :, ::-1]
    places = [(26, 0), (26, pair.shape[1] + 3 * MARGIN), (26 + pair.shape[0] + 3 * MARGIN, 0)]
    for y, x in places:
        assert np.array_equal(sheet[y : y + pair.shape[0], x : x + pair.shape[1]], pair)
    assert (sheet[places[2][0] :, places[1][1] :] == 255).all()  # no fourth one


def test_a_sheet_that_cannot_be_written(pair, tmp_path):
    with pytest.raises(UserError, match="nowhere/sheet.png cannot be written"):
        contact_sheet([pair], columns=2, path=tmp_path / "nowhere" / "sheet.png")


def test_plots_draw_what_they_are_given(tmp_path):
    """Both plots differ from those of other data, and of the same data do not."""
    for name, values in {"a": (3.0, 2.0), "b": (3.0, 1.0)}.items():
        lines = [{"iteration": i, "total_loss": v, "loss_cls_init": v, "lr": 1.0} for i, v in enumerate(values)]
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, [*lines, {"iteration": 1, "bbox/AP": 1.0}])))
        plot_losses(tmp_path / f"{name}.json", tmp_path / f"loss_{name}.png")
        plot_residuals(torch.tensor(values)[:, None].expand(2, 4), tmp_path / f"residual_{name}.png")
    for kind in ("loss", "residual"):
        pictures = [cv2.imread(str(tmp_path / f"{kind}_{name}.png")) for name in "ab"]
        assert pictures[0].shape == (480, 840, 3)
        assert (pictures[0] != pictures[1]).any()


def test_a_later_run_replaces_the_iterations_that_it_repeats(tmp_path):
    """metrics.json is appended to: two runs in it give the picture of the second alone."""
    lines = {name: [{"iteration": i, "total_loss": 1, "loss_cls_init": v} for i, v in enumerate(values)]
             for name, values in {"first": (5.0, 4.0, 3.0), "second": (2.0, 1.0, 0.5)}.items()}
    for name, content in {"both": lines["first"] + lines["second"], "second": lines["second"]}.items():
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, content)))
        plot_losses(tmp_path / f"{name}.json", tmp_path / f"{name}.png")
    both, second = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("both", "second"))
    assert np.array_equal(both, second)


def test_curves_show_losses_and_every_ap(tmp_path, monkeypatch):
    """Of two sets, of which one is evaluated later; a NaN is left out."""
    drawn = {}
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **more: drawn.update({more["label"]: (x, y)}))
    lines = [
        {"iteration": 1, "total_loss": 5.0, "loss_cls_init": 1.0},
        {"iteration": 2, "a/bbox/AP": 10.0, "a/bbox/AP-cat": 3.0, "a/bbox/AP75": 3.0, "a/bbox/AP50": float("nan")},
        {"iteration": 3, "total_loss": 4.0, "validation/total_loss": 6.0, "a/bbox/AP": 20.0, "b/bbox/AP50": 30.0},
    ]
    plot_curves(lines, tmp_path / "curves.png")
    assert drawn == {"total loss": ([1, 3], [5.0, 4.0]), "validation/total loss": ([3], [6.0]),
                     "a/AP": ([2, 3], [10.0, 20.0]), "b/AP50": ([3], [30.0])}  # fmt: skip
    monkeypatch.undo()
    pictures = []
    for name in "xy":
        plot_curves(lines[: 2 if name == "x" else 3], tmp_path / f"{name}.png")
        pictures.append(cv2.imread(str(tmp_path / f"{name}.png")))
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr("deqdet.measurement.plots.save_figure", lambda figure, path: figures.append(figure))
        plot_curves(lines, tmp_path / "curves.png")
    for axes in figures[0].axes:
        assert all(tick == round(tick) for tick in axes.get_xticks())
    assert pictures[0].shape == (480, 1320, 3) and (pictures[0] != pictures[1]).any()
    plot_curves([], tmp_path / "none.png")
    assert cv2.imread(str(tmp_path / "none.png")).std() > 5


def test_pictures_are_arranged_in_rows():
    """A row is as high as its highest picture; narrower ones stand at the left of their column."""
    red, green, blue = (Image.new("RGB", size, colour) for size, colour in (
        ((4, 2), "red"), ((3, 5), "green"), ((4, 1), "blue")))  # fmt: skip
    sheet = np.asarray(arrange([red, green, blue], columns=2, width=4, gap=3))
    want = np.full((5 + 3 + 1, 4 + 3 + 4, 3), 255)
    want[:2, :4], want[:5, 7:10], want[8:, :4] = (255, 0, 0), (0, 128, 0), (0, 0, 255)
    assert (sheet == want).all()
    assert arrange([red], columns=4, width=4, gap=3).size == (4, 2)
