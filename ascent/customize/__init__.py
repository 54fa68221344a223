"""Customize: data, objectives, rollout, one trainer, one loop for each kind of data, and the recipes that name them."""
