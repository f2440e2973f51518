"""Imported by the fork server alone: what a rank needs before its first step."""

import io
from contextlib import redirect_stdout

with redirect_stdout(io.StringIO()):  # DeepSpeed greets on standard output
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import pytest  # noqa: F401  # which multiprocessing imports again in each child, as it was this program's main module
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

    import kfood_dist.evaluate.main
    import kfood_dist.train.build
    import kfood_dist.train.main  # noqa: F401
