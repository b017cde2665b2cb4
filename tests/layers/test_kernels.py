"""The kernels for GPUs, run by Triton's interpreter on the CPU, and what happens where they cannot run."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deqdet.layers import kernels
from deqdet.layers import table as tables
from deqdet.layers.regions import pool_regions
from deqdet.layers.sampling import sample_table

from helpers import interpreted_kernels
from helpers.interpreted_kernels import draw_points, draw_table


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    """In a process of its own: with the interpreter, no kernel of this process could be compiled any more."""
    folder = str(Path(interpreted_kernels.__file__).parents[1])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    command = [sys.executable, interpreted_kernels.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name, within",
    [
        ("four levels", 1e-5),
        ("three states of two images", 1e-5),
        ("one level", 1e-5),
        ("levels of one cell", 1e-5),
        ("channels that are no power of two", 1e-5),
        ("one image of two", 1e-5),
        ("bfloat16", 4e-3),
        ("nonfinite", 0.0),
        ("regions", 1e-5),
        ("regions of one sample a cell", 1e-5),
        ("regions of many samples a cell", 1e-5),
        ("regions of wide rows", 1e-5),
        ("regions of one image", 1e-5),
        ("regions in bfloat16", 4e-3),
        ("norms", 1e-6),
        ("norms of a size that is no power of two", 1e-6),
        ("norms of large numbers", 1e-6),
        ("norms of small numbers", 1e-6),
        ("norms in bfloat16", 4e-3),
        ("norms of nonfinite rows", 0.0),
        ("mixing", 1e-3),
        ("mixing of sizes that are no powers of two", 1e-3),
        ("mixing of sizes below 16", 1e-3),
        ("mixing of nonfinite numbers", 0.0),
        ("the floor of mixing", 0.0),
        ("extreme depths", 1e-5),
        ("AdaMixer's layer", 1e-5),
        ("AdaMixer's layer, NaN in an image", 1e-5),
        ("AdaMixer's layer in float16", 1e-3),
        ("Sparse R-CNN's layer", 1e-5),
        ("Sparse R-CNN's layer in float16", 1e-3),
    ],
)
def test_a_kernel_computes_what_the_operations_do(differences, name, within):
    assert differences[name] <= within


def compiled_for_a_gpu(name: str, dtype: str, capability: int, warps: int = 4, **constants: int):
    """A kernel in PTX, the assembly of NVIDIA's GPUs, which needs no GPU."""
    kernel = getattr(kernels, name)
    pointers = {"points": "fp32", "boxes": "fp32", "scale": "fp32", "shift": "fp32",
                "size": "i32", "last": "i32", "line": "i32", "start": "i32"}  # fmt: skip
    pointers |= dict.fromkeys(("table", "out", "x", "samples", "matrices"), dtype)
    signature = {
        x: "constexpr" if x in constants else f"*{pointers[x]}" if x in pointers else "i32" for x in kernel.arg_names
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(x),): value for x, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name, constants", [
    ("_pool", {"SIDE": 7, "RATIO": 2, "CANONICAL_SIZE": 224, "CANONICAL_LEVEL": 4, "FINEST": 2, "COARSEST": 5,
               "CELLS": 1, "C": 256}),
    ("_sample", {"LEVELS": 4, "POINTS": 4, "C": 64}),
    ("_norm_relu", {"SIZE": 4096}),
])  # fmt: skip
def test_a_kernel_can_be_compiled_for_a_gpu(name, constants, dtype, capability):
    compiled = compiled_for_a_gpu(name, dtype, capability, **constants)
    assert f".target sm_{capability}" in compiled.asm["ptx"]


