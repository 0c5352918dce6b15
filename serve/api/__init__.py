"""OpenAI-compatible HTTP: schema, routes, stream framing, errors to status codes."""
