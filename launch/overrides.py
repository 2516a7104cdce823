"""The words of a command line as Hydra's overrides: values quoted where its grammar would stumble, and mistakes named."""

import difflib
import re
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from histoscale.data.secrets import HIDDEN, may_hide
from histoscale.launch.paths import is_path

_QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)
_PARSER = OverridesParser.create()


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names the likeliest of the known names; empty where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_overrides(command: str, words: list[str]) -> list[Override]:
    """One override a word. A value that Hydra's grammar refuses is taken to the letter, a path always.

    Raises ConfigError for a flag, a word that is not key=value, a list or mapping that cannot be read, a sweep, and the deletion
    of a key.
    """
    return [_read(command, word) for word in words]


def _read(command: str, word: str) -> Override:
    key, given, value = word.partition("=")
    said = _said(word)
    if word.startswith("-"):
        raise ConfigError(f"{command}: {said!r} is a flag; this command takes key=value (and --help, --cfg, --version)")
    if word.startswith("~"):
        raise ConfigError(f"{command}: {said!r} deletes a key; set it to a value (null where it may be empty)")
    if not given:
        raise ConfigError(f"{command}: {said!r} is not key=value")
    key = key.lstrip("+")  # what may be added needs no plus, and what may not is refused with one too
    override = _parsed(f"{key}={_quoted(key, value)}")
    if isinstance(override, HydraException):
        odd = re.search(r"[^\w\s.,:/[\]{}\"'+*@?|$%\\-]", value, re.ASCII)
        what = f"{odd[0]!r} stands in it: put the text that holds it in quotes, as in" if odd else "expected"
        raise ConfigError(f"{command}: {said!r} cannot be read; {what} '{key}=[\"a text\", b]' or '{key}={{name: \"a text\"}}'")
    if override.is_sweep_override():
        raise ConfigError(f"{command}: {said!r} is a sweep; one command runs one configuration (a list is written [a, b])")
    return override


def _said(word: str) -> str:
    """A word for a message, which shows no credential even where it cannot be read."""
    key, given, _ = word.partition("=")
    return f"{key}={HIDDEN}" if given and may_hide(key.lstrip("+-~")) else word


def _parsed(word: str) -> Override | HydraException:
    try:
        return _PARSER.parse_override(word)
    except HydraException as error:
        return error


def _reads(value: str) -> bool:
    return not isinstance(_parsed(f"key={value}"), HydraException)


def _quoted(key: str, value: str) -> str:
    """The value as Hydra's grammar takes it."""
    if _QUOTED.fullmatch(value) and _reads(value):
        return value
    if is_path(key) and value not in ("null", "") and not value.startswith(("${", "[")):
        return _literal(value)
    if _reads(value):
        return value
    if value.startswith("[") and value.endswith("]") and not set(value[1:-1]) & set("[]{}\"'"):
        return f"[{','.join(one if _reads(one) else _literal(one.strip()) for one in value[1:-1].split(','))}]"
    return value if value.startswith(("[", "{")) else _literal(value)


def _literal(text: str) -> str:
    """The text in quotes; backslashes count twice where a quote follows them, and only there."""
    doubled = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    return f"'{doubled}{doubled[len(doubled.rstrip(chr(92))):]}'"
