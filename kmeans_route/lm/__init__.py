"""The byte-level language model of `kmeans-route demo` and `train`, and of the study."""
