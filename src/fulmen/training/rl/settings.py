"""How reinforcement learning trains."""

from dataclasses import dataclass

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.modeling.rollouts import Sampling
from fulmen.tasks.base import Task
from fulmen.training.rl.gap import GAP_LIMITS

INDEXERS = ("frozen", "trained")
RATE, LORA_RATE = 1e-5, 1e-4
BETAS = (0.9, 0.95)
MICRO_BATCH = 8
# Of a run, listed before it begins.
MOST_PROMPTS = 10_000_000


@dataclass(frozen=True)
class Domain:
    """A task, and the strength of the KL on its replies."""

    task: Task
    kl: float = 1e-3


@dataclass(frozen=True)
class RlSettings:
    """How long, on how much and how hard to train.

    steps: optimizer steps. prompts: per step, of all processes. group: replies to each, G.
    updates: optimizer steps on one call of the engine; above 1 the later ones are off-policy.
    micro_batch: replies in one forward pass; None: as many as divide a step's, MICRO_BATCH at most.
    max_new_tokens, temperature, top_p, top_k: as `Sampling`; of several turns each has a share of the tokens.
    learning_rate: None: RATE, with LoRA LORA_RATE. lora: rank; None trains all weights.
    indexer: one of INDEXERS: "frozen", or "trained" by a loss of its own (`fulmen.training.sparse.losses`).
    indexer_learning_rate: where it is trained. n_rows: query rows a layer and reply for its loss.
    clip_low, clip_high: how far below and above 1 the ratio has a gradient.
    off_policy: mean log(engine / policy), in nats a token, above which a reply that was worse than its group
    leaves the policy's term.
    cut_weight: what the strict score of a reply that was cut counts for: where scores are partial, never to
    end may be as good as to be right.
    checkpointing: recompute layers in the backward pass. bf16: autocast to bfloat16; weights are held in
    float32, whatever they are in.
    save_every: steps between checkpoints. report_to: as Trainer's: "none", "tensorboard", "wandb".
    held_out: problems of each task that are answered before and after. seed: of every random choice.
    """

    steps: int
    prompts: int = 8
    group: int = 8
    updates: int = 1
    micro_batch: int | None = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 64
    learning_rate: float | None = None
    lora: int | None = 16
    indexer: str = "frozen"
    indexer_learning_rate: float = 3e-5
    n_rows: int = 64
    clip_low: float = 0.2
    clip_high: float = 0.2
    off_policy: float = 0.05
    cut_weight: float = 0.5
    checkpointing: bool = False
    bf16: bool = False
    save_every: int = 10
    report_to: str = "none"
    held_out: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "group", "updates", "max_new_tokens", "save_every"):
            require_positive_int(name, getattr(self, name))
        if self.micro_batch is not None:
            require_positive_int("micro_batch", self.micro_batch)
        if self.all_prompts > MOST_PROMPTS:
            raise ConfigError(
                f"steps={self.steps} of prompts={self.prompts} cannot be listed; use {MOST_PROMPTS:,} "
                "prompts at most, and train what came of it again"
            )
        if self.group < 2:
            raise ConfigError(f"group={self.group} cannot be compared with itself; use 2 or more")
        if self.replies % self.at_once:
            raise ConfigError(
                f"micro_batch={self.micro_batch} does not divide a step's {self.replies} replies "
                f"(prompts={self.prompts} x group={self.group}); use a divisor"
            )
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature} cannot be; use a number above 0, as 1")
        if not 0 <= self.cut_weight <= 1:
            raise ConfigError(f"cut_weight={self.cut_weight} cannot be; use 0 to 1, where 1 changes nothing")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} cannot be; use a share above 0, at most 1")
        if self.top_p < 1 and not self.top_k:
            raise ConfigError(f"top_p={self.top_p} needs a top_k, which bounds the kept tokens; use 64")
        if self.indexer not in INDEXERS:
            raise ConfigError(f"indexer={self.indexer!r} is not known; choose from {', '.join(INDEXERS)}")

    @property
    def replies(self) -> int:
        """Of a step, in all processes."""
        return self.prompts * self.group

    @property
    def at_once(self) -> int:
        """Replies in one forward pass: `micro_batch`, or its default."""
        return self.micro_batch or max(n for n in range(1, MICRO_BATCH + 1) if self.replies % n == 0)

    @property
    def all_prompts(self) -> int:
        """Of the run: TRL leaves out those that fill no whole call of the engine."""
        calls = -(-self.steps // self.updates)
        return calls * self.updates * self.prompts

    @property
    def rate(self) -> float:
        """`learning_rate`, or its default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATE if self.lora is None else LORA_RATE

    @property
    def largest_gap(self) -> float:
        """Of engine and trainer, mean nats a token."""
        return GAP_LIMITS["bfloat16" if self.bf16 else "float32"]

    def sampling(self, seed: int) -> Sampling:
        """How a step's replies are sampled."""
        return Sampling(self.group, self.max_new_tokens, self.temperature, self.top_p, self.top_k, seed)

    def greedy(self) -> Sampling:
        """How held-out problems are answered: the likeliest token each time."""
        return Sampling(1, self.max_new_tokens, top_k=1, seed=self.seed)
