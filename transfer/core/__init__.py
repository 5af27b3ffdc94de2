"""Utilities without dependencies on other packages: files, processes, measurement, devices."""
