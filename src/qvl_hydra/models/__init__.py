"""Models: Qwen-VL checkpoints, from a folder, the hub, the package, or as a shape without weights."""
