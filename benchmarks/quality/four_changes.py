"""What each of DeepSeek-V3.2's four changes to GRPO does, on toys whose truth is known: four pictures.

    python -m benchmarks.quality.four_changes        # writes docs/four-changes-*.svg; half a minute of CPU

The formulas, the scoring and the engine are those of `fulmen.training.rl`; only what they are compared with
is worked out here. Prints the numbers, a line of JSON for each picture.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fulmen.evaluation.style import VARIANT_COLORS, legend_above, new_figure
from fulmen.modeling.rollouts import Rollout, Sampling
from fulmen.training.rl.generate_engine import GenerateRollouts
from fulmen.training.rl.objective import group_advantages, grpo_loss, unbiased_kl
from fulmen.training.rl.scoring import Replies, score_replies

WITH, WITHOUT, THIRD = (VARIANT_COLORS[name] for name in ("dsa", "window", "inherited"))
# Rewards of the toy: a reply's share of tokens that are the wanted ones.
POSITIONS, TOKENS, PROMPTS, GROUP, DRAWS = 16, 8, 32, 8, 40
CLIP, OFF_POLICY, NO_MASK = (0.2, 0.2), 0.05, 1e9
MOVES = (0.0, 0.12, 0.24, 0.36, 0.48, 0.6, 0.72, 0.84, 0.96)
VOCAB, PROMPT, REPLY = 97, 8, 24
TOP_P = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

Rows = list[dict[str, float]]


def main(out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("docs")) -> None:
    """Compute, print and draw."""
    for name, (compute, draw) in PICTURES.items():
        rows = compute()
        print(json.dumps({name: rows}), flush=True)
        save(draw(rows), out / f"four-changes-{name}.svg")


def kl_rows(steps: int = 11) -> Rows:
    """How far the mean gradient of three estimates is from the KL's own, in shares of its length.

    Four tokens, whose probabilities are known: the mean is over all of them, and there is no noise.
    """
    logits = torch.tensor([0.5, -0.2, 0.1, -0.4], dtype=torch.float64)
    reference = torch.tensor([-0.3, 0.6, 0.0, 0.2], dtype=torch.float64).log_softmax(0)
    away = torch.tensor([0.5, -0.4, -0.3, 0.2], dtype=torch.float64)
    leaf = logits.requires_grad_()
    logp = leaf.log_softmax(0)
    exact = gradient((logp.exp() * (logp - reference)).sum(), leaf)
    rows = []
    for share in torch.linspace(0, 2, steps, dtype=torch.float64):
        engine = (logits.detach() + share * away).log_softmax(0)
        # What the weight's denominator is: who sampled, the policy as it is now, or no weight at all.
        below = {"unbiased": engine, "recomputed": logp.detach(), "unweighted": logp}
        row = {"nats": float((engine.exp() * (engine - logp.detach())).sum())}
        for name, old in below.items():
            kl_T1 = unbiased_kl(logp[:, None], reference[:, None], old[:, None])
            found = gradient((engine.exp() * kl_T1[:, 0]).sum(), leaf)
            row[name] = float((found - exact).norm() / exact.norm())
        rows.append(row)
    return rows


def mask_rows(moves: Sequence[float] = MOVES) -> Rows:
    """Masked share, and the error of the policy's gradient with and without the mask, as the policy moves."""
    torch.manual_seed(0)
    first_TV = 0.5 * torch.randn(POSITIONS, TOKENS)
    wanted_T = torch.randint(0, TOKENS, (POSITIONS,))
    away_TV = torch.randn(POSITIONS, TOKENS)
    engine_TV = first_TV.log_softmax(-1)
    drawn_DBT = torch.multinomial(engine_TV.exp(), DRAWS * PROMPTS * GROUP, replacement=True).T.contiguous()
    rows = []
    for move in moves:
        logits_TV = first_TV + move * away_TV
        moved_TV = engine_TV - logits_TV.log_softmax(-1)
        row = {"nats": float((engine_TV.exp() * moved_TV).sum(-1).mean())}
        for name, threshold in (("with", OFF_POLICY), ("without", NO_MASK)):
            drawn = drawn_DBT.view(DRAWS, PROMPTS * GROUP, POSITIONS)
            found = [toy_gradient(logits_TV, engine_TV, one, wanted_T, threshold) for one in drawn]
            exact_TV = exact_gradient(logits_TV, wanted_T)
            errors = torch.stack([(grad - exact_TV).square().sum() for grad, _ in found])
            row[name] = float(errors.mean().sqrt() / exact_TV.norm())
            row[f"masked {name}"] = float(torch.tensor([share for _, share in found]).mean())
        rows.append(row)
    return rows


