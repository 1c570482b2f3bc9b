"""What fulmen asks of a model family; each file in `families/` answers in one record, called FAMILY.

Nothing else in fulmen asks what kind of attention a model has: a fork on it belongs here, as a method.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fulmen.config import CoarseShape, DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.forward_checks import require_no_dropout
from fulmen.modeling.merged_weights import can_merge


class AttentionLayout(NamedTuple):
    """Heads and widths of one layer's attention.

    Attributes:
        heads, key_heads: of queries (H); of keys and values (G).
        key_width, value_width: of a head's queries and keys; of its values.
        values_in_keys: a value is the first part of its key, so that a cache keeps keys alone.
        scale: of the logits.
    """

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    values_in_keys: bool
    scale: float

    @property
    def token_width(self) -> int:
        """Numbers that a cache keeps of a token."""
        return self.key_heads * (self.key_width + (0 if self.values_in_keys else self.value_width))

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query-key pair, all heads: logit and value."""
        return 2 * self.heads * (self.key_width + self.value_width)


class IndexerCost(NamedTuple):
    """One layer's indexer: FLOPs per query-key pair, weights that make index keys and index queries.

    coarse_pair_flops: of the coarse level, if there is one, whose weights the others include.
    """

    pair_flops: int
    key_weights: int
    query_weights: int
    coarse_pair_flops: int = 0


class AnsweredText(NamedTuple):
    """A text with questions and answers. ids_T: int64. rows_R: ascending, the tokens before an answer's."""

    ids_T: Tensor
    rows_R: Tensor


class TriedSplit(NamedTuple):
    """A split of k and what it changes. ratios: each layer's k over the model's.

    kl_text, kl_answers: KL(dense || sparse) of the next token, nats a token, in a text and at its answers.
    """

    ratios: tuple[float, ...]
    kl_text: float
    kl_answers: float


class IndexHeads(NamedTuple):
    """Index query heads (J), index key heads (I) and their width (E)."""

    queries: int
    keys: int
    width: int


