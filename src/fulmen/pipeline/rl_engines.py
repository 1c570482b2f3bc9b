"""What trainers for many machines are given: their options, files and launch scripts.

Options were read in the sources of slime (002fa9d6), SkyRL (00127619) and prime-rl (004274ec). None was run
here; docs/post-training.md says what each lacks.
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fulmen.training.rl.settings import BETAS, RlSettings

ENV_CLASS, ENV_MODULE = "fulmen", "fulmen_rl"
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"


@dataclass(frozen=True)
class EngineRun:
    """What is to be trained elsewhere.

    Attributes:
        model: a directory or a hub name. settings: of the run. kl: the strength, one for all tasks.
        prompt: tokens of the longest prompt. has_experts, has_dsa: of the model.
    """

    model: str
    settings: RlSettings
    kl: float
    prompt: int
    has_experts: bool
    has_dsa: bool

    @property
    def calls(self) -> int:
        """Of the engine: `updates` steps each."""
        return -(-self.settings.steps // self.settings.updates)

    @property
    def call_prompts(self) -> int:
        """Prompts of one call."""
        return self.settings.prompts * self.settings.updates


def slime_files(run: EngineRun) -> dict[str, str]:
    """A reward function and a launch script; model options are those of a script of slime's own."""
    settings = run.settings
    options: dict[str, Any] = {
        "--hf-checkpoint": "$MODEL",
        "--prompt-data": f"$HERE/{TRAIN_FILE}",
        "--input-key": "prompt",
        "--label-key": "label",
        "--metadata-key": "metadata",
        "--apply-chat-template": None,
        "--custom-rm-path": "fulmen_reward.reward",
        "--num-rollout": run.calls,
        "--num-steps-per-rollout": settings.updates,
        "--rollout-batch-size": run.call_prompts,
        "--n-samples-per-prompt": settings.group,
        "--rollout-max-response-len": settings.max_new_tokens,
        "--rollout-temperature": settings.temperature,
        "--rollout-top-p": 1.0,
        "--rollout-seed": settings.seed,
        "--advantage-estimator": "grpo",
        "--disable-grpo-std-normalization": None,
        "--use-rollout-logprobs": None,
        "--eps-clip": settings.clip_low,
        "--eps-clip-high": settings.clip_high,
        "--use-opsm": None,
        "--opsm-delta": settings.off_policy,
        "--optimizer": "adam",
        "--lr": _full_rate(settings),
        "--lr-decay-style": "constant",
        "--weight-decay": 0.0,
        "--adam-beta1": BETAS[0],
        "--adam-beta2": BETAS[1],
        "--seed": settings.seed,
        "--save": "$HERE/checkpoints",
        "--save-interval": settings.save_every,
    }
    if run.kl:
        options |= {"--ref-load": "$REFERENCE", "--use-kl-loss": None, "--use-unbiased-kl": None}
        options |= {"--kl-loss-coef": run.kl, "--kl-loss-type": "k3"}
    if run.has_experts:
        options["--use-rollout-routing-replay"] = None
    if run.has_dsa and settings.indexer == "frozen":
        options["--freeze-indexer"] = None
    return {"fulmen_reward.py": SLIME_REWARD, "launch.sh": SLIME_LAUNCH + _script_options(options)}


