"""How well a run uses its devices: useful FLOPs (`flops.py`) over what the devices can do (`devices.py`).

model, device ──► build_utilisation ──► Utilisation ──► flops of each batch, shares of each step
"""

from dataclasses import dataclass
from typing import Any

import torch

from kfood_dist.data.batch.collate import Batch
from kfood_dist.estimate.counts import count_batch
from kfood_dist.estimate.devices import device_of, matmul_ceiling
from kfood_dist.estimate.flops import Coefficients, read_coefficients
from kfood_dist.system.world import World


@dataclass(frozen=True)
class Utilisation:
    """The useful FLOPs of batches, and the rates of all ranks' devices together."""

    coefficients: Coefficients
    config: Any  # the model's transformers config
    ceiling: float  # FLOP/s of matrix products, measured at the start of the run
    peak: float | None  # FLOP/s by the data sheet; None if a device is not in the table

    def flops(self, batch: Batch) -> int:
        """Return the useful FLOPs of forward and backward of a batch that is still on the CPU."""
        return self.coefficients.cost(count_batch(batch, self.config)).total

    def shares(self, flops_per_second: float) -> dict[str, float]:
        """Return the model FLOPs utilisation (MFU) of all ranks: over the ceiling, and over the peak if it is known."""
        of_peak = {} if self.peak is None else {"mfu_of_peak": flops_per_second / self.peak}
        return {"mfu": flops_per_second / self.ceiling, **of_peak}

    def facts(self) -> dict[str, Any]:
        """Return the rates for run.json."""
        return {"matmul_flops_per_second": self.ceiling, "peak_flops_per_second": self.peak}


def build_utilisation(model: Any, device: torch.device, dtype: torch.dtype, world: World) -> Utilisation:
    """Read the model and measure this rank's device in `dtype`. A collective: the rates of all ranks are added."""
    known = device_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    rates = [matmul_ceiling(device, dtype), known.flops_per_s if known else 0.0, float(known is None)]
    ceiling, peak, unknown = world.all_sum(torch.tensor(rates, dtype=torch.float64, device=device)).tolist()
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    return Utilisation(read_coefficients(model), config, ceiling, None if unknown else peak)
