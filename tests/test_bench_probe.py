"""`bench what=probe`: seconds for each method, ratios of one run, and the choice that was made."""

from pathlib import Path

from histoscale.launch.run import invoke


def test_probes_are_timed(tmp_path: Path) -> None:
    sizes = {"rows": 600, "width": 16, "classes": 3, "blocks": 20, "signal": 1.0, "eva_rows": 300, "eva_select": 100}
    keys = [f"probed.{name}={size}" for name, size in sizes.items()]
    found = invoke("bench", ["what=probe", f"out={tmp_path}", "rounds=2", "eva.steps=20", "logging.progress=off", *keys])
    probe = found["bench"]["probe"]
    assert set(probe["seconds"]) == {"linear", "sklearn", "eva", "plain"}
    for seconds in probe["seconds"].values():
        assert 0 < seconds["wall"]["low"] <= seconds["wall"]["median"] <= seconds["wall"]["high"]
    assert set(probe["ratios"]) == {"sklearn / linear", "plain / eva"}
    assert probe["penalty"] in [row[0] for row in probe["tried"]] and probe["passes"] > len(probe["tried"])
