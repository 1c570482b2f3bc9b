"""Forward and backward of one group of replies: its prompt read in each reply, and once; CPU seconds.

    python -m benchmarks.end_to_end.rl_prompts out/smol --prompt 55 --reply 12

Rounds alternate. CPU time of the process, since machines are shared; a busy one inflates it, both alike.
"""

import argparse
import time
from pathlib import Path
from unittest import mock

import torch

from fulmen.modeling.families import accelerated
from fulmen.pipeline.answers import open_model
from fulmen.training import beginnings
from fulmen.training.rl.scoring import Replies, score_replies
from fulmen.training.sparse.lora import add_lora

KEPT = 64
NEVER = 10**9


def main() -> None:
    """Print the seconds of each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=55, help="tokens")
    parser.add_argument("--reply", type=int, default=12, help="tokens")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    model, _ = open_model(asked.model, torch.device("cpu"))
    model.requires_grad_(True)
    add_lora(model, 16, seed=0)
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            parameter.requires_grad_(False)
    replies = random_group(model.config.vocab_size, asked.prompt, asked.reply, asked.group)
    for _ in range(asked.rounds):
        for what, shortest in (("once", beginnings.SHORTEST), ("in each reply", NEVER)):
            with mock.patch.object(beginnings, "SHORTEST", shortest), accelerated(model.train()):
                forward, backward = timed(model, replies)
            print(f"{what}: forward {forward:.2f} s, backward {backward:.2f} s")


def random_group(vocab_size: int, prompt: int, reply: int, group: int) -> Replies:
    """Random replies to one random prompt, each token among KEPT that sampling kept."""
    torch.manual_seed(0)
    prompt_BP = torch.randint(vocab_size, (1, prompt)).expand(group, -1)
    tokens_BT = torch.randint(vocab_size, (group, reply))
    kept_BTK = torch.randint(vocab_size, (group, reply, KEPT))
    kept_BTK[..., 0] = tokens_BT
    starts_B = torch.full((group,), prompt)
    counts_BT = torch.ones(group, reply, dtype=torch.bool)
    return Replies(torch.cat([prompt_BP, tokens_BT], 1), starts_B, tokens_BT, counts_BT, kept_BTK)


def timed(model: torch.nn.Module, replies: Replies) -> tuple[float, float]:
    """CPU seconds of scoring and of its gradients."""
    begin = time.process_time()
    total = score_replies(model, replies, 1.0).logp_BT.sum()
    scored = time.process_time()
    total.backward()
    return scored - begin, time.process_time() - scored


if __name__ == "__main__":
    main()
