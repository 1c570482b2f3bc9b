"""TRL's GRPO trainer with the four changes of DeepSeek-V3.2, and with an engine of one's own.

TRL's are the data order, buffers, accumulation, checkpoints and logs; ours are generation, scores, loss, and
the engine's weights. Importing it takes seconds: `fulmen.training.rl.run` does.
"""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from fulmen.errors import TrainingDivergedError
from fulmen.files import atomic_write
from fulmen.modeling.rollouts import Rollout, RolloutEngine
from fulmen.ops.half_products import hasten_half_products
from fulmen.tasks.base import Problem
from fulmen.training.checkpoints import SafeCheckpoints
from fulmen.training.rl.episodes import play, reply_text
from fulmen.training.rl.indexer import IndexerLoss
from fulmen.training.rl.objective import group_advantages, grpo_loss
from fulmen.training.rl.prompts import prompt_tokens, rows_by_length
from fulmen.training.rl.rewards import ScoredReply, Scorer, figures_of
from fulmen.training.rl.routing import routing_of
from fulmen.training.rl.scoring import Replies, TokenScores, behind_prompts, let_score, score_replies
from fulmen.training.rl.settings import BETAS, Domain, RlSettings
from fulmen.training.rl.tally import StepTally
from fulmen.training.rl.weights import policy_weights
from fulmen.training.sparse.lora import without_lora

WEIGHTS_FILE = "model.safetensors"


