from transfer.runs import data_report_text
from transfer.runs.data_report import LabelReport, LabelToReview


def test_another_class_is_suggested_only_where_it_is_more_probable():
    rows = [
        LabelToReview("roses/1.jpg", "roses", 0.049, "tulips", 0.951),
        LabelToReview("roses/2.jpg", "roses", 0.86, "tulips", 0.1),
    ]
    report = LabelReport(rows, num_expected=1.1, num_judged=100, not_judged=[])
    assert [*data_report_text._doubts(report)] == [
        "roses/1.jpg: roses 0.049, rather tulips 0.951",
        "roses/2.jpg: roses 0.860, or tulips 0.100",
    ]
