"""Experts divided between ranks."""
