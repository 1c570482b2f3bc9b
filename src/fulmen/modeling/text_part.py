"""The language model inside of a model that reads images: read from the whole one's files, and put back."""

from collections.abc import Container
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.generation_settings import with_generation_settings
from fulmen.modeling.load_unpacked import load_unpacked
from fulmen.modeling.merged_weights import Arrangement
from fulmen.modeling.model_shards import ModelShards
from fulmen.modeling.shards import SHARD_DTYPES, Shards, folder_of_shards, save_tensors
from fulmen.modeling.vision import vision_family_for
from fulmen.modeling.weights import HEAD, load_all_weights, local_file, require_held
from fulmen.modeling.whole.family import WholeFamily

# Files beside weights and tokenizer that say how images become pixels.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
_LAYERS = "model.layers."


class TextShards(ModelShards):
    """The files of a model that reads images; `shapes`, `tensors` and `blocks` are its language model's.

    They go by the names that this has by itself. `held` is what lies in the files.
    """

    def __init__(self, folder: Path, whole: PreTrainedConfig, family: WholeFamily) -> None:
        """Read the headers alone. Raises as `ModelShards` and `WholeFamily.text_config`."""
        self.whole, self.family = whole, family
        super().__init__(folder, family.text_config(whole))

    def arrangement(self, model_type: str) -> Arrangement:
        prefix = self.family.text_prefix
        names = {name: stored for stored, name in self.whole_names.items()}
        text = {
            "model." + name.removeprefix(prefix): stored
            for name, stored in names.items()
            if name.startswith(prefix)
        }
        return Arrangement(text | ({HEAD: names[HEAD]} if HEAD in names else {}), {})

    @property
    def stored_names(self) -> dict[str, str]:
        """What the files call the language model's weights, by the names that it has by itself."""
        return dict(self._renamed)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.held[stored].shape for name, stored in self._renamed.items()}

    @cached_property
    def whole_names(self) -> dict[str, str]:
        """What the whole model calls each stored weight, by Transformers' own rules."""
        entries = get_model_conversion_mapping(self._empty_whole, add_legacy=False)
        renames = [entry for entry in entries if not isinstance(entry, WeightConverter)]
        names = {}
        for stored in self.held:
            names[stored] = stored
            for entry in renames:
                names[stored] = entry.rename_source_key(names[stored])[0]
        return names

    @property
    def first_dtype(self) -> torch.dtype:
        """Of the language model's first weights."""
        kinds = (SHARD_DTYPES.get(self.held[stored].kind) for stored in self._renamed.values())
        return next((kind for kind in kinds if kind is not None), torch.float32)

    def tensors_around(self, wanted: Container[str]) -> dict[str, Tensor]:
        """The whole model's tensors of these names but for its language model's, as they are stored."""
        inside = set(self._renamed.values())
        names = {
            stored: name
            for stored, name in self.whole_names.items()
            if stored not in inside and name in wanted
        }
        return {names[stored]: x for stored, x in Shards.tensors(self, names).items()}

    def require_finite_around(self) -> None:
        """Raise CheckpointError as `require_finite`, of all that is not the language model's."""
        self.require_finite(sorted(self.whole_names.keys() - set(self._renamed.values())))

    def require_all_held(self) -> None:
        """Raise CheckpointError as `require_held`, of the whole model's weights."""
        wanted = {name: tuple(x.shape) for name, x in self._empty_whole.state_dict().items()}
        held = {name: self.held[stored].shape for stored, name in self.whole_names.items()}
        if self.whole.tie_word_embeddings:
            wanted.pop(HEAD, None)
            held.pop(HEAD, None)
        require_held(str(self.folder), self.whole, wanted, held)

    def put_into(self, folder: Path, more: Path) -> None:
        """As `Shards.put_into`; `more` has names of the language model's, and gets those of the files."""
        name, stored = next(item for item in self._renamed.items() if item[0].startswith(_LAYERS))
        prefix = stored.removesuffix(name.removeprefix("model."))
        assert prefix != stored, stored
        with TemporaryDirectory(dir=folder) as temporary:
            renamed = Path(temporary) / more.name
            save_tensors(
                {prefix + key.removeprefix("model."): x for key, x in load_file(more).items()}, renamed
            )
            renamed.chmod(more.stat().st_mode)
            super().put_into(folder, renamed)

    @cached_property
    def _empty_whole(self) -> PreTrainedModel:
        with torch.device("meta"):
            model: PreTrainedModel = self.family.class_of(self.whole)(self.whole)
        return model


def shards_around(place: str) -> TextShards | None:
    """The files of a model that reads images, dense or converted; None: it is a language model alone.

    Raises CheckpointError, and as `TextShards`.
    """
    whole = read_own_config(place)
    family = vision_family_for(whole)
    return None if family is None else TextShards(folder_of_shards(place), whole, family)


def open_shards(place: str, config: PreTrainedConfig) -> ModelShards:
    """The files of a language model, alone or inside of one that reads images.

    config: of the language model. Raises CheckpointError, and as `ModelShards`.
    """
    return shards_around(place) or ModelShards(folder_of_shards(place), config)


def load_text_part(
    place: str,
    whole: PreTrainedConfig,
    family: WholeFamily,
    dtype: torch.dtype | str,
    *,
    text: PreTrainedConfig | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The language model inside of a model that reads images, in memory by itself.

    text: its config, if it is to be another than the whole model's has. Raises as `load_unpacked`, which
    the options are for.
    """
    shards = TextShards(folder_of_shards(place), whole, family)
    text = family.text_config(whole) if text is None else text
    text.dtype = text.dtype or shards.first_dtype
    load = partial(load_unpacked, place, text, dtype=dtype, shards=shards, **options)
    return with_generation_settings(place, text.vocab_size, load)


def load_whole(place: str, config: PreTrainedConfig, family: WholeFamily, dtype: torch.dtype | str) -> Any:
    """A model that reads images, as a whole. Raises CheckpointError as `load_all_weights`."""
    load = partial(load_all_weights, place, family.class_of(config), dtype=dtype)
    return with_generation_settings(place, config.get_text_config().vocab_size, load)


def whole_of(shards: TextShards, text_model: PreTrainedModel) -> PreTrainedModel:
    """The whole model around a converted language model, without weights: what its files are to say."""
    config = shards.family.dsa_config(shards.whole, text_model.config)
    with torch.device("meta"):
        model: PreTrainedModel = shards.family.whole_class(config)
    model.config.architectures = [type(model).__name__]
    model.generation_config = text_model.generation_config
    return model


def filled_whole_of(shards: TextShards, text_model: PreTrainedModel) -> PreTrainedModel:
    """`whole_of` with weights to be saved: the language model's own, and for the rest those of the files."""
    model, prefix = whole_of(shards, text_model), shards.family.text_prefix
    inside = {
        name if name == HEAD else prefix + name.removeprefix("model."): x
        for name, x in text_model.state_dict().items()
    }
    around = shards.tensors_around(model.state_dict())
    model.load_state_dict({**inside, **around}, assign=True)
    model.tie_weights()
    return model


def processor_files(shards: TextShards) -> dict[str, Path]:
    """The files that say how images become pixels, by their names; those of a hub model are fetched."""
    place = shards.whole.name_or_path or str(shards.folder)
    found = {name: local_file(place, name) for name in PROCESSOR_FILES}
    return {name: file for name, file in found.items() if file is not None}
