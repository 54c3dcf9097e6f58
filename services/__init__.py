"""The way of a claim: producer -> broker -> gpu_worker -> broker -> collector."""
