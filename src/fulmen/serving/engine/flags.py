"""Flags that a user hands on to vLLM: read as vLLM reads them, and refused where they open a second door.

vLLM's parser takes `_` for `-`, any beginning of a flag's name that fits no other, `--flag=value`,
`--flag.part value`, and a YAML file whose entries are flags.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from fulmen.errors import ConfigError

_GATEWAY = "is the gateway's to set; leave it out of the engine's flags"
_SOCKET = "is of no use at the engine's private socket; leave it out, and put TLS or a proxy before fulmen"
_ONE = "does not fit one engine behind one gateway; start `vllm serve` by hand for that"
_EVENTS = "sends the tokens of all prompts to whoever connects; start `vllm serve` by hand for that"
_FLAGS = {
    _GATEWAY: "--host --port --uds --api-key --model --served-model-name",
    _SOCKET: "--ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-cert-reqs --ssl-ciphers --enable-ssl-refresh "
    "--root-path --grpc --grpc-port",
    _ONE: "--headless --api-server-count -asc --tokens-only --data-parallel-external-lb -dpe "
    "--data-parallel-hybrid-lb -dph --data-parallel-multi-port-external-lb -dpm "
    "--data-parallel-supervisor-port",
    _EVENTS: "--kv-events-config",
}
REFUSED = {flag: reason for reason, flags in _FLAGS.items() for flag in flags.split()}
# Flags of vLLM that one of those begins with.
_OTHERS = ("-dp",)
# With these the engine is on several machines, which must reach each other.
_MACHINES = ("--nnodes", "-n", "--node-rank", "-r", "--master-addr", "--data-parallel-address", "-dpa")


def require_harmless(extra: tuple[str, ...]) -> None:
    """Raise ConfigError for a flag that would let others reach the engine, or keep the gateway from it."""
    for flag in _flags(extra):
        meant = [refused for refused in REFUSED if refused.startswith(_name(flag))]
        if meant and _name(flag) not in _OTHERS:
            called = flag if flag == meant[0] else f"{flag} (for vLLM {meant[0]})"
            raise ConfigError(f"{called} {REFUSED[meant[0]]}")


def spans_machines(extra: tuple[str, ...]) -> bool:
    """Whether the flags put the engine's processes on several machines."""
    names = {_name(flag) for flag in _flags(extra)}
    values = {value for flag in extra for value in (flag, flag.partition("=")[2])}
    return "ray" in values or any(name and name in _MACHINES for name in names)


def asks_to_compile(extra: tuple[str, ...]) -> bool:
    """Whether the flags turn vLLM's compiler on, which is off on a CPU unless asked for."""
    return any(_name(flag).startswith("--no-enf") for flag in _flags(extra))


def _flags(extra: tuple[str, ...]) -> Iterator[str]:
    """What vLLM takes for a flag: what begins with a dash, there or in a file that is named there."""
    for place, word in enumerate(extra):
        if not word.startswith("-") or _is_number(word):
            continue
        flag, _, value = word.partition("=")
        yield flag
        if _name(flag) == "--config":
            yield from _flags_of_file(value or "".join(extra[place + 1 : place + 2]))


def _flags_of_file(name: str) -> Iterator[str]:
    """The entries of a YAML file, and values of them that vLLM would take for flags."""
    try:
        entries = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise ConfigError(f"--config {name} cannot be read ({reason}); name a YAML file of flags") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"--config {name} holds no flags; write them as `max-num-seqs: 64`")
    for key, value in entries.items():
        yield f"--{key}"
        words = [str(part) for part in (value if isinstance(value, list) else [value])]
        yield from _flags(tuple(word for word in words if not word.startswith("--config")))


def _name(flag: str) -> str:
    """The flag's own name, as vLLM writes it."""
    if not flag.startswith("--"):
        return flag.partition(".")[0]
    return flag.partition(".")[0].replace("_", "-")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
