"""Storage options have the names of adlfs, s3fs, gcsfs and fsspec's http client; here is what obstore calls them."""

import os
from typing import Any

_AZURE = {"account_name": "account_name", "account_key": "account_key", "sas_token": "sas_key", "tenant_id": "tenant_id",
          "client_id": "client_id", "client_secret": "client_secret", "anon": "skip_signature"}  # fmt: skip
_CONNECTION = {"accountname": "account_name", "accountkey": "account_key", "sharedaccesssignature": "sas_key",
               "blobendpoint": "endpoint"}  # fmt: skip
_S3 = {"key": "access_key_id", "secret": "secret_access_key", "token": "session_token", "endpoint_url": "endpoint",
       "region_name": "region", "anon": "skip_signature", "requester_pays": "request_payer"}  # fmt: skip
_ENVIRONMENT = {"account_name": "AZURE_STORAGE_ACCOUNT_NAME", "account_key": "AZURE_STORAGE_ACCOUNT_KEY",
                "sas_key": "AZURE_STORAGE_SAS_TOKEN", "tenant_id": "AZURE_STORAGE_TENANT_ID",
                "client_id": "AZURE_STORAGE_CLIENT_ID", "client_secret": "AZURE_STORAGE_CLIENT_SECRET"}  # fmt: skip


def translated(scheme: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(configuration of the store, options of its HTTP client). Raises ValueError naming an option that obstore cannot take."""
    given = {name: value for name, value in options.items() if value is not None}
    if scheme in ("http", "https"):
        return {}, _http(scheme, given)
    if scheme == "s3":
        nested = given.pop("client_kwargs", {})
        return _renamed(scheme, {**given, **nested}, _S3), {}
    if scheme in ("gs", "gcs"):
        return _gcs(scheme, given), {}
    return _azure(scheme, given), {}


def _renamed(scheme: str, given: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    _refuse(scheme, given.keys() - names.keys())
    return {names[name]: value for name, value in given.items()}


def _refuse(scheme: str, names: set[str]) -> None:
    if names:
        listed = ", ".join(f"storage.options.{scheme}.{name}" for name in sorted(names))
        raise ValueError(f"obstore takes no {listed}: drop it or set storage.backend=fsspec")


def _azure(scheme: str, given: dict[str, Any]) -> dict[str, Any]:
    connection = given.pop("connection_string", None) or os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
    host = given.pop("account_host", None)
    config = _renamed(scheme, given, _AZURE)
    for name, variable in _ENVIRONMENT.items():  # the names that adlfs reads; obstore knows only some of them
        if name not in config and os.environ.get(variable):
            config[name] = os.environ[variable]
    if "account_key" in config:
        config.pop("sas_key", None)
    if host:
        config["endpoint"] = f"https://{host}"
    if connection:
        parts = dict(part.split("=", 1) for part in connection.split(";") if "=" in part)
        known = {name.lower(): value for name, value in parts.items()}
        config = {_CONNECTION[name]: value for name, value in known.items() if name in _CONNECTION}
        if "endpoint" not in config:
            suffix = known.get("endpointsuffix", "core.windows.net")
            config["endpoint"] = f"{known.get('defaultendpointsprotocol', 'https')}://{config['account_name']}.blob.{suffix}"
    if "sas_key" in config:
        config["sas_key"] = config["sas_key"].removeprefix("?")
    return config


def _gcs(scheme: str, given: dict[str, Any]) -> dict[str, Any]:
    token, endpoint = given.pop("token", None), given.pop("endpoint_url", None)
    _refuse(scheme, given.keys() - {"project"})  # the project is for writing and for listing buckets
    config: dict[str, Any] = {"base_url": endpoint} if endpoint else {}
    if token == "anon":
        return {**config, "skip_signature": True}
    if isinstance(token, str) and token not in ("google_default", "cloud"):
        return {**config, "application_credentials": token}  # a file, as for gcsfs
    if token not in (None, "google_default", "cloud"):
        _refuse(scheme, {"token (other than a file, anon, google_default or cloud)"})
    return config


def _http(scheme: str, given: dict[str, Any]) -> dict[str, Any]:
    nested = given.pop("client_kwargs", {})
    _refuse(scheme, set(given) | {f"client_kwargs.{name}" for name in nested if name != "headers"})
    return {"default_headers": dict(nested["headers"])} if "headers" in nested else {}