@dataclass(frozen=True)
class Family(ABC):
    """A kind of model: which ones convert, what they become, and all that depends on their attention.

    Attributes:
        source_types: `model_type`s of dense models.
        dsa_types: `model_type`s of DSA models, the first being what a conversion makes.
        serving_classes: names of the DSA models' classes, in Transformers and in vLLM, one for each type.
        full_attention_layers: indices of the layers whose attention sees all of the past.
        mlp_matrices: of a plain MLP: gate, up and down, or the last two alone.
        is_stock: a converted model is a class of Transformers' and vLLM's own, and runs without fulmen.
        varies_topk: layers may keep different numbers of tokens, `topk` on average.
        packs_index_keys: a cache keeps index keys in 8 bits (`fulmen.ops.common.index_keys`).
    """

    source_types: tuple[str, ...]
    dsa_types: tuple[str, ...]
    serving_classes: tuple[str, ...]
    full_attention_layers: Callable[[PreTrainedConfig], list[int]]
    mlp_matrices: int = field(default=3, kw_only=True)

    is_stock: ClassVar[bool] = False
    varies_topk: ClassVar[bool] = False
    packs_index_keys: ClassVar[bool] = False

    @abstractmethod
    def has_layout(self, config: PreTrainedConfig) -> bool:
        """Whether a model, of this family or of none, has attention heads as this family's models do."""

    @abstractmethod
    def attention_layout(self, config: PreTrainedConfig) -> AttentionLayout:
        """Heads as a cache keeps them: how a token is decoded, and a selection read."""

    def prefill_layout(self, config: PreTrainedConfig) -> AttentionLayout:
        """Heads as dense attention reads a prompt."""
        return self.attention_layout(config)

    def layers_without_rope(self, config: PreTrainedConfig) -> list[int]:
        """Indices of the layers whose heads no rotary table turns."""
        return []

    @abstractmethod
    def attention_weights(self, config: PreTrainedConfig) -> int:
        """Weights of one layer's projections, queries to output."""

    @abstractmethod
    def heads_in_words(self, config: PreTrainedConfig) -> str:
        """The layout for people: "9 query, 3 key/value, width 64"."""

    @abstractmethod
    def indexer_cost(self, config: PreTrainedConfig, dsa: DsaConfig) -> IndexerCost:
        """What one layer's indexer computes."""

    @abstractmethod
    def index_key_bytes(self, dsa: DsaConfig, dtype_bytes: int) -> int:
        """What a cache keeps of one token's index keys in one layer. dtype_bytes: per number of the model."""

    @abstractmethod
    def default_index(self, config: PreTrainedConfig, key_share: float) -> IndexHeads:
        """The widest indexer whose keys take at most `key_share` of the bytes of bfloat16 keys and values."""

    def default_coarse(self, config: PreTrainedConfig) -> CoarseShape:
        """The coarse level that a conversion adds; of no width: the index has one level."""
        return CoarseShape(0, 0)

    def coarse_key_bytes(self, dsa: DsaConfig) -> int:
        """What a cache keeps of one token's coarse key in one layer."""
        return 0

    @abstractmethod
    def require_inheritable(self, config: PreTrainedConfig, dsa: DsaConfig) -> None:
        """Raise ConfigError for an indexer that cannot be built from the model's own heads."""

    @abstractmethod
    def require_convertible(self, config: PreTrainedConfig, dsa: DsaConfig) -> None:
        """Raise what `from_dense` would, where the config alone tells: before weights are loaded."""

    def require_trainable(self, config: PreTrainedConfig) -> None:
        """Raise ConfigError for a model that the sparse stage cannot train, which its config tells."""
        require_no_dropout(config, training=True)

    @abstractmethod
    def from_dense(self, dense: PreTrainedModel, dsa: DsaConfig) -> PreTrainedModel:
        """A DSA model with the weights of `dense` and a random indexer in each layer of `dsa.layers`."""

    def runs_as_stored(self, config: PreTrainedConfig) -> bool:
        """Whether each layer can be read by itself from a dense model's files."""
        return can_merge(config.model_type)

    @abstractmethod
    def dsa_config(self, config: PreTrainedConfig, dsa: DsaConfig, tied: bool) -> PreTrainedConfig:
        """The config that `from_dense` makes. tied: whether the head is the embedding."""

    def quantizes_indexers(self, settings: Mapping[str, Any]) -> bool:
        """Whether a model that is quantized by these settings has quantized indexers."""
        return False

    def stored_indexers(self, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """All indexers' tensors as they lie in the files of a quantized model."""
        return dict(state)

    @abstractmethod
    def dsa_of(self, config: PreTrainedConfig) -> DsaConfig:
        """The DSA configuration of a converted model."""

    @abstractmethod
    def set_topk(self, model: PreTrainedModel, topk: int) -> None:
        """Let every query of a converted model keep `topk` tokens (a positive integer)."""

    @abstractmethod
    def fit_topk(
        self, model: PreTrainedModel, input_ids_BT: Tensor, on_layer: Callable[[int], None] = lambda _: None
    ) -> None:
        """Set each layer's k from a dense pass over calibration text; nothing unless `varies_topk`.

        on_layer: called with the number of layers measured, for progress.
        """

    @abstractmethod
    def try_topk(
        self,
        model: PreTrainedModel,
        texts: Sequence[AnsweredText],
        on_read: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[TriedSplit]:
        """Keep the split of k with which the model answers best; nothing unless `varies_topk`.

        To be called after `fit_topk` and `inherit`.

        Args:
            on_read: called with texts read and texts to read.

        Returns what was tried, the one that is kept first.
        """

    @abstractmethod
    def restore_topk(self, model: PreTrainedModel, layers: Sequence[Mapping[str, Any]]) -> None:
        """Put back what `fit_topk` had set. layers: what `inherit` returned, as dicts."""

    @abstractmethod
    def inherit(
        self, model: PreTrainedModel, input_ids_BT: Tensor, on_layer: Callable[[Any], None] = lambda _: None
    ) -> Sequence[Any]:
        """Build every indexer of a converted model from its own heads: the calibration fit.

        Args:
            input_ids_BT: int64 token ids, B sequences of T tokens without padding.
            on_layer: called with each layer's fit, for progress.

        Returns:
            One NamedTuple per layer, each with `kl` (nats).
        """

    def set_coarse(self, model: PreTrainedModel, dsa: DsaConfig) -> None:
        """Give every indexer of a converted model the coarse level that `dsa` describes, or none."""
        raise ConfigError(f"model_type {model.config.model_type!r} has an index of one level")

    def inherit_coarse(
        self, model: PreTrainedModel, input_ids_BT: Tensor, on_layer: Callable[[int], None] = lambda _: None
    ) -> None:
        """Build the coarse level of every indexer and change nothing else; as `inherit`.

        on_layer: called with the number of layers done.
        """
        raise ConfigError(f"model_type {model.config.model_type!r} has an index of one level")

    @abstractmethod
    def empty_cache(self, config: PreTrainedConfig, max_length: int | None = None) -> Any:
        """An empty cache with room for index keys. max_length: tokens to allocate at once."""

    @abstractmethod
    def accelerate(self, model: PreTrainedModel) -> None:
        """Let a converted model run on fulmen's ops from now on; nothing where it does by itself."""

    @abstractmethod
    def accelerated(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """`accelerate` for the length of a `with` block."""


def has_own_head(model: PreTrainedModel) -> bool:
    """Whether the output layer has weights of its own. The config may call them tied where they are not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is not embedding.weight


def even_width(widest: int, narrowest: int) -> int:
    """Width of an index head: a multiple of 8 up to `widest`, where that leaves any."""
    return max(narrowest, widest - widest % (8 if widest >= 8 else 2))


def all_layers(config: PreTrainedConfig) -> list[int]:
    """Every layer has full attention."""
    return list(range(config.num_hidden_layers))
