"""The coarse level of an index, fitted in closed form: to a converted model, and anew to a trained one."""

import torch
from transformers import PreTrainedModel

from fulmen.data import TokenSequence
from fulmen.modeling.families import dsa_family_for, dsa_of
from fulmen.modeling.token_blocks import feed_forward_in_blocks
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.texts import CALIBRATION_TOKENS, FEWEST_SEQUENCES
from fulmen.training.sharding import is_sharded

# The most that are read again after training: of short texts.
REFIT_SEQUENCES = 16


def fit_coarse(model: PreTrainedModel, ids_BT: torch.Tensor, reporter: Reporter) -> None:
    """Set the coarse level of every layer; nothing else changes."""
    n_layers, trains = len(dsa_of(model.config).layers), model.training
    model.eval()
    with reporter.stage("Coarse level"), feed_forward_in_blocks(model):
        reporter.advance(0, n_layers, f"{len(ids_BT)} sequences of {ids_BT.shape[1]} tokens")
        family = dsa_family_for(model.config)
        family.inherit_coarse(model, ids_BT, lambda done: reporter.advance(done, n_layers))
    model.train(trains)


def refit_sequences(length: int) -> int:
    """Sequences that have as many tokens as a conversion's calibration texts, unless they are very short."""
    return max(FEWEST_SEQUENCES, min(REFIT_SEQUENCES, CALIBRATION_TOKENS // length))


def refit_coarse(model: PreTrainedModel, texts: list[TokenSequence], reporter: Reporter) -> None:
    """After a stage that trained the model: its coarse level follows, if it has one.

    A model in shards keeps the one that it has, which still fits what training has left alone.
    """
    if not dsa_of(model.config).coarse_head_dim:
        return
    if is_sharded():
        reporter.note("The coarse level stays as it was: it is not fitted to a model in shards")
        return
    ids_BT = torch.stack([text.input_ids for text in texts if len(text.input_ids) == len(texts[0].input_ids)])
    fit_coarse(model, ids_BT.to(model.device), reporter)