def toy_gradient(
    logits_TV: Tensor, engine_TV: Tensor, tokens_BT: Tensor, wanted_T: Tensor, threshold: float
) -> tuple[Tensor, float]:
    """The gradient that GRPO gives the policy's logits for replies of the engine, and the masked share."""
    leaf = logits_TV.clone().requires_grad_()
    positions_BT = torch.arange(POSITIONS).expand_as(tokens_BT)
    logp_BT, engine_BT = (of[positions_BT, tokens_BT] for of in (leaf.log_softmax(-1), engine_TV))
    rewards_B = (tokens_BT == wanted_T).float().mean(-1)
    # A reply has a part in the mean that it is compared with.
    advantage_B = group_advantages(rewards_B.view(-1, GROUP)).flatten() * GROUP / (GROUP - 1)
    counts_BT, no_kl_B = torch.ones_like(tokens_BT, dtype=torch.bool), torch.zeros(len(tokens_BT))
    found = grpo_loss(logp_BT, engine_BT, engine_BT, advantage_B, counts_BT, no_kl_B, CLIP, threshold)
    return gradient(-found.loss, leaf), float((~found.keeps_B).float().mean())


def exact_gradient(logits_TV: Tensor, wanted_T: Tensor) -> Tensor:
    """That of the policy's mean reward, over a reply's tokens as the loss is."""
    leaf = logits_TV.clone().requires_grad_()
    reward = leaf.softmax(-1)[torch.arange(POSITIONS), wanted_T].mean()
    return gradient(reward, leaf) / POSITIONS


def routing_rows(updates: int = 8) -> Rows:
    """Share of choices that are other experts than in sampling, while the same replies train a model."""
    first = tiny_moe()
    rollouts = sampled(first, Sampling(4, REPLY))
    own, replay = (list(disagreements(first, rollouts, replays, updates)) for replays in (False, True))
    return [{"updates": n, "own": own[n], "replay": replay[n]} for n in range(updates + 1)]


