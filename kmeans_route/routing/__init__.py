"""Routers, their state, experts and the whole layer."""
