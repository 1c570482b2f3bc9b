"""A recipe of post-training, as a YAML file or a mapping: which domains, how long, from which base model."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError, first_line
from fulmen.pipeline.api import convert
from fulmen.pipeline.api_rl import rl
from fulmen.pipeline.arguments import number_argument
from fulmen.pipeline.rl_settings import RlRunSettings, lora_argument
from fulmen.pipeline.settings import require_seed
from fulmen.tasks import named
from fulmen.training.sft.settings import SftSettings

if TYPE_CHECKING:
    import yaml

# What a stage gets from the recipe itself.
OWN_OPTIONS = {"tasks", "out", "seed", "source", "overwrite", "device", "reporter", "kl"}
DEFAULT_KL = 1e-3
DOMAIN_KEYS = ("tasks", "kl", "max_new_tokens", "sft", "rl", "rejection")
# Folders of a run that are no domain's.
TAKEN_NAMES = ("base", "data", "dense-distilled", "dense-mixed", "distilled", "evaluate", "mixed", "stages")
# As YAML 1.2 and JSON have numbers; PyYAML takes those without a point for text.
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


@dataclass(frozen=True)
class ColdStart:
    """Supervised fine-tuning: on how many problems' own answers, and how.

    Attributes:
        problems: of each domain.
        options: fields of `fulmen.training.sft.settings.SftSettings`.
    """

    problems: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Rejection:
    """What the specialists write for the distilled model, and how much of a domain that learns.

    Attributes:
        problems: of each task, at most. samples: replies to each. keep: right ones of a problem at most.
        keep_at_least: of each task; once so many are kept, no further problem is asked. None: all are.
        temperature: of sampling.
        examples: that the distilled model learns of a domain: kept replies, then the tasks' own answers.
    """

    problems: int = 64
    samples: int = 4
    keep: int = 2
    keep_at_least: int | None = None
    temperature: float = 1.0
    examples: int = 200

    def __post_init__(self) -> None:
        for name in ("problems", "samples", "keep", "examples"):
            require_positive_int(f"rejection.{name}", getattr(self, name))
        if self.keep_at_least is not None:
            require_positive_int("rejection.keep_at_least", self.keep_at_least)
        if not number_argument("rejection.temperature", self.temperature, "a number above 0") > 0:
            raise ConfigError(f"rejection.temperature={self.temperature!r} cannot be; use a number above 0")


@dataclass(frozen=True)
class RecipeDomain:
    """Tasks that one specialist is for.

    Attributes:
        tasks: names and parameters, as `fulmen.tasks.named` reads them.
        kl: strength of the KL to the model that RL begins with.
        max_new_tokens: where replies are cut.
        sft, rl: its cold start, and options of `fulmen.rl`.
        rejection: what of it the distilled model learns.
    """

    name: str
    tasks: tuple[str, ...]
    kl: float
    max_new_tokens: int
    sft: ColdStart
    rl: Mapping[str, Any]
    rejection: Rejection


@dataclass(frozen=True)
class Recipe:
    """One run of specialists, distillation and mixed reinforcement learning.

    Attributes:
        base: the model, dense or converted. convert: options of `fulmen.convert` for a dense one.
        distill: options of supervised fine-tuning on what the specialists wrote.
        mixed: options of `fulmen.rl` over all domains.
        held_out: problems of each task that every stage's model answers.
        held_out_samples: replies to each that are sampled, beside the likeliest one.
        dense: whether the dense base is distilled and trained in the same way, to compare with.
    """

    base: str
    domains: tuple[RecipeDomain, ...]
    distill: Mapping[str, Any]
    mixed: Mapping[str, Any]
    convert: Mapping[str, Any] = field(default_factory=dict)
    held_out: int = 64
    held_out_samples: int = 4
    dense: bool = False
    seed: int = 0


def read_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """The recipe of a YAML file, or of a mapping with the same keys, all of it checked.

    Raises ConfigError that names the key: one that is missing, not known, or has a value that cannot be; and
    for tasks that are not known.
    """
    given = source if isinstance(source, Mapping) else _read_yaml(Path(source).expanduser())
    places = [one.name for one in fields(Recipe)]
    shared_keys = ("sft", "rl", "rejection", "max_new_tokens")
    _require_keys("the recipe", given, [*places, *shared_keys], ("base", "domains"))
    _rejection(_mapping("rejection", given, {}))
    domains = tuple(_domain(name, one, given) for name, one in _mapping("domains", given).items())
    if not domains:
        raise ConfigError("domains is empty; name at least one, with its tasks")
    shared = _mapping("sft", given, {})
    shared.pop("problems", None)
    recipe = Recipe(
        base=_text("base", given["base"]),
        domains=domains,
        distill={"steps": 50, **shared, **_mapping("distill", given, {})},
        mixed={"steps": 20, **_mapping("rl", given, {}), **_mapping("mixed", given, {})},
        convert=_mapping("convert", given, {}),
        held_out=given.get("held_out", 64),
        held_out_samples=given.get("held_out_samples", 4),
        dense=given.get("dense", False),
        seed=given.get("seed", 0),
    )
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    require_positive_int("held_out", recipe.held_out)
    require_positive_int("held_out_samples", recipe.held_out_samples)
    require_seed(recipe.seed)
    if not isinstance(recipe.dense, bool):
        raise ConfigError(f"dense={recipe.dense!r} cannot be; use true or false")
    _check_options(recipe)
    names = [domain.name.lower() for domain in recipe.domains]
    if alike := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"domain {alike[0]!r} is there twice, in other letters; some disks have one folder for both"
        )
    tasks = [task for domain in recipe.domains for task in domain.tasks]
    if twice := {task for task in tasks if tasks.count(task) > 1}:
        raise ConfigError(f"task {min(twice)!r} stands in the recipe twice; name it once")


def _check_options(recipe: Recipe) -> None:
    """Of each stage: keys that it has, and values that can be told before anything runs."""
    fine_tuned = {f"domains.{one.name}.sft": one.sft.options for one in recipe.domains}
    learned = {f"domains.{one.name}.rl": one.rl for one in recipe.domains}
    for place, options in {"distill": recipe.distill, **fine_tuned}.items():
        _require_not_own(place, options)
        _require_keys(place, options, [one.name for one in fields(SftSettings) if one.name != "seed"])
        try:
            SftSettings(**options)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
    for place, options in {"mixed": recipe.mixed, **learned}.items():
        _require_not_own(place, options)
        require_positive_int(f"{place}.steps", options["steps"])
        _require_keys(place, options, list(signature(rl).parameters))
        _require_rl(place, options)
    _require_not_own("convert", recipe.convert)
    _require_keys("convert", recipe.convert, list(signature(convert).parameters))


def _require_rl(place: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for what `fulmen.rl` would refuse, hours later."""
    from fulmen.training.rl.settings import RlSettings  # imports torch

    asked = {**{name: one.default for name, one in signature(rl).parameters.items()}, **options}
    own = {one.name: asked[one.name] for one in fields(RlSettings) if one.name in asked}
    try:
        own["lora"] = lora_argument(asked["lora"], asked["full"])
        RlRunSettings("", Path(), (), asked["rollouts"], asked["memory_gib"], options=own)
        RlSettings(**own)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _require_not_own(place: str, options: Mapping[str, Any]) -> None:
    if own := OWN_OPTIONS & options.keys():
        raise ConfigError(f"{place}.{min(own)} is set by the recipe itself; leave it out")


