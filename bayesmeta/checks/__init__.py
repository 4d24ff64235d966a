"""Room five: is it right, and how do I see it? Scores, comparisons of ways of sharing, plots."""
