"""The thin layer that puts the library on a Ray cluster: Ray owns processes, the library owns everything else."""
