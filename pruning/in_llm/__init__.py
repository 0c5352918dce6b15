"""Inside the decoder: reducers that act in prefill or on its cache."""