def skyrl_files(run: EngineRun) -> dict[str, str]:
    """An environment, a program that registers it, and a launch script."""
    settings, algorithm = run.settings, "trainer.algorithm"
    mask, sampling = f"{algorithm}.off_policy_correction", "generator.sampling_params"
    options: dict[str, Any] = {
        "data.train_data": f"['$HERE/{TRAIN_FILE}']",
        "data.val_data": f"['$HERE/{HELD_OUT_FILE}']",
        "environment.env_class": ENV_CLASS,
        "trainer.policy.model.path": "$MODEL",
        "trainer.placement.policy_num_gpus_per_node": "$GPUS",
        "trainer.placement.ref_num_gpus_per_node": "$GPUS",
        "generator.inference_engine.num_engines": "$GPUS",
        "trainer.train_batch_size": run.call_prompts,
        "trainer.policy_mini_batch_size": settings.prompts,
        "trainer.max_training_steps": run.calls,
        "trainer.max_prompt_length": run.prompt,
        "trainer.policy.optimizer_config.lr": settings.rate,
        "trainer.policy.optimizer_config.adam_betas": f"[{BETAS[0]},{BETAS[1]}]",
        "trainer.policy.optimizer_config.weight_decay": 0.0,
        f"{algorithm}.advantage_estimator": "grpo",
        f"{algorithm}.grpo_norm_by_std": False,
        f"{algorithm}.loss_reduction": "sequence_mean",
        f"{algorithm}.eps_clip_low": settings.clip_low,
        f"{algorithm}.eps_clip_high": settings.clip_high,
        f"{algorithm}.use_kl_loss": run.kl > 0,
        f"{algorithm}.kl_loss_coef": run.kl,
        f"{mask}.sequence_mask_metric": "geometric",
        f"{mask}.geo_mask_low": round(math.exp(-settings.off_policy), 6),
        f"{mask}.geo_mask_high": 1e6,
        "generator.n_samples_per_prompt": settings.group,
        f"{sampling}.max_generate_length": settings.max_new_tokens,
        f"{sampling}.temperature": settings.temperature,
        f"{sampling}.top_p": 1.0,
        "trainer.ckpt_interval": settings.save_every,
        "trainer.ckpt_path": "$HERE/checkpoints",
        "trainer.seed": settings.seed,
        "trainer.logger": "console",
    }
    if settings.lora is not None:
        lora = "trainer.policy.model.lora"
        options |= {f"{lora}.rank": settings.lora, f"{lora}.alpha": 2 * settings.lora}
    if run.has_experts:
        options["trainer.strategy"] = "megatron"
        options["generator.inference_engine.enable_return_routed_experts"] = True
        options["trainer.policy.megatron_config.moe_enable_routing_replay"] = True
    overrides = " \\\n".join(f'  "{name}={_lower(value)}"' for name, value in options.items())
    launch = f'{SKYRL_LAUNCH}{overrides} \\\n  "$@"\n'
    return {"fulmen_env.py": SKYRL_ENV, "main_fulmen.py": SKYRL_MAIN, "launch.sh": launch}


def prime_rl_files(run: EngineRun) -> dict[str, str]:
    """An environment module, the settings, and a launch script."""
    settings = run.settings
    tables: dict[str, dict[str, Any]] = {
        "": {"max_steps": settings.steps, "seq_len": run.prompt + settings.max_new_tokens},
        "model": {"name": run.model},
        "ckpt": {"interval": settings.save_every},
        "trainer": {"enable_router_replay": run.has_experts},
        "trainer.optim": {"lr": settings.rate, "weight_decay": 0.0, "betas1": BETAS[0], "betas2": BETAS[1]},
        "trainer.loss": {
            "type": "default",
            "dppo_mask_low": settings.clip_low,
            "dppo_mask_high": settings.clip_high,
            "kl_tau": run.kl,
        },
        "orchestrator": {
            "batch_size": settings.replies,
            "group_size": settings.group,
            "max_off_policy_steps": settings.updates,
        },
        "orchestrator.renderer": {"name": "default"},
        "orchestrator.train.sampling": {
            "temperature": settings.temperature,
            "max_completion_tokens": settings.max_new_tokens,
        },
        "[orchestrator.train.env]": {"id": ENV_MODULE, "name": "fulmen"},
        "inference": {},
    }
    if settings.lora is not None:
        tables["trainer.model.lora"] = {"rank": settings.lora, "alpha": 2 * settings.lora}
    return {f"{ENV_MODULE}.py": PRIME_ENV, "rl.toml": _toml(tables), "launch.sh": PRIME_LAUNCH}


ENGINES: dict[str, Callable[[EngineRun], dict[str, str]]] = {
    "slime": slime_files,
    "skyrl": skyrl_files,
    "prime-rl": prime_rl_files,
}
# What each does not have of what `fulmen rl` did; the first words of the folder's README.
LACKS: dict[str, tuple[str, ...]] = {
    "slime": (
        "all weights are trained, no adapters",
        "no keep sampling mask: replies are sampled with top-p 1, where none is needed",
        "Megatron has no class for fulmen's sparse attention with grouped heads: train the dense model "
        "there, or one of DeepSeek's or GLM's",
        "one strength of the KL for all tasks",
    ),
    "skyrl": (
        "its KL's gradient is not weighed by policy over engine",
        "its off-policy mask leaves good replies out as well, and measures the engine against the policy "
        "before its updates",
        "keep routing with Megatron alone",
        "no keep sampling mask: replies are sampled with top-p 1, where none is needed",
        "one strength of the KL for all tasks",
    ),
    "prime-rl": (
        "its KL is to the engine's policy, not to the first model",
        "no off-policy mask of replies: tokens are masked by how far their probability has moved, and "
        "replies older than max_off_policy_steps are left out",
        "the loss is a mean over tokens, not over replies",
        "keep routing for its own model classes alone",
        "no keep sampling mask: replies are sampled with top-p 1, where none is needed",
        "one strength of the KL for all tasks",
    ),
}


def _full_rate(settings: RlSettings) -> float:
    """For all weights, also of a run that trained adapters without naming a rate."""
    return RlSettings(steps=1, lora=None, learning_rate=settings.learning_rate).rate


