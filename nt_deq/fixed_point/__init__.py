"""Fixed points `y = F(y)` of a batch of samples, and their derivatives."""
