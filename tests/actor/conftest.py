"""Puts this folder on the import path (`from answers import …`)."""
