"""What needs none of the other packages: files, processes, measurement, devices."""
