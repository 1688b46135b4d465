"""Two apps to hold a deployed round against: one that does nothing, and the stock one with a clock in it."""
