"""Environment variables that every rank's process is started with, wherever it runs."""

# OpenMP's threads wait at every barrier by spinning. For ever, as is the default, they spin for a thread that is not
# running where a rank shares its cores: a step took 867 ms instead of 54 on two busy cores. Not at all, every barrier
# costs a wake-up: 53 ms instead of 31 on two idle ones. This many turns keep most of both.
#
# A rank sees its own GPU and no other, so all of them call theirs the first. torch takes ranks whose symmetric memory
# is on devices of the same number for ranks that share a GPU, and refuses them unless it is told otherwise.
RANK_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
