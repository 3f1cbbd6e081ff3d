"""The trainer and what it needs of a data set; no engine in it."""
