"""The whole story on a synthetic cohort, on a laptop: slides are drawn and streamed, an encoder learns from them without labels,
is probed beside its floors, released, and carries a slide-level model to a hospital it never saw.

    histoscale demo
    histoscale demo out=runs/demo seed=1

Every stage is a command of its own; the demo prints it as one would type it. It ends in `out`/report.html. Stopped, it goes on
where it was.
"""

import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from histoscale.data.catalog import open_catalog
from histoscale.data.journal import Journal, JournalConfig, aside
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.proof import ProofConfig, contact_sheet, prove, read_places
from histoscale.launch.demo_report import closing_words, write_demo_report
from histoscale.launch.footprint import Footprint
from histoscale.launch.run import invoke

RESULT = ("seed", "proof", "stages")
MADE = ("report.html",)
HOLDS = ("cohort/summary.json",)
LOG = "log.txt"
ABOUT = {  # a stage in words, by its folder in `out`
    "cohort": "slides of four hospitals are drawn; their tissue classes differ in form, not in colour",
    "catalog": "each slide's header is read and its tissue found",
    "pretrain": "an encoder learns from patches of three hospitals, read from the slides as it trains, without labels",
    "probe": "what is it worth? Tissue classes on patients that it never saw, beside untrained encoders and plain colour",
    "release": "the encoder becomes a folder that opens in timm",
    "embeddings": "every slide becomes a file of embeddings",
    "colour": "the same by colours alone, as a floor for the slide model",
    "mil": "a slide model looks for tumour, also at a hospital that nobody trained on",
    "proof": "what could be known without an encoder? Shortcuts in the tissue, and its answer",
}


@dataclass(frozen=True)
class StagesConfig:
    """Overrides that each stage's command takes besides its inputs and `out`."""

    cohort: list[str]
    index: list[str]
    pretrain: list[str]
    release: list[str]
    probe: list[str]
    embed: list[str]
    mil: list[str]


@dataclass(frozen=True)
class Config:
    """seed: of the cohort and of the training. footprint_interval_s: how often memory is looked at."""

    seed: int
    proof: ProofConfig
    stages: StagesConfig
    footprint_interval_s: float
    storage: StorageConfig
    out: str
    logging: JournalConfig


def run(config: Config, journal: Journal) -> dict[str, Any]:
    out = Path(config.out)
    footprint = Footprint(config.footprint_interval_s)
    results: dict[str, dict[str, Any]] = {}
    count = len(ABOUT)

    def stage(name: str, command: str, *overrides: str) -> None:
        arguments = [*overrides, f"logging.progress={config.logging.progress}", f"out={out / name}"]
        typed = f"$ histoscale {command} {shlex.join(arguments)}"
        journal.say(f"\n{len(results) + 1} of {count}: {ABOUT[name]}\n{typed}")
        with journal.path(LOG).open("a") as log, aside(log), footprint.stage(name):
            print(f"\n{typed}", file=log)
            results[name] = invoke(command, arguments)
        if "run" in results[name]:  # it was done before: what it took then
            footprint.stages[-1] = replace(footprint.stages[-1], seconds=results[name]["run"]["seconds"])
        journal.say(f"{footprint.stages[-1].seconds:.0f} s")

    journal.say(f"{count} stages, minutes on two cores. The lines with $ are commands that can be typed; what each of them says,")
    journal.say(f"tables and warnings too, stands in {journal.path(LOG)}")
    stages, cohort, catalog = config.stages, out / "cohort", out / "catalog"
    stage("cohort", "cohort", *stages.cohort, f"cohort.seed={config.seed}")
    stage("catalog", "index", *stages.index, f"manifest={cohort / 'manifest.csv'}")
    stage("pretrain", "pretrain", *stages.pretrain, f"catalog={catalog}", f"seed={config.seed}")
    stage("probe", "probe", *stages.probe, f"encoder={out / 'pretrain'}", f"data_root={cohort}", f"catalog={catalog}")
    stage("release", "release", *stages.release, f"checkpoint={out / 'pretrain'}", f"summary={out / 'probe' / 'summary.json'}")
    seen = f"precision={results['probe']['probe']['precision']}"  # measured once: the scores are those of this encoder
    stage("embeddings", "embed", *stages.embed, seen, f"encoder={out / 'release'}", f"catalog={catalog}")
    stage("colour", "embed", *stages.embed, "encoder=colour", f"catalog={catalog}")
    stage(
        "mil", "mil", *stages.mil, f"embeddings={out / 'embeddings'}", f"floor_embeddings={out / 'colour'}", f"catalog={catalog}",
        f"manifest={cohort / 'manifest.csv'}", f"annotations={cohort / 'truth'}", f"pretraining={catalog}",
        "pretraining_roles=[train]",
    )  # fmt: skip
    _same_weights(results)
    journal.say(f"\n{count} of {count}: {ABOUT['proof']}")
    with footprint.stage("proof"):
        store = Store(config.storage)
        measured = prove(cohort, catalog, store, config.proof, journal)
        opened = open_catalog(str(catalog), store)
        places = read_places(cohort / "patches.parquet", "matched4", opened)
        columns, rows = (", ".join(sorted(set(names.tolist()))) for names in (places.label, places.site))
        words = f"Columns, two regions each: {columns}. Rows: {rows}. A region is {config.proof.sheet_um:g} µm wide."
        sheet = contact_sheet(places, opened, store, config.proof), words
    summary = {
        "probe": results["probe"]["probe"],
        "mil": results["mil"]["mil"],
        "proof": {one.name: one.as_dict() for one in measured},
        "seconds": sum(stage.seconds for stage in footprint.stages),
        "peak_pss_bytes": max(stage.peak_bytes for stage in footprint.stages),
        "stages": {stage.name: {"seconds": stage.seconds, "peak_pss_bytes": stage.peak_bytes} for stage in footprint.stages},
    }
    following = f"{_program()} index manifest=manifest.csv out=runs/catalog"
    write_demo_report(out, results, measured, sheet, footprint.stages, following)
    journal.say(f"\n{closing_words(results, measured)}")
    journal.say(f"\nIt took {summary['seconds']:.0f} s and at most {summary['peak_pss_bytes'] / 2**30:.1f} GiB of memory.")
    journal.say(f"open: {(out / 'report.html').resolve().as_uri()}")
    journal.say(f"next: {following}   (your own slides: a CSV with slide_id and uri, better with patient_id and site)")
    return summary


def _program() -> str:
    """How this program is called from the shell that runs it: by name where it is found, else by its place."""
    if shutil.which("histoscale"):
        return "histoscale"
    place = Path(sys.executable).parent / "histoscale"
    if not place.exists():
        return shlex.join([sys.executable, "-m", "histoscale.launch.cli"])
    return shlex.quote(str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place))


def _same_weights(results: dict[str, dict[str, Any]]) -> None:
    """The probe's scores are those of the released encoder: raises ValueError unless both saw the same weights."""
    probed, embedded = results["probe"]["probe"]["encoder_hash"], results["embeddings"]["embed"]["encoder_hash"]
    if probed != embedded:
        raise ValueError(f"the probed encoder ({probed}) is not the released one ({embedded})")


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("demo", sys.argv[1:]))
