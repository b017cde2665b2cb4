"""A web page that shows the detections of an exported detector, and how they develop step by step.

    pip install 'gradio>=5' onnxruntime
    python examples/gradio_app.py detector.encoder.onnx [--port 7860]

The page takes an image from a file or a webcam. Three sliders set the steps, the tolerance and the minimum score. Below
the result, the boxes are shown after each step. detector.encoder.onnx and detector.step.onnx come from
tools/export_model.py --form two.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

RUNNER = Path(__file__).parents[1] / "projects" / "DEQDet" / "deqdet" / "export" / "runner.py"
COLORS = ((255, 220, 60), (90, 200, 255), (120, 240, 120), (255, 160, 60), (220, 160, 255), (90, 240, 220))
SMALLEST = 480  # pixels: the long side of a drawn picture is at least this long
LETTERS = 18  # pixels, the height of the labels


def load_runner(path: Path = RUNNER):
    """Import runner.py by its path, so that neither PyTorch nor the package is needed."""
    spec = importlib.util.spec_from_file_location("deqdet_runner", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def draw(image: np.ndarray, found) -> Image.Image:
    """Draw the detections on the image, in one colour per class; small images are enlarged first."""
    factor = max(1, -(-SMALLEST // max(image.shape[:2])))
    picture = Image.fromarray(image)
    picture = picture.resize((factor * picture.width, factor * picture.height))
    pen = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 200))
    for box, score, index, label in zip(found.boxes, found.scores, found.classes, found.labels, strict=True):
        color = COLORS[index % len(COLORS)]
        left, top, right, bottom = (factor * float(x) for x in box)
        pen.rectangle((left, top, right, bottom), outline=color, width=width)
        corner = (left + width, max(0.0, top - LETTERS))
        words = f"{label} {score:.2f}"
        pen.rectangle(pen.textbbox(corner, words, font_size=LETTERS), fill=color)
        pen.text(corner, words, fill=(0, 0, 0), font_size=LETTERS)
    return picture


def make_detect(detector):
    """Return the function that the page calls, for one detector."""

    def detect(image: np.ndarray | None, steps: float, rtol: float, threshold: float, solver: str):
        """Detect objects in one image.

        Returns:
            The picture of the last step, its detections as rows (class, score, x1, y1, x2, y2), a line about the
            iteration, and the pictures of all steps, each with its caption.
        """
        if image is None:
            return None, [], "Choose a picture.", []
        steps = int(steps)
        results = list(detector.refine(image, steps=steps, rtol=rtol, solver=solver, threshold=threshold))
        last = results[-1]
        rows = [
            [label, round(float(score), 3), *(round(float(x), 1) for x in box)]
            for label, score, box in zip(last.labels, last.scores, last.boxes, strict=True)
        ]
        stopped = "below the tolerance" if last.residual < rtol else "all steps taken"
        line = f"{len(rows)} detections after {last.steps} steps ({stopped}); residual {last.residual:.4f}"
        gallery = [(draw(image, x), _caption(x)) for x in results]
        return draw(image, last), rows, line, gallery

    return detect


def _caption(found) -> str:
    return "initialization" if found.steps == 0 else f"{found.steps}: {found.residual:.3f}"


def make_page(detector):
    """Build the page: inputs on the left, the result on the right, the refinement below."""
    import gradio

    notes = detector.notes
    with gradio.Blocks(title="Deep equilibrium detection") as page:
        gradio.Markdown("## A detector that refines its boxes as long as you let it")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(label="Picture", sources=["upload", "webcam"], type="numpy", image_mode="RGB")
                steps = gradio.Slider(0, 25, notes["steps"], step=1, label="Steps, at most")
                rtol = gradio.Slider(0, 0.5, notes["rtol"], step=0.01, label="Tolerance (0: take all steps)")
                threshold = gradio.Slider(0, 1, 0.5, step=0.01, label="Lowest score")
                solver = gradio.Radio(["plain", "anderson"], value=notes["solver"], label="Solver")
                button = gradio.Button("Detect", variant="primary")
            with gradio.Column():
                result = gradio.Image(label="Detections")
                line = gradio.Textbox(label="Iteration")
                table = gradio.Dataframe(headers=["class", "score", "x1", "y1", "x2", "y2"], label="Boxes, pixels")
        gallery = gradio.Gallery(label="The refinement: step and residual", columns=6, height="auto")
        button.click(
            make_detect(detector),
            inputs=[image, steps, rtol, threshold, solver],
            outputs=[result, table, line, gallery],
            api_name="detect",
        )
    return page


def main() -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="NAME.encoder.onnx, with NAME.step.onnx beside it")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 allows access from other machines")
    args = parser.parse_args()
    try:
        detector = load_runner().OnnxDetector(args.model)
    except ValueError as error:
        parser.error(str(error))
    if detector.step is None:
        parser.error(f"{args.model} is one graph, which shows its last step only: export with --form two")
    make_page(detector).launch(server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()
