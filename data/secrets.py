"""Credentials: which values they are, and values and text without them.

Values are scrubbed before they are written: what stands below `storage.options`, what bears the name of a credential, what is
known as one, and what has the form of one (in a URL, in a connection string). A result is not searched for words that only sound
secret: hospitals are called SP and SE. Text that people read (log lines, errors, tracebacks) is also searched for the other forms
in which libraries print credentials. All of it takes time linear in its input.
"""

import json
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

HIDDEN = "***"
OPTIONS = "storage.options"  # below this key everything is a credential, but for what fsspec's file systems call:
_OPEN = frozenset({
    "account_name", "account_host", "anon", "endpoint_url", "region_name", "project", "use_ssl", "addressing_style",
    "signature_version", "tenant_id", "client_id", "requester_pays", "version_aware", "default_cache_type",
    "user-agent", "accept", "accept-encoding", "accept-language", "cache-control", "content-type", "x-ms-version",
    # fsspec and its HTTP
    "cache_type", "block_size", "blocksize", "default_block_size", "default_fill_cache", "cache_regions", "max_concurrency",
    "batch_size", "simple_links", "same_scheme", "size_policy", "encoded", "trust_env", "raise_for_status",
    # adlfs
    "location_mode", "assume_container_exists", "socket_timeout", "connection_timeout", "read_timeout", "timeout",
    # s3fs and botocore
    "profile", "mode", "defaults_mode", "max_attempts", "total_max_attempts", "connect_timeout", "max_pool_connections",
    "tcp_keepalive", "verify", "api_version", "user_agent", "user_agent_extra", "user_agent_appid", "payload_signing_enabled",
    "use_accelerate_endpoint", "use_dualstack_endpoint", "use_fips_endpoint", "us_east_1_regional_endpoint",
    "parameter_validation", "request_checksum_calculation", "response_checksum_validation", "account_id_endpoint_mode",
    "requestpayer",
    # gcsfs
    "access", "consistency", "cache_timeout", "requests_timeout", "default_location", "location", "check_connection",
    # obstore
    "region", "default_region", "bucket", "container_name", "endpoint", "authority_host", "metadata_endpoint", "credential_type",
    "checksum_algorithm", "conditional_put", "copy_if_not_exists", "request_payer", "skip_signature", "s3_express",
    "virtual_hosted_style_request", "unsigned_payload", "imdsv1_fallback", "role_arn", "role_session_name", "allow_http",
    "allow_invalid_certificates", "default_content_type", "pool_idle_timeout", "pool_max_idle_per_host", "max_retries",
    "retry_timeout", "init_backoff", "max_backoff", "use_emulator", "use_azure_cli", "disable_tagging", "disable_bulk_delete",
})  # fmt: skip
_VARIABLES = (
    "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET", "AZURE_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY",
)  # fmt: skip
# Names of credentials wherever they stand, without their - and _: exact ones, and none that is also a word of results.
_NAMES = frozenset({
    "accountkey", "connectionstring", "sastoken", "saskey", "clientsecret", "secretaccesskey", "accesskeyid", "sessiontoken",
    "awssecretaccesskey", "awsaccesskeyid", "awssessiontoken", "accesstoken", "refreshtoken", "sharedaccesskey",
    "sharedaccesssignature",
    *(name.lower().replace("_", "") for name in _VARIABLES),
})  # fmt: skip
_IN_TEXT = _NAMES | {"authorization", "proxyauthorization", "password", "passwd", "apikey"}
_LONGEST_NAME = 48
_SCHEMES = ("bearer", "basic", "digest", "sharedkey", "token")  # of an Authorization
_SIGNS = ("sig", "signature", "x-amz-signature", "x-amz-security-token")
# Of the query of a URL: https://learn.microsoft.com/rest/api/storageservices/create-service-sas, signed URLs of S3 and of GCS.
# Of a fragment (RFC 6749, 4.2.2: access_token) those that are no words of a page.
_IN_FRAGMENTS = (
    r"sig|secret|signature|password|passwd|pwd|(?:[a-z]+[-_])*token|api[-_]?key|client[-_]secret|x-amz-[a-z-]+|x-goog-[a-z-]+"
)
_PARAMETERS = (
    rf"{_IN_FRAGMENTS}|se|sp|sv|st|sr|skoid|sktid|skt|ske|sks|skv|key|credential|auth|authorization|awsaccesskeyid|googleaccessid"
)
# Possessive quantifiers and the look behind keep these linear: what was looked through once is not looked through again.
_WORD = re.compile(r"(?<![\w-])([\w-]++)\\*+[\"']?+\s*+[=:]\s*+\\*+")
_SCHEMED = rf"[\"']?+(?:(?:{'|'.join(_SCHEMES)})\s++)?[^\s,;\"'}})\]]++"
_VALUE = re.compile(rf"(?:[bru](?=[\"']))?+(?:\"[^\"]*+\"|'[^']*+'|{_SCHEMED})", re.IGNORECASE)
_BEARER = re.compile(r"(?<!\w)((?:bearer|sharedkey)\s++)[\w.:~+/-]{12,}+=*+", re.IGNORECASE)
_CONNECTION = re.compile(r"(?<!\w)((?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[^\s;\"'<>]++", re.IGNORECASE)
_RUN = re.compile(r"[^\s\"'<>]++")  # a URL stands in one
# Scheme, user and host. A password may hold a / that should have been quoted; what follows the colon is then no port.
_URL = re.compile(
    r"(?<![a-z0-9+.-])([a-z0-9+.-]*+)://((?:[^\s/?#@:]*+:(?!\d*+(?:[/?#]|$))[^\s@]{0,256}+@)?+[^\s/?#]*+)", re.IGNORECASE
)
# A URL may hold another one, in its query or its path, written as it is or quoted: %3A %2F %3F %26 %3D are : / ? & =.
_SCHEME_ENDS, _QUERY = re.compile(r"://|%3A%2F%2F", re.IGNORECASE), re.compile(r"\?|%3F", re.IGNORECASE)
_PARAMETER = re.compile(rf"((?:[?&;]|%3F|%26)(?:{_PARAMETERS})(?:=|%3D))([^&#]++)", re.IGNORECASE)
_OF_FRAGMENT = re.compile(rf"([#&](?:{_IN_FRAGMENTS})=)([^&#]++)", re.IGNORECASE)
_REFERENCE = re.compile(r"\$\{([^{}]*+)\}")
_SHORTEST = 8  # shorter values are words that stand elsewhere too
_known: tuple[str, ...] = ()  # longest first


