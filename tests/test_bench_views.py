"""`bench what=views`: a number for each method, ratios of one run."""

from pathlib import Path

from histoscale.launch.run import invoke


def test_views_and_normalisation_are_timed(tmp_path: Path) -> None:
    small = ["rounds=2", "sampler.grid=2", "sampler.patch_px=64", "views=demo", "logging.progress=off"]
    found = invoke("bench", ["what=views", f"out={tmp_path}", *small])["bench"]["views"]
    assert set(found["ms"]) == {"views", "torchvision", "macenko", "vahadane", "reinhard"}
    for time in found["ms"].values():
        assert 0 < time["low"] <= time["median"] <= time["high"]
    assert found["torchvision_over_views"] > 0
