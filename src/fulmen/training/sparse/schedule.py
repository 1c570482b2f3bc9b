"""How many keys each layer keeps at each step of the sparse stage."""

from dataclasses import dataclass

K_SCHEDULES = ("none", "shrink", "layers", "dense")
# Share of the steps after which every layer has reached the target.
SCHEDULE_SHARE = 0.5


@dataclass(frozen=True)
class TopkSchedule:
    """k by step and layer.

    kind: "none": the target from the first step on. "shrink": from the sequences' length down to the target,
    by a constant factor a step. "layers": one layer after the other becomes sparse, the last one first, since
    its error passes through no other. "dense": never sparse, which makes the control of a run: the same
    tokens, the same loss, dense attention.
    length: tokens of a sequence. topk: the target. layers: the converted ones. steps: of the run.
    """

    kind: str
    length: int
    topk: int
    layers: tuple[int, ...]
    steps: int

    def at(self, step: int, layer: int) -> int:
        """Keys that a query of `layer` keeps in the step after `step` finished ones."""
        done = min(step / (SCHEDULE_SHARE * self.steps), 1.0)
        if self.kind == "dense":
            return self.length
        if self.kind == "shrink":
            return round(self.length * (self.topk / self.length) ** done)
        if self.kind == "layers":
            n_sparse = max(1, round(done * len(self.layers)))
            return self.topk if layer in sorted(self.layers)[-n_sparse:] else self.length
        return self.topk
