"""Inference: catalogue, model store, adapters, chat rendering, and engines: tokens in, tokens and log-probs out."""
