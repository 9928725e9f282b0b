"""Checkpoints: the config, and the quantizer through which transformers reads and writes them."""
