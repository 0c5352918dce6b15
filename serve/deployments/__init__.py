"""Thin Ray Serve deployments over the same stage functions that run in process."""
