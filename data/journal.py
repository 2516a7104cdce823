"""What a run tells: metric rows, progress, the summary, and the removal of credentials from all of them."""

import json
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

# Tokens in URLs, key=value secrets, and the account keys of the object stores.
_SECRETS = re.compile(
    r"(?i)(?P<name>\b(?:sig|se|sp|sv|token|secret|password|passwd|api[-_]?key|access[-_]?key(?:[-_]?id)?|account[-_]?key|sas[-_]?(?:token|key)|"
    r"(?:client|aws|storage)[-_]?[a-z_-]*(?:secret|token|key)|(?:session|access|refresh|id|bearer)_token|credential|shared[-_]?access[-_]?signature|"
    r"signature|x-amz-[a-z-]+|connection[-_]?string|(?:aws_)?secret_access_key|authorization)\b[\"']?\s*[=:]\s*)"
    r"(?P<value>\"[^\"]*\"|'[^']*'|(?:bearer|sharedkey|basic)\s+[^\s,;&\"']+|[^\s,;&\"'}\])]+)"
)
_BEARER = re.compile(r"(?i)\b(?P<name>bearer\s+|sharedkey\s+\S+?:)[a-z0-9._~+/-]{12,}=*")
_USERINFO = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s/@]+@(?![a-z0-9-]+\.dfs\.core)", re.IGNORECASE)
_OPEN = {"account_name", "account_host", "anon", "endpoint_url", "region_name", "project", "use_ssl", "addressing_style"}
_VARIABLES = (
    "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)  # fmt: skip
_SHORTEST = 8  # shorter values are words that stand elsewhere too
_hidden: set[str] = set()


def scrub(text: str) -> str:
    """The text with secrets replaced by ***: those that hide_options was told, query tokens, keys, passwords, user:password@."""
    for secret in sorted(_hidden, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _SECRETS.sub(lambda m: m["name"] + _quoted(m["value"]), text)
    return _USERINFO.sub(lambda m: m["scheme"] + "***@", _BEARER.sub(lambda m: m["name"] + "***", text))


def scrubbed(values: Any, name: str = "") -> Any:
    """Nested values with their secrets, by name or by content, replaced: for files that are read again."""
    if isinstance(values, Mapping):
        return {key: scrubbed(below, str(key)) for key, below in values.items()}
    if isinstance(values, list | tuple):
        return [scrubbed(below, name) for below in values]
    if not isinstance(values, str):
        return values
    return "***" if values and scrub(f"{name}={values}") == f"{name}=***" else scrub(values)


def _quoted(value: str) -> str:
    """*** in the quotes of the value that it stands for: JSON and YAML stay readable."""
    return f"{value[0]}***{value[0]}" if value[0] in "\"'" else "***"


def hide_options(options: Mapping[str, Any]) -> None:
    """From now on `scrub` knows the credentials in storage options and in the environment, whatever stands around them."""
    for value in [*_texts(options), *(os.environ.get(name, "") for name in _VARIABLES)]:
        parts = [part.partition("=")[2] for part in value.split(";") if part.lower().startswith(("accountkey=", "shareda"))]
        for secret in [value, *parts, *urllib.parse.parse_qs(value.lstrip("?")).get("sig", [])]:
            if len(secret) >= _SHORTEST and not os.path.exists(secret):
                _hidden.update((secret, urllib.parse.quote(secret, safe=""), json.dumps(secret)[1:-1]))


def _texts(value: Any, name: str = "") -> list[str]:
    if isinstance(value, Mapping):
        return [text for key, below in value.items() for text in _texts(below, str(key))]
    if isinstance(value, list | tuple):
        return [text for below in value for text in _texts(below, name)]
    return [value] if isinstance(value, str) and name not in _OPEN else []


@dataclass(frozen=True)
class JournalConfig:
    """progress: `auto` draws bars on a terminal and prints plain lines elsewhere; `bar`, `lines`, `off` force it.
    interval_s: at most one plain line in so many seconds. wandb: `off`, `offline`, `online` or
    `auto` (online with a key, offline without); wandb_project: its project. tensorboard: whether events are written too."""

    progress: str
    interval_s: float
    wandb: str
    wandb_project: str
    tensorboard: bool


class Progress:
    """A bar on a terminal, plain lines with rate and time left elsewhere."""

    def __init__(self, total: int, text: str, unit: str, style: str, interval_s: float) -> None:
        self.total, self.text, self.unit, self.interval_s = total, text, unit, interval_s
        self.count, self.start, self.last = 0, time.monotonic(), time.monotonic()
        self.shown = ""
        self.lines = style == "lines"
        self.bar = tqdm(total=total, desc=text, unit=unit, file=sys.stderr, dynamic_ncols=True) if style == "bar" else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.lines and kind is None:
            self._line(time.monotonic())

    def advance(self, n: int = 1, **shown: float | str) -> None:
        """Count n more; `shown` values stand beside the rate."""
        self.count += n
        if shown:
            self.shown = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(self.shown, refresh=False)
            self.bar.update(n)
        elif self.lines and now - self.last >= self.interval_s:
            self._line(now)

    def _line(self, now: float) -> None:
        self.last = now
        rate = self.count / max(now - self.start, 1e-9)
        left = (self.total - self.count) / rate if rate and self.total else 0.0
        line = f"{self.text}: {self.count}/{self.total} {self.unit}  {rate:.1f}/s  {left:.0f} s left  {self.shown}"
        print(line.rstrip(), file=sys.stderr, flush=True)


class Journal:
    """Writes `metrics.jsonl` and `summary.json` into `out`; silent on every rank but the first (`main`)."""

    def __init__(self, out: Path, config: JournalConfig, main: bool = True) -> None:
        if config.progress not in ("auto", "bar", "lines", "off"):
            raise ValueError(f"logging.progress is {config.progress!r}: expected auto, bar, lines or off")
        self.out, self.config, self.main = Path(out), config, main
        if main:
            self.out.mkdir(parents=True, exist_ok=True)
        style = config.progress
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "lines"
        self._style = style if main else "off"

    def path(self, name: str) -> Path:
        """A path inside `out`, its folder made. Raises ValueError when the name leaves `out`."""
        path = (self.out / name).resolve()
        if not path.is_relative_to(self.out.resolve()):
            raise ValueError(f"the name {name!r} leaves the output folder {self.out}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def row(self, **values: Any) -> None:
        """Append one JSON line to metrics.jsonl."""
        if self.main:
            with self.path("metrics.jsonl").open("a") as file:
                file.write(scrub(json.dumps(plain(values))) + "\n")

    def progress(self, total: int, text: str, unit: str) -> Progress:
        return Progress(total, text, unit, self._style, self.config.interval_s)

    def say(self, text: str) -> None:
        if self.main and self.config.progress != "off":
            tqdm.write(scrub(text), file=sys.stderr)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Merge nested values into summary.json; the file is replaced atomically."""
        if not self.main:
            return
        path = self.path("summary.json")
        merged = _merge(json.loads(path.read_text()) if path.exists() else {}, plain(values))
        write_atomic(path, json.dumps(merged, indent=2, sort_keys=True) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write, sync and rename, so that a reader sees the old file or the new one."""
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(scrub(text))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _merge(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in new.items():
        nested = isinstance(value, Mapping) and isinstance(old.get(name), dict)
        old[name] = _merge(old[name], value) if nested else value
    return old


def plain(value: Any) -> Any:
    """JSON types only: arrays become lists, numpy scalars numbers, non-finite floats None (JSON has none)."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value
