"""What changes the weights: parameter groups, the optimizer by its name, the average of the weights."""
