"""`/v1/files` and `/v1/batches` with the lifecycle of OpenAI's API, kept on disk, so that a restart goes on."""
