"""No text tells a reader to type what the configuration does not take: README, every --help, up.py, and comments of configs."""

import re
from functools import cache
from importlib import import_module

import pytest
from examples import ROOT, Example, mentions, mutated, of_help, of_readme, of_up, problems

from histoscale.launch.config import COMMANDS, choices, groups, schema_keys
from histoscale.launch.explain import help_text

README = (ROOT / "README.md").read_text()


def everything() -> list[Example]:
    return [*of_readme(README), *(one for command in COMMANDS for one in of_help(command)), *of_up()]


TYPED = [one for one in everything() if one.kind == "sh"]


TRIED: set[tuple[str, str]] = set()  # a key of a command is changed in one line alone, which takes a quarter of a second


@pytest.mark.parametrize("example", TYPED, ids=lambda one: f"{one.where}: {' '.join(one.words)[:60]}")
def test_composes_and_would_not_with_one_changed_key(example: Example) -> None:
    assert problems(example) == []
    command = (example.command() or ("",))[0]
    changed = {key: line for key, line in mutated(example).items() if (command, key) not in TRIED}
    TRIED.update((command, key) for key in changed)
    assert [line.text for line in changed.values() if not problems(line)] == []


def test_a_readme_with_one_changed_key_has_exactly_one_problem() -> None:
    """The walk above is over text as it is found, not over a list of its own."""
    assert "recipe=dinov2_vits14 out=runs/vits14" in README
    for old, new in (("recipe=dinov2_vits14 out=runs/vits14", "recipes=dinov2_vits14 out=runs/vits14"),
                     ("recipe=dinov2_vits14 out=runs/vits14", "recipe=dinov2_vits41 out=runs/vits14"),
                     ("task=slide task.label=tumour", "task=slide task.labels=tumour"),
                     ("--nproc-per-node 8", "--nproc-per-nodes 8"),
                     ("'runs=[runs/crc,runs/phikon_crc]'", "runs=[runs/crc,runs/phikon_crc]")):  # fmt: skip
        wrong = [one.text for one in of_readme(README.replace(old, new, 1)) if problems(one)]
        assert len(wrong) == 1 and new in wrong[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_with_one_changed_key_has_exactly_one_problem(command: str) -> None:
    """Every command shows what to type, and what is held against its keys is the text itself."""
    text, shown = help_text(command), of_help(command)
    last = next((one for one in reversed(shown) if mutated(one)), None)
    assert shown, f"`histoscale {command} --help` shows nothing to type"
    if last is not None:
        changed = list(mutated(last).values())[-1].text
        found = [one.text for one in of_help(command, text.replace(last.text, changed)) if problems(one)]
        assert found == [changed]


def test_no_line_of_a_block_is_overlooked() -> None:
    """What stands in the README's shell blocks is all taken, and each line begins with a program that it runs."""
    block = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    whole = "".join("".join(block).split())
    assert whole == "".join("".join(one.text.split()) for one in of_readme(README) if one.kind == "sh")
    assert all(len(line) < 170 for text in block for line in text.splitlines())


SHELL = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"}  # variables of the shell, not keys
SENTENCES = {
    "README.md": README,
    **{f"{command} --help": help_text(command) for command in COMMANDS},
    **{str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "configs").rglob("*.yaml"))},
}


@pytest.mark.parametrize("place", [place for place, text in SENTENCES.items() if mentions(text)])
def test_keys_in_sentences_are_taken(place: str) -> None:
    """`key=value` in backticks, with or without its command before it: keys exist, and choices of groups too."""
    for span in mentions(SENTENCES[place]):
        words = span.removeprefix("histoscale ").split()
        command, keys = (words[0], words[1:]) if words[0] in COMMANDS else (None, words)
        for word in keys:
            assert span in SHELL or is_taken(word, command), f"{place}: `{span}`: {word} is no key of {command or 'any command'}"


def is_taken(word: str, command: str | None) -> bool:
    """Whether the command, or any, has the key, and the group that it names the choice."""
    key, value = word.split("=", 1)
    key = key.split("@")[0]
    if key in groups() and re.fullmatch(r"[a-z0-9_]+", value):
        return value in choices(key)
    return any(key.replace("/", ".") in keys_of(one) for one in ([command] if command else COMMANDS))


@cache
def keys_of(command: str) -> set[str]:
    return {*schema_keys(import_module(f"histoscale.launch.{command}").Config), *groups(), "views.blur"}
