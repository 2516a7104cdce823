"""Help for one command: its own words, its keys, the choices of its groups."""

from importlib import import_module, resources

from histoscale.launch.config import choices, groups


def help_text(command: str) -> str:
    module = import_module(f"histoscale.launch.{command}")
    keys = resources.files("histoscale.configs").joinpath(f"{command}.yaml").read_text().strip()
    used = [group for group in groups() if f"- {group}:" in keys or f"- optional {group}:" in keys]
    rows = "\n".join(f"  {group:<12} {', '.join(choices(group))}" for group in used)
    return (
        f"{(module.__doc__ or '').strip()}\n\n"
        f"Keys, given as key=value (`histoscale {command} --cfg key=value …` prints the whole configuration):\n\n{keys}\n"
        + (f"\nGroups and their choices (group=choice, group.key=value):\n{rows}\n" if rows else "")
    )
