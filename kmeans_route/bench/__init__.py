"""Contests between ways to route: what `kmeans-route bench` and the suites in benchmarks/ time, check and print."""
