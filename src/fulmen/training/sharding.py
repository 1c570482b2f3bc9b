"""FSDP2 for Trainer (`accelerate launch --use_fsdp --fsdp_version 2`): a process keeps parts of weights."""

import os
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule

from fulmen.errors import ConfigError
from fulmen.training.processes import processes


def is_sharded() -> bool:
    """Whether the launcher asks for sharded weights."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def prepare_sharding() -> None:
    """What must hold before any weights are loaded, where the launcher asks for sharded ones.

    Raises ConfigError for FSDP's first version, which `accelerate launch --use_fsdp` takes by default.
    """
    if is_sharded() and (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(f"fsdp_version={version} is not supported; launch with --fsdp_version 2")
    load_in_all_processes()


def load_in_all_processes() -> None:
    """Every process loads and asks all of the model: the launcher's default keeps the first's weights alone,
    wherever the processes are connected before the model is loaded, and parts tied weights."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def load_full_weights(module: nn.Module, state: dict[str, Any]) -> list[str]:
    """Put full weights (tensors by name) into a module, sharded or not; return the names that `state` lacks.

    Every process must have all of `state`. Raises RuntimeError for a name that the module lacks.
    """
    if not isinstance(module, FSDPModule):
        missing, unexpected = module.load_state_dict(state, strict=False)
    else:
        options = StateDictOptions(full_state_dict=True, strict=False)
        missing, unexpected = set_model_state_dict(module, state, options=options)
    assert not unexpected, unexpected
    return missing


class Sharded:
    """Goes before Trainer: FSDP2 where the launcher asks for it, on CPUs too."""

    accelerator: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's, which makes the launcher's variables into a plugin."""
        if is_sharded():
            state = processes()
            load_in_all_processes()
            if state.distributed_type is DistributedType.MULTI_CPU:
                # Accelerate 1.15 (AcceleratorState, state.py) takes up the plugin for kinds of GPUs only, and
                # runs DDP on CPUs without a word. It makes FSDP of this value at once; torch's fully_shard
                # finds out the kind of device for itself.
                state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # Weights travel in bfloat16, autocast does the rest. Accelerate's policy has bfloat16 losses and
            # sums of gradients too: 3 digits, too few to tell steps apart.
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy,
                reduce_dtype=torch.float32,
                output_dtype=torch.float32,
                cast_forward_inputs=False,
            )
