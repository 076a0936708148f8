"""A package, so that pynq finds overlays by its entry point `pynq.overlays`."""
