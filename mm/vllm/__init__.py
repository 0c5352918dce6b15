"""vLLM's engine behind `mm.engine.interface`: our encoders, reducers and API in front of its decoder."""
