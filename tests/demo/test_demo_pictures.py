"""What the demo draws: detections, the refinement step by step, residuals."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from deqdet.decoders.trajectory import ResidualParts
from deqdet.demo.animation import GIF_SIDE, PANEL_SIDE, build_scene, write_gif, write_strip
from deqdet.demo.refinement import Refinement, plot_convergence, trace_refinement
from deqdet.detections import Detections
from deqdet.drawing import class_colours, enlarge, separate_labels
from deqdet.equilibrium import relative_residual
from deqdet.structures import QueryState

NAMES = ["red", "green", "blue"]


def instances(boxes: list[list[float]], labels: list[int], height: int, width: int) -> Instances:
    found = Instances((height, width), pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
    found.scores, found.pred_classes = torch.full((len(labels),), 0.9), torch.tensor(labels, dtype=torch.int64)
    return found


def detections(found: Instances) -> Detections:
    return Detections(found, tuple(NAMES), steps=1, residual=None)


def coloured(picture: np.ndarray, label: int, tolerance: int = 1) -> np.ndarray:
    """(n, 2): rows and columns of the pixels that have a class's colour."""
    colour = np.rint(255 * np.array(class_colours(len(NAMES))[label]))
    return np.argwhere((np.abs(picture.astype(int) - colour) <= tolerance).all(axis=2))


class TestDrawing:
    def test_boxes_lie_where_they_should_in_the_colour_of_their_class(self):
        """In a picture twice as large as the image that they were found in."""
        grey = np.full((400, 600, 3), 128, np.uint8)
        found = instances([[50.0, 60.0, 100.0, 150.0], [150.0, 100.0, 250.0, 180.0]], [0, 2], 200, 300)
        picture = detections(found).draw(grey, enlarge=False)
        assert picture.shape == grey.shape
        for label, (x0, y0, x1, y1) in ((0, (100, 120, 200, 300)), (2, (300, 200, 500, 360))):
            rows, columns = coloured(picture, label).T
            assert (columns.min(), columns.max()) == pytest.approx((x0, x1), abs=2)
            assert (rows.min(), rows.max()) == pytest.approx((y0, y1), abs=2)
        assert not len(coloured(picture, 1))
        outside = np.concatenate([picture[:90].ravel(), picture[370:].ravel()])
        assert (outside == 128).all()  # the labels are in the boxes

    def test_without_detections_the_image_stays_as_it_is(self):
        image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        assert np.array_equal(detections(instances([], [], 60, 80)).draw(image, enlarge=False), image)

    def test_a_name_is_never_a_formula(self):
        """A lone $ in a name would be one's beginning: matplotlib raises an error."""
        grey, found = np.full((100, 100, 3), 128, np.uint8), instances([[20.0, 30.0, 90.0, 90.0]], [0], 100, 100)
        Detections(found, (r"a$\frac$b",), 1, None).draw(grey)

    @pytest.mark.parametrize("size, expected", [
        ((1, 1), (16, 16)), ((160, 160), (640, 640)), ((100, 320), (200, 640)), ((480, 640), (480, 640)),
        ((3000, 4000), (3000, 4000)),
    ])  # fmt: skip
    def test_small_images_are_enlarged(self, size, expected):
        assert enlarge(np.zeros((*size, 3), np.uint8)).shape == (*expected, 3)

    def test_colours_differ(self):
        colours = np.array(class_colours(8))
        assert colours.min() >= 0.15 - 1e-6 and colours.max() <= 1
        distances = np.abs(colours[:, None] - colours).sum(axis=2) + 10 * np.eye(8)
        assert distances.min() > 0.3

    def test_labels_stay_in_the_image_and_off_each_other(self):
        visualizer = Visualizer(np.zeros((100, 200, 3), np.uint8))
        corners = [(0, 0), (190, 90), (195, 2), (-3, 97)]
        places = [(120, 50), *corners, *[(60, 40)] * 5, (65, 44)]
        for place in places:
            visualizer.draw_text("label 99%", place, font_size=6, horizontal_alignment="left")
        separate_labels(visualizer.output)
        labels, renderer = visualizer.output.ax.texts, visualizer.output.canvas.get_renderer()
        assert labels[0].get_position() == (120, 50) and labels[5].get_position() == (60, 40)  # nothing is in their way
        positions = np.array([label.get_position() for label in labels])
        sizes = np.array([label.get_window_extent(renderer).size for label in labels])
        assert len(labels) == len(places) and sizes.min() > 5
        assert (positions >= 0).all() and (positions + sizes <= [200, 100]).all()
        for i in range(len(labels)):
            for j in range(i):
                assert (np.abs(positions[i] - positions[j]) >= sizes[i]).any(), (i, j)

    def test_all_labels_can_be_read(self):
        """Detections of one place have their labels beside each other, and one at the border has its whole label."""
        grey = np.full((200, 300, 3), 128, np.uint8)

        def dark_pixels(*boxes: list[float]) -> int:
            picture = detections(instances(list(boxes), [0] * len(boxes), 200, 300)).draw(grey, enlarge=False)
            return int((picture.max(axis=2) < 40).sum())

        box, narrow, at_the_border = (
            [x0, 60.0, x1, 150.0] for x0, x1 in ((50.0, 150.0), (140.0, 159.0), (280.0, 299.0))
        )
        one = dark_pixels(box)
        assert one > 200
        assert dark_pixels(box, box) == pytest.approx(2 * one, rel=0.1)
        assert dark_pixels(at_the_border) == pytest.approx(dark_pixels(narrow), rel=0.1)

    def test_labels_are_not_moved_far(self):
        """Where one label is in the way, the next one is directly above or below it."""
        visualizer = Visualizer(np.zeros((100, 200, 3), np.uint8))
        for _ in range(2):
            visualizer.draw_text("label", (60, 40), font_size=6, horizontal_alignment="left")
        separate_labels(visualizer.output)
        first, second = visualizer.output.ax.texts
        height = first.get_window_extent(visualizer.output.canvas.get_renderer()).height
        assert height <= abs(second.get_position()[1] - first.get_position()[1]) <= height + 3


