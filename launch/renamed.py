"""Keys that have another name now: the old one is an error that says the new one."""

_ENCODING = {
    "device": "hardware.device", "batch": "hardware.batch", "threads": "stream.threads", "cut.threads": "stream.threads",
    "cut.mpp_tolerance": "grid.mpp_tolerance", "cut.max_upsample": "grid.max_upsample", "resolution.mpp": "grid.mpp",
    "resolution.name": "resolution",
}  # fmt: skip
RENAMED = {
    "pretrain": {
        "optim.precision": "precision", "online.cut.threads": "stream.threads",
        "online.cut.mpp_tolerance": "online.grid.mpp_tolerance", "online.cut.max_upsample": "online.grid.max_upsample",
    },
    "release": {"release.precision": "precision"},
    "embed": {
        "device": "hardware.device", "pipe.batch": "hardware.batch", "pipe.threads": "stream.threads",
        "pipe.read_px": "stream.read_px",
    },
    "probe": {**_ENCODING, "segment.feed.encode_batch": "hardware.batch"},
    "robustness": _ENCODING,
    "mil": {"threads": "hardware.threads", "readers": "stream.threads", "evidence.artefacts.threads": "stream.threads"},
}  # fmt: skip


def renamed(command: str, key: str) -> str | None:
    """What `key` of `command` is called now; None where it never had another name."""
    return RENAMED.get(command, {}).get(key)
