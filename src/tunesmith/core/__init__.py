"""Errors, strict settings, devices, files and versions: what every other layer stands on."""
