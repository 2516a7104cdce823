"""One rank's part of the plan as a program under torchrun: patches with their view keys and masks, a JSON line a (step, slot).

`torchrun … list_patches.py CATALOG SAMPLER.yaml WORKERS START STOP OUT`
"""

import json
import os
import sys
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from histoscale.data import keys as draw
from histoscale.data.catalog import open_catalog
from histoscale.data.memory import StreamConfig
from histoscale.data.plan import Plan, SamplerConfig
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.stream import Stream
from histoscale.data.visit import SlideSource
from histoscale.pretrain.masking import MaskConfig, make_masks

ROOT = Path(__file__).resolve().parents[1]
SEED, GLOBAL_BATCH, GROUP, VIEWS = 3, 96, 16, 2


def main(catalog: str, sampler: str, workers: str, start: str, stop: str, out: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    storage = TypeAdapter(StorageConfig).validate_python(yaml.safe_load((ROOT / "configs/storage/default.yaml").read_text()))
    store, config = Store(storage), TypeAdapter(SamplerConfig).validate_python(yaml.safe_load(Path(sampler).read_text()))
    source = SlideSource(open_catalog(catalog, store), store, config)
    plan = Plan(SEED, GLOBAL_BATCH, config, source.table())
    reading = StreamConfig(workers=int(workers), prefetch=1, in_flight=4, threads=2, memory_gb=1, memory_share=1.0, max_lost=0.05)
    with Stream(plan, source, reading, rank, world, int(start)) as stream, Path(out, f"{rank}.jsonl").open("w") as file:
        for step in range(int(start), int(stop)):
            batch = next(stream)
            columns = (batch.slots, batch.slide, batch.mpp, batch.level, batch.x, batch.y)
            views = draw.keys(SEED, "views", step, batch.slots)
            masks = make_masks(MaskConfig(0.5, [0.1, 0.5], False), SEED, step, batch.slots, (6, 6), VIEWS, GROUP)
            by_slot = masks.crops.unflatten(0, (VIEWS, -1)).transpose(0, 1).flatten(1).int().tolist()
            for row in zip(*(column.tolist() for column in (*columns, views)), by_slot, strict=True):
                file.write(json.dumps([batch.step, *row]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
