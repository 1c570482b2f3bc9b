"""Which split of k among the layers a model really answers best with: tried out, not reckoned.

`topk_ratios` looks at each layer alone and at ordinary text. What that saves in loss may cost answers, of
which loss says little: so the converted model reads texts that ask and look up, under the even split, the
fitted one and the one half-way. The fitted one stays unless another changes predictions clearly less: two
texts, much shorter than the context, tell no small difference. A change at answers counts as much as one in
the text around. Every second text is spread over the context (`calibration`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.modeling.family import AnsweredText, TriedSplit
from fulmen.modeling.gqa.calibration import positions_to_read, read_at
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.selectors import DenseSelector, IndexerSelector, Selector, use_selector

# Shares of the way from the even split to the fitted one.
TRIED_BLENDS = (0.0, 0.5, 1.0)
# Of a text, beside the answers' tokens, evenly over its second half.
TEXT_ROWS = 192
# Of the fitted split's change, what another may have at most to be taken in its place.
CLEARLY_LESS = 0.9


@torch.no_grad()
def try_topk_ratios(
    model: PreTrainedModel,
    texts: Sequence[AnsweredText],
    on_read: Callable[[int, int], None] = lambda done, total: None,
) -> list[TriedSplit]:
    """Leave a model with the best of three splits between an even one and the one that it has.

    Args:
        model: with its indexers; the ratios that it has are the fitted ones.
        texts: each longer than the model's k, at least one.
        on_read: called with texts read and texts to read, after each.

    Returns all that were tried, the one that is kept first.
    """
    fitted = DsaConfig.from_dict(model.config.dsa).topk_shares
    blends = [tuple(1 + blend * (ratio - 1) for ratio in fitted) for blend in TRIED_BLENDS]
    total = len(texts) * (1 + len(blends))
    on_read(0, total)
    changes_ST = [[0.0, 0.0] for _ in blends]
    for number, text in enumerate(texts):
        position_T = positions_to_read(model, len(texts), len(text.ids_T))[number]
        dense = _read(model, text, position_T, DenseSelector())
        on_read(number * (1 + len(blends)) + 1, total)
        for place, ratios in enumerate(blends):
            set_topk_ratios(model, ratios)
            sparse = _read(model, text, position_T, IndexerSelector())
            for part, (p_RV, q_RV) in enumerate(zip(dense, sparse, strict=True)):
                changes_ST[place][part] += float((p_RV.exp() * (p_RV - q_RV)).sum(-1).mean()) / len(texts)
            on_read(number * (1 + len(blends)) + 2 + place, total)
    tried = [TriedSplit(ratios, *changes) for ratios, changes in zip(blends, changes_ST, strict=True)]
    even, fitted_one = tried[0], tried[-1]

    def change(one: TriedSplit) -> float:
        total = one.kl_text / max(even.kl_text, 1e-12) + one.kl_answers / max(even.kl_answers, 1e-12)
        return total * CLEARLY_LESS if one is fitted_one else total

    tried.sort(key=change)
    set_topk_ratios(model, tried[0].ratios)
    return tried


def _read(
    model: PreTrainedModel, text: AnsweredText, position_T: Tensor, selector: Selector
) -> tuple[Tensor, Tensor]:
    """Log probabilities [R, V] of the next token: in the text, and where answers are next."""
    length = len(text.ids_T)
    some_R = torch.linspace(length // 2, length - 1, TEXT_ROWS).long().unique()
    with use_selector(model, selector):
        hidden_TC = read_at(model, text.ids_T[None], position_T[None]).last_hidden_state[0]
    head = model.get_output_embeddings()
    text_RV, answers_RV = (
        head(hidden_TC[rows.to(hidden_TC.device)]).float().log_softmax(-1) for rows in (some_R, text.rows_R)
    )
    return text_RV, answers_RV
