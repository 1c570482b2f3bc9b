"""What a conversion will do on this machine, before any weight is read: k, lengths, whole or by layers.

The rule: where the weights, the indexers and the work on the calibration text are estimated to take more
memory than is free, or the weights are quantized and are to stay so, one layer at a time is in memory, and
inherit is the only stage. Where even that has no room, or cannot be, less text is read.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear
from transformers import PreTrainedConfig

from fulmen.config import DsaConfig
from fulmen.memory import available_bytes
from fulmen.modeling.families import family_for
from fulmen.modeling.index_shape import default_dsa
from fulmen.modeling.inherit_cost import InheritCost, InheritTexts, WeightSizes, inherit_cost, weight_sizes
from fulmen.modeling.lengths import context_of, untrained_topk
from fulmen.ops.half_products import hasten_half_products
from fulmen.pipeline.devices import training_device
from fulmen.pipeline.inherit_stage import BUDGET_SEQUENCES
from fulmen.pipeline.model_source import DenseSource
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.settings import AUTO_DEVICE, ConvertSettings
from fulmen.pipeline.texts import (
    ANSWERED_SEQUENCES,
    ANSWERED_TOKENS,
    calibration_shape,
    calibration_sizes,
    lengths_to_try,
)
from fulmen.training.processes import broadcast_from_main

INHERIT_ALONE = ("inherit",)
# Of the products that tell the machine's speed: long enough to count, short enough not to be noticed.
TIMED_SHAPE, TIMED_TIMES = (1024, 2048), 3


class Plan(NamedTuple):
    """What a conversion will do, as far as the config tells. lengths: of sequences, to be tried in turn."""

    dsa: DsaConfig
    lengths: list[int]
    context: int | None


class FittedPlan(NamedTuple):
    """A plan that has room. calibration_tokens: of all calibration texts, at most."""

    dsa: DsaConfig
    lengths: list[int]
    context: int | None
    calibration_tokens: int


@dataclass(frozen=True)
class ConversionPlan:
    """What `fulmen convert` with defaults would do on this machine now. Bytes and seconds are estimates.

    Attributes:
        topk: tokens that each query keeps.
        stages: that would run.
        length: tokens of a training text.
        calibration: texts to calibrate on, and tokens of each.
        by_layers: whether one layer at a time would be in memory.
        stays_quantized: whether the result's weights would be as quantized as the source's.
        weight_bytes: of the whole model.
        whole_bytes, layers_bytes: peak of inherit with the whole model, and layer by layer.
        free_bytes: of memory now.
        inherit_seconds: of inherit here.
    """

    topk: int
    stages: tuple[str, ...]
    length: int
    calibration: tuple[int, int]
    by_layers: bool
    stays_quantized: bool
    weight_bytes: int
    whole_bytes: int
    layers_bytes: int
    free_bytes: int
    inherit_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def plan_conversion(settings: ConvertSettings, config: PreTrainedConfig) -> Plan:
    """Raises what the config has against these settings, before weights are loaded."""
    topk = settings.topk
    if topk is None and not settings.trains:
        topk = untrained_topk(config, settings.length)
    dsa = default_dsa(config, topk, settings.index_heads, settings.index_head_dim, settings.index)
    family_for(config).require_convertible(config, dsa)
    if "sparse" in settings.asked_stages:
        family_for(config).require_trainable(config)
    return Plan(dsa, lengths_to_try(settings.length, config, dsa.topk), context_of(config))


class Planner:
    """Fits conversions of one source into the memory that is free when it is made."""

    def __init__(self, source: DenseSource, begun: Mapping[str, Any], device: torch.device | None) -> None:
        """Take what an unfinished run began with (none: empty) as decided: it must not change its mind."""
        self._source, self._config = source, source.config
        # Of a training, or of an earlier fulmen: nothing is decided there.
        self._begun = begun if {"by_layers", "length", "calibration_tokens"} <= begun.keys() else {}
        # All processes of a run must decide alike.
        self.free_bytes = broadcast_from_main(available_bytes(device)) + source.loaded_bytes

    @cached_property
    def sizes(self) -> WeightSizes:
        """Those of the dense model; reckoned after all that the config itself has against a conversion."""
        return weight_sizes(self._config)

    def settled(self, settings: ConvertSettings) -> ConvertSettings:
        """The settings with their stages, and with `by_layers` decided."""
        by_layers = settings.by_layers
        if by_layers is None:
            by_layers = self._may_be_by_layers(settings) and self._is_by_layers(settings)
        if by_layers:
            return replace(settings, by_layers=True, stages=INHERIT_ALONE, budget_s=None)
        return replace(settings, by_layers=False, stages=settings.asked_stages)

    def plan(self, settings: ConvertSettings) -> FittedPlan:
        """`plan_conversion` with the longest texts that have room, at least with the shortest.

        Calibration gives way before the training texts do, and these only where nobody asked for a length.
        """
        plan = plan_conversion(settings, self._config)
        if self._begun:
            most = settings.length or self._begun["length"]
            lengths = [length for length in plan.lengths if length <= most] or plan.lengths
            return FittedPlan(plan.dsa, lengths, plan.context, self._begun["calibration_tokens"])
        fitted = [
            FittedPlan(plan.dsa, plan.lengths[place:], plan.context, tokens)
            for place, length in enumerate(plan.lengths)
            for tokens in calibration_sizes(length, plan.context)
        ]
        return next((one for one in fitted if self._has_room(one, settings)), fitted[-1])

    def cost(self, plan: FittedPlan) -> InheritCost:
        """Of inherit with the longest texts of a plan."""
        sequences, length = calibration_shape(plan.lengths[0], plan.context, plan.calibration_tokens)
        tried = (ANSWERED_SEQUENCES, min(plan.lengths[0], ANSWERED_TOKENS))
        texts = InheritTexts(sequences, length, min(sequences, BUDGET_SEQUENCES), *tried)
        itemsize = _dtype(self._config).itemsize
        return inherit_cost(self._config, plan.dsa, self.sizes, texts, itemsize)

    def _has_room(self, plan: FittedPlan, settings: ConvertSettings) -> bool:
        cost = self.cost(plan)
        return (cost.layers_bytes if settings.by_layers else cost.whole_bytes) <= self.free_bytes

    def _may_be_by_layers(self, settings: ConvertSettings) -> bool:
        plain = settings.stages in (None, INHERIT_ALONE) and settings.dtype == "auto"
        return plain and self._source.has_layers

    def _is_by_layers(self, settings: ConvertSettings) -> bool:
        if self._begun:
            return bool(self._begun["by_layers"])
        if self._source.stays_quantized:
            return True
        cost = self.cost(FittedPlan(*plan_conversion(settings, self._config), sys.maxsize))
        return cost.whole_bytes > self.free_bytes


def left_out(
    asked: ConvertSettings, settings: ConvertSettings, source: DenseSource, reporter: Reporter
) -> dict[str, str]:
    """The stages that would run if the model had room in memory, and why they do not; said too."""
    if not settings.by_layers:
        return {}
    if asked.by_layers is None:
        why = "The model has no room in memory"
        if source.stays_quantized:
            why = f"The weights stay quantized ({', '.join(source.quantized)})"
        reporter.note(f"{why}: one layer at a time is read (by_layers decides)")
    if asked.stages is not None:
        return {}
    reason = "it trains a model that is in memory as a whole"
    reporter.note(f"Left out: warmup, as {reason}; k is that of an index that nothing trained")
    return {"warmup": reason}


def describe_plan(source: DenseSource) -> ConversionPlan:
    """What a conversion with defaults would do now. Raises as `plan_conversion`."""
    device = training_device(AUTO_DEVICE)
    planner = Planner(source, {}, device)
    settings = planner.settled(ConvertSettings(source.name, Path("none")))
    plan, dtype = planner.plan(settings), _dtype(source.config)
    cost = planner.cost(plan)
    return ConversionPlan(
        topk=plan.dsa.topk,
        stages=settings.asked_stages,
        length=plan.lengths[0],
        calibration=calibration_shape(plan.lengths[0], plan.context, plan.calibration_tokens),
        by_layers=bool(settings.by_layers),
        stays_quantized=bool(settings.by_layers) and source.stays_quantized,
        weight_bytes=planner.sizes.model * dtype.itemsize,
        whole_bytes=cost.whole_bytes,
        layers_bytes=cost.layers_bytes,
        free_bytes=planner.free_bytes,
        inherit_seconds=cost.flops / _flops_per_second(dtype, device)
        + cost.float32_flops / _flops_per_second(torch.float32, device),
    )


def _dtype(config: PreTrainedConfig) -> Any:
    # A config without a dtype means float32; that of a model in memory may be a name.
    dtype: Any = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    hasten_half_products(dtype)
    rows, width = TIMED_SHAPE
    x_NC, y_CC = (torch.ones(size, width, dtype=dtype, device=device) for size in (rows, width))
    seconds = []
    for _ in range(TIMED_TIMES):
        began = time.perf_counter()
        # Read, since a GPU only begins at once.
        float(linear(x_NC, y_CC)[0, 0])
        seconds.append(time.perf_counter() - began)
    return 2 * rows * width * width / min(seconds)
