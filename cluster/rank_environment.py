"""Environment variables that every rank's process is started with, wherever it runs."""

# OpenMP's threads spin at every barrier by default. Where a rank shares its cores with the rest of the pipeline, they
# spin for a thread that is not running: a step took 867 ms instead of 54 on two busy cores.
RANK_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
