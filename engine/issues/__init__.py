"""Finding the wrong labels of a data set in one call."""
