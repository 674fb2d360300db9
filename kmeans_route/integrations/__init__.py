"""Adapters to training frameworks, one file a framework, each imported lazily."""
