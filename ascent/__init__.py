"""Ascent: post-train the models behind agents and prove every step by measurement."""

import os

__version__ = "0.1.0"

# Libraries that report usage read these when they are imported, so they are set before any of them is.
for _switch in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_switch, "1")
