"""The parts of sampling: weights as a decoding step reads them, the passes over the caches, and the draw of a token."""
