"""What methods without backpropagation share."""
