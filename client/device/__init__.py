"""A device that takes part: its checks, its processes, its screen."""
