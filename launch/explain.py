"""Help for one command: its own words, its keys, the choices of its groups. Nothing of the command is imported."""

import ast
import textwrap
from importlib import resources

from histoscale.launch.config import choices, defaults


def help_text(command: str, everything: bool = False) -> str:
    """The words of `histoscale <command> --help`; with everything also the keys inside its groups, of the default choices."""
    keys = _yaml(command)
    groups = {written.partition("@")[0].removeprefix("optional "): choice for written, choice in defaults(command).items()}
    rows = "\n".join(_wrapped(group, choices(group)) for group in groups)
    parts = [
        ast.get_docstring(ast.parse(resources.files("histoscale.launch").joinpath(f"{command}.py").read_text())) or "",
        f"Keys, given as key=value (`histoscale {command} --cfg key=value …` prints the whole configuration):\n\n{keys}",
        f"Groups and their choices (group=choice, group.key=value; `--help all` lists their keys):\n{rows}" if rows else "",
    ]
    if everything:
        parts += [_inside(group, choice) for group, choice in groups.items() if isinstance(choice, str) and choice != "???"]
    return "\n\n".join(part for part in parts if part)


def _inside(group: str, choice: str) -> str:
    """The file of a choice, and of the groups inside it."""
    inside = defaults(f"{group}/{choice}").items()
    inner = [_inside(f"{group}/{name}", one) for name, one in inside if not name.startswith(("/", "override "))]
    return "\n\n".join([f"# {group}={choice}\n{_yaml(f'{group}/{choice}')}", *inner])


def _wrapped(group: str, names: list[str]) -> str:
    return textwrap.fill(", ".join(names), 120, initial_indent=f"  {group:<12} ", subsequent_indent=" " * 15)


def _yaml(name: str) -> str:
    return resources.files("histoscale.configs").joinpath(f"{name}.yaml").read_text().strip()