def _domain(name: Any, given: Any, recipe: Mapping[str, Any]) -> RecipeDomain:
    place = f"domains.{name}"
    if not (isinstance(name, str) and name.replace("-", "_").isidentifier()):
        raise ConfigError(f"domain {name!r} cannot be; use letters, digits and -")
    if name.lower() in TAKEN_NAMES:
        raise ConfigError(f"domain {name!r} has the name of a folder of the run; use another one")
    if not isinstance(given, Mapping):
        raise ConfigError(f"{place}={given!r} cannot be; give it tasks, and what differs from the rest")
    _require_keys(place, given, DOMAIN_KEYS, ("tasks",))
    tasks = given["tasks"]
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not (isinstance(tasks, Sequence) and tasks and all(isinstance(one, str) for one in tasks)):
        raise ConfigError(f"{place}.tasks={given['tasks']!r} cannot be; give names, as spell_backward")
    # As `fulmen.rl` will call them.
    tasks = [task.strip(" ,:") for task in tasks]
    for task in tasks:
        named(task)
    kl, longest = given.get("kl", DEFAULT_KL), given.get("max_new_tokens", recipe.get("max_new_tokens", 64))
    if not number_argument(f"{place}.kl", kl, "a number of 0 or more") >= 0:
        raise ConfigError(f"{place}.kl={kl!r} cannot be; use a number of 0 or more")
    require_positive_int(f"{place}.max_new_tokens", longest)
    sft = {"steps": 50, **_mapping("sft", recipe, {}), **_mapping("sft", given, {}, place)}
    problems = sft.pop("problems", 200)
    require_positive_int(f"{place}.sft.problems", problems)
    rl = {"steps": 20, **_mapping("rl", recipe, {}), **_mapping("rl", given, {}, place)}
    own = _mapping("rejection", given, {}, place)
    rejection = _rejection({**_mapping("rejection", recipe, {}), **own}, f"{place}.")
    return RecipeDomain(name, tuple(tasks), float(kl), longest, ColdStart(problems, sft), rl, rejection)


def _rejection(given: Mapping[str, Any], place: str = "") -> Rejection:
    _require_keys(f"{place}rejection", given, [one.name for one in fields(Rejection)])
    try:
        return Rejection(**given)
    except ConfigError as error:
        raise ConfigError(f"{place}{error}") from error


def _read_yaml(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        read = yaml.load(file.read_text(encoding="utf-8"), _loader())
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"recipe {file} cannot be read ({first_line(error)}); name a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"recipe {file} is no YAML ({reason}); mend it there") from error
    if not isinstance(read, Mapping):
        raise ConfigError(
            f"recipe {file} has no keys; it needs base and domains, as examples/recipe-small.yaml"
        )
    return read


def _loader() -> "type[yaml.SafeLoader]":
    """PyYAML's safe loader, with 1e-4 as a number, and without keys that are there twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """With two rules of its own."""

        def construct_mapping(self, node: "yaml.MappingNode", deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    return Loader


def _require_keys(
    place: str, given: Mapping[str, Any], known: Sequence[str], needed: Sequence[str] = ()
) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"{place} has no key {key!r}; {meant}")
    for key in needed:
        if given.get(key) is None:
            raise ConfigError(f"{place} lacks {key}; add it")


def _mapping(
    key: str, given: Mapping[str, Any], default: Mapping[str, Any] | None = None, place: str = ""
) -> dict[str, Any]:
    value = given.get(key, default)
    if not isinstance(value, Mapping):
        name = f"{place}.{key}" if place else key
        raise ConfigError(f"{name}={value!r} cannot be; give it keys and values")
    return dict(value)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{key}={value!r} cannot be; name a model or its directory")
    return value
