"""The endpoint without Ray: batcher, service, routes and page, on plain ASGI."""
