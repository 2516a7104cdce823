"""Hydra composes the YAML tree; the dataclasses of each command give it types; unknown, missing and wrong keys are named."""

import dataclasses
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, resources
from types import ModuleType
from typing import Any, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from histoscale.data.journal import hide_options

COMMANDS = (
    "demo", "cohort", "manifest", "index", "pretrain", "release", "fetch", "probe", "compare", "embed", "mil", "robustness",
    "bench", "doctor",
)  # fmt: skip


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and what to do."""


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


def nearest(name: str, known: Iterator[str] | list[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def load(command: str, overrides: list[str]) -> Composed:
    """Compose `configs/<command>.yaml` with Hydra overrides into the command's `Config`.

    Raises ConfigError for an unknown command, group, key or value, and for required keys that were not given.
    """
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}{nearest(command, list(COMMANDS))} Commands: {', '.join(COMMANDS)}")
    module = import_module(f"histoscale.launch.{command}")
    overrides = _checked(command, module.Config, overrides)
    try:
        with initialize_config_module("histoscale.configs", version_base="1.3"):
            composed = compose(config_name=command, overrides=overrides)
        values = _resolved(command, composed)
        hide_options((values.get("storage") or {}).get("options") or {})  # before anything is written or printed
        config = TypeAdapter(module.Config).validate_python(values)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{command}: {_first_lines(error)}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))} = {e.get('input')!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{command}: {problems}") from error
    unknown = sorted(set(flatten(values)) - set(flatten(dataclasses.asdict(config))))
    if unknown:
        raise ConfigError(f"{command}: the configuration holds {', '.join(unknown)}, which nothing reads")
    return Composed(module, config, values)


def _resolved(command: str, composed: DictConfig) -> dict[str, Any]:
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(
            f"{command} needs {', '.join(f'{key}=' for key in missing)} (`histoscale {command} --help` shows an example)"
        )
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:12])


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


def groups() -> list[str]:
    """The Hydra groups: folders of `configs`."""
    folders = (entry.name for entry in resources.files("histoscale.configs").iterdir() if entry.is_dir())
    return sorted(name for name in folders if name[0] not in "_.")


def choices(group: str) -> list[str]:
    """The names that a group offers: its YAML files."""
    files = (entry.name for entry in resources.files("histoscale.configs").joinpath(group).iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def _checked(command: str, schema: type, overrides: list[str]) -> list[str]:
    """The overrides as Hydra takes them: what stands below a free mapping is added, without a `+` from the user.

    Refuses what Hydra would accept in silence: `+unknown=1` composes and then vanishes.
    """
    taken = []
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(f"{command}: {text!r} is a flag; this command takes key=value (and --help, --cfg)")
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"{command}: {text!r} is not key=value{nearest(text, list(COMMANDS))}")
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        hint = "quote values that hold = , or brackets: 'key=\"value\"'"
        raise ConfigError(f"{command}: {_first_lines(error)} ({hint})") from error
    known = schema_keys(schema)
    names = [*known, *groups()]
    for override in parsed:
        name = override.key_or_group.split("@")[0].replace("/", ".")
        parts = name.split(".")
        free = any(known.get(".".join(parts[:i]), False) for i in range(1, len(parts) + 1))
        taken.append("++" + (override.input_line or "").lstrip("+") if free else override.input_line or "")
        if name not in names and not free:
            raise ConfigError(f"{command}: unknown key {name!r}{nearest(name, names)}")
        if override.is_delete():
            raise ConfigError(f"{command}: {override.input_line!r} deletes a key; set it to a value (null where it may be empty)")
        if override.is_sweep_override():
            raise ConfigError(f"{command}: {override.input_line!r} is a sweep; one command runs one configuration")
    return taken


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
