"""The training supervisor: how ends are classified, and what passes from the child on."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer import errors, tasks
from trainer.news import News


@pytest.mark.parametrize(
    ("status", "said", "is_oom", "code", "outcome"),
    [
        (errors.BAD_INPUT, None, False, "invalid_data", "error"),
        (errors.BAD_INPUT, {"code": "bad_recipe", "detail": "x"}, False, "bad_recipe", "error"),
        (errors.GPU_OUT_OF_MEMORY, None, False, "gpu_out_of_memory", "oom"),
        (errors.HOST_OUT_OF_MEMORY, None, False, "host_out_of_memory", "oom"),
        (errors.NON_FINITE_LOSS, None, False, "non_finite_loss", "error"),
        (errors.PARITY_FAILED, None, False, "parity_failed", "error"),
        (errors.FAILED, None, False, "training_error", "error"),
        (errors.FAILED, {"code": "disk_full", "detail": "x"}, False, "disk_full", "error"),
        (3, None, False, "training_error", "error"),
        (-9, None, True, "host_out_of_memory", "oom"),
        (-9, None, False, "native_crash", "crash"),
        (-11, None, True, "native_crash", "crash"),
        (-9, {"code": "stalled", "detail": "x"}, False, "stalled", "stalled"),
    ],
)
def test_an_exit_status_is_a_cause(status, said, is_oom, code, outcome):
    found_code, detail, found_outcome = tasks.cause_of(status, said, is_oom=is_oom)

    assert (found_code, found_outcome) == (code, outcome)
    assert detail


def test_the_text_of_an_unforeseen_exception_is_not_told():
    said = {"code": "failed", "detail": "KeyError: 'DOE^JANE'"}

    code, detail, _ = tasks.cause_of(errors.FAILED, said, is_oom=False)

    assert code == "training_error"
    assert "DOE" not in detail


def test_what_is_not_an_event_is_dropped_and_nan_does_not_pass():
    news = News(None, None)

    for line in (b"hello", b"[1]", b"{}", b'"text"', b"\xff\n", b'{"event": "unknown"}'):
        news.take(line)
    news.take(b'{"event": "metric", "step": 1, "values": {"loss": 0.5, "dice": NaN}}')

    assert list(news._pending) == [("metric", {"step": 1, "values": {"loss": 0.5}})]
    assert news.metrics == {"loss": 0.5}


def test_the_supervisor_never_imports_torch():
    code = "import sys, trainer.tasks; print([m for m in ('torch', 'monai') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )

    assert found.stdout.strip() == "[]"


def test_of_several_ranks_the_first_error_that_says_something_is_kept():
    news = News(None, None)

    for code in ("failed", "gpu_out_of_memory", "host_out_of_memory", "failed"):
        news.take(b'{"event": "error", "code": "%s", "detail": "x"}' % code.encode())

    assert news.error == {"code": "gpu_out_of_memory", "detail": "x"}
