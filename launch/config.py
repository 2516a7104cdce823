"""Hydra composes the YAML tree; the dataclasses of each command give it types; unknown, missing and wrong keys are named.

The tree alone says which keys there are, so that help and refusals need none of the code that a command runs.
"""

import dataclasses
import os
from dataclasses import dataclass
from importlib import import_module, resources
from types import ModuleType
from typing import Any, get_type_hints

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from histoscale.data.secrets import hide, scrubbed
from histoscale.launch import proportion
from histoscale.launch.overrides import ConfigError, nearest, read_overrides
from histoscale.launch.paths import credential, empty, expanded, uri_on_disk
from histoscale.launch.renamed import renamed

COMMANDS = (
    "demo", "cohort", "manifest", "index", "pretrain", "release", "fetch", "probe", "compare", "embed", "mil", "robustness",
    "bench", "doctor",
)  # fmt: skip
FREE = ("storage.options", "phases", "labels.columns", "task.classes", "segment.eva_patience")  # anything may stand below these


@dataclass(frozen=True)
class Composed:
    """A command with its configuration: typed for the code, plain for files and comparison."""

    module: ModuleType
    config: Any
    values: dict[str, Any]

    @property
    def result_keys(self) -> tuple[str, ...]:
        """Top-level keys that make the result; all others only change speed or place."""
        return self.module.RESULT


def load(command: str, words: list[str]) -> Composed:
    """Compose `configs/<command>.yaml` with the words of a command line into the command's `Config`.

    Raises ConfigError for an unknown command, group, key or value, for required keys that were not given, for a URI where only a
    disk will do, and for one that carries a credential. Nothing of the command is imported before its keys are known to be right.
    """
    tree, missing = composed(command, words)
    if missing:
        named = ", ".join(f"{key}={_offer(key)}" for key in missing)
        raise ConfigError(f"{command} needs {named} (`histoscale {command} --help` shows an example)")
    values = expanded(_plain(command, tree))
    wrong = empty(flatten(values)) or credential(flatten(values)) or uri_on_disk(flatten(values))
    if wrong:
        raise ConfigError(f"{command}: {wrong}")
    from pydantic import TypeAdapter, ValidationError

    module = import_module(f"histoscale.launch.{command}")
    try:
        config = TypeAdapter(module.Config).validate_python(values)
    except ValidationError as error:
        problems = "; ".join(_problem(".".join(map(str, e["loc"])), e.get("input"), e["msg"]) for e in error.errors())
        raise ConfigError(f"{command}: {problems}") from error
    unknown = sorted(set(flatten(values)) - set(flatten(dataclasses.asdict(config))))
    if unknown:
        raise ConfigError(f"{command}: the configuration holds {', '.join(unknown)}, which nothing reads")
    return Composed(module, config, values)


def _problem(key: str, given: Any, what: str) -> str:
    [value] = scrubbed({key: given}).values()
    return f"{key} = {value!r}: {what}"


def shown(command: str, words: list[str]) -> dict[str, Any]:
    """The configuration of a command for people: keys that must still be given hold ???. Raises ConfigError."""
    tree, missing = composed(command, words)
    unchosen = {group: "???" for group in missing if group not in tree}
    return {**unchosen, **expanded(_plain(command, tree, resolve=not missing))}  # what refers to a missing key cannot be resolved


def composed(command: str, words: list[str]) -> tuple[DictConfig, list[str]]:
    """The tree of a command with what a command line sets, and the groups and keys that must be given and were not."""
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}{nearest(command, COMMANDS)} Commands: {', '.join(COMMANDS)}")
    overrides = read_overrides(command, words)
    for override in overrides:  # what Hydra says of one that it refuses may hold a credential
        hide({override.key_or_group: override.value()})
    for override in overrides:
        if override.key_or_group.partition(".")[0] == "hydra":
            what = "is a key of Hydra's launcher, which does not run here: the folder of results is out="
            raise ConfigError(f"{command}: {override.key_or_group}= {what}")
        if now := renamed(command, override.key_or_group):
            raise ConfigError(f"{command}: {override.key_or_group}= is called {now}= now")
    chosen = {override.key_or_group for override in overrides if _is_group(override)}
    unchosen = [group for group, choice in defaults(command).items() if choice == "???" and group not in chosen]
    left_out = [f"~{group}" for group in unchosen]
    proportion.register()
    lines = [("++" if _free(override) else "") + (override.input_line or "") for override in overrides]
    try:
        with initialize_config_module("histoscale.configs", version_base="1.3"):
            tree = compose(config_name=command, overrides=[*left_out, *lines])
    except (HydraException, OmegaConfBaseException) as error:
        with initialize_config_module("histoscale.configs", version_base="1.3"):
            raise ConfigError(f"{command}: {_mistake(command, overrides, left_out) or _in_one_line(error)}") from error
    lacking = [key for key, value in flatten(_plain(command, tree, resolve=False)).items() if value == "???"]
    return tree, [*unchosen, *lacking]


