"""From pixels to ResNets: the library that the notebooks in nbs/ export."""
