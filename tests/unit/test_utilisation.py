"""The utilisation of devices: useful FLOPs of real batches over the measured rate and the data sheet's peak."""

from pathlib import Path

import pytest
import torch
from asking import adapted, asking_dishes

from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.estimate import utilisation
from kfood_dist.estimate.flops import Coefficients
from kfood_dist.estimate.utilisation import Utilisation, build_utilisation
from kfood_dist.system.world import World


def test_the_flops_of_batches_add_up(tiny_model: Path, tiny_shards: Path) -> None:
    """Two samples cost as much in one batch as in two, although the padding differs."""
    collator, model = asking_dishes(tiny_model, tiny_shards), adapted(tiny_model)
    known = build_utilisation(model, torch.device("cpu"), torch.float32, World())
    together = known.flops(collator[MicroBatch(0, 0, (0, 1), 0)])
    assert together == sum(known.flops(collator[MicroBatch(0, 0, (i,), 0)]) for i in (0, 1)) > 0
    assert known.ceiling > 0 and known.peak is None  # the CPU has no data sheet here


def test_shares_are_of_the_measured_rate_and_of_the_peak() -> None:
    known = Utilisation(Coefficients(), None, ceiling=800.0, peak=1000.0)
    assert known.shares(400.0) == {"mfu": 0.5, "mfu_of_peak": 0.4}
    assert Utilisation(Coefficients(), None, ceiling=800.0, peak=None).shares(400.0) == {"mfu": 0.5}


def test_the_rates_of_all_ranks_are_added(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(World):
        def all_sum(self, value: torch.Tensor) -> torch.Tensor:
            return value * 2

    monkeypatch.setattr(utilisation, "matmul_ceiling", lambda *_: 7.0)
    assert build_utilisation(adapted(tiny_model), torch.device("cpu"), torch.float32, Two()).ceiling == 14.0
