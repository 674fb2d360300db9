"""Convert a learned router to K-Means, export a K-Means router to a learned one, compare the two."""
