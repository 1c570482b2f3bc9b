"""Builds vLLM's own classes of deepseek_v32 on "meta" and loads checkpoints into them, in an own process.

`print_all(folders)` prints, for each folder and class, what `load` returns. The classes are those
that vLLM takes on GPUs of NVIDIA and AMD, and its general one. Replaced, as there is no GPU: the platform's
choice of a backend for sparse MLA, which on a CPU is an error, the release of an accelerator's memory, and
whether a CPU has the tiles that vLLM's FP8 kernels need there: nothing is computed.
"""

import importlib
import json
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SPARSE_BACKEND = "vllm.v1.attention.backends.mla.flashmla_sparse.FlashMLASparseBackend"
MODULES = {
    "nvidia": "vllm.models.deepseek_v32.nvidia.model",
    "amd": "vllm.models.deepseek_v32.amd.model",
    "general": "vllm.models.deepseek_v32",
}


class Copies(TorchDispatchMode):
    """Counts the numbers that are copied, by the name of the weight that is loaded and by where they go."""

    def __init__(self):
        super().__init__()
        self.name, self.by_name, self.by_storage = None, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.copy_:
            place, count = storage(args[0]), args[0].numel()
            self.by_name[self.name] += count
            self.by_storage[place] = self.by_storage.get(place, 0) + count
        return func(*args, **(kwargs or {}))

    def named(self, weights):
        for self.name, weight in weights:
            self.by_name[self.name] = 0
            yield self.name, weight


def storage(tensor):
    return tensor.untyped_storage()._cdata


def load(model, folder):
    """How far each parameter is filled, which names of the folder went nowhere, the parameters' shapes."""
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    files = sorted(map(str, folder.glob("model*.safetensors")))
    with Copies() as copies:
        loaded = model.load_weights(copies.named(safetensors_weights_iterator(files, False)))
    held = dict(model.named_parameters())
    return {
        "missing": sorted(held.keys() - loaded),
        "filled": {name: copies.by_storage.get(storage(x), 0) / x.numel() for name, x in held.items()},
        "unused": sorted(name for name, count in copies.by_name.items() if not count),
        "shapes": {name: [*x.shape, str(x.dtype).removeprefix("torch.")] for name, x in held.items()},
    }


def load_all(folder):
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 256}
    found = {}
    for kind, module in MODULES.items():
        config = EngineArgs(str(folder), dtype="bfloat16", **arguments).create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{folder}/process-group", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            torch.set_default_dtype(config.model_config.dtype)
            with torch.device("meta"):
                model = importlib.import_module(module).DeepseekV32ForCausalLM(vllm_config=config)
            found[kind] = load(model, folder)
    return found


def as_with_a_gpu():
    import vllm._custom_ops as vllm_ops
    from vllm.platforms import current_platform
    from vllm.v1.worker.workspace import init_workspace_manager

    type(current_platform).get_attn_backend_cls = classmethod(lambda cls, *_, **__: SPARSE_BACKEND)
    torch.accelerator.empty_cache = lambda: None
    torch.cpu._is_amx_tile_supported = lambda: True
    vllm_ops._supports_cpu_fp8_w8a16 = True
    init_workspace_manager(torch.device("meta"))


def print_all(folders):
    as_with_a_gpu()
    print(json.dumps([load_all(Path(folder)) for folder in folders]))
