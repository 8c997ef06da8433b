"""Rows of what `kdmos suite` wrote."""

from benchmarks.suite import score_rows


def test_scores_become_rows():
    total = {"moving_precision": 0.98765, "moving_recall": 0.5, "object_recall": None, "scans": 18}
    total |= {"false_objects_per_scan": 0.25, "false_points_per_scan": 3.0}
    mean = {"moving_iou": None, "low": None, "high": None, "sequences": 0, "left_out": 2}
    part = {"mean": mean, "total": total, "tests": "", "sequences": {}}
    checkpoint = {"fingerprint": "0123456789", "lookahead": 7, "precision": "bfloat16"}
    result = {"suite_version": 2, "synth_version": 5, "twin": False, "checkpoint": checkpoint}
    parts = {"nothing": part, "slow": part}
    result["suites"] = {"streets": {**part, "parts": {"streets": part}}, "scenes": {**part, "parts": parts}}
    table = score_rows(result, "rule")
    expected = [("streets", "all"), ("scenes", "all"), ("scenes", "nothing"), ("scenes", "slow")]
    assert [(row["suite"], row["part"]) for row in table] == expected
    row = table[2]
    assert (row["precision"], row["recall"], row["object_recall"], row["moving_iou"]) == (0.9877, 0.5, "", "")
    assert (row["fingerprint"], row["sequences"], row["scans"], row["twin"]) == ("01234567", 2, 18, "no")