def scrub(text: str) -> str:
    """Text for people with *** in place of credentials: known ones, parameters of URLs, user:password@, and `name: value` where
    the name is that of a credential."""
    text = _without_named(_without_forms(_without_known(text), strictly=False))
    return _BEARER.sub(rf"\1{HIDDEN}", text)


def scrubbed(values: Any) -> Any:
    """Nested values (mappings, lists, texts, numbers) with *** in place of credentials; where there are none they are equal to
    what came in, but that tuples are lists."""
    return _scrubbed(values, "", False)


def _scrubbed(value: Any, path: str, hidden: bool) -> Any:
    """path: the keys above, each behind a dot; hidden: whether what stands there is a credential."""
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for key, below in value.items():
            shown = _clean_key(key) if isinstance(key, str) else key
            if shown in found or (shown != key and shown in value):  # two that differ by their credentials alone are still two
                shown = f"{shown} ({len(found) + 1})"
            found[shown] = _scrubbed(below, f"{path}.{key}", _is_hidden(f"{path}.{key}"))
        return found
    if isinstance(value, list | tuple):
        return [_scrubbed(below, path, hidden) for below in value]
    if hidden:
        return value if value is None or isinstance(value, bool) or value == "" else HIDDEN
    return _clean(value) if isinstance(value, str) else value


def _is_hidden(path: str) -> bool:
    name = path.rpartition(".")[2].lower()
    inside = f".{OPTIONS}." in f"{path}."
    return (inside and name not in _OPEN) or _squashed(name) in _NAMES


def _clean(text: str) -> str:
    """A value's text: only what is known is taken out, and what is a credential by its form."""
    return _without_forms(_without_known(text))


def _clean_key(key: str) -> str:
    """The name of a result: as `_clean`, but a known word of letters alone is only hidden where it is the whole name."""
    return HIDDEN if key in _known else _without_forms(_without_known(key, words=False))


def has_credential(text: str, strictly: bool = True) -> bool:
    """Whether a text has a credential by its form: in a URL, or in a connection string. strictly: as in values, where the query
    of a path alone is none."""
    return _without_forms(text, strictly) != text


def _without_forms(text: str, strictly: bool = True) -> str:
    return _CONNECTION.sub(rf"\1{HIDDEN}", _without_urls(text, strictly))


def _without_known(text: str, words: bool = True) -> str:
    for secret in _known:
        if words or not secret.isalpha():
            text = text.replace(secret, HIDDEN)
    return text