class RlTrainer(SafeCheckpoints, GRPOTrainer):
    """GRPO on what a `RolloutEngine` writes; the trained weights as checkpoint.

    Args:
        model: with gradients where they are wanted, adapters beside its weights if there are to be some.
        reference: what the KL is against; None: the model without its adapters.
        engine: is given the weights after each step, before it writes again.
    """

    # Micro-batches of the engine's last call, as TRL has them.
    _buffered_inputs: Any

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        tokenizer: Any,
        domains: Sequence[Domain],
        engine: RolloutEngine,
        settings: RlSettings,
        scorer: Scorer,
        **more: Any,
    ) -> None:
        self.domains = {domain.task.name: domain for domain in domains}
        self.reference, self.engine, self.settings, self.scorer = reference, engine, settings, scorer
        self.indexer_loss = IndexerLoss(model, settings)
        self.tally = StepTally()
        self.figures: dict[str, Any] = {}
        self.row: dict[str, Any] = {}
        self._updated_at = -1
        self._asked: list[Problem] = []
        self._rollouts: list[Rollout] = []
        # It gives the tokenizer a token for padding, which the user's must not get.
        super().__init__(model, [_task], processing_class=copy.deepcopy(tokenizer), **more)
        let_score(model, settings.temperature)

    @property
    def policy(self) -> PreTrainedModel:
        """The model, whatever Accelerate wrapped it in."""
        return self.accelerator.unwrap_model(self.model)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of replies with rewards; with what they are to be scored by."""
        self.indexer_loss.rest()
        problems = self._problems(inputs)
        order = rows_by_length(self.processing_class, problems, self.settings.group, self.settings.updates)
        inputs, problems = [inputs[row] for row in order], [problems[row] for row in order]
        self._asked = problems[:: self.settings.group]
        rows = [
            {**row, "prompt": [dict(message) for message in problem.messages], "problem": problem}
            for row, problem in zip(inputs, problems, strict=True)
        ]
        batch = super()._generate_and_score_completions(rows)
        device = batch["completion_ids"].device
        if (kept_BTK := _padded_kept(self._rollouts)) is not None:
            batch["kept"] = kept_BTK.to(device)
        if (experts_BSLK := _padded_experts(self._rollouts)) is not None:
            batch["experts"] = experts_BSLK.to(device)
        if (told_BT := _padded_told(self._rollouts)) is not None:
            batch["told"] = told_BT.to(device)
        batch["kl"] = torch.tensor([self.domains[row["task"]].kl for row in inputs], device=device)
        batch["reference_logps"] = self._reference_logps(batch)
        batch["advantages"] = group_advantages(self._rewards.view(-1, self.settings.group)).flatten()
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As TRL's, but unshuffled: replies of a group stay together, so that their prompt is read once."""
        per_call = self.args.steps_per_generation
        if self._step % per_call == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(batch, per_call)
        inputs: dict[str, Any] = self._buffered_inputs[self._step % per_call]
        return inputs

    def _problems(self, inputs: list[dict[str, Any]]) -> list[Problem]:
        """Of each row; those of a group are one."""
        made: dict[tuple[str, int], Problem] = {}
        keys = [(row["task"], row["index"]) for row in inputs]
        for name, index in dict.fromkeys(keys):
            made[name, index] = self.domains[name].task.problem(index)
        return [made[key] for key in keys]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        problems = [Problem("", 0, tuple(messages)) for messages in prompts]
        return [prompt_tokens(self.processing_class, problem) for problem in problems], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, *_: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The engine's replies and log-probabilities, under the weights of now."""
        self.update_engine()
        step, process = self.state.global_step, self.accelerator.process_index
        seed = 1_000_003 * self.settings.seed + self.accelerator.num_processes * step + process
        tasks = {name: domain.task for name, domain in self.domains.items()}
        sampling = self.settings.sampling(seed)
        self._rollouts = play(self.engine, self.processing_class, tasks, self._asked, sampling)
        asked = [number // num_generations for number in range(len(prompt_ids))]
        assert [rollout.prompt for rollout in self._rollouts] == asked
        logprobs = [list(rollout.logprobs) for rollout in self._rollouts]
        return [list(rollout.tokens) for rollout in self._rollouts], logprobs

    def update_engine(self) -> None:
        """Give the engine the weights of now, if it has others."""
        if self._updated_at != self.state.global_step:
            self.engine.update(policy_weights(self.policy))
            self._updated_at = self.state.global_step

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """Strict scores, NaN where scoring failed; float32 [replies of all processes, 1]."""
        scored = []
        for row, rollout in zip(inputs, self._rollouts, strict=True):
            score = self.scorer.score(row["problem"], reply_text(self._tokenizer, rollout))
            strict, lenient = (None, None) if score is None else (score.strict, score.lenient)
            if strict is not None and not rollout.ended:
                strict *= self.settings.cut_weight
            scored.append(ScoredReply(row["task"], strict, lenient, rollout.written, rollout.ended))
        self.figures = figures_of(gather_object(scored), self.settings.group)
        rewards = [math.nan if reply.strict is None else reply.strict for reply in scored]
        self._rewards = torch.tensor(rewards, device=self.accelerator.device)
        return self.accelerator.gather(self._rewards[:, None])

    @torch.no_grad()
    def _reference_logps(self, batch: Mapping[str, Any]) -> Tensor:
        """Log-probabilities of the replies under the reference, float32 [B, T]."""
        if self.reference is not None:
            return self._in_micro_batches(self.reference, batch)
        self.policy.eval()
        try:
            with without_lora(self.policy):
                return self._in_micro_batches(self.policy, batch)
        finally:
            self.policy.train()

    def _in_micro_batches(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "kept", "experts", "told")
        parts = {name: batch[name].split(self.settings.at_once) for name in names if name in batch}
        pieces = [dict(zip(parts, piece, strict=True)) for piece in zip(*parts.values(), strict=True)]
        with self.accelerator.autocast():
            scores = [score_replies(model, replies_of(piece), self.settings.temperature) for piece in pieces]
        return torch.cat([one.logp_BT for one in scores])

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        """The policy's own scores of what it wrote, which only TRL's loss needs."""
        return torch.zeros(input_ids.shape, device=input_ids.device), None, None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        replies = replies_of(inputs)
        with self.indexer_loss.taken():
            scores: TokenScores = model(scored=replies)
        engine_BT, settings = inputs["sampling_per_token_logps"], self.settings
        if self._is_first_update:
            self._check_gap(scores.logp_BT.detach(), engine_BT, replies.counts_BT)
        found = grpo_loss(
            scores.logp_BT,
            engine_BT,
            inputs["reference_logps"],
            inputs["advantages"],
            replies.counts_BT,
            inputs["kl"],
            (settings.clip_low, settings.clip_high),
            settings.off_policy,
        )
        loss = found.loss + self.indexer_loss.loss
        self.tally.add(found, scores, replies.counts_BT, self.indexer_loss.loss)
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss is not finite at step {self.state.global_step + 1}; the last checkpoint is kept: "
                f"lower the learning rate (now {settings.rate:.2g})"
            )
        return loss / self.current_gradient_accumulation_steps

    @property
    def _is_first_update(self) -> bool:
        """Whether the weights are still those that the engine wrote with."""
        per_call = self.args.steps_per_generation
        return self._step % per_call < per_call // self.settings.updates

    def _check_gap(self, logp_BT: Tensor, engine_BT: Tensor, counts_BT: Tensor) -> None:
        """Raise RolloutError if engine and trainer do not give the sampled tokens the same probabilities."""
        self.tally.add_gap((logp_BT - engine_BT)[counts_BT].abs())
        is_last = (self._step + 1) % self.current_gradient_accumulation_steps == 0
        if is_last:
            when = f"before step {self.state.global_step + 1}"
            self.tally.gap.require_within(self.settings.largest_gap, when)

    def step_row(self) -> dict[str, Any]:
        """What the step that has ended came to; the next one begins anew."""
        self.row = {**self.figures, **self.tally.row(self.accelerator), "learning_rate": self._rate()}
        if (routing := routing_of(self.policy)) is not None:
            self.row["replaced_experts"] = routing.take_replaced()
        self.tally.begin()
        return self.row

    def _rate(self) -> float:
        assert self.optimizer is not None
        return self.optimizer.param_groups[0]["lr"]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; indexers that are trained have a rate of their own."""
        groups = [
            {"params": self._trained(is_indexer=False), "lr": self.settings.rate},
            {"params": self._trained(is_indexer=True), "lr": self.settings.indexer_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=BETAS, weight_decay=0.0
        )
        return self.optimizer

    def _trained(self, *, is_indexer: bool) -> list[nn.Parameter]:
        named = self.policy.named_parameters()
        return [p for name, p in named if p.requires_grad and (".indexer." in name) == is_indexer]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Each loss's gradient by itself: a large one of the indexer must not shrink the policy's."""
        norms = [
            self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
            for is_indexer in (False, True)
            if (parameters := self._trained(is_indexer=is_indexer))
        ]
        return norms[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's figures and the step's, for `report_to`."""
        numbers = {name: x for name, x in self.row.items() if isinstance(x, (int, float))}
        super().log({**logs, **numbers}, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained weights, in one file."""
        assert output_dir is not None
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            state, file = trained_state(self.policy), Path(output_dir, WEIGHTS_FILE)
            atomic_write(file, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.policy, Path(resume_from_checkpoint, WEIGHTS_FILE))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Of checkpoints: none. What is saved in the end has its own."""

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""


def replies_of(inputs: Mapping[str, Any]) -> Replies:
    """A micro-batch as `Replies`."""
    return behind_prompts(
        inputs["prompt_ids"],
        inputs["prompt_mask"],
        inputs["completion_ids"],
        inputs["completion_mask"],
        inputs.get("kept"),
        inputs.get("experts"),
        inputs.get("told"),
    )


def trained_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that training changes, tied ones once, contiguous on the CPU."""
    named = model.named_parameters()
    return {name: p.detach().contiguous().cpu() for name, p in named if p.requires_grad}


def load_trained(model: PreTrainedModel, file: Path) -> None:
    """Put weights that `trained_state` gave back."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(file).items():
            named[name].copy_(tensor)


def rl_arguments(run_dir: Path, settings: RlSettings, processes: int, device: torch.device) -> GRPOConfig:
    """TRL's arguments: its own KL, deviation and importance sampling are off; nothing is printed."""
    if settings.bf16:
        hasten_half_products(torch.bfloat16)
    accumulation = settings.replies // (settings.at_once * processes)
    # A run that goes on begins with a call of the engine.
    save_every = settings.updates * -(-settings.save_every // settings.updates)
    arguments = GRPOConfig(
        output_dir=str(run_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.at_once,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * settings.updates,
        num_generations=settings.group,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=0.0,
        scale_rewards="none",
        loss_type="grpo",
        disable_dropout=True,
        router_aux_loss_coef=0.0,
        shuffle_dataset=False,
        learning_rate=settings.rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=settings.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=settings.bf16,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        eval_strategy="no",
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[] if settings.report_to == "none" else [settings.report_to],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    # One process is one GPU.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _padded_kept(rollouts: Sequence[Rollout]) -> Tensor | None:
    """kept_BTK, int64, -1 for none; None if sampling kept all."""
    if any(rollout.kept is None for rollout in rollouts):
        return None
    most = max(len(ids) for rollout in rollouts for ids in rollout.kept or ())
    rows = [
        torch.tensor([[*ids, *[-1] * (most - len(ids))] for ids in rollout.kept or ()])
        for rollout in rollouts
    ]
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def _task(**_: Any) -> list[float | None]:
    """TRL asks for a reward, whose name its logs show; `_calculate_rewards` gives it."""
    raise AssertionError


def _padded_experts(rollouts: Sequence[Rollout]) -> Tensor | None:
    """experts_BSLK, int16, -1 for none: each reply's last token has none; None if they are not known."""
    if any(rollout.experts is None for rollout in rollouts):
        return None
    rows = [torch.tensor(rollout.experts, dtype=torch.int16) for rollout in rollouts]
    rows = [torch.cat([row, row.new_full((1, *row.shape[1:]), -1)]) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def _padded_told(rollouts: Sequence[Rollout]) -> Tensor | None:
    """told_BT, bool; None if the policy wrote everything."""
    if all(rollout.told is None for rollout in rollouts):
        return None
    rows = [torch.tensor(rollout.told or [False] * len(rollout.tokens)) for rollout in rollouts]
    return pad_sequence(rows, batch_first=True)
