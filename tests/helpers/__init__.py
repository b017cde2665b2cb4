"""Small models, inputs and slow reference computations that several test files share."""
