"""The config of the base model, read before its weights are loaded."""

from typing import Any

from kfood_dist.errors import ModelError, first_line
from kfood_dist.model.family import require_supported
from kfood_dist.model.files import located

REDOWNLOAD = "download the model again, or set model.base to another"


def load_config(base: str) -> Any:
    """Return the transformers config of `base`. Raises ModelError if it cannot be read or its type was not tested."""
    from transformers import AutoConfig
    from transformers.configuration_utils import PretrainedConfig

    where = located(base)
    try:
        # Check the type first: for an unknown one, AutoConfig asks at the console whether to run foreign code.
        require_supported(base, PretrainedConfig.get_config_dict(where)[0].get("model_type"))
        return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # transformers 5 has a separate error class for the fault of each field
        raise ModelError(f"the config of base model {base} cannot be read ({first_line(error)})", REDOWNLOAD) from None
