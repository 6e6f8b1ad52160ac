"""The walk block by block: segments, contexts, batches of samples, ranges observed on the way."""
