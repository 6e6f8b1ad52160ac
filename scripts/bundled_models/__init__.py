"""How the two bundled checkpoints were made: architecture, training, massive activations, the cost of INT8."""
