"""How good samples are: distances between sets of pictures, through features of a classifier."""
