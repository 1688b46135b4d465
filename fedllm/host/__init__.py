"""Processes and resources of the machine this runs on."""