def _mistake(command: str, overrides: list[Override], left_out: list[str]) -> str | None:
    """The choice that no group offers, or the key that the chosen groups do not have; None where Hydra's words must do."""
    chosen = [override for override in overrides if _is_group(override)]
    for override in chosen:
        group = override.key_or_group.partition("@")[0]
        value = override.value()
        for choice in value if isinstance(value, list) else [value]:
            if choice not in choices(group):
                question = nearest(str(choice), choices(group)) or "."
                return f"{group}={choice} is no choice of {group}{question} There are: {', '.join(choices(group))}"
    try:
        tree = compose(config_name=command, overrides=[*left_out, *(override.input_line or "" for override in chosen)])
    except (HydraException, OmegaConfBaseException):
        named = [override.key_or_group for override in chosen if override.key_or_group not in defaults(command)]
        return f"{command} has no group {', '.join(named)}; its groups are {', '.join(defaults(command))}" if named else None
    known = branches(OmegaConf.to_container(tree))
    for override in overrides:
        if override in chosen or _free(override):
            continue
        for key in (override.key_or_group, *branches(override.value(), f"{override.key_or_group}.")):
            if key not in known:
                return f"unknown key {key!r}{_elsewhere(key) or nearest(key, [*known, *defaults(command)])}"
    return None


def _elsewhere(key: str) -> str:
    """The choices of a key's group that would have it."""
    group, _, rest = key.partition(".")
    if group not in groups():
        return ""
    have = [choice for choice in choices(group) if rest in branches(yaml.safe_load(_text(f"{group}/{choice}")) or {})]
    return f", which only {group}={', '.join(have)} {'has' if len(have) == 1 else 'have'}" if have else ""


def _is_group(override: Override) -> bool:
    group = override.key_or_group.partition("@")[0]
    named = isinstance(override.value(), str | list)
    return named and resources.files("histoscale.configs").joinpath(group).is_dir() and not group.startswith(("_", "."))


def _free(override: Override) -> bool:
    return any(override.key_or_group == free or override.key_or_group.startswith(f"{free}.") for free in FREE)


def _offer(key: str) -> str:
    return f"{'|'.join(choices(key))}" if key in groups() else ""


def _plain(command: str, tree: DictConfig, resolve: bool = True) -> dict[str, Any]:
    if resolve and (wrong := proportion.unusable(flatten(_plain(command, tree, resolve=False)))):
        raise ConfigError(f"{command}: {wrong}")
    try:
        values = OmegaConf.to_container(tree, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{command}: {_in_one_line(error)}") from error
    assert isinstance(values, dict)
    hide(values)  # before anything of it is written or printed
    return {str(name): value for name, value in values.items()}


def _in_one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def schema_keys(schema: type, prefix: str = "") -> dict[str, bool]:
    """Every dotted key of a dataclass -> whether it holds a free mapping (anything may stand below it)."""
    found: dict[str, bool] = {}
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind, name = hints[field.name], prefix + field.name
        found[name] = getattr(kind, "__origin__", None) is dict
        for option in nested(kind):
            found.update(schema_keys(option, name + "."))
    return found


def nested(kind: Any) -> list[type]:
    """The dataclasses that a field may hold: one, or those of a union."""
    options = (kind, *getattr(kind, "__args__", ()))
    return [option for option in options if dataclasses.is_dataclass(option) and isinstance(option, type)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {dotted key: value}; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + str(name)] = value
    return flat


def branches(values: Any, prefix: str = "") -> list[str]:
    """The dotted keys of nested mappings, those that hold mappings too."""
    if not isinstance(values, dict):
        return []
    return [key for name, below in values.items() for key in (f"{prefix}{name}", *branches(below, f"{prefix}{name}."))]


def groups() -> list[str]:
    """The Hydra groups: folders of `configs`."""
    folders = (entry.name for entry in resources.files("histoscale.configs").iterdir() if entry.is_dir())
    return sorted(name for name in folders if name[0] not in "_.")


def choices(group: str) -> list[str]:
    """The names that a group offers: its YAML files."""
    files = (entry.name for entry in resources.files("histoscale.configs").joinpath(group).iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def defaults(name: str) -> dict[str, Any]:
    """The groups of a file of `configs` (a command's, or group/choice) -> what is chosen in them, ??? where it must be."""
    listed = (yaml.safe_load(_text(name)) or {}).get("defaults", [])
    return {str(group): choice for one in listed if isinstance(one, dict) for group, choice in one.items()}


def _text(name: str) -> str:
    return resources.files("histoscale.configs").joinpath(f"{name}.yaml").read_text()


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
