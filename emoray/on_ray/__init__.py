"""The only rooms that import ray: training, sweeps, batch scoring and serving on a cluster."""
