"""Tracking: run folders sent to MLflow, and runs read back from it.

A run folder holds everything; MLflow is told what the folder holds. So a run made while the server was away is sent
later (`python -m qvl_hydra.tracking.send <folder>`), and sending twice changes nothing.
"""

from __future__ import annotations

import os

# MLflow reports usage to its makers unless told not to; it reads this once, when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Of files that a run reads back it draws a bar each.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# With a server it prints a link after every run; what is printed is the screen's business.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
