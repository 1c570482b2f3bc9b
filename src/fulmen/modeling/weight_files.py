"""The files of a model directory, looked at before any is loaded: there, readable, complete, no pickles."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fulmen.errors import CheckpointError, one_line

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
READ_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def require_sound_files(folder: Path) -> None:
    """Look at a model directory's files without reading a weight.

    Raises CheckpointError: a file that may not be read, an adapter, pickles only, no weights, a part that is
    missing or cut short, an index that names weights which are not in their parts.
    """
    require_no_adapter(folder)
    held = {file.name: set(names_in(file)) for file in weight_files(folder)}
    if WEIGHTS_FILE in held:
        return
    listed = _weight_map(folder / INDEX_FILE)
    if absent := sorted(name for name, file in listed.items() if name not in held[file]):
        raise CheckpointError(
            f"{folder / INDEX_FILE} lists {len(absent)} weights that are not in their parts, the first "
            f"{absent[0]} in {listed[absent[0]]}; get index and parts anew, of one model"
        )


def require_no_adapter(folder: Path) -> None:
    """Raise CheckpointError if a directory holds an adapter, alone or beside a model."""
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_FILE}); merge it into its base model (peft: "
            "merge_and_unload, save_pretrained) and name the result"
        )


def follow_umask(files: Iterable[Path], plain: Path) -> None:
    """Give files the mode of `plain`, one that was simply opened and written.

    Safetensors are written for their owner alone, whatever the umask says.
    """
    mode = plain.stat().st_mode
    for file in files:
        file.chmod(mode)


def require_readable(folder: Path) -> None:
    """Raise CheckpointError that names a directory or a file in it that may not be read."""
    try:
        files = [file for pattern in READ_FILES for file in sorted(folder.glob(pattern))]
        # A directory that cannot be listed is empty to `glob`.
        next(folder.iterdir(), None)
        for file in files:
            file.open("rb").close()
    except OSError as error:
        raise not_readable(error) from error


def not_readable(error: OSError) -> CheckpointError:
    """The error for a file that the system does not let us read."""
    return CheckpointError(
        f"{error.filename} cannot be read ({error.strerror}); give yourself leave to read it"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a directory's model is loaded from. Raises CheckpointError."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise _no_weights(folder)
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has unreadable weights (it lacks {len(missing)} of {len(names)} parts, "
            f"the first {missing[0]}); get them"
        )
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Where an index says that each weight is. Raises CheckpointError if it says nothing of that."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} lists no weights ({type(error).__name__}); get it anew") from error


def names_in(file: Path) -> list[str]:
    """Names of the weights in a safetensors file. Raises CheckpointError if it is cut short or damaged."""
    try:
        # Reads the header alone, and holds its extents against the file's size.
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file.parent} has unreadable weights ({file.name}: {one_line(error)}); get it anew"
        ) from error


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return CheckpointError(
            f"{folder} has unreadable weights (pickles only, as {pickles[0]}, which can run code when "
            "opened); if you trust them, load them with Transformers and save them as safetensors"
        )
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if ggufs:
        return CheckpointError(
            f"{folder} has unreadable weights (no {WEIGHTS_FILE}); name the file {ggufs[0]} in it"
        )
    return CheckpointError(f"{folder} has unreadable weights (no {WEIGHTS_FILE}); get them")