@pytest.mark.parametrize("capability, instruction", [(80, "mma.sync"), (90, "wgmma.mma_async")])
@pytest.mark.parametrize(
    "dtype, points, out_points, channels, warps", [("bf16", 64, 128, 64, 4), ("fp16", 64, 128, 128, 8)]
)
def test_mixing_uses_tensor_cores(capability, instruction, dtype, points, out_points, channels, warps):
    """With the sizes of the full models, and with the largest that fit."""
    assert kernels.fits_mix(points, out_points, channels) and not kernels.fits_mix(points + 1, 128, 128)
    sizes = {"POINTS": points, "OUT_POINTS": out_points, "CHANNELS": channels, "P": points, "Q": out_points}
    compiled = compiled_for_a_gpu("_mix", dtype, capability, warps, C=channels, **sizes)
    assert instruction in compiled.asm["ptx"] and compiled.metadata.shared <= 2**16


@pytest.fixture
def works(monkeypatch):
    """works(error) asks whether the kernels work on a machine with a GPU, on which they raise the error, if any."""

    def ask(error: Exception | None = None) -> bool:
        def try_all(device: torch.device) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(kernels, "try_all", try_all)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return tables._kernels_work.__wrapped__(torch.device("cuda", 0))

    return ask


def test_without_a_compiler_a_warning_says_so_and_the_operations_are_used(works, caplog):
    with caplog.at_level(logging.WARNING):
        assert works() and not caplog.records
        assert not works(RuntimeError("Failed to find C compiler.\nSet CC."))
    (record,) = caplog.records
    assert record.getMessage() == (
        "Sampling on the GPU is slow, because Triton does not work on this machine: "
        "RuntimeError: Failed to find C compiler."
    )


def test_without_a_gpu_or_triton_there_are_no_kernels(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert not tables._kernels_work(gpu)  # the tests hide the GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tables, "kernels", None)
    assert not tables._kernels_work.__wrapped__(gpu)


def test_they_are_tried_once_on_each_gpu(monkeypatch, caplog):
    tried = []

    def try_all(device: torch.device) -> None:
        tried.append(device.index)
        if device.index == 1:
            raise RuntimeError("no kernel image")

    monkeypatch.setattr(kernels, "try_all", try_all)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tables._kernels_work.cache_clear()
    try:
        assert [tables._kernels_work(torch.device("cuda", i)) for i in (0, 1, 0, 1)] == [True, False, True, False]
    finally:
        tables._kernels_work.cache_clear()
    assert tried == [0, 1]


def test_they_are_tried_on_the_gpu_of_the_table(monkeypatch):
    """Which need not be the current one."""
    tried = []
    monkeypatch.setattr(tables, "_kernels_work", lambda device: tried.append(device) or False)
    with FakeTensorMode():
        tables.build_table([torch.zeros(1, 8, 4, 4, device="cuda:1")], (4,), torch.float32, 1)
    assert tried == [torch.device("cuda", 1)]


def test_the_kernels_are_used_without_a_gradient_alone(monkeypatch):
    called = []

    def sample(table: torch.Tensor, points: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
        called.append("sample")
        return table.new_zeros(*points.shape[:4], table.shape[1])

    def pool(table: torch.Tensor, boxes: torch.Tensor, *numbers: object) -> torch.Tensor:
        called.append("pool")
        return table.new_zeros(*boxes.shape[:2], 9, table.shape[1])

    monkeypatch.setattr(kernels, "sample", sample)
    monkeypatch.setattr(kernels, "pool", pool)
    table, points = draw_table([8, 16], 16, 2), draw_points(2, 2, 9.0)
    boxes = torch.tensor([8.0, 8.0, 40.0, 40.0]).repeat(2, 3, 1)
    for has_kernels in (False, True):
        table = dataclasses.replace(table, has_kernels=has_kernels)
        for gradient in (False, True):
            with torch.set_grad_enabled(gradient):
                sample_table(table, points)
                pool_regions(table, boxes, 3, 2)
            assert called == (["sample", "pool"] if has_kernels and not gradient else [])
            called.clear()
    with torch.no_grad():
        sample_table(table, points.double())  # the kernels read float32 alone
        pool_regions(table, boxes.double(), 3, 2)
        pool_regions(table, boxes, 3, kernels.LARGEST_RATIO + 1)
    assert called == []
