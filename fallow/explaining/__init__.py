"""What noise does to a network: the loss it penalises, the signals it changes, the law it tends to."""
