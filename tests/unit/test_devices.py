"""Devices by the names that torch and users give them, and the measured rate of matrix products."""

import math

import pytest
import torch

from kfood_dist.errors import RecipeError
from kfood_dist.estimate.devices import DEVICES, device_of, matmul_ceiling, named_device

REPORTED = {
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "A100-SXM4-80GB": "a100-80",  # drivers before 470
    "NVIDIA A100-PCIE-40GB": "a100-40-pcie",
    "NVIDIA A100 80GB PCIe": "a100-80-pcie",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000-ada",
    "NVIDIA RTX A6000": "rtx-a6000",
    "Tesla V100-SXM2-32GB": "v100-32",
    "Tesla T4": "t4",
}
OTHERS = (
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "Quadro RTX 6000",
    "NVIDIA GB200",
    "AMD Instinct MI300X",
    "",
)


@pytest.mark.parametrize("reported", REPORTED)
def test_a_device_is_found_by_the_name_that_torch_reports(reported: str) -> None:
    device = device_of(reported)
    assert device is not None and device.name == REPORTED[reported]
    assert named_device(device.name.upper()) is device


@pytest.mark.parametrize("reported", OTHERS)
def test_a_variant_is_not_taken_for_the_device(reported: str) -> None:
    assert device_of(reported) is None


def test_an_unknown_short_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"no device is named h1000 → use one of a100-40, .*h100, .*t4"):
        named_device("h1000")


def test_names_are_unique_and_peaks_are_dense() -> None:
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    assert all(device_of(name) is device for device in DEVICES for name in device.reported)
    assert [named_device(name).flops_per_s / 1e12 for name in ("a100-80", "h100", "rtx3090")] == [312, 989.5, 71]
    assert {device.name[:2] for device in DEVICES if device.dtype == "fp16"} == {"v1", "t4"}


def test_the_measured_rate_is_a_positive_number_and_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    rate = matmul_ceiling(torch.device("cpu"), torch.float32)
    assert rate > 0 and math.isfinite(rate)
    assert torch.equal(torch.get_rng_state(), before)
