"""The errors a user can cause. Each says what was given, what is allowed and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class QvlHydraError(Exception):
    """Base of every error that the command line reports in one message with exit status 2."""


class SettingsError(QvlHydraError):
    """All faults of a configuration, reported together.

    Args:
        faults: one sentence a fault: the key, the value given, the values allowed.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"the configuration has {count}:\n{lines}")


class ModelError(QvlHydraError):
    """A model folder, hub id or checkpoint cannot be used, or does not fit in memory."""


class CalibrationError(QvlHydraError):
    """The calibration samples cannot be read, or there are too few of them."""


class OperatorError(QvlHydraError):
    """The operator filters select nothing, or name what is not there."""


class EngineError(QvlHydraError):
    """A backend cannot do what was asked of it on this model, scheme or device."""


class RunFolderError(QvlHydraError):
    """The run folder is in use by another run, or holds another run's results."""


class TrackingError(QvlHydraError):
    """MLflow cannot be reached or refuses what was sent."""


class ComparisonError(QvlHydraError):
    """Runs cannot be found, or cannot be compared with each other."""


class ProfileError(QvlHydraError):
    """A profile cannot be selected, applied or expressed in the format asked for."""


class ExportError(QvlHydraError):
    """An ONNX export failed, or its result does not agree with the model it came from."""


class MissingExtraError(QvlHydraError):
    """An optional package is needed that is not installed.

    Args:
        package: distribution that is missing.
        extra: the extra of this project that installs it.
        purpose: what it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'qvl-hydra[{extra}]'")
