"""Where a result comes from: which run it is, its signed rounds and their check, the card beside it."""
