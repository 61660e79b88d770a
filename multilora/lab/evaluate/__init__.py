"""Thousands of compositions, made exactly once, scored and reported."""
