"""How fast a device multiplies matrices: by its maker's data sheet, and as measured here.

    name from torch ──► device_of ──► Device, or None    a user's short name ──► named_device ──► Device
    the device itself ──► matmul_ceiling ──► FLOP/s

Peaks are dense. Data sheets print the rate with 2:4 sparsity, which is twice as high, and say so in a footnote. For
GeForce and RTX cards the peak is that with float32 accumulation, as in torch. The rate printed first may be with fp16.
"""

import time
from dataclasses import dataclass

import torch

from kfood_dist.errors import RecipeError


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet. Of the memory, the driver and error correction keep up to a sixteenth."""

    name: str  # the short name, for users
    flops_per_s: float  # dense peak of the tensor cores in `dtype`
    memory_gib: int
    memory_bytes_per_s: float
    reported: tuple[str, ...]  # as `torch.cuda.get_device_name` reports it
    source: str
    dtype: str = "bf16"  # or fp16, for a GPU whose tensor cores have no bf16


_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet"
_V100 = "NVIDIA V100 Tensor Core GPU data sheet"
_GA102 = "NVIDIA Ampere GA102 GPU architecture white paper, bf16 with fp32 accumulate"

DEVICES = (
    Device("a100-40", 312e12, 40, 1.555e12, ("A100-SXM4-40GB", "A100-SXM-40GB"), _A100),
    Device("a100-80", 312e12, 80, 2.039e12, ("A100-SXM4-80GB", "A100-SXM-80GB"), _A100),
    Device("a100-40-pcie", 312e12, 40, 1.555e12, ("A100-PCIE-40GB",), _A100),
    Device("a100-80-pcie", 312e12, 80, 1.935e12, ("A100 80GB PCIe", "A100-PCIE-80GB"), _A100),
    Device("h100", 989.5e12, 80, 3.35e12, ("H100 80GB HBM3", "H100 SXM5 80GB"), _H100),
    Device("h100-pcie", 756.5e12, 80, 2.0e12, ("H100 PCIe",), _H100),
    Device("h100-nvl", 835.5e12, 94, 3.9e12, ("H100 NVL",), _H100),
    Device("h200", 989.5e12, 141, 4.8e12, ("H200",), _H200),
    Device("h200-nvl", 835.5e12, 141, 4.8e12, ("H200 NVL",), _H200),
    Device("b200", 2250e12, 180, 8.0e12, ("B200",), "NVIDIA DGX B200 data sheet, an eighth of the system"),
    Device("l40s", 362.05e12, 48, 0.864e12, ("L40S",), "NVIDIA L40S data sheet"),
    Device("l40", 181.05e12, 48, 0.864e12, ("L40",), "NVIDIA L40 data sheet"),
    Device("l4", 121e12, 24, 0.3e12, ("L4",), "NVIDIA L4 Tensor Core GPU data sheet"),
    Device("a10", 125e12, 24, 0.6e12, ("A10",), "NVIDIA A10 Tensor Core GPU data sheet"),
    Device("a10g", 70e12, 24, 0.6e12, ("A10G",), "NVIDIA A10G data sheet (AWS g5)"),
    Device("a30", 165e12, 24, 0.933e12, ("A30",), "NVIDIA A30 Tensor Core GPU data sheet"),
    Device("a40", 149.7e12, 48, 0.696e12, ("A40",), "NVIDIA A40 data sheet"),
    Device("rtx3090", 71e12, 24, 0.936e12, ("GeForce RTX 3090",), _GA102),
    Device("rtx4090", 165.2e12, 24, 1.008e12, ("GeForce RTX 4090",), "NVIDIA Ada GPU architecture white paper"),
    Device("rtx5090", 209.5e12, 32, 1.792e12, ("GeForce RTX 5090",), "NVIDIA RTX Blackwell architecture white paper"),
    Device("rtx-a6000", 154.8e12, 48, 0.768e12, ("RTX A6000",), _GA102),
    Device(
        "rtx6000-ada",
        364.2e12,
        48,
        0.96e12,
        ("RTX 6000 Ada Generation",),
        "NVIDIA Ada Lovelace professional GPU architecture white paper",
    ),
    Device("v100-16", 125e12, 16, 0.9e12, ("Tesla V100-SXM2-16GB",), _V100, "fp16"),
    Device("v100-32", 125e12, 32, 0.9e12, ("Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB"), _V100, "fp16"),
    Device("v100-16-pcie", 112e12, 16, 0.9e12, ("Tesla V100-PCIE-16GB",), _V100, "fp16"),
    Device("v100-32-pcie", 112e12, 32, 0.9e12, ("Tesla V100-PCIE-32GB",), _V100, "fp16"),
    Device("v100s", 130e12, 32, 1.134e12, ("Tesla V100S-PCIE-32GB",), _V100, "fp16"),
    Device("t4", 65e12, 16, 0.3e12, ("Tesla T4",), "NVIDIA T4 Tensor Core GPU data sheet", "fp16"),
)
_VENDOR_WORDS = {"nvidia", "tesla", "geforce"}  # older and newer drivers differ in these


def device_of(reported: str) -> Device | None:
    """Return the device that torch reports under this name, or None if it is not in the table.

    All words must agree, in any order. So a variant with another rate (Ti, Laptop, a MIG slice) is not taken for the
    device.
    """
    words = _words(reported)
    return next((device for device in DEVICES if words in map(_words, device.reported)), None)


def _words(reported: str) -> frozenset[str]:
    return frozenset(reported.lower().replace("-", " ").split()) - _VENDOR_WORDS


def named_device(name: str) -> Device:
    """Return the device with this short name, such as h100. Raises RecipeError if it is not in the table."""
    for device in DEVICES:
        if device.name == name.lower():
            return device
    raise RecipeError(f"no device is named {name}", f"use one of {', '.join(d.name for d in DEVICES)}")


_BUDGET_S = {"cpu": 0.1, "cuda": 0.3}  # for the timed products
_LARGEST = 8192  # rows; three such matrices take 384 MiB in bf16
_IN_A_ROW = 3  # products between two waits for the device, so that the wait counts little


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of matrix products on a device: FLOP/s of the fastest of several products of square matrices.

    Doubles the size while a product takes less than a hundredth of the budget, up to 8192 rows. Repeats the last size
    until the budget is used, because an idle GPU needs time to raise its clock. A CPU uses torch's number of threads.
    The matrices are random, because a GPU multiplies zeros at a higher clock.
    """
    rows, best, spent_s, budget_s = 256, 0.0, 0.0, _BUDGET_S[device.type]
    pair = _random_pair(rows, device, dtype)
    while spent_s < budget_s:
        took_s = _product_s(*pair)
        spent_s += took_s * _IN_A_ROW
        best = max(best, 2 * rows**3 / took_s)
        if took_s < budget_s / 100 and rows < _LARGEST:
            rows *= 2
            pair = _random_pair(rows, device, dtype)
    return best


def _random_pair(rows: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two random square matrices after their first product, which also loads the kernel.

    They do not come from torch's global generator, whose state belongs to the run.
    """
    generator = torch.Generator(device).manual_seed(0)
    first, second = (torch.randn(rows, rows, generator=generator, device=device, dtype=dtype) for _ in range(2))
    torch.mm(first, second)
    return first, second


def _product_s(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the seconds per product of a few in a row."""
    _wait(first.device)
    start = time.perf_counter()
    for _ in range(_IN_A_ROW):
        torch.mm(first, second)
    _wait(first.device)
    return (time.perf_counter() - start) / _IN_A_ROW


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
