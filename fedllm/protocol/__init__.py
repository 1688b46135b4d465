"""What crosses the network between server and clients."""