def _script_options(options: Mapping[str, Any]) -> str:
    """Options as lines of a script; variables of the script stay."""
    lines = [name if value is None else f'{name} "{value}"' for name, value in options.items()]
    return "  " + " \\\n  ".join([*lines, '"$@"']) + "\n"


def _lower(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables by name, that of the top without; JSON's values are TOML's."""
    parts = []
    for name, values in tables.items():
        lines = [f"[{name}]"] if name else []
        parts.append("\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in values.items())]))
    return "\n\n".join(parts) + "\n"


def model_line(model: str) -> str:
    """The line of a script that says what is trained, unless its caller does."""
    return f"MODEL=${{MODEL:-{shlex.quote(model)}}}"


HERE = 'HERE=$(cd "$(dirname "$0")" && pwd)\nexport PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"\n'
SLIME_REWARD = '''"""What a reply is worth to slime: fulmen's own score."""

import asyncio

from fulmen.tasks.exported import score_row


async def reward(args, sample, **kwargs):
    """The strict score of a sample's reply."""
    return await asyncio.to_thread(score_row, sample.metadata, sample.response)
'''
SLIME_LAUNCH = f"""#!/usr/bin/env bash
# Run from slime's folder, where Ray has been started; slime's options may follow.
# MODEL_SCRIPT: the model's options, as scripts/models/qwen3-4B.sh.
# REFERENCE: the model as Megatron's checkpoint, made by slime's tools/convert_hf_to_torch_dist.py.
set -euo pipefail
{HERE}@MODEL@
source "${{MODEL_SCRIPT:?names the script with the options of the model}}"
: "${{REFERENCE:?names the Megatron checkpoint of the model}}"
ray job submit --address "${{RAY:-http://127.0.0.1:8265}}" \\
  --runtime-env-json "{{\\"env_vars\\": {{\\"PYTHONPATH\\": \\"$PYTHONPATH\\"}}}}" -- \\
  python3 train.py "${{MODEL_ARGS[@]}}" \\
  --colocate --actor-num-gpus-per-node "${{GPUS:-8}}" \\
"""
SKYRL_ENV = '''"""fulmen's problems for SkyRL: one turn, then fulmen's own score."""

from fulmen.tasks.exported import score_row
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput


class FulmenEnv(BaseTextEnv):
    """One problem; a row's metadata says which."""

    def __init__(self, env_config=None, extras=None):
        super().__init__()
        self.metadata = extras["metadata"]

    def step(self, action):
        """Score a reply, and end."""
        worth = score_row(self.metadata, action)
        return BaseTextEnvStepOutput(observations=[], reward=worth, done=True, metadata={})
'''
SKYRL_MAIN = '''"""SkyRL's training with fulmen's environment; it takes SkyRL's options."""

import sys

import ray
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray


@ray.remote(num_cpus=1)
def train(config):
    """Train, where the environment is known."""
    from skyrl_gym.envs import register

    register(id="fulmen", entry_point="fulmen_env:FulmenEnv")
    BasePPOExp(config).run()


if __name__ == "__main__":
    config = SkyRLTrainConfig.from_cli_overrides(sys.argv[1:])
    validate_cfg(config)
    initialize_ray(config)
    ray.get(train.remote(config))
'''
SKYRL_LAUNCH = f"""#!/usr/bin/env bash
# Run in SkyRL's environment, with fulmen installed in it; SkyRL's options may follow.
set -euo pipefail
{HERE}@MODEL@
GPUS=${{GPUS:-8}}
python -m main_fulmen \\
"""
PRIME_ENV = f'''"""fulmen's problems as an environment of verifiers (0.1), for prime-rl."""

import json
from pathlib import Path

import verifiers as vf
from datasets import Dataset
from fulmen.tasks.exported import score_row


def reward(completion, info):
    """fulmen's own score of a reply."""
    message = completion[-1]
    return score_row(info, message["content"] if isinstance(message, dict) else message.content)


def rows(name):
    """The problems of a file beside this one."""
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return Dataset.from_list(
        [{{"prompt": row["prompt"], "answer": row["label"], "info": row["metadata"]}} for row in found]
    )


def load_environment(**kwargs):
    """One turn for each problem."""
    rubric = vf.Rubric(funcs=[reward], weights=[1.0])
    return vf.SingleTurnEnv(
        dataset=rows("{TRAIN_FILE}"), eval_dataset=rows("{HELD_OUT_FILE}"), rubric=rubric, **kwargs
    )
'''
PRIME_LAUNCH = f"""#!/usr/bin/env bash
# Run from prime-rl's folder, with fulmen installed in its environment; prime-rl's options may follow.
set -euo pipefail
{HERE}uv run rl @ "$HERE/rl.toml" "$@"
"""
