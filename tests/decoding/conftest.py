"""Puts this folder on the import path (`from reference import …`)."""
