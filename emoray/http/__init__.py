"""The endpoint without Ray: batcher, service, routes and page. Web frameworks are imported here and nowhere else."""