def _without_urls(text: str, strictly: bool) -> str:
    """strictly: a query counts only behind a scheme; else also behind the path of a request, or alone."""
    if not _SCHEME_ENDS.search(text) and (strictly or not ("?" in text or "#" in text)):
        return text

    def one(run: re.Match[str]) -> str:
        url = _URL.sub(_without_user, run[0])
        scheme = _SCHEME_ENDS.search(url)
        if strictly and scheme is None:
            return url
        url = _from(url, _QUERY.search(url, scheme.end() if strictly and scheme else 0), _PARAMETER)
        return _from(url, re.search("#", url), _OF_FRAGMENT)

    return _RUN.sub(one, text)


def _from(url: str, start: re.Match[str] | None, parameter: re.Pattern[str]) -> str:
    """A URL without the values of some parameters behind its first ? or #."""
    return url if start is None else url[: start.start()] + parameter.sub(_without_value, url[start.start() :])


def _without_user(url: re.Match[str]) -> str:
    user = _user(url)
    return f"{url[1]}://{HIDDEN}{url[2][len(user) :]}" if user else url[0]


def _user(url: re.Match[str]) -> str:
    """What stands before the @ of a URL and is a credential: abfs://container@account names no user."""
    user = url[2].rpartition("@")[0]
    return user if ":" in user or url[1].lower() in ("http", "https") else ""


def _without_value(parameter: re.Match[str]) -> str:
    kept = parameter[2].rstrip(").,;:]}")  # these belong to the sentence that the URL stands in
    return f"{parameter[1]}{HIDDEN}{parameter[2][len(kept) :]}" if kept else parameter[0]


def _without_named(text: str) -> str:
    parts, done = [], 0
    for word in _WORD.finditer(text):
        if word.start() < done or len(word[1]) > _LONGEST_NAME or _squashed(word[1]) not in _IN_TEXT:
            continue
        value = _VALUE.match(text, word.end())
        if value is not None:
            quote = value[0][-1] if value[0][-1] in "\"'" else ""
            parts += [text[done : word.end()], f"{quote}{HIDDEN}{quote}"]
            done = value.end()
    return "".join([*parts, text[done:]])


def _squashed(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


# Which credentials are known.


def may_hide(key: str) -> bool:
    """Whether credentials may stand under a dotted key, or below it."""
    return _is_hidden(f".{key}") or OPTIONS.startswith(f"{key}.")


def hide(values: Any) -> None:
    """From now on the credentials of a configuration (nested values) and of the environment are known, whatever stands around
    them: what `scrubbed` hides in it, and the users in its URLs."""
    found = [os.environ.get(name, "") for name in _VARIABLES]
    for path, text in _texts(values, ""):
        found += [text] if _is_hidden(path) else []
        users = (_user(url).partition(":") for url in _URL.finditer(text))
        found += [password or name for name, _, password in users]
    _hide(found)


def hide_options(options: Mapping[str, Any]) -> None:
    """As `hide`, of storage options by themselves."""
    hide({OPTIONS: options})


def _hide(secrets: list[str]) -> None:
    global _known
    found = set(_known)
    for part in (part for secret in secrets for part in _parts(secret)):
        if len(part) >= _SHORTEST and not (os.path.isabs(part) and os.path.exists(part)):  # a file that holds one is none
            quoted = urllib.parse.quote(part, safe=""), urllib.parse.unquote(part)
            found |= {part, *quoted, json.dumps(part)[1:-1], repr(part)[1:-1]}
    _known = tuple(sorted(found, key=lambda part: (-len(part), part)))


def _parts(secret: str) -> Iterator[str]:
    """A credential as it is given, and what of it stands alone where it is used: keys of a connection string, the signature of a
    token, the token of an Authorization."""
    scheme, _, token = secret.partition(" ")
    yield from _REFERENCE.findall(secret)  # what OmegaConf takes for a key, and names when there is none
    fields = [field.partition("=") for field in secret.split(";")]
    keys = [value for name, _, value in fields if _squashed(name) in ("accountkey", "sharedaccesskey", "sharedaccesssignature")]
    for whole in (secret, token if scheme.lower() in _SCHEMES else "", *keys):
        yield whole
        yield whole.lstrip("?")
        for name, values in urllib.parse.parse_qs(whole.lstrip("?")).items():
            yield from values if name.lower() in _SIGNS else ()


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Where each text among nested values stands (the keys above it, each behind a dot), and the text."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _texts(below, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _texts(below, path)
    elif isinstance(value, str):
        yield path, value


# What a process prints.


class _Scrubbing:
    """A stream that is written to without credentials; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(scrub(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def scrub_streams() -> None:
    """From now on nothing that this process prints shows a credential: libraries, warnings and threads that fail print by
    themselves. Called again, it comes before whoever has replaced the `write` of a stream since, to keep what is written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not (isinstance(stream, _Scrubbing) and "write" not in vars(stream)):
            setattr(sys, name, _Scrubbing(stream))
