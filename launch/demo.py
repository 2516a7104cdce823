"""The whole story on a synthetic cohort, on a laptop, in one process: slides are drawn and streamed, an encoder learns from them
without labels, is released, probed beside its floors, and carries a slide-level model to a hospital it never saw.

    histoscale demo
    histoscale demo out=runs/demo seed=1

Every stage is a command of its own; the demo prints it as one would type it. It ends in `out`/report.html. Stopped, it goes on
where it was.
"""

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from histoscale.data.catalog import open_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.proof import ProofConfig, contact_sheet, prove, read_places
from histoscale.launch.demo_report import worth, write_demo_report
from histoscale.launch.footprint import Footprint
from histoscale.launch.run import invoke

RESULT = ("seed", "proof", "stages")


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

    def stage(name: str, command: str, *overrides: str) -> None:
        arguments = [*overrides, f"logging.progress={config.logging.progress}", f"out={out / name}"]
        journal.say(f"\n$ histoscale {command} {shlex.join(arguments)}")
        with footprint.stage(name):
            results[name] = invoke(command, arguments)
        if "run" in results[name]:  # it was done before: what it took then
            footprint.stages[-1] = replace(footprint.stages[-1], seconds=results[name]["run"]["seconds"])

    stages, cohort, catalog = config.stages, out / "cohort", out / "catalog"
    stage("cohort", "cohort", *stages.cohort, f"cohort.seed={config.seed}")
    stage("catalog", "index", *stages.index, f"manifest={cohort / 'manifest.csv'}")
    stage("pretrain", "pretrain", *stages.pretrain, f"catalog={catalog}", f"seed={config.seed}")
    stage("probe", "probe", *stages.probe, f"encoder={out / 'pretrain'}", f"data_root={cohort}", f"catalog={catalog}")
    stage("release", "release", *stages.release, f"checkpoint={out / 'pretrain'}", f"summary={out / 'probe' / 'summary.json'}")
    stage("embeddings", "embed", *stages.embed, f"encoder={out / 'release'}", f"catalog={catalog}")
    stage("colour", "embed", *stages.embed, "encoder=colour", f"catalog={catalog}")
    stage(
        "mil", "mil", *stages.mil, f"embeddings={out / 'embeddings'}", f"floor_embeddings={out / 'colour'}", f"catalog={catalog}",
        f"manifest={cohort / 'manifest.csv'}", f"annotations={cohort / 'truth'}", f"pretraining={catalog}",
        "pretraining_roles=[train]",
    )  # fmt: skip
    _same_weights(results)
    journal.say("\nIs the cohort neither trivial nor impossible?")
    with footprint.stage("proof"):
        store = Store(config.storage)
        proof = prove(cohort, catalog, store, config.proof, journal)
        floor = worth(results["probe"]["probe"], "linear", "report")["random"]["balanced_accuracy"]["value"]
        proof = proof.with_untrained(floor)
        opened = open_catalog(str(catalog), store)
        places = read_places(cohort / "patches.parquet", "matched4", opened)
        columns, rows = (", ".join(sorted(set(names.tolist()))) for names in (places.label, places.site))
        words = f"Columns, two regions each: {columns}. Rows: {rows}. A region is {config.proof.sheet_um:g} µm wide."
        sheet = contact_sheet(places, opened, store, config.proof), words
    journal.say(proof.table())
    summary = {
        "probe": results["probe"]["probe"],
        "mil": results["mil"]["mil"],
        "proof": proof.summary(),
        "seconds": sum(stage.seconds for stage in footprint.stages),
        "peak_pss_bytes": max(stage.peak_bytes for stage in footprint.stages),
        "stages": {stage.name: {"seconds": stage.seconds, "peak_pss_bytes": stage.peak_bytes} for stage in footprint.stages},
    }
    write_demo_report(out, results, proof, sheet, footprint.stages)
    journal.say(f"\n{summary['seconds']:.0f} s, {summary['peak_pss_bytes'] / 2**30:.1f} GiB; open {out / 'report.html'}")
    return summary


def _same_weights(results: dict[str, dict[str, Any]]) -> None:
    """The probe's scores are those of the released encoder: raises ValueError unless both saw the same weights."""
    probed, embedded = results["probe"]["probe"]["encoder_hash"], results["embeddings"]["embed"]["encoder_hash"]
    if probed != embedded:
        raise ValueError(f"the probed encoder ({probed}) is not the released one ({embedded})")


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("demo", sys.argv[1:]))
