"""A report in Markdown, its table in the paper's layout (figure 4), and its cases as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from models.experiment.plan import Plan, cells, ratio_name
from models.experiment.report import Comparison, Outcome, Point, Report

MEASURES = {"dice": "Dice", "auc": "AUC", None: "score"}
UNTESTED = {"single_seed": "not tested: one seed", "single_pretraining": "not tested: one encoder"}

COMPARISON = (
    "against",
    "labels",
    "seeds",
    "difference",
    "interval",
    "p patients",
    "p seeds",
    "p Holm",
    "",
)


def markdown(report: Report, *, curve: str | None = None) -> str:
    """The report for a reader.

    Args:
        report: What to tell.
        curve: Where the curve lies, relative to the text; None leaves it out.
    """
    picture = ["", f"![Label efficiency]({curve})"] if curve is not None else []
    seeds = ", ".join(str(seed) for seed in report.plan.seeds)
    per = "and seed " if report.plan.pretrain_per == "seed" else ""
    sections = [
        f"# {_plain(report.name)}",
        "",
        f"Pretrained on {_plain(report.source)} (once a method {per}each), fine-tuned on "
        f"{_plain(report.target)} with seeds {seeds}; {report.num_cases} test cases of "
        f"{report.num_patients} patients, the same for all. {_not_drawn(report.plan)}"
        f"{MEASURES[report.measure]} in percent, mean over seeds.",
        *_caveat(report.plan),
        "",
        *_paper_table(report),
        *picture,
        "",
        "## Intervals",
        "",
        f"{report.confidence:.0%} intervals: patients by bootstrap ({report.num_resamples} "
        "resamples, all cases of a patient together), seeds by Student's t.",
        "",
        *_table(
            ("method", "labels", "mean", "interval", "by seed"),
            [_interval_row(point) for point in report.points],
        ),
        "",
        f"## {_plain(report.plan.methods[0].name)} against the others",
        "",
        "Paired by seed and patient. A difference must hold over patients (Wilcoxon's signed-rank "
        "test of Dice, permutation of AUC) and over seeds (paired t-test): p is the larger of the "
        "two, and Holm's correction is over all rows. With one seed the second is not known: p is "
        "then that of these trainings alone, and no row of it is called significant.",
        "",
        *_table(
            COMPARISON,
            [_comparison_row(one) for one in report.comparisons],
        ),
        *_missing_lines(report),
        "",
    ]
    return "\n".join(sections)


def cases_csv(plan: Plan, outcomes: Mapping[str, Outcome]) -> str:
    """Every case of every fine-tuning that is done, a row for each label."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("method", "ratio", "seed", "case", "patient", "label", "value", "truth"))
    for cell in cells(plan):
        found = outcomes.get(cell.key)
        if found is None or found.results is None:
            continue
        for case in sorted(found.results.cases, key=lambda case: case.case_id):
            for label in found.results.labels:
                if label in case.values:
                    where = (cell.method, cell.ratio, cell.seed, case.case_id, case.subject)
                    truth = case.truth.get(label, "")
                    rows.writerow((*where, label, repr(case.values[label]), truth))
    return text.getvalue()


def _paper_table(report: Report) -> list[str]:
    """Methods down, ratios across, the best bold; last the p-value of best against second."""
    ratios = sorted(report.plan.ratios)
    found = {(point.method, point.ratio): point.value for point in report.points}
    best = {
        ratio: max((v for (_, r), v in found.items() if r == ratio and v is not None), default=None)
        for ratio in ratios
    }

    def shown(method: str, ratio: float) -> str:
        value = found[method, ratio]
        if value is None:
            return "-"
        text = f"{100 * value:.1f}"
        return f"**{text}**" if value == best[ratio] else text

    rows = [
        (method.name, *(shown(method.name, ratio) for ratio in ratios))
        for method in report.plan.methods
    ]
    p_values = {one.ratio: _counted_p(one) for one in report.best_against_second}
    rows.append(("p-value", *(p_values.get(ratio, "-") for ratio in ratios)))
    title = f"{_plain(report.source)} → {_plain(report.target)}"
    return [
        *_table((title, *(ratio_name(ratio) for ratio in ratios)), rows),
        "",
        "p-value: best against second best of each column, Holm's correction over the columns. "
        "The two were chosen by these results, so it is lower than it should be; the tests below "
        "were chosen before. With one seed it is over patients alone.",
    ]


def _not_drawn(plan: Plan) -> str:
    """Which methods start from an encoder that nothing was trained for."""
    names = [one.name for one in plan.methods if one.pretrain is not None and not one.is_drawn]
    return f"Weights from a file, the same for all seeds: {', '.join(names)}. " if names else ""


def _caveat(plan: Plan) -> list[str]:
    """What a study of one encoder a method cannot say."""
    if plan.pretrain_per == "seed" or not any(method.is_drawn for method in plan.methods):
        return []
    return [
        "",
        "**Each method was pretrained once**, and all seeds start from that encoder: intervals, "
        "differences and p hold for these encoders only, and no difference to a pretrained method "
        "is called significant. `pretrain_per: seed` compares methods.",
    ]


def _counted_p(one: Comparison) -> str:
    number = len(one.seeds)
    return f"{one.p_holm:.2g} ({number} seed{'s' if number > 1 else ''})"


def _interval_row(point: Point) -> Sequence[str]:
    if point.value is None or point.low is None or point.high is None:
        return (point.method, ratio_name(point.ratio), "-", "-", "-")
    by_seed = ", ".join(
        f"{seed}: {100 * value:.1f}" for seed, value in zip(point.seeds, point.by_seed, strict=True)
    )
    between = f"{100 * point.low:.1f} to {100 * point.high:.1f}"
    return (point.method, ratio_name(point.ratio), f"{100 * point.value:.1f}", between, by_seed)


def _comparison_row(one: Comparison) -> Sequence[str]:
    return (
        one.other,
        ratio_name(one.ratio),
        str(len(one.seeds)),
        f"{100 * one.difference:+.1f}",
        f"{100 * one.low:+.1f} to {100 * one.high:+.1f}",
        f"{one.p_patients:.2g}",
        "-" if one.p_seeds is None else f"{one.p_seeds:.2g}",
        f"{one.p_holm:.2g}",
        UNTESTED[one.untested] if one.untested else "significant" if one.significant else "",
    )


def _missing_lines(report: Report) -> list[str]:
    if not report.missing:
        return []
    rows = [(f"`{one.key}`", one.state, _plain(one.reason)) for one in report.missing]
    return ["", "## Missing", "", *_table(("training", "state", "why"), rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["Nothing yet."]
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _plain(text: str) -> str:
    """Text that stays text in Markdown: no table cell ends, no tag or link begins."""
    kept = " ".join(text.split())
    for mark in "\\`*_[]<>|#":
        kept = kept.replace(mark, f"\\{mark}")
    return kept
