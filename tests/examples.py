"""What the README and every `--help` tell a reader to type: found, taken apart, and held against the configuration."""

import ast
import re
import shlex
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from histoscale.launch import up
from histoscale.launch.config import COMMANDS, FREE, ConfigError, load
from histoscale.launch.explain import help_text

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
PYTHON = ("timm.", "transformers.", "torch.")
STARTS = ("histoscale", "torchrun", "python3")  # what a line that can be typed begins with
ONLY_SHOWN = {"mermaid"}  # blocks of the README that nobody types
GLOB = re.compile(r"[][{}*?]")  # what a shell may take for a pattern outside quotes


@dataclass(frozen=True)
class Example:
    """text: as typed, with its continuation lines and its comment. kind: sh, python or csv. where: the document."""

    text: str
    kind: str
    where: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text.replace("\\\n", " "), comments=True)

    def command(self) -> tuple[str, list[str]] | None:
        """The command of histoscale and its overrides; None for up.py's own words and for Python."""
        words = self.words if self.kind == "sh" else []
        if words[:1] == ["histoscale"]:
            return words[1], words[2:]
        if words[:1] == ["torchrun"]:
            module = words.index("-m") + 1
            return words[module].removeprefix("histoscale.launch."), words[module + 1 :]
        if words[:2] == ["python3", "launch/up.py"] and words[2] not in up.OWN:
            return words[2], words[3:]
        return None


def of_readme(text: str) -> list[Example]:
    """Every block of a README, line by line; of Python and CSV the whole block."""
    found = []
    for kind, block in FENCE.findall(text):
        if kind == "sh":
            found += [Example(line, "sh", "README.md") for line in lines_of(block) if line.strip()]
        elif kind not in ONLY_SHOWN:
            found.append(Example(block.strip(), kind, "README.md"))
    return found


def of_help(command: str, text: str | None = None) -> list[Example]:
    """The lines of `histoscale COMMAND --help` (or of `text`) that can be typed."""
    found = []
    for line in lines_of(help_text(command) if text is None else text):
        if line.split(None, 1)[:1] and line.split(None, 1)[0] in STARTS:
            found.append(Example(line.strip(), "sh", f"{command} --help"))
        elif line.strip().startswith(PYTHON):
            found.append(Example(line.strip(), "python", f"{command} --help"))
    return found


def of_up() -> list[Example]:
    """What `python3 launch/up.py --help` shows."""
    text = ast.get_docstring(ast.parse((ROOT / "launch/up.py").read_text())) or ""
    return [Example(line.strip(), "sh", "up.py --help") for line in lines_of(text) if line.strip().startswith("python3 launch/")]


def lines_of(text: str) -> list[str]:
    """Lines, those that end in a backslash with the next."""
    return re.findall(r"(?:[^\n]*\\\n)*[^\n]+", text)


def problems(example: Example) -> list[str]:
    """Why a line cannot be typed as it stands: one text a fault, by composing alone. Nothing is read or started."""
    if example.kind != "sh":
        return []
    found = [f"{word!r} needs quotes: a shell may take it for a pattern" for word in unquoted_patterns(example.text)]
    if example.words[0] not in STARTS:
        return [*found, f"begins with {example.words[0]!r}, not with {', '.join(STARTS)}"]
    if example.words[0] == "torchrun":
        found += torchrun_problems(example.words)
    if example.words[0] == "python3" and not (ROOT / example.words[1]).is_file():
        found.append(f"{example.words[1]} is not there")
    called = example.command()
    if called is not None:
        found += refusals(called[0], tuple(called[1]))
    return found


@cache
def refusals(command: str, words: tuple[str, ...]) -> list[str]:
    """Why a command line does not compose."""
    try:
        load(command, list(words))
    except ConfigError as error:
        return [str(error)]
    return []


def torchrun_problems(words: list[str]) -> list[str]:
    from torch.distributed.run import get_args_parser

    try:
        parsed = get_args_parser().parse_args(words[1:])
    except SystemExit:
        return [f"torchrun does not take {' '.join(words[1:])}"]
    if not parsed.module or not parsed.training_script.startswith("histoscale.launch."):
        return ["torchrun runs -m histoscale.launch.COMMAND"]
    return []


def unquoted_patterns(text: str) -> list[str]:
    """Words with brackets, braces or stars outside quotes; in zsh `runs=[a,b]` is a pattern without a match, an error."""
    bare = re.sub(r"(?m)(^|\s)#.*$", "", re.sub(r"'[^']*'|\"[^\"]*\"", "", text))
    return [word for word in bare.split() if GLOB.search(word)]


def mutated(example: Example) -> dict[str, Example]:
    """Each of its keys -> the same line with that key changed; below a free mapping (storage.options) any key is right."""
    found = {}
    for word in (example.command() or ("", []))[1]:
        key = word.split("=", 1)[0]
        least = next((free for free in FREE if key.startswith(f"{free}.")), key)
        changed = re.sub(rf"(?<![\w.]){re.escape(least)}(?=[.=])", f"{least}x", example.text, count=1)
        found[key] = replace(example, text=changed)
    return found


def mentions(text: str) -> list[str]:
    """Spans in backticks that say what to type inside a sentence: `embed jitter.copies=2`, `protocols=[eva]`."""
    return [span for span in INLINE.findall(FENCE.sub("", text)) if _sayable(span)]


def _sayable(span: str) -> bool:
    words = span.split()
    if words[:1] == ["histoscale"]:
        words = words[1:]
    return bool(words) and (words[0] in COMMANDS or "=" in words[0]) and all(re.match(r"[a-z_][\w.@/]*=", w) for w in words[1:])
