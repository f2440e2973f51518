"""The imports that a rank needs before its first step. Only the fork server imports this module."""

import io
import os
from contextlib import redirect_stdout

from forked import SERVER, SUITE

from kfood_dist.system.processes import end_with_parent

# multiprocessing ends its server when no process holds the write end of a pipe. The ranks hold it, too: without this
# line, they and the server would outlive a killed suite.
end_with_parent(int(os.environ[SUITE]))

with redirect_stdout(io.StringIO()):  # DeepSpeed prints to standard output when it is imported
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import pytest  # noqa: F401  # it was this program's main module, so multiprocessing imports it again in each child
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

    import kfood_dist.evaluate.main
    import kfood_dist.train.build
    import kfood_dist.train.main  # noqa: F401

os.environ[SERVER] = str(os.getpid())  # the last line: it says that all imports succeeded
