"""What labelled images say about a model: predictions, gates, the accuracy gain of routing."""
