"""A run's result in the formats of other runtimes: one file a runtime, and what all of them are put to."""
