"""Ring 3: training, scoring, evaluation and the embedded world."""
