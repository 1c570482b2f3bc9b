"""Forward and backward of replies: prompts read in each, once a group, many groups a pass; CPU seconds.

    python -m benchmarks.end_to_end.rl_prompts out/smol --prompt 45 --reply 9 --prompts 8 --at-once 8,64

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


def main() -> None:
    """Print the seconds of each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=55, help="tokens")
    parser.add_argument("--reply", type=int, default=12, help="tokens")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--at-once", default="8", help="replies in a pass, several divided by commas")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    model, _ = open_model(asked.model, torch.device("cpu"))
    model.requires_grad_(True)
    add_lora(model, 16, seed=0)
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            parameter.requires_grad_(False)
    sizes = [int(size) for size in asked.at_once.split(",")]
    replies = random_replies(model.config.vocab_size, asked.prompt, asked.reply, asked.prompts, asked.group)
    for _ in range(asked.rounds):
        for size, is_shared in [(sizes[0], False), *((size, True) for size in sizes)]:
            with mock.patch.object(beginnings, "can_share", lambda _, is_shared=is_shared: is_shared):
                forward, backward = timed(model, parts(replies, size))
            what = "read once" if is_shared else "in each reply"
            print(f"{size} a pass, prompts {what}: forward {forward:.2f} s, backward {backward:.2f} s")


def random_replies(vocab_size: int, prompt: int, reply: int, prompts: int, group: int) -> Replies:
    """Random replies to random prompts, each token among KEPT that sampling kept."""
    torch.manual_seed(0)
    prompt_BP = torch.randint(vocab_size, (prompts, prompt)).repeat_interleave(group, 0)
    tokens_BT = torch.randint(vocab_size, (prompts * group, reply))
    kept_BTK = torch.randint(vocab_size, (prompts * group, reply, KEPT))
    kept_BTK[..., 0] = tokens_BT
    starts_B = torch.full((prompts * group,), prompt)
    counts_BT = torch.ones(prompts * group, reply, dtype=torch.bool)
    return Replies(torch.cat([prompt_BP, tokens_BT], 1), starts_B, tokens_BT, counts_BT, kept_BTK)


def parts(replies: Replies, size: int) -> list[Replies]:
    """So many of them at a time."""
    return [
        Replies(*(None if part is None else part[begin : begin + size] for part in replies))
        for begin in range(0, len(replies.starts_B), size)
    ]


def timed(model: torch.nn.Module, passes: list[Replies]) -> tuple[float, float]:
    """CPU seconds of scoring and of its gradients."""
    forward = backward = 0.0
    with accelerated(model.train()):
        for replies in passes:
            begin = time.process_time()
            total = score_replies(model, replies, 1.0).logp_BT.sum()
            scored = time.process_time()
            total.backward()
            forward, backward = forward + scored - begin, backward + time.process_time() - scored
    return forward, backward


if __name__ == "__main__":
    main()
