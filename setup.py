"""The package. detectron2 has no release to require: tools/install_detectron2.py brings it."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGE = Path("projects/DEQDet/deqdet")
TOOLS = (
    "analyze_model",
    "benchmark",
    "check_data",
    "compare",
    "convert_checkpoint",
    "demo",
    "evaluate_steps",
    "export_model",
    "fetch_weights",
    "predict",
    "pretrain_backbone",
    "publish",
    "report",
    "residual_signal",
    "speed_accuracy",
)
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]  # deqdet-export-model and its runner


class BuildWithConfigs(build_py):
    """Copy configs/ into the built package, where deqdet.model_zoo finds it; an editable install has the original."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib, "deqdet", "configs"), dirs_exist_ok=True)


setup(
    name="deqdet",
    version=re.search(r'__version__ = "(.+)"', (PACKAGE / "version.py").read_text())[1],
    description="Deep equilibrium object detection as a Detectron2 project extension",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "projects/DEQDet"},
    packages=find_packages("projects/DEQDet"),
    package_data={"deqdet": ["py.typed"]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={
        "console_scripts": [
            "deqdet-train = deqdet.tools.train_net:main",
            *(f"deqdet-{name.replace('_', '-')} = deqdet.tools.{name}:main" for name in TOOLS),
        ]
    },
    install_requires=[
        "torch>=2.5",
        "torchvision>=0.20",  # the release beside torch 2.5
        "numpy>=1.23",
        "scipy>=1.10",  # Hungarian matching
        "pycocotools>=2.0.7",
        "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7,<0.1.10",
        "opencv-python-headless>=4.8",
        "matplotlib>=3.7",
        "Pillow>=9.4",
        "safetensors>=0.4",  # model files
        "tqdm>=4.64",
        "setuptools<81",  # detectron2.model_zoo imports pkg_resources, which later releases lack
    ],
    extras_require={
        "timm": ["timm>=1.0.9"],  # MODEL.TIMM: its models as backbones
        "swin": ["timm>=0.9"],  # the drop path of detectron2's SwinTransformer
        "hub": ["huggingface_hub>=0.20"],  # hf://owner/name as a model file
        "supervision": ["supervision>=0.20"],  # Detections.to_supervision()
        "export": EXPORT,
        "app": ["gradio>=5"],  # examples/gradio_app.py
        "fast-eval": ["faster-coco-eval>=1.6"],  # TEST.EVALUATOR faster-coco-eval
        "wandb": ["wandb>=0.16"],  # WRITERS
        "mlflow": ["mlflow-skinny>=2.9"],
        "dev": [
            "pytest>=8", "pytest-xdist>=3.7", "ruff>=0.6", "timm>=1.0.9", "build>=1", "nbconvert>=7", "ipykernel>=6",
            "faster-coco-eval>=1.6", *EXPORT,
        ],
    },
)
