"""`histoscale <command> key=value …`"""

import sys
from importlib.util import find_spec

from histoscale import __version__
from histoscale.launch.config import COMMANDS
from histoscale.launch.overrides import nearest
from histoscale.launch.run import answer, execute

ABOUT = {
    "demo": "the whole story on a synthetic cohort, on a laptop, ending in one HTML report",
    "cohort": "write a synthetic cohort: slides with truth, of any size",
    "manifest": "a public cohort's label files -> manifest (Camelyon16/17, PANDA, TCGA)",
    "index": "manifest -> catalog",
    "pretrain": "catalog -> checkpoints (one process, or under torchrun)",
    "release": "checkpoint -> release directory (timm)",
    "fetch": "public labelled sets -> data_root (resumable, with checksums)",
    "probe": "any encoder -> patch-level table, with floors and intervals",
    "compare": "several runs of probe or of mil -> one table, with paired differences",
    "embed": "slides -> embedding stores (one HDF5 a slide)",
    "mil": "embedding stores -> slide-level model, metrics, heatmaps",
    "robustness": "any encoder -> robustness to site, scanner and stain",
    "bench": "speed of reading, against the decode limit and OpenSlide",
    "doctor": "is this machine ready?",
}


def usage() -> str:
    rows = "\n".join(f"  {name:<10} {ABOUT[name]}" for name in COMMANDS)
    return f"usage: histoscale <command> key=value …      (histoscale <command> --help, --help all, --cfg; --version)\n\n{rows}"


def main() -> int:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        answer(usage())
        return 0 if argv else 2
    if "--version" in argv:
        return answer(f"histoscale {__version__}")
    command, *rest = argv
    if command not in COMMANDS:
        print(f"histoscale: unknown command {command!r}{nearest(command, list(COMMANDS))}\n\n{usage()}", file=sys.stderr)
        return 2
    if find_spec("torch") is None:
        print("histoscale: torch is not installed here; `python3 launch/up.py doctor` sets the environment up", file=sys.stderr)
        return 2
    return execute(command, rest)


if __name__ == "__main__":
    sys.exit(main())
