"""See bench.registry: every module here is imported on the first look-up and registers its plug-ins."""
