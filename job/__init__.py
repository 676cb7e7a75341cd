"""The thin layer that puts the library on a Ray cluster: Ray owns processes, the library owns everything else."""

import os

# Read by Ray Train when it is imported: see failures and drained nodes soon, keep the working directory.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
