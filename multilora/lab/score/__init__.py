"""Scores: picture (and text, or reference) to number. A score always says which model and preprocessing gave it."""
