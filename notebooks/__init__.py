"""A package, so that pynq finds notebooks by its entry point `pynq.notebooks`."""
