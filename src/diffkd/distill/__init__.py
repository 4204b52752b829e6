"""Two models, pairs of their layers, and one method between each pair."""
