"""The package. detectron2 has no release to require: tools/install_detectron2.py brings it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = Path(__file__).with_name("projects") / "DEQDet" / "deqdet" / "version.py"

setup(
    name="deqdet",
    version=re.search(r'__version__ = "(.+)"', VERSION.read_text())[1],
    description="Deep equilibrium object detection as a Detectron2 project extension",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "projects/DEQDet"},
    packages=find_packages("projects/DEQDet"),
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
        "swin": ["timm>=0.9"],  # the drop path of detectron2's SwinTransformer
        "hub": ["huggingface_hub>=0.20"],  # models named hf://OWNER/NAME
        "dev": ["pytest>=8", "ruff>=0.6", "timm>=0.9"],
    },
)