def rows(found: Instances) -> list[list[float]]:
    """x0, y0, x1, y1, score, class of each."""
    columns = [found.pred_boxes.tensor, found.scores[:, None], found.pred_classes[:, None].float()]
    return torch.cat(columns, dim=1).tolist()


def trace(model, inputs: dict, threshold: float) -> Refinement:
    """Of a model in eval mode, along its own number of steps."""
    walk = model.walk([inputs], record=range(model.decoder.test_steps + 1), record_iterates=True)
    return trace_refinement(walk, threshold)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Grey, from dark to bright."""
    return np.broadcast_to(np.arange(20, 212, dtype=np.uint8)[None, :, None], (128, 192, 3)).copy()


@pytest.fixture(scope="module")
def inputs(image) -> dict:
    """The image at half its size."""
    small = torch.from_numpy(cv2.resize(image, (96, 64))).permute(2, 0, 1).float()
    return {"image": small, "height": 128, "width": 192}


@pytest.fixture(scope="module")
def refinement(small_model, inputs) -> Refinement:
    return trace(small_model().eval(), inputs, 0.0)


def moving(steps: int = 12) -> Refinement:
    """One query of class 1 that wanders right by 5 px a step, seen from step 3 on, and one that is never seen."""
    x = 20 + 5.0 * torch.arange(steps + 1)
    boxes = torch.stack([torch.stack([x, x * 0 + 30, x + 40, x * 0 + 90], dim=1), torch.zeros(steps + 1, 4)], dim=1)
    scores = torch.zeros(steps + 1, 2, 3)
    scores[3:, 0, 1] = 0.8
    return Refinement(
        image_size=(128, 192),
        initial_boxes=torch.tensor([[0.0, 0.0, 192.0, 128.0]] * 2),
        boxes=boxes,
        scores=scores,
        detected=torch.tensor([[0, 1]]),
        residuals=0.5 ** torch.arange(1.0, steps + 1),
        shown=0.5 ** torch.arange(1.0, steps + 1),
        parts=ResidualParts(*(torch.full((steps,), value) for value in (0.3, 0.2, 0.1))),
        shifts=torch.full((steps, 2), 3.5),
    )


class TestTrace:
    def test_the_last_step_is_the_prediction(self, small_model, inputs):
        """With every solver, also one that stops early or gives its best state."""
        for expected_steps, overrides in (
            (4, []),
            (4, ["MODEL.DEQDET.SOLVER.NAME", "Anderson", "MODEL.DEQDET.SOLVER.RETURN_BEST", True]),
            (3, ["MODEL.DEQDET.SOLVER.RTOL", 0.35, "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 9]),
        ):
            model = small_model(*overrides).eval()
            with torch.no_grad():
                (found,) = model([inputs])
            threshold = found["instances"].scores[2:4].mean().item()
            sure = found["instances"][:3]
            traced = trace(model, inputs, threshold)
            assert traced.steps == int(found["steps"]) == expected_steps
            best = {}  # a query may be detected as several classes, at one place; the best one comes first
            for *box, score, label in rows(sure):
                best.setdefault(tuple(box), (score, label))
            expected = torch.tensor([(*box, *rest) for box, rest in best.items()])
            queries, labels = traced.detected.T
            boxes = torch.minimum(traced.boxes[-1, queries].clamp(min=0), torch.tensor([192.0, 128.0]).repeat(2))
            scores = traced.scores[-1, queries, labels]
            got = torch.cat([boxes, scores[:, None], labels[:, None].float()], dim=1)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)

    def test_the_path_and_its_residuals(self, small_model, inputs, refinement):
        """Plain iteration: a step starts from what the step before came to."""
        model = small_model().eval()
        with torch.no_grad():
            features, initial = model.encode(model.preprocess([inputs]))
            states = [model.decoder.initialize(initial, features)]
            for _ in range(4):
                states.append(model.decoder.refinement(states[-1], features))
        boxes = [2 * model.decoder.refinement.predict(state).boxes[0] for state in states]
        assert refinement.steps == 4 and refinement.image_size == (128, 192)
        torch.testing.assert_close(refinement.boxes, torch.stack(boxes), rtol=0, atol=1e-3)
        whole = torch.tensor([[0.0, 0.0, 192.0, 128.0]]).expand(6, 4)
        torch.testing.assert_close(refinement.initial_boxes, whole, rtol=0, atol=1e-3)
        first = model.decoder.initialization.predict(states[0]).logits[0].sigmoid()
        torch.testing.assert_close(refinement.scores[0], first, rtol=0, atol=1e-5)
        for t in range(4):
            change = states[t + 1].content - states[t].content
            assert refinement.parts.content_norm[t] == pytest.approx(change.square().sum().sqrt().item(), rel=1e-3)
            ratio = change.norm() / states[t + 1].content.norm()
            assert refinement.parts.content[t] == pytest.approx(ratio.item(), rel=1e-3)
            packed = relative_residual(states[t].pack(), states[t + 1].pack())
            assert refinement.residuals[t] == pytest.approx(packed.item(), rel=1e-3)
            units = torch.tensor([1024.0, 1024.0, 8.0, 8.0])
            value, result = states[t].position / units, states[t + 1].position / units
            assert refinement.parts.position[t] == pytest.approx(
                ((result - value).norm() / result.norm()).item(), rel=1e-3
            )
            limits = torch.tensor([192.0, 128.0, 192.0, 128.0])
            shift = torch.minimum(boxes[t + 1].clamp(min=0), limits) - torch.minimum(boxes[t].clamp(min=0), limits)
            torch.testing.assert_close(refinement.shifts[t], shift.square().mean(dim=1).sqrt(), rtol=1e-3, atol=1e-3)

    def test_the_best_state_has_its_own_residual(self, small_model, inputs, monkeypatch):
        """A third step that goes wrong: its boxes are not shown, and the residual is that of the boxes that are."""
        model = small_model("MODEL.DEQDET.SOLVER.RETURN_BEST", True).eval()
        forward, calls = model.decoder.refinement.forward, []

        def jump(state, features):
            calls.append(state)
            image = forward(state, features)
            return QueryState(image.position, -9 * image.content) if len(calls) == 3 else image

        monkeypatch.setattr(model.decoder.refinement, "forward", jump)
        traced = trace(model, inputs, 0.0)
        assert traced.residuals[2] > traced.residuals[1] == traced.shown[1] == traced.shown[2]
        assert torch.equal(traced.boxes[3], traced.boxes[2]) and not torch.equal(traced.boxes[2], traced.boxes[1])

    def test_a_later_step_that_becomes_infinite(self, small_model, inputs, monkeypatch):
        """The boxes of the step before stay, and so does their residual."""
        model = small_model().eval()
        forward, calls = model.decoder.refinement.forward, []

        def break_off(state, features):
            calls.append(state)
            output = forward(state, features)
            return QueryState(output.position, torch.inf * output.content) if len(calls) == 3 else output

        monkeypatch.setattr(model.decoder.refinement, "forward", break_off)
        traced = trace(model, inputs, 0.0)
        assert traced.steps == 3 and not traced.residuals[2].isfinite()
        assert traced.shown[2] == traced.shown[1] == traced.residuals[1]
        assert torch.equal(traced.boxes[3], traced.boxes[2])

    def test_without_an_initialization_layer(self, small_model, inputs):
        """Step 0 is then the initial queries themselves."""
        traced = trace(small_model("MODEL.DEQDET.EQUILIBRIUM.USE_INIT_LAYER", False).eval(), inputs, 0.0)
        torch.testing.assert_close(traced.boxes[0], traced.initial_boxes, rtol=0, atol=1e-4)
        assert traced.steps == 4

    def test_a_query_is_followed_once(self, small_model, inputs, refinement):
        """Its best class; each of the 6 queries has 3, and all 18 pairs would pass the threshold."""
        model = small_model("TEST.DETECTIONS_PER_IMAGE", 18).eval()
        detected = trace(model, inputs, 0.0).detected
        scores, labels = refinement.scores[-1].max(dim=1)
        order = scores.argsort(descending=True)
        assert detected.tolist() == [[q, int(labels[q])] for q in order.tolist()]

    def test_a_state_that_becomes_infinite(self, small_model, inputs, tmp_path, image):
        """Its last finite value is kept, and the pictures are drawn."""
        model = small_model().eval()
        with torch.no_grad():
            for parameter in model.decoder.refinement.parameters():
                parameter.fill_(float("nan"))
        traced = trace(model, inputs, 0.0)
        assert traced.boxes.isfinite().all() and traced.steps == 1
        write_strip(build_scene(image, traced, NAMES, 0.0, PANEL_SIDE), tmp_path / "strip.png")
        plot_convergence(traced, "broken", 0.0).savefig(tmp_path / "plot.png")


class TestAnimation:
    def test_gif(self, tmp_path, image):
        """The box moves from frame to frame, dashed before step 3, and the picture below it stays."""
        write_gif(build_scene(image, moving(), NAMES, 0.5, GIF_SIDE), tmp_path / "x.gif")
        with Image.open(tmp_path / "x.gif") as gif:
            assert gif.n_frames == 14 and gif.info["loop"] == 0
            frames, durations = [], []
            for index in range(14):
                gif.seek(index)
                durations.append(gif.info["duration"])
                frames.append(np.array(gif.convert("RGB")))
        assert frames[0].shape[1] == 640
        assert durations[-1] == max(durations) and durations[-1] > 2 * durations[-2]
        scale, top = 640 / 192, 24
        for step in (3, 7, 12):
            places = coloured(frames[step + 1][: top + 426], 1)
            assert places[:, 1].min() == pytest.approx(scale * (20 + 5 * step), abs=3)
            assert places[:, 1].max() == pytest.approx(scale * (60 + 5 * step), abs=3)
            assert places[:, 0].min() == pytest.approx(top + scale * 30, abs=3)
        solid, dashed = (len(coloured(frames[step + 1][: top + 426], 1)) for step in (3, 2))
        assert 0.4 * solid < dashed < 0.9 * solid
        titles = [frame[:top] for frame in frames]
        assert all((a != b).any() for a, b in zip(titles, titles[1:], strict=False))
        corner = (slice(top, top + 40), slice(500, 600))  # no box comes there but the initial one, on the border
        assert all(np.array_equal(frame[corner][4:], frames[1][corner][4:]) for frame in frames[1:])

    @pytest.mark.parametrize("steps, panels", [(1, 2), (3, 4), (10, 6), (12, 7), (200, 7)])
    def test_strip(self, tmp_path, image, steps, panels):
        write_strip(build_scene(image, moving(steps), NAMES, 0.5, PANEL_SIDE), tmp_path / "x.png")
        strip = cv2.imread(str(tmp_path / "x.png"))[:, :, ::-1]
        assert strip.shape == (2 * 24 + 171 + 24, panels * (256 + 8) - 8, 3)
        shown = [0, 1, 2, 3, 5, 10, steps][:panels] if steps > 10 else [t for t in (0, 1, 2, 3, 5, 10) if t <= steps]
        for index, step in enumerate(shown):
            panel = strip[48 : 48 + 171, index * 264 : index * 264 + 256]
            left = min(256 / 192 * (20 + 5 * step), 254)
            assert coloured(panel, 1, tolerance=90)[:, 1].min() == pytest.approx(left, abs=3)

    @pytest.mark.parametrize("size", [(1, 1), (40, 800), (900, 30)])
    def test_odd_sizes(self, tmp_path, size):
        """The text has its place beside any image."""
        image = np.full((*size, 3), 200, np.uint8)
        traced = replace(moving(2), image_size=size)
        write_gif(build_scene(image, traced, NAMES, 0.5, GIF_SIDE), tmp_path / "x.gif")
        write_strip(build_scene(image, traced, NAMES, 0.5, PANEL_SIDE), tmp_path / "x.png")
        with Image.open(tmp_path / "x.gif") as gif, Image.open(tmp_path / "x.png") as strip:
            assert 340 <= gif.width <= 640
            assert strip.width >= 3 * 210

    def test_no_detection(self, tmp_path, image):
        """One frame a step all the same, without a box."""
        traced = replace(moving(), detected=torch.zeros(0, 2, dtype=torch.int64))
        write_gif(build_scene(image, traced, NAMES, 0.5, GIF_SIDE), tmp_path / "x.gif")
        with Image.open(tmp_path / "x.gif") as gif:
            assert gif.n_frames == 14
        plot_convergence(traced, "a$^$b", 0.0).savefig(tmp_path / "x.png")  # a name is never a formula


def test_the_plot_shows_the_residuals():
    falling = 0.7 ** torch.arange(1.0, 13)
    traced = replace(
        moving(),
        parts=ResidualParts(content=2 * falling, position=3 * falling, content_norm=10 * falling),
        residuals=4 * falling,
        shifts=torch.stack([3 * falling, 4 * falling], dim=1),
    )
    absolute, relative = plot_convergence(traced, "title", 0.05).axes
    lines = {line.get_label(): line.get_xydata() for axes in (absolute, relative) for line in axes.lines}
    rtol = lines.pop("rtol = 0.05")
    assert (rtol[:, 1] == 0.05).all()
    # Root mean squares: of 3 and 4 over both boxes, 3 of the first, the one that is detected.
    for (label, line), factor in zip(lines.items(), [10, 12.5**0.5, 3, 2, 3, 4], strict=True):
        assert line[:, 0].tolist() == list(range(1, 13)), label
        assert line[:, 1] == pytest.approx(factor * falling.numpy(), rel=1e-5), label
    assert absolute.get_yscale() == relative.get_yscale() == "log"
    assert "px" in list(lines)[1] and "px" in list(lines)[2]
    assert list(lines)[3:] == ["content", "position (packing units)", "both together, compared with rtol"]
