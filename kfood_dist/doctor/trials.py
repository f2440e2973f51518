"""The trials of `kfood doctor`: a 4-bit product, an 8-bit optimiser step, a compiler. Each returns its result."""

import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PROGRAM = "#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n"


def nf4_error(device: "torch.device") -> float:
    """Return the relative error of a 4-bit linear layer (NF4, double quantisation, bf16) to the same one in float32."""
    import bitsandbytes as bnb
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    exact = nn.Linear(256, 128, bias=False)
    exact.weight.data = torch.randn(128, 256, generator=generator)
    quantised = bnb.nn.Linear4bit(
        256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    quantised.load_state_dict({"weight": exact.weight.data.clone()})
    quantised = quantised.to(device)
    x = torch.randn(8, 256, generator=generator)
    with torch.no_grad():
        expected = exact(x)
        found = quantised(x.to(device, torch.bfloat16)).float().cpu()
    return float((found - expected).norm() / expected.norm())


def adamw8bit_step(device: "torch.device") -> tuple["torch.dtype", float]:
    """Return the dtype of AdamW8bit's first moment, and its first step in units of the learning rate (Adam's is 1)."""
    import bitsandbytes as bnb
    import torch

    weight = torch.nn.Parameter(torch.zeros(64, 128, device=device))  # states are 8-bit from 4,096 numbers on
    weight.grad = torch.ones_like(weight)
    optimizer = bnb.optim.AdamW8bit([weight], lr=0.5, weight_decay=0.0)
    optimizer.step()
    return optimizer.state[weight]["state1"].dtype, float(-weight.detach().mean()) / 0.5


def compile_complaint(compiler: str) -> str | None:
    """Compile a C++ program that includes Python.h. Returns the compiler's first complaint, or None if it builds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cpp"
        source.write_text(_PROGRAM, encoding="utf-8")
        command = [compiler, f"-I{sysconfig.get_path('include')}", "-std=c++17", "-c", str(source), "-o", f"{source}.o"]
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=120, check=False
            )
        except OSError as error:
            return f"{error.strerror}"
        return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[0][:200]
