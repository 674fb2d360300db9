"""Contests between ways to route: what `kmeans-route bench` makes, checks and times."""
