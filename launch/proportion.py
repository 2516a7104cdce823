"""Step counts that follow the length of a run: `${steps:12500,125000}` in configs/ is 12500 of 125000 steps at any schedule."""

from omegaconf import DictConfig, OmegaConf


def register() -> None:
    """Let OmegaConf resolve `${steps:COUNT,OF}` and `${steps:COUNT,OF,LEAST}`.

    A key that is given another value, by a recipe or on the command line, has it."""
    OmegaConf.register_new_resolver("steps", _share, replace=True)


def _share(count: int, of: int, least: int = 0, *, _parent_: DictConfig) -> int:
    """`count` where the nearest schedule above (a phase's own, or the run's) is `of` steps long, else in proportion, rounded."""
    node = _parent_
    while OmegaConf.select(node, "schedule.steps") is None:
        node = node._get_parent()  # type: ignore[assignment]
    length = OmegaConf.select(node, "schedule.horizon") or OmegaConf.select(node, "schedule.steps")
    return max(round(count * length / of), least)
