"""Reading medication directions: normalise, extract (the model), assemble, check, and say again in plain words."""
