"""What ends a run before its time, each with a stable code and the exit status of the process."""

from __future__ import annotations

BAD_INPUT = 64
PREEMPTED = 75
GPU_OUT_OF_MEMORY = 76
HOST_OUT_OF_MEMORY = 77
NON_FINITE_LOSS = 78
PARITY_FAILED = 79
FAILED = 1


class TrainingError(Exception):
    """A run that cannot go on.

    Args:
        code: Stable slug for programs.
        detail: What was found and what was expected; names a file by its scan id alone.
        status: Exit status of the process.
    """

    def __init__(self, code: str, detail: str, status: int = FAILED) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.status = status


class DataError(TrainingError):
    """Scans, labels, recipe or parent that cannot be trained on; final."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail, BAD_INPUT)


class Preempted(TrainingError):  # noqa: N818 - asked to stop, which is no error
    """Stopped on request after a checkpoint; a rerun resumes."""

    def __init__(self, step: int) -> None:
        super().__init__(
            "preempted", f"stopped after step {step}; a rerun resumes there", PREEMPTED
        )
        self.step = step


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite.

    Args:
        step: The first step with such a loss.
        last_checkpoint: Step of the newest checkpoint, 0 if there is none yet; None if not told.
    """

    def __init__(self, step: int, last_checkpoint: int | None = None) -> None:
        kept = "the last checkpoint is from before it"
        if last_checkpoint is not None:
            kept = f"the last good checkpoint is of step {last_checkpoint}"
            if last_checkpoint == 0:
                kept = "there is no checkpoint before it"
        super().__init__(
            "non_finite_loss", f"the loss of step {step} is not finite; {kept}", NON_FINITE_LOSS
        )
        self.step = step


class CollapsedError(TrainingError):
    """The features no longer tell one crop from another, and the recipe ends the run for it."""

    def __init__(self, step: int) -> None:
        super().__init__("collapsed", f"the features collapsed by step {step}")


class ParityError(TrainingError):
    """ONNX and torch disagree; no bundle is written."""

    def __init__(self, detail: str) -> None:
        super().__init__("parity_failed", detail, PARITY_FAILED)


class DiskFullError(TrainingError):
    """No room for a checkpoint; the one before it is untouched."""

    def __init__(self, detail: str) -> None:
        super().__init__("disk_full", detail)
