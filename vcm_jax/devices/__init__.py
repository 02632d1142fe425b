"""Devices and processes: the mesh and its shardings, several processes, SIGTERM."""