def disagreements(
    first: PreTrainedModel, rollouts: Sequence[Rollout], replays: bool, updates: int
) -> Iterator[float]:
    """Before each update, and after the last one."""
    model, told_BSLK = copy.deepcopy(first).train(), torch.tensor([one.experts for one in rollouts])
    unknown_B1LK = torch.full_like(told_BSLK[:, :1], -1)
    experts_BSLK = torch.cat([told_BSLK, unknown_B1LK], 1) if replays else None
    replies = replies_of(rollouts, kept=False)._replace(experts_BSLK=experts_BSLK)
    rewards_B = (replies.tokens_BT < VOCAB // 2).float().mean(-1)
    advantage_B = group_advantages(rewards_B.view(-1, 4)).flatten()
    engine_BT = torch.tensor([one.logprobs for one in rollouts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for update in range(updates + 1):
        with chosen_experts(model) as chosen:
            logp_BT = score_replies(model, replies, 1.0).logp_BT
        chosen_BSLK = torch.stack([one_NK.view(len(rollouts), -1, one_NK.shape[-1]) for one_NK in chosen], 2)
        differs = chosen_BSLK[:, :-1].sort(-1).values != told_BSLK.sort(-1).values
        yield float(differs.any(-1).float().mean())
        if update < updates:
            no_kl_B = torch.zeros(len(rollouts))
            loss = grpo_loss(
                logp_BT, engine_BT, engine_BT, advantage_B, replies.counts_BT, no_kl_B, CLIP, OFF_POLICY
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def sampling_rows(shares: Sequence[float] = TOP_P) -> Rows:
    """The mean ratio of policy and engine of the same weights, over kept tokens and over all, by top-p."""
    model, rows = tiny_moe(), []
    for top_p in shares:
        rollouts = sampled(model, Sampling(8, REPLY, top_p=top_p, top_k=VOCAB))
        engine_BT = torch.tensor([one.logprobs for one in rollouts])
        log_ratio = {}
        for name, kept in (("with", True), ("without", False)):
            with torch.no_grad():
                log_ratio[name] = score_replies(model, replies_of(rollouts, kept), 1.0).logp_BT - engine_BT
        row = {name: float(of.exp().mean()) for name, of in log_ratio.items()}
        row |= {f"reply {name}": float(of.sum(-1).exp().mean()) for name, of in log_ratio.items()}
        rows.append({"top_p": top_p, **row})
    return rows


def tiny_moe() -> PreTrainedModel:
    """A random Qwen3-MoE of two layers, whose next tokens are neither sure nor all alike."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return Qwen3MoeForCausalLM(config).eval()


def sampled(model: PreTrainedModel, sampling: Sampling) -> list[Rollout]:
    """Replies of one length to four prompts."""
    prompts = prompts_of(4)
    return GenerateRollouts(model, ends=[], pad=0).generate(prompts.tolist(), sampling)


def prompts_of(count: int) -> Tensor:
    """Random tokens, the same each time."""
    return torch.randint(0, VOCAB, (count, PROMPT), generator=torch.Generator().manual_seed(1))


def replies_of(rollouts: Sequence[Rollout], kept: bool) -> Replies:
    """As the trainer scores them; without what was kept all tokens count."""
    tokens_BT = torch.tensor([one.tokens for one in rollouts])
    prompts_BP = prompts_of(4)[[one.prompt for one in rollouts]]
    kept_BTK = None
    if kept:
        rows = [[[*ids, *[-1] * (VOCAB - len(ids))] for ids in one.kept or ()] for one in rollouts]
        kept_BTK = torch.tensor(rows)
    starts_B = torch.full((len(rollouts),), PROMPT)
    counts_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    return Replies(torch.cat([prompts_BP, tokens_BT], 1), starts_B, tokens_BT, counts_BT, kept_BTK)


@contextmanager
def chosen_experts(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What each layer's experts are asked for inside, [tokens, K] of a layer."""
    found: list[Tensor] = []
    experts = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    hooks = [one.register_forward_pre_hook(lambda _, args: found.append(args[1].clone())) for one in experts]
    yield found
    for hook in hooks:
        hook.remove()


def gradient(of: Tensor, leaf: Tensor) -> Tensor:
    """d of / d leaf; the graph stays."""
    return torch.autograd.grad(of, leaf, retain_graph=True)[0]


def draw_kl(rows: Rows) -> Any:
    """Error of the gradient's mean over staleness."""
    figure, axes = new_figure(3.0)
    labels = {
        "unbiased": ("weighed by policy / engine (V3.2)", WITH, "o"),
        "recomputed": ("weighed by a recomputed policy", THIRD, "s"),
        "unweighted": ("not weighed", WITHOUT, "v"),
    }
    draw_lines(axes, rows, "nats", labels)
    axes.set(xlabel="KL(engine || policy), nats a token", ylabel="error / length of the gradient")
    axes.set_ylim(bottom=-0.03)
    return figure


def draw_mask(rows: Rows) -> Any:
    """Masked share, and below it the error of the gradient."""
    figure, grid = new_figure(4.6, rows=2)
    (above,), (below,) = grid
    draw_lines(above, rows, "nats", {"masked with": ("share of replies that are masked", WITH, "o")})
    labels = {"with": ("with the mask", WITH, "o"), "without": ("without", WITHOUT, "v")}
    draw_lines(below, rows, "nats", labels)
    above.set(ylabel="masked share", ylim=(-0.02, 0.6))
    below.set(xlabel="KL(engine || policy), nats a token", ylabel="r.m.s. error / length", ylim=(0, None))
    return figure


def draw_routing(rows: Rows) -> Any:
    """Disagreement of experts over updates."""
    figure, axes = new_figure(3.0)
    labels = {"own": ("routers choose again", WITHOUT, "v"), "replay": ("sampling's choice kept", WITH, "o")}
    draw_lines(axes, rows, "updates", labels)
    axes.set(xlabel="updates since sampling", ylabel="choices of other experts", ylim=(-0.02, None))
    return figure


def draw_sampling(rows: Rows) -> Any:
    """Mean ratios over top-p: of a token, and below it of a whole reply, on a scale of powers."""
    figure, grid = new_figure(4.6, rows=2)
    (above,), (below,) = grid
    labels = {"with": ("over kept tokens", WITH, "o"), "without": ("over all tokens", WITHOUT, "v")}
    draw_lines(above, rows, "top_p", labels)
    draw_lines(below, rows, "top_p", {f"reply {name}": of for name, of in labels.items()})
    above.set(ylabel="ratio of a token", ylim=(0, 1.1))
    below.set(xlabel="top-p of sampling", ylabel=f"of a reply of {REPLY} tokens", yscale="log")
    return figure


def draw_lines(axes: Any, rows: Rows, x: str, labels: Mapping[str, tuple[str, str, str]]) -> None:
    """A line for each name in `labels`: its label, colour and marker."""
    for name, (label, color, marker) in labels.items():
        axes.plot(
            *([row[of] for row in rows] for of in (x, name)),
            label=label,
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.8,
        )
    legend_above(axes)


def save(figure: Any, file: Path) -> None:
    """As SVG on white, the same each time."""
    from matplotlib import rc_context

    figure.patch.set(facecolor="white", alpha=1)
    with rc_context({"svg.hashsalt": "fulmen"}):
        figure.savefig(file, metadata={"Date": None})


PICTURES = {
    "kl": (kl_rows, draw_kl),
    "mask": (mask_rows, draw_mask),
    "routing": (routing_rows, draw_routing),
    "sampling": (sampling_rows, draw_sampling),
}

if __name__ == "__main__":
    typer.run(main)
