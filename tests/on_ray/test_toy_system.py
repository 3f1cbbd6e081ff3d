"""A system of a user's own goes through all stages of the main job; nothing else knows of it."""

import json

from libra_ray.on_ray import stages
from libra_ray.report.publish import tracked
from libra_ray.report.table import summary_table

TOY = "toy_system:Toy"


def test_a_users_system_is_trained_evaluated_and_reported(ray_cluster, make_run, demonstrations):
    folder = make_run(
        model__system=TOY,
        data__root=str(demonstrations),
        train__steps=4,
        train__log_every=2,
        train__validate_every=4,
        sim__max_steps=45,
        evaluate__episodes_per_task=1,
    )
    stages.check(folder, "train", "evaluate")
    with tracked(folder) as tracker:
        stages.train(folder, tracker)
        stages.evaluate(folder)
        report = stages.report(folder, tracker)
    assert list(report.latency_ms) == ["goal", "path", "motor"]
    assert [calls.count for calls in report.latency_ms.values()] == [3, 5, 9], "20, 10 and 5 steps each, of 45"
    assert list(report.success_mean) == ["expert", "policy", "zero_action"]
    assert max(report.intent_age_steps.histogram.ages) == 9
    assert {"loss_goal", "loss_path", "loss_motor", "action_error"} <= report.difficulty.keys()
    assert "policy" in summary_table(report)
    page = folder.path("report.html").read_text(encoding="utf-8")
    assert all(title in page for title in ("Goal latency", "Path latency", "Motor latency", "Loss motor"))
    assert json.loads(folder.path("report.json").read_text(encoding="utf-8"))["latency_ms"].keys() == {"goal", "path", "motor"}
