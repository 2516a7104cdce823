"""`scores.csv` of a run: a row for every slide and place where a trial read it."""

from typing import Any

import numpy as np

from histoscale.eval.mil.bags import Bags
from histoscale.eval.mil.split import Plan
from histoscale.eval.mil.study import trial_thresholds
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, SurvivalTask, Task


def score_rows(bags: Bags, plan: Plan, outputs: np.ndarray, task: Task) -> list[dict[str, Any]]:
    """Rows of `scores.csv`: one a slide and place where a trial read it; flagged_<rule>: the slide's own decision.

    score: the probability of the positive class, the value or the log-risk; of several classes score_<class> each.
    """
    thresholds = trial_thresholds(bags, plan, outputs, task)
    rows = []
    for t, trial in enumerate(plan.trials):
        for part in ("train", "internal", "external"):
            for i in getattr(trial, part):
                bag, given = bags.rows[i], outputs[t, i].tolist()
                place = {"slide_id": bag.slide_id, "patient_id": bag.group, "site": bag.site, "trial": trial.name, "part": part}
                match task:
                    case BinaryTask():
                        flags = {f"flagged_{at.name}": int(given[0] >= at.value) for at in thresholds[t]}
                        rest: dict[str, Any] = {"label": bag.label, "score": given[0], **flags}
                    case ClassesTask():
                        names = list(task.classes)
                        scores = {f"score_{name}": score for name, score in zip(names, given, strict=True)}
                        rest = {"label": names[bag.label], "named": names[int(np.argmax(given))], **scores}
                    case RegressionTask():
                        rest = {"label": bag.target, "score": given[0]}
                    case SurvivalTask():
                        rest = {"label": bag.target, "event": int(bag.event), "score": given[0]}
                rows.append({**place, **rest})
    return rows
