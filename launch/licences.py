"""The licence of every package that is installed: read from the package, held against what is permitted, written to LICENSES.md.

    python3 launch/up.py licences

Fails, and writes nothing, where a licence is unknown or not permitted.
"""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata

from histoscale.launch.up import CONSTRAINTS, ROOT, pins

LIST = ROOT / "LICENSES.md"
# Neither GPL nor AGPL nor anything that excludes a use. LGPL and MPL are of libraries that we call and do not change.
PERMITTED = frozenset(
    "0BSD Apache-2.0 BSD BSD-1-Clause BSD-2-Clause BSD-3-Clause BSD-4.3TAHOE BSL-1.0 CC0-1.0 CNRI-Python IJG ISC LGPL-2.1-only "
    "LGPL-2.1-or-later LicenseRef-NVIDIA-Proprietary LicenseRef-Public-Domain MIT MIT-0 MIT-CMU MPL-1.1 MPL-2.0 PSF-2.0 Zlib "
    "blessing libpng-2.0 libtiff".split()
)
# What classifiers and free texts mean. BSD: they do not say which of the BSD licences.
MEANS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD 3-Clause License": "BSD-3-Clause",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT license": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-Proprietary",
    "Python Software Foundation License": "PSF-2.0",
}
# Packages that say nothing themselves, or that no Linux machine installs: read in their files.
UNSAID = {
    "colorama": "BSD-3-Clause",
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",
    "httpx2-jsfetch": "BSD-3-Clause",
    "pywin32": "PSF-2.0 AND LGPL-2.1-or-later",
}
ABOUT = """# Licences of the packages that Histoscale installs

Every package of `constraints.txt`, as it describes itself. `python3 launch/up.py licences` reads them again, and fails where one
is unknown or not permitted: neither GPL nor AGPL, nothing that excludes commercial use. LGPL is the OpenSlide library's, MPL that
of a few Python packages; both are called, not changed. NVIDIA's libraries come with PyTorch on Linux under NVIDIA's terms. NumPy
and SciPy carry the GCC runtime under its exception. Weights that timm or a hub offers have licences of their own, some of them
non-commercial: read their cards.

| package | licence |
|---|---|
"""


def licence_of(name: str) -> str | None:
    """What an installed package says of itself, as an SPDX expression; None where it says nothing known. Raises
    PackageNotFoundError."""
    told = metadata(name)
    text, expression = ((told.get_all(field) or [""])[0].strip() for field in ("License", "License-Expression"))
    classified = re.findall(r"^License :: OSI Approved :: (.+)$", "\n".join(told.get_all("Classifier", [])), re.MULTILINE)
    meant = [MEANS.get(line, line) for line in classified]
    candidates = [expression, MEANS.get(text, text), " AND ".join(meant)]
    return next((one for one in candidates if one and "\n" not in one and _is_known(one)), None)


def _is_known(expression: str) -> bool:
    """Whether every word of it is a licence that can be judged."""
    words = re.sub(r"[()]| WITH \S+", " ", expression).replace(" AND ", " ").replace(" OR ", " ").split()
    return bool(words) and all(word in PERMITTED or re.fullmatch(r"[A-Za-z]+[\w.+]*(-[\w.+]+)+", word) for word in words)


def permitted(expression: str) -> bool:
    """Of an SPDX expression: an alternative is enough of what OR joins, all of what AND joins is needed."""
    words = iter(re.findall(r"[()]|[^\s()]+", expression))

    def alternatives() -> bool:
        found, both = False, True
        for word in words:
            if word == "OR":
                found, both = found or both, True
            elif word == ")":
                break
            elif word == "WITH":
                next(words)  # an exception permits more, never less
            elif word != "AND":
                both &= alternatives() if word == "(" else word in PERMITTED
        return found or both

    return alternatives()


def rows() -> Iterator[tuple[str, str | None]]:
    """Each package of constraints.txt with its licence; what this machine does not install keeps what LICENSES.md says."""
    written = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", LIST.read_text(), re.MULTILINE)) if LIST.exists() else {}
    for name in sorted({name for name, _ in pins(CONSTRAINTS)}):
        try:
            yield name, licence_of(name) or UNSAID.get(name)
        except PackageNotFoundError:
            yield name, UNSAID.get(name) or written.get(name)


def page(found: dict[str, str | None]) -> str:
    return ABOUT + "".join(f"| {name} | {licence} |\n" for name, licence in found.items())


def main() -> int:
    """The exit code: 1 where a licence is unknown or not permitted."""
    found = dict(rows())
    wrong = {name: licence for name, licence in found.items() if licence is None or not permitted(licence)}
    for name, licence in wrong.items():
        said = "an unknown licence: read it, and name it in UNSAID" if licence is None else f"{licence}, which is not permitted"
        print(f"[licences] {name} has {said}", file=sys.stderr)
    if not wrong:
        LIST.write_text(page(found))
        print(f"[licences] {len(found)} packages, each permitted: {LIST}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
